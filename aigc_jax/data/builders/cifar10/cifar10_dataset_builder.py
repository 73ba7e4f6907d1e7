"""CIFAR-10 as a TFDS builder that needs no TensorFlow."""

import gzip
import tarfile
import zlib

import numpy as np
import tensorflow_datasets as tfds

FOLDER = "cifar-10-batches-bin"
FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (32, 32, 3)
BYTES = 1 + 32 * 32 * 3  # of a record: the label, then all of red, green and blue, each row by row


def read_batches(path, records: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (images uint8 [N, 32, 32, 3], labels uint8 [N])} of the official archive, in its order.

    records: how many each of the six files holds.

    Raises ValueError where the archive is damaged, lacks a file, or holds one of another size or with a label above 9.
    """
    wanted = {f"{FOLDER}/{file}" for files in FILES.values() for file in files}
    content = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    content[member.name] = archive.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise ValueError(f"{path} is no gzipped tar archive, or a damaged one ({e})") from e
    if missing := sorted(wanted - set(content)):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    found = {}
    for split, files in FILES.items():
        images, labels = [], []
        for name in (f"{FOLDER}/{file}" for file in files):
            if len(content[name]) != records * BYTES:
                raise ValueError(
                    f"{path}: {name} holds {len(content[name]):,} bytes, {records:,} records of {BYTES:,} are "
                    f"{records * BYTES:,}"
                )
            rows = np.frombuffer(content[name], np.uint8).reshape(records, BYTES)
            if (label := rows[:, 0].max()) >= len(NAMES):
                raise ValueError(f"{path}: {name} holds the label {label}, which is none of 0..{len(NAMES) - 1}")
            labels.append(rows[:, 0])
            images.append(rows[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1))
        found[split] = np.concatenate(images), np.concatenate(labels)
    return found


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One archive of six files of 10,000 records; URL and checksum in checksums.tsv."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Images as bytes, prepared and read without TensorFlow."}
    RECORDS = 10_000

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES),
                    "label": tfds.features.ClassLabel(names=NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keep the official order
        )

    def _split_generators(self, dl_manager):
        [(url, info)] = self.url_infos.items()
        batches = read_batches(dl_manager.download({info.filename: url})[info.filename], self.RECORDS)
        return {split: self._generate_examples(*arrays) for split, arrays in batches.items()}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
