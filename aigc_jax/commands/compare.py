"""`python -m aigc_jax compare`: how far a folder of pictures is from a reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import data, train
from ..train import folder as folders
from .shared import Folder, check_seed

FEWEST = 50  # pictures per side; with fewer the values say nothing


DataSize = Annotated[int | None, tyro.conf.arg(name="data.size")]


def _recorded_size(folder: Path) -> int | None:
    """The size to which a run resized its pictures; None for a folder that is no run."""
    source = folders.read(folder)["data"]["source"] if (folder / "run.json").is_file() else None
    return source.get("size") if isinstance(source, dict) else None


def _pictures(folder: Path, size: int | None) -> data.Data:
    """Loads every picture of a folder; of a run folder those that `sample` wrote."""
    if (folder / "run.json").is_file():
        if not (folder / "samples").is_dir():
            raise train.Refused(
                f"{folder} is a run: draw its samples first, with python -m aigc_jax sample "
                f"{folder}"
            )
        folder = folder / "samples"
    return data.load(f"images:{folder}", size=size, labels=False)


def compare(
    reference: Folder,
    other: Folder,
    /,
    *,
    features: Literal["pixels", "mnist", "fashion_mnist", "digits"] = "pixels",
    n: int | None = None,
    seed: int = 0,
    data_size: DataSize = None,
) -> None:
    """Prints how far a folder of pictures is from a reference.

    Beside each value stands its floor: what two halves of the reference score against each other.
    Both take n pictures per side. Compare values only with others of the same features and n.

    Args:
        reference: the real pictures.
        other: those to judge.
        features: the pixels in [0, 1], or the 64 features of our classifier of that set (28x28 or
            8x8, grey).
        n: pictures per side; by default half of the reference, or all of the other if fewer.
        seed: which pictures, and the random directions.
        data_size: resize and crop all pictures to this side; by default the size of the run OTHER.
    """
    from .. import metrics  # imports scipy, which is slow and which no other command needs

    check_seed(seed)
    size = _recorded_size(other) if data_size is None else data_size
    real, fake = _pictures(reference, size), _pictures(other, size)
    n = _check_pictures(reference, other, real, fake, n)
    classifier = None if features == "pixels" else metrics.load_classifier(features)
    shape = real.info.shape
    if classifier and shape != classifier.shape:
        wanted, got = (" x ".join(map(str, s)) for s in (classifier.shape, shape))
        raise train.Refused(
            f"the classifier of {features} takes pictures of {wanted}, these are {got}"
        )

    def take(found: data.Data, seed: int, size: int) -> np.ndarray:
        images = found.batch(seed, 0, size)["image"] / np.float32(255)
        return classifier.apply(images)[1] if classifier else images.reshape(size, -1)

    first, second = np.split(take(real, seed, 2 * n), 2)
    columns = [_scores(first, x, seed) for x in (take(fake, seed + 1, n), second)]
    _show_scores(columns, f"{other} against {reference}", features)
    width = first.shape[1]
    used = (
        f"classifier {features}, sha256 {classifier.sha256[:12]}"
        if classifier
        else "pixels in [0, 1]"
    )
    print(f"{n} pictures a side, {width} features: {used}")
    if n < 10 * width:
        print(f"fewer than {10 * width} pictures: the Frechet distance is mostly its floor")


def _check_pictures(
    reference: Path, other: Path, real: data.Data, fake: data.Data, n: int | None
) -> int:
    """Returns how many pictures per side are compared; raises Refused if that says nothing."""
    if fake.info.shape != real.info.shape:
        one, two = (" x ".join(map(str, found.info.shape)) for found in (real, fake))
        raise train.Refused(
            f"pictures of one size are compared: {reference} has {one}, {other} {two}"
        )
    if real.info.fingerprint == fake.info.fingerprint:
        raise train.Refused(f"{reference} and {other} hold the same pictures")
    most = min(real.info.examples // 2, fake.info.examples)
    there = f"{reference} holds {real.info.examples} pictures, {other} {fake.info.examples}"
    if most < FEWEST:
        raise train.Refused(f"{there}: at least {2 * FEWEST} and {FEWEST} are needed")
    n = most if n is None else n
    if not FEWEST <= n <= most:
        raise train.Refused(f"{there}: n must lie in {FEWEST}..{most}, got {n}")
    return n


def _scores(real: np.ndarray, fake: np.ndarray, seed: int) -> dict[str, tuple[float, ...]]:
    """{quantity: (value,) or (value, standard error)}."""
    from .. import metrics

    k_kernel, k_sliced = jax.random.split(jax.random.key(seed))
    precision, recall = metrics.precision_recall(real, fake)
    density, coverage = metrics.density_coverage(real, fake)
    return {
        "Frechet distance": (metrics.frechet_distance(real, fake),),
        "kernel distance": metrics.kernel_distance(real, fake, k_kernel),
        "precision (k = 3)": (precision,),
        "recall (k = 3)": (recall,),
        "density (k = 5)": (density,),
        "coverage (k = 5)": (coverage,),
        "sliced Wasserstein distance": (metrics.sliced_wasserstein(real, fake, k_sliced),),
    }


def _show_scores(columns: list[dict], title: str, features: str) -> None:
    table = Table(
        title=Text(title), title_justify="left"
    )  # Text: brackets in a folder's name are no markup
    for head in ("quantity", "value", "floor: the reference against itself"):
        table.add_column(head)
    for name in columns[0]:
        shown = (
            f"fid_{features.removesuffix('_mnist')}"
            if name.startswith("Frechet") and features != "pixels"
            else name
        )
        table.add_row(
            Text(shown), *(" +- ".join(f"{x:.4g}" for x in column[name]) for column in columns)
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
