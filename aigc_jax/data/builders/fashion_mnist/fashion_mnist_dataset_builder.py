"""Fashion-MNIST as a TFDS builder that needs no TensorFlow."""

from aigc_jax.data.builders.idx import IdxBuilder


class Builder(IdxBuilder):
    """Prepares the set from its official files; checksums.tsv holds their URLs and checksums."""
