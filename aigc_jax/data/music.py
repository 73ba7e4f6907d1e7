"""Bach's chorales as piano rolls."""

from __future__ import annotations

import functools
import json

import numpy as np

from . import Data, from_arrays
from .prepare import cuts, prepared

KEYS = 88
LOWEST = 21  # MIDI number of the first key, A0


def jsb_chorales(split: str, *, folder: str | None = None) -> Data:
    """JSB Chorales in quarter notes (Boulanger-Lewandowski et al. 2012): 229 train, 76 validation, 77 test pieces.

    roll uint8 [B, T, 88], padded behind to the longest piece of the set; mask [B, T] is 1 within a piece.
    """
    pieces = _pieces(str(prepared("jsb_chorales", folder).data_path))
    sizes = {part: len(found) for part, found in pieces.items()}
    chosen = [p for part, start, stop in cuts("jsb_chorales", split, sizes) for p in pieces[part][start:stop]]
    if not chosen:
        raise ValueError(f"jsb_chorales: the split {split!r} is empty")
    length = max(len(p) for found in pieces.values() for p in found)
    roll, mask = np.zeros((len(chosen), length, KEYS), np.uint8), np.zeros((len(chosen), length), np.float32)
    for i, piece in enumerate(chosen):
        mask[i, : len(piece)] = 1
        for t, notes in enumerate(piece):
            roll[i, t, np.array(notes, int) - LOWEST] = 1
    return from_arrays({"roll": roll, "mask": mask}, source={"name": "jsb_chorales", "split": split})


@functools.lru_cache(maxsize=1)
def _pieces(path: str) -> dict[str, list]:
    """{split: pieces, each a list of steps, each a list of MIDI numbers}."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    return {
        part: [json.loads(example["steps"]) for example in builder.as_data_source(part)]
        for part in ("train", "validation", "test")
    }
