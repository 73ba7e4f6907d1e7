"""The nets of a diffusion model: the U-Net of DDPM, a transformer over patches (Peebles & Xie 2023, "DiT"), and a
multilayer perceptron for points. Each takes x_t, the time [B] on a scale of 0 .. 1000, and labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ..nn import Block, Norm


@dataclass(frozen=True)
class Net:
    """The form of a net; the defaults are DDPM's for CIFAR-10 (appendix B)."""

    kind: str = "unet"  # unet | dit | mlp
    widths: tuple[int, ...] = (128, 256, 256, 256)  # unet: channels at H, H/2, ...; dit: of every block; mlp: of layers
    blocks: int = 2  # unet: residual blocks a resolution, one more on the way up
    attention: tuple[int, ...] = (16,)  # unet: heights at which it attends, besides the middle
    heads: int = 1  # of attention
    groups: int = 32  # of GroupNorm
    patch: int = 2  # dit: side of a patch in pixels
    dropout: float = 0.1

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where the net's fields, or samples of this shape, do not fit it."""
        if self.kind not in ("unet", "dit", "mlp"):
            raise ValueError(f"model.net.kind must be one of unet, dit, mlp, not {self.kind!r}")
        if not self.widths or min(self.widths) < 1 or min(self.blocks, self.heads, self.groups, self.patch) < 1:
            raise ValueError("model.net: widths, blocks, heads, groups and patch must be positive")
        if self.blocks > 1000:
            raise ValueError(f"model.net.blocks must be at most 1000, got {self.blocks}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.net.dropout must lie in [0, 1), got {self.dropout}")
        if self.kind == "mlp":
            return
        if len(shape) != 3:
            raise ValueError(f"model.net.kind {self.kind!r} is for images, shape is {shape}: use mlp")
        if self.kind == "unet":
            if self.widths[0] < 2:
                raise ValueError("model.net.widths of a unet begin with at least 2: the time is its cosines and sines")
            halvings = len(self.widths) - 1
            if any(side % 2**halvings for side in shape[:2]):
                raise ValueError(f"model.net.widths {self.widths} halve H and W {halvings} times, which shape {shape} "
                                 "does not allow")  # fmt: skip
            if odd := [w for w in self.widths if w % self.groups or w % self.heads]:
                raise ValueError(f"model.net.widths: {odd[0]} does not divide into {self.groups} groups and "
                                 f"{self.heads} heads")  # fmt: skip
        if self.kind == "dit":
            if len(set(self.widths)) > 1 or self.widths[0] % self.heads:
                raise ValueError(f"model.net.widths of a dit are one number for each block, all equal and divisible by "
                                 f"{self.heads} heads, got {self.widths}")  # fmt: skip
            if any(side % self.patch for side in shape[:2]):
                raise ValueError(f"model.net.patch {self.patch} does not divide H and W of {shape}")


