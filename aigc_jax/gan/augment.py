"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, "DiffAugment").

D sees real and fake images changed in the same random ways. So it cannot tell them apart by
remembering the real ones, and G is not taught to draw changed images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Images = Float[Array, "B H W C"]  # in [-1, 1]


def diff_augment(x: Images, key: Key[Array, ""]) -> Images:
    """Returns images changed in colour, then moved, then with a square cut out.

    It is differentiable in x. The draws of an image are its own. What comes in from outside, and
    the square, is 0, a middle grey, as in the authors' code. Values may leave [-1, 1].
    """
    k_colour, k_move, k_cut = jax.random.split(key, 3)
    return cut_out(move(change_colour(x, k_colour), k_move), k_cut)


def change_colour(x: Images, key: Key[Array, ""]) -> Images:
    """Changes brightness by -0.5 .. 0.5, saturation by 0 .. 2 and contrast by 0.5 .. 1.5 times."""
    brightness, saturation, contrast = jax.random.uniform(key, (3, len(x), 1, 1, 1), x.dtype)
    x = x + brightness - 0.5
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + (x - mean) * (0.5 + contrast)


def move(x: Images, key: Key[Array, ""], *, ratio: float = 1 / 8) -> Images:
    """Moves each image by up to `ratio` of its height and width."""
    B, H, W, _ = x.shape
    most = jnp.array([[int(H * ratio + 0.5), int(W * ratio + 0.5)]])
    shift = jax.random.randint(key, (B, 2), -most, most + 1)
    rows = jnp.arange(H)[None] + shift[:, :1]  # [B, H]: where each row comes from
    columns = jnp.arange(W)[None] + shift[:, 1:]  # [B, W]
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None]
    moved = jnp.take_along_axis(x, rows.clip(0, H - 1)[:, :, None, None], 1)
    moved = jnp.take_along_axis(moved, columns.clip(0, W - 1)[:, None, :, None], 2)
    return jnp.where(inside[..., None], moved, 0.0)


def cut_out(x: Images, key: Key[Array, ""], *, ratio: float = 1 / 2) -> Images:
    """Sets a rectangle of `ratio` of the sides to 0. It may lie partly outside the image."""
    B, H, W, _ = x.shape
    size = jnp.array([[int(H * ratio + 0.5), int(W * ratio + 0.5)]])
    middle = jax.random.randint(key, (B, 2), 0, jnp.array([[H, W]]) + 1 - size % 2)
    first = middle - size // 2  # [B, 2]

    def within(length: int, axis: int):
        place = jnp.arange(length)[None] - first[:, axis : axis + 1]
        return (place >= 0) & (place < size[0, axis])  # [B, length]

    cut = within(H, 0)[:, :, None] & within(W, 1)[:, None]
    return jnp.where(cut[..., None], 0.0, x)
