"""What the GAN scripts share: distances to training images, and the discriminator while training."""

import numpy as np

from aigc_jax import figures, train
from experiments import _cli, _pictures
from experiments._cli import Row

COVERAGE = f"{_pictures.COVERAGE}; oracle: training images"
NEAR = "median distance of a sample to its nearest training image, over that of test images"
COPIES = "smallest distance of a sample to a training image (pixels in [0, 1])"


def nearest_rows(fake: np.ndarray, seen: np.ndarray, real: np.ndarray) -> list[Row]:
    """Returns two rows on the distance to the nearest training image, near 0 for copies."""
    near, copies = _pictures.neighbours(fake, seen, real)
    return [Row(NEAR, near), Row(COPIES, copies)]


def draw_discriminator(ax, result: train.Result, title: str) -> None:
    """Draws D's accuracy, or its logit where it has none, on training images, held-out images and
    samples.
    """
    steps, _ = _cli.history(result.folder, "real_accuracy")
    kind = "accuracy" if len(steps) else "logit"
    who = {"training images": "seen_real", "held-out images": "real", "samples": "fake"}
    curves = {words: _cli.history(result.folder, f"{name}_{kind}") for words, name in who.items()}
    figures.curves(ax, curves, xlabel="updates", ylabel=f"D's {kind}", title=title)
