"""The IDX format of MNIST and its relatives, and the builder that both sets share.

The official TFDS builders need TensorFlow to prepare a set; this one needs the standard library.
"""

import gzip

import numpy as np
import tensorflow_datasets as tfds


def read_idx(path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes: magic 0 0 8 ndim, big-endian sizes, then the values.

    Raises ValueError where the file is anything else, or shorter or longer than its header says.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    values = np.frombuffer(content[start:], np.uint8)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} values, its header says {shape}")
    return values.reshape(shape)


class IdxBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Four gzipped IDX files, images and labels of train and test, found by the URLs in checksums.tsv."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Images as bytes, prepared and read without TensorFlow."}

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keep the official order
        )

    def _split_generators(self, dl_manager):
        files = dl_manager.download({info.filename: url for url, info in self.url_infos.items()})
        return {
            split: self._generate_examples(files[f"{stem}-images-idx3-ubyte.gz"], files[f"{stem}-labels-idx1-ubyte.gz"])
            for split, stem in (("train", "train"), ("test", "t10k"))
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(read_idx(images), read_idx(labels), strict=True)):
            yield i, {"image": image[..., None], "label": int(label)}
