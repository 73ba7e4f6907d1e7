"""Tiny Shakespeare as a TFDS builder that needs no TensorFlow."""

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The official file in TFDS's splits, 90, 5 and 5 %, one example each; URL and checksum in checksums.tsv."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Prepared and read without TensorFlow."}

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        [(url, info)] = self.url_infos.items()
        text = dl_manager.download({info.filename: url})[info.filename].read_text()
        first, second = len(text) * 90 // 100, len(text) * 95 // 100
        parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
        return {split: self._generate_examples(split, part) for split, part in parts.items()}

    def _generate_examples(self, split, text):
        yield split, {"text": text}
