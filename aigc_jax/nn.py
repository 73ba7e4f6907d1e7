"""Blocks that two families or more share."""

from __future__ import annotations

from jaxtyping import Array, Float


def pixel_shuffle(h: Float[Array, "... H W C4"]) -> Float[Array, "... H2 W2 C"]:
    """Four channels become 2 x 2 pixels: [..., H, W, 4 C] -> [..., 2 H, 2 W, C] (Shi et al. 2016).

    After a convolution it is a transposed one of stride 2, without its checkerboard and without the zeros that it
    multiplies by.
    """
    *rows, height, width, channels = h.shape
    h = h.reshape(*rows, height, width, 2, 2, channels // 4).swapaxes(-4, -3)
    return h.reshape(*rows, 2 * height, 2 * width, channels // 4)
