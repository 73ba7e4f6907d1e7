"""Bach's chorales as piano rolls, and MIDI files of piano rolls."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np

from . import Data, from_arrays
from .prepare import cuts, prepared

KEYS = 88
LOWEST = 21  # MIDI number of the lowest key, A0


def jsb_chorales(split: str, *, folder: str | None = None) -> Data:
    """Loads JSB Chorales in quarter notes: 229 train, 76 validation and 77 test pieces.

    Boulanger-Lewandowski et al. 2012. roll is uint8 [B, T, 88], padded at the end to the longest
    piece of all splits. mask [B, T] is 1 within a piece.
    """
    pieces = _pieces(str(prepared("jsb_chorales", folder).data_path))
    sizes = {part: len(found) for part, found in pieces.items()}
    slices = cuts("jsb_chorales", split, sizes)
    chosen = [piece for part, start, stop in slices for piece in pieces[part][start:stop]]
    if not chosen:
        raise ValueError(f"jsb_chorales: the split {split!r} is empty")
    length = max(len(piece) for found in pieces.values() for piece in found)
    roll = np.zeros((len(chosen), length, KEYS), np.uint8)
    mask = np.zeros((len(chosen), length), np.float32)
    for i, piece in enumerate(chosen):
        mask[i, : len(piece)] = 1
        for t, notes in enumerate(piece):
            roll[i, t, np.array(notes, int) - LOWEST] = 1
    source = {"name": "jsb_chorales", "split": split}
    return from_arrays({"roll": roll, "mask": mask}, source=source)


def write_midi(path: str | Path, roll: np.ndarray, *, beats_per_minute: int = 80) -> None:
    """Writes a piano roll of quarter notes [T, keys] as a MIDI file.

    A key that is on in consecutive frames sounds as one held note.
    """
    import mido

    file = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    file.tracks.append(track)
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(beats_per_minute)))
    silence = np.zeros((1, roll.shape[1]), bool)
    held, ticks = silence[0], 0  # ticks since the last message
    for frame in np.concatenate([roll > 0.5, silence]):
        for keys, message in ((held & ~frame, "note_off"), (frame & ~held, "note_on")):
            for key in np.flatnonzero(keys):
                note = int(key) + LOWEST
                track.append(mido.Message(message, note=note, velocity=64, time=ticks))
                ticks = 0
        held, ticks = frame, ticks + 480
    file.save(os.path.expanduser(path))


def joined(rolls: np.ndarray, *, rest: int = 4) -> np.ndarray:
    """Returns pieces [N, T, keys] as one roll, with `rest` silent frames between them."""
    padded = np.pad(np.asarray(rolls), ((0, 0), (0, rest), (0, 0)))
    roll = padded.reshape(-1, padded.shape[-1])
    return roll[: len(roll) - rest]


@functools.lru_cache(maxsize=1)
def _pieces(path: str) -> dict[str, list]:
    """Returns {split: pieces}: a piece is a list of time steps, a step a list of MIDI numbers."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    return {
        part: [json.loads(example["steps"]) for example in builder.as_data_source(part)]
        for part in ("train", "validation", "test")
    }
