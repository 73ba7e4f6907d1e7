"""The IDX format of MNIST and Fashion-MNIST, and the builder that both sets share.

TFDS's own builders need TensorFlow to prepare a set. This one needs only the standard library.
"""

import gzip

import numpy as np
import tensorflow_datasets as tfds


def read_idx(path) -> np.ndarray:
    """Returns the array in a gzipped IDX file of bytes.

    The format: the bytes 0, 0, 8 and the number of axes, then big-endian sizes, then the values.

    Raises ValueError for any other file, and if the values are fewer or more than the sizes say.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    values = np.frombuffer(content[start:], np.uint8)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} values, its header says {shape}")
    return values.reshape(shape)


class IdxBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares a set from four gzipped IDX files: images and labels of train and test.

    Their URLs and checksums are in checksums.tsv.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Images as bytes, prepared and read without TensorFlow."}

    def _info(self):
        image = tfds.features.Tensor(
            shape=(28, 28, 1),
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,
        )
        label = tfds.features.ClassLabel(num_classes=10)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keep the official order
        )

    def _split_generators(self, dl_manager):
        files = dl_manager.download({info.filename: url for url, info in self.url_infos.items()})
        examples = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            images = files[f"{stem}-images-idx3-ubyte.gz"]
            labels = files[f"{stem}-labels-idx1-ubyte.gz"]
            examples[split] = self._generate_examples(images, labels)
        return examples

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(read_idx(images), read_idx(labels), strict=True)):
            yield i, {"image": image[..., None], "label": int(label)}
