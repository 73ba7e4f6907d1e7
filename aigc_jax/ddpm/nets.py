"""The form of a diffusion model's net, as data, and the module of `nn` that it names.

Each net takes x_t, the time [B] on a scale of 0 .. 1000, and labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from .. import nn as nets
from ..core import check_at_least, check_fields


@dataclass(frozen=True)
class NetConfig:
    """The form of a net; the defaults are DDPM's for CIFAR-10 (appendix B).

    A new field has the default None, so that a run recorded before it can be continued.
    """

    kind: Literal["unet", "dit", "mlp"] = "unet"
    # unet: channels at H, H/2, ...; dit: of every block; mlp: of layers
    widths: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2  # unet: residual blocks per resolution, one more on the way up
    attention: tuple[int, ...] = (16,)  # unet: heights at which it attends, besides the middle
    heads: int = 1  # of attention
    groups: int = 32  # of GroupNorm
    patch: int = 2  # dit: side of a patch in pixels
    dropout: float = 0.1
    # Of activations. None: float32. Parameters are always float32.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] | None = None
    scan: bool | None = None  # dit: blocks as one lax.scan, which compiles in the time of one

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where a field is wrong or does not fit samples of this shape."""
        check_fields(self, name="model.net")
        check_at_least(self, 1, "blocks", "heads", "groups", "patch", name="model.net")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"model.net.widths must hold positive widths, got {self.widths}")
        if self.blocks > 1000:
            raise ValueError(f"model.net.blocks must be at most 1000, got {self.blocks}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.net.dropout must lie in [0, 1), got {self.dropout}")
        if self.kind != "mlp" and len(shape) != 3:
            raise ValueError(
                f"model.net.kind {self.kind!r} is for images, shape is {shape}: use mlp",
            )
        if self.scan and self.kind != "dit":
            raise ValueError(f"model.net.scan is for equal blocks, so for dit, not {self.kind}")
        if self.kind == "unet":
            self._check_unet(shape)
        if self.kind == "dit":
            self._check_dit(shape)

    def _check_unet(self, shape: tuple[int, ...]) -> None:
        if self.widths[0] < 2:
            rule = "model.net.widths[0] of a unet must be at least 2, for sines of the time"
            raise ValueError(f"{rule}; got {self.widths}")
        halvings = len(self.widths) - 1
        if any(side % 2**halvings for side in shape[:2]):
            words = (
                f"halve H and W {halvings} times, which shape {shape} does not allow: give fewer"
            )
            raise ValueError(f"model.net.widths {self.widths} {words}")
        if odd := [w for w in self.widths if w % self.groups or w % self.heads]:
            words = f"does not divide into {self.groups} groups and {self.heads} heads"
            raise ValueError(f"model.net.widths: {odd[0]} {words}")

    def _check_dit(self, shape: tuple[int, ...]) -> None:
        if len(set(self.widths)) > 1 or self.widths[0] % self.heads:
            raise ValueError(
                "model.net.widths of a dit are one number for each block, all equal and divisible "
                f"by {self.heads} heads, got {self.widths}"
            )
        if any(side % self.patch for side in shape[:2]):
            raise ValueError(f"model.net.patch {self.patch} does not divide H and W of {shape}")


def _options(net: NetConfig) -> dict:
    """Returns the fields that all modules share."""
    dtype = jnp.dtype(net.dtype or "float32")
    return {"dropout": net.dropout, "dtype": dtype, "remat": net.remat or False}


def UNet(net: NetConfig, out: int, classes: int = 0) -> nn.Module:
    """Returns the U-Net that `net` describes, with `out` channels."""
    return nets.UNet(
        out,
        classes,
        tuple(net.widths),
        net.blocks,
        tuple(net.attention),
        net.heads,
        net.groups,
        **_options(net),
    )


def DiT(net: NetConfig, out: int, classes: int = 0) -> nn.Module:
    """Returns the transformer over patches that `net` describes, with `out` channels."""
    layers, width = len(net.widths), net.widths[0]
    options = {**_options(net), "scan": bool(net.scan)}
    return nets.DiT(out, classes, width, layers, net.heads, net.patch, **options)


def MLP(net: NetConfig, out: int, classes: int = 0) -> nn.Module:
    """Returns the net for points that `net` describes, with `out` numbers per point."""
    return nets.TimeMLP(out, classes, tuple(net.widths), **_options(net))


def module(net: NetConfig, shape: tuple[int, ...], classes: int, *, several: int = 1) -> nn.Module:
    """Returns the net for samples of this shape, with `several` outputs per channel."""
    out = math.prod(shape) if net.kind == "mlp" else shape[-1]
    return {"unet": UNet, "dit": DiT, "mlp": MLP}[net.kind](net, several * out, classes)
