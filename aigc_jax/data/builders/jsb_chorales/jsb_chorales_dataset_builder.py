"""JSB Chorales in quarter notes as a TFDS builder that needs no TensorFlow."""

import json

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One JSON file of train, valid and test, each a list of pieces; URL and checksum in checksums.tsv."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Prepared and read without TensorFlow."}

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"steps": tfds.features.Text()}),
            disable_shuffling=True,  # keep the order of the file
        )

    def _split_generators(self, dl_manager):
        [(url, info)] = self.url_infos.items()
        pieces = json.loads(dl_manager.download({info.filename: url})[info.filename].read_text())
        return {split: self._generate_examples(pieces[name])
                for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))}  # fmt: skip

    def _generate_examples(self, pieces):
        for i, piece in enumerate(pieces):
            yield i, {"steps": json.dumps(piece)}
