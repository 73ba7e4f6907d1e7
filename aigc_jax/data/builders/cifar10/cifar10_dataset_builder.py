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
# Of a record: the label, then the red, the green and the blue channel, each row by row.
BYTES = 1 + 32 * 32 * 3


def read_batches(path, records: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the official archive: {split: (images uint8 [N, 32, 32, 3], labels uint8 [N])}.

    The images are in the official order.

    records: the number of records in each of the six files.

    Raises ValueError if the archive is damaged or lacks a file, or if a file has another size or
    a label above 9.
    """
    wanted = {f"{FOLDER}/{file}" for files in FILES.values() for file in files}
    content = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    content[member.name] = archive.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise ValueError(f"{path} is not a gzipped tar archive, or is damaged ({e})") from e
    if missing := sorted(wanted - set(content)):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    found = {}
    for split, files in FILES.items():
        images, labels = [], []
        for name in (f"{FOLDER}/{file}" for file in files):
            if len(content[name]) != records * BYTES:
                expected = f"{records:,} records of {BYTES:,} are {records * BYTES:,}"
                raise ValueError(f"{path}: {name} holds {len(content[name]):,} bytes, {expected}")
            rows = np.frombuffer(content[name], np.uint8).reshape(records, BYTES)
            if (label := rows[:, 0].max()) >= len(NAMES):
                problem = f"the label {label}, which is not in 0..{len(NAMES) - 1}"
                raise ValueError(f"{path}: {name} holds {problem}")
            labels.append(rows[:, 0])
            images.append(rows[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1))
        found[split] = np.concatenate(images), np.concatenate(labels)
    return found


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares CIFAR-10 from one archive of six files; checksums.tsv holds URL and checksum."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Images as bytes, prepared and read without TensorFlow."}
    RECORDS = 10_000  # in each file

    def _info(self):
        image = tfds.features.Tensor(
            shape=SHAPE,
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,
        )
        label = tfds.features.ClassLabel(names=NAMES)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keep the official order
        )

    def _split_generators(self, dl_manager):
        [(url, info)] = self.url_infos.items()
        [path] = dl_manager.download({info.filename: url}).values()
        batches = read_batches(path, self.RECORDS)
        return {split: self._generate_examples(*arrays) for split, arrays in batches.items()}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
