"""Bach's chorales as piano rolls."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

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


def write_midi(path: str | Path, roll: np.ndarray, *, beats_per_minute: int = 80) -> None:
    """A piano roll of quarter notes [T, keys] as a MIDI file; a key held over several frames is struck once."""
    import mido

    file = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    file.tracks.append(track)
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(beats_per_minute)))
    held, waited = np.zeros(roll.shape[1], bool), 0
    for frame in np.concatenate([roll > 0.5, np.zeros((1, roll.shape[1]), bool)]):
        for keys, message in ((held & ~frame, "note_off"), (frame & ~held, "note_on")):
            for key in np.flatnonzero(keys):
                track.append(mido.Message(message, note=int(key) + LOWEST, velocity=64, time=waited))
                waited = 0
        held, waited = frame, waited + 480
    file.save(os.path.expanduser(path))


def joined(rolls: np.ndarray, *, rest: int = 4) -> np.ndarray:
    """Returns pieces [N, T, keys] one after another as one roll, `rest` silent frames between them."""
    apart = np.pad(np.asarray(rolls), ((0, 0), (0, rest), (0, 0)))
    return apart.reshape(-1, apart.shape[-1])[:-rest]


@functools.lru_cache(maxsize=1)
def _pieces(path: str) -> dict[str, list]:
    """{split: pieces, each a list of steps, each a list of MIDI numbers}."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    return {
        part: [json.loads(example["steps"]) for example in builder.as_data_source(part)]
        for part in ("train", "validation", "test")
    }
