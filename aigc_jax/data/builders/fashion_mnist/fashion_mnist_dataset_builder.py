"""Fashion-MNIST as a TFDS builder that needs no TensorFlow."""

from aigc_jax.data.builders.idx import IdxBuilder


class Builder(IdxBuilder):
    """The four official files; URLs and checksums in checksums.tsv."""