def sinusoids(t: Float[Array, "B"], width: int) -> Float[Array, "B D"]:
    """cos and sin of t at frequencies from 1 to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    angle = t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)[None]
    return jnp.pad(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1), ((0, 0), (0, width % 2)))


class Condition(nn.Module):
    """Time and label as one vector [B, width], zero label: none."""

    width: int
    inner: int
    classes: int

    @nn.compact
    def __call__(self, t, label):
        h = nn.Dense(self.width)(sinusoids(t, self.inner))
        h = nn.Dense(self.width)(nn.silu(h))
        if self.classes:
            h = h + nn.Embed(self.classes + 1, self.width, name="label")(label)  # the last stands for no label
        return h


def _zeros(features: int, name: str | None = None):
    """A last layer of a branch, which begins as nothing."""
    return nn.Conv(features, (3, 3), kernel_init=nn.initializers.zeros, name=name)


class GroupNorm(nn.Module):
    """Wu & He 2018: each group of channels to mean 0 and variance 1 over the pixels, then a learned scale and bias.

    Flax's, but that channels are summed before groups, which a CPU does faster.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)

        def mean(x):  # of each channel's group, [B, C]
            of_group = x.mean((1, 2)).reshape(B, self.groups, -1).mean(-1)
            return of_group.repeat(C // self.groups, -1)

        mu = mean(x)
        slope = scale[None] * jax.lax.rsqrt(jnp.maximum(mean(x**2) - mu**2, 0) + 1e-6)
        return x * slope[:, None, None] + (bias[None] - mu * slope)[:, None, None]


class ResBlock(nn.Module):
    """Two convolutions with the condition between them, beside a shortcut."""

    width: int
    groups: int
    dropout: float

    @nn.compact
    def __call__(self, x, condition):
        h = nn.Conv(self.width, (3, 3))(nn.silu(GroupNorm(self.groups)(x)))
        h = h + nn.Dense(self.width)(nn.silu(condition))[:, None, None]
        h = nn.silu(GroupNorm(self.groups)(h))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = _zeros(self.width)(h)
        return h + (x if x.shape[-1] == self.width else nn.Dense(self.width, name="shortcut")(x))


class Attention(nn.Module):
    """Every pixel looks at every pixel."""

    heads: int
    groups: int

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        h = GroupNorm(self.groups)(x).reshape(B, H * W, C)
        q, k, v = (
            nn.Dense(C, name=name)(h).reshape(B, H * W, self.heads, C // self.heads).swapaxes(1, 2) for name in "qkv"
        )
        scores = jnp.einsum("bhtk,bhsk->bhts", q * (C // self.heads) ** -0.5, k)
        # Divided after the product with v: the softmax's gradient then sums no [pixels, pixels].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        h = jnp.einsum("bhts,bhsk->bhtk", weights, v) / weights.sum(-1, keepdims=True)
        h = h.swapaxes(1, 2).reshape(B, H, W, C)
        return x + nn.Dense(C, kernel_init=nn.initializers.zeros, name="out")(h)


class UNet(nn.Module):
    """The net of DDPM (appendix B): x_t [B, H, W, C] -> [B, H, W, out]."""

    net: Net
    out: int
    classes: int = 0

    @nn.compact
    def __call__(self, x_t, t, label=None):
        net, first = self.net, self.net.widths[0]
        condition = Condition(4 * first, first, self.classes, name="condition")(t, label)

        def block(h, width, name):
            h = ResBlock(width, net.groups, net.dropout, name=name)(h, condition)
            return Attention(net.heads, net.groups, name=f"{name}_attention")(h) if h.shape[1] in net.attention else h

        h = nn.Conv(first, (3, 3), name="in")(x_t)
        skips = [h]
        for level, width in enumerate(net.widths):
            if level:
                # Padded on both sides, where the authors' code pads below and to the right.
                h = nn.Conv(h.shape[-1], (3, 3), 2, padding=1, name=f"down{level}")(h)
                skips.append(h)
            for i in range(net.blocks):
                h = block(h, width, f"down{level}_{i}")
                skips.append(h)
        h = ResBlock(net.widths[-1], net.groups, net.dropout, name="middle_0")(h, condition)
        h = Attention(net.heads, net.groups, name="middle_attention")(h)
        h = ResBlock(net.widths[-1], net.groups, net.dropout, name="middle_1")(h, condition)
        for level, width in reversed(list(enumerate(net.widths))):
            for i in range(net.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], -1), width, f"up{level}_{i}")
            if level:
                h = nn.Conv(width, (3, 3), name=f"up{level}")(h.repeat(2, 1).repeat(2, 2))
        return _zeros(self.out, "out")(nn.silu(GroupNorm(net.groups, name="norm")(h)))


class DiT(nn.Module):
    """A transformer over patches, whose norms the condition shifts and scales ("adaLN-Zero", DiT section 3.2).

    x_t [B, H, W, C] -> [B, H, W, out]. Positions are learned, where the paper's are sines and cosines.
    """

    net: Net
    out: int
    classes: int = 0

    @nn.compact
    def __call__(self, x_t, t, label=None):
        net, (B, H, W, _), p, D = self.net, x_t.shape, self.net.patch, self.net.widths[0]
        condition = Condition(D, 256, self.classes, name="condition")(t, label)
        h = nn.Conv(D, (p, p), p, name="patches")(x_t).reshape(B, -1, D)
        T = h.shape[1]
        h = h + self.param("positions", nn.initializers.normal(0.02), (1, T, D), jnp.float32)
        everyone, positions = jnp.ones((1, T, T), bool), jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        for i in range(len(net.widths)):
            block = Block(net.heads, 4 * D, dropout=net.dropout, name=f"block{i}")
            h, _ = block(h, everyone, positions, condition_BD=condition)
        shift, scale = jnp.split(
            nn.Dense(2 * D, kernel_init=nn.initializers.zeros, name="modulation")(nn.silu(condition))[:, None], 2, -1
        )
        h = Norm("layer", name="norm")(h) * (1 + scale) + shift
        h = nn.Dense(p * p * self.out, kernel_init=nn.initializers.zeros, name="out")(h)
        h = h.reshape(B, H // p, W // p, p, p, self.out).swapaxes(2, 3)
        return h.reshape(B, H, W, self.out)


class MLP(nn.Module):
    """For points: x_t [B, d] -> [B, out]; the condition is added in every layer."""

    net: Net
    out: int
    classes: int = 0

    @nn.compact
    def __call__(self, x_t, t, label=None):
        condition = nn.silu(Condition(self.net.widths[0], 64, self.classes, name="condition")(t, label))
        h = x_t.reshape(len(x_t), -1)
        for width in self.net.widths:
            h = nn.silu(nn.Dense(width)(h) + nn.Dense(width)(condition))
            h = nn.Dropout(self.net.dropout, deterministic=not self.has_rng("dropout"))(h)
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="out")(h)


def module(net: Net, shape: tuple[int, ...], classes: int, *, several: int = 1) -> nn.Module:
    """The net for samples of this shape; `several` outputs a channel."""
    kind = {"unet": UNet, "dit": DiT, "mlp": MLP}[net.kind]
    out = math.prod(shape) if net.kind == "mlp" else shape[-1]
    return kind(net, several * out, classes)
