"""JSB Chorales in quarter notes as a TFDS builder that needs no TensorFlow."""

import json

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares the set from one JSON file: lists of pieces for train, valid and test.

    checksums.tsv holds its URL and checksum.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Prepared and read without TensorFlow."}

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"steps": tfds.features.Text()}),
            disable_shuffling=True,  # keep the order of the file
        )

    def _split_generators(self, dl_manager):
        [(url, info)] = self.url_infos.items()
        [path] = dl_manager.download({info.filename: url}).values()
        pieces = json.loads(path.read_text())
        return {
            "train": self._generate_examples(pieces["train"]),
            "validation": self._generate_examples(pieces["valid"]),
            "test": self._generate_examples(pieces["test"]),
        }

    def _generate_examples(self, pieces):
        for i, piece in enumerate(pieces):
            yield i, {"steps": json.dumps(piece)}
