"""The nets of a GAN: multilayer perceptrons with maxout and dropout (Goodfellow et al. 2014), convolutional ones with
BatchNorm (DCGAN), residual ones with spectral normalisation (SNGAN)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..nn import pixel_shuffle

_ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": lambda h: nn.leaky_relu(h, 0.2),  # DCGAN's slope
    "tanh": nn.tanh,
}
_INITIALISERS = {
    "lecun": lambda scale: nn.initializers.lecun_normal(),
    "he": lambda scale: nn.initializers.he_normal(),
    "normal": nn.initializers.normal,
    "uniform": lambda scale: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale),
    "orthogonal": nn.initializers.orthogonal,
}


@dataclass(frozen=True)
class Net:
    """The form of a generator or of a discriminator."""

    kind: str = "mlp"  # mlp | dcgan | resnet
    widths: tuple[int, ...] = (1200, 1200)  # mlp: hidden layers from the input on; else channels at H/2, H/4, ...
    activation: str = "relu"  # relu | leaky_relu (slope .2) | tanh | maxout
    pieces: int = 5  # linear pieces of a maxout unit (Goodfellow et al. 2013)
    norm: str = "none"  # none | batch | spectral
    dropout: tuple[float, float] = (0.0, 0.0)  # mlp: share of the input, of every hidden layer set to 0 in training
    init: str = "lecun"  # of kernels: lecun | he | normal | uniform | orthogonal; biases begin at 0
    init_scale: float = 1.0  # standard deviation of normal, bound of uniform, gain of orthogonal

    def check(self, name: str) -> None:
        """Raises ValueError, naming the field `model.<name>.<field>`."""
        choices = {
            "kind": ("mlp", "dcgan", "resnet"),
            "activation": (*_ACTIVATIONS, "maxout"),
            "norm": ("none", "batch", "spectral"),
            "init": tuple(_INITIALISERS),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"model.{name}.{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}"
                )
        if any(width < 1 for width in self.widths) or (not self.widths and self.kind != "mlp"):
            raise ValueError(f"model.{name}.widths must hold positive widths, got {self.widths}")
        if self.pieces < 2:
            raise ValueError(f"model.{name}.pieces must be at least 2, got {self.pieces}")
        if len(self.dropout) != 2 or not all(0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"model.{name}.dropout must be two shares in [0, 1), got {self.dropout}")
        if not self.init_scale > 0:
            raise ValueError(f"model.{name}.init_scale must be positive, got {self.init_scale}")
        if self.kind != "mlp" and (self.activation == "maxout" or any(self.dropout)):
            raise ValueError(f"model.{name}: maxout and dropout are for kind mlp, not {self.kind}")


def _layer(net: Net, module, h, train: bool):
    """A linear layer, its kernel divided by its largest singular value where the net is spectrally normalised.

    One power iteration a call (SNGAN algorithm 1). A convolution's kernel counts as a matrix of [h w c_in, c_out].
    """
    return nn.SpectralNorm(module)(h, update_stats=train) if net.norm == "spectral" else module(h)


def _init(net: Net):
    return _INITIALISERS[net.init](net.init_scale)


class _Act(nn.Module):
    """BatchNorm where the net has it, then the activation. [..., C] -> [..., C], of maxout [..., pieces C]."""

    net: Net
    axis_name: str | None = None
    normed: bool = True

    @nn.compact
    def __call__(self, h, train):
        if self.net.norm == "batch" and self.normed:
            axis_name = self.axis_name if train else None
            h = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(h)
        if self.net.activation == "maxout":
            return h.reshape(*h.shape[:-1], self.net.pieces, -1).max(-2)
        return _ACTIVATIONS[self.net.activation](h)


class _MLP(nn.Module):
    """[B, D] -> hidden layers [B, widths[-1]], with dropout before each layer but of what it returns none."""

    net: Net
    axis_name: str | None = None
    first_normed: bool = True

    @nn.compact
    def __call__(self, h, train):
        net = self.net
        for i, width in enumerate(net.widths):
            h = nn.Dropout(net.dropout[min(i, 1)], deterministic=not train)(h)
            pieces = net.pieces if net.activation == "maxout" else 1
            h = _layer(net, nn.Dense(width * pieces, kernel_init=_init(net)), h, train)
            h = _Act(net, self.axis_name, normed=i > 0 or self.first_normed)(h, train)
        return nn.Dropout(net.dropout[min(len(net.widths), 1)], deterministic=not train)(h)


def _double(h):
    """Each pixel as 2 x 2."""
    return h.repeat(2, -3).repeat(2, -2)


def _halve(h):
    """Means of 2 x 2 pixels."""
    *rows, height, width, channels = h.shape
    return h.reshape(*rows, height // 2, 2, width // 2, 2, channels).mean((-4, -2))


class Generator(nn.Module):
    """G: noise [B, Z] and one-hot labels [B, classes] -> images [B, H, W, C] in [-1, 1], or points [B, d].

    mlp: ends in a sigmoid, as GAN's does, rescaled to [-1, 1]; linear for points.
    dcgan: every layer doubles H and W; tanh. A convolution and a pixel shuffle stand for the transposed convolution.
    resnet: pre-activation blocks, upsampling by repetition (SNGAN, appendix B.4); tanh.
    """

    net: Net
    shape: tuple[int, ...]
    output_bias: tuple[float, ...] = ()  # mlp: where the last layer's biases begin; (): zeros
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z, y, train: bool):
        net, widths = self.net, self.net.widths
        h = jnp.concatenate([z, y.astype(z.dtype)], -1)
        if net.kind == "mlp":
            h = _MLP(net, self.axis_name)(h, train)

            def bias(key, shape, dtype):
                return jnp.asarray(self.output_bias, dtype) if self.output_bias else jnp.zeros(shape, dtype)

            h = nn.Dense(prod(self.shape), kernel_init=_init(net), bias_init=bias)(h).reshape(-1, *self.shape)
            return 2 * nn.sigmoid(h) - 1 if len(self.shape) == 3 else h

        conv = partial(nn.Conv, kernel_init=_init(net))
        act = partial(_Act, net, self.axis_name)
        first = (self.shape[0] >> len(widths), self.shape[1] >> len(widths), widths[-1])
        h = nn.Dense(prod(first), kernel_init=_init(net))(h).reshape(-1, *first)
        if net.kind == "dcgan":
            for channels in (*reversed(widths[:-1]), self.shape[2]):
                h = pixel_shuffle(conv(4 * channels, (3, 3))(act()(h, train)))
            return nn.tanh(h)
        for channels in reversed(widths):
            branch = conv(channels, (3, 3))(_double(act()(h, train)))
            branch = conv(channels, (3, 3))(act()(branch, train))
            h = branch + _double(conv(channels, (1, 1))(h))
        return nn.tanh(conv(self.shape[2], (3, 3))(act()(h, train)))


class Discriminator(nn.Module):
    """D: images [B, H, W, C] or points [B, d], packed ones too, and one-hot labels [B, classes] -> logits [B].

    mlp: images are taken back to [0, 1] first, as GAN's D sees them.
    dcgan: 4 x 4 convolutions of stride 2 (DCGAN's code: 5 x 5), no BatchNorm in the first layer.
    resnet: blocks that halve H and W by means, sum over pixels (SNGAN, appendix B.4).
    projection: logit + <y V, phi(x)>, phi the last features (Miyato & Koyama 2018, eq. 3); else labels come with x.
    """

    net: Net
    projection: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, y, train: bool):
        net, (rows, *shape) = self.net, x.shape
        layer = partial(_layer, net, train=train)
        conv = partial(nn.Conv, kernel_init=_init(net))
        act = partial(_Act, net, self.axis_name)
        y = y.astype(x.dtype)
        beside = y[..., :0] if self.projection else y
        if net.kind == "mlp":
            h = (x.reshape(rows, -1) + 1) / 2 if len(shape) == 3 else x
            h = _MLP(net, self.axis_name, first_normed=False)(jnp.concatenate([h, beside], -1), train)
        else:
            planes = jnp.broadcast_to(beside[:, None, None], (rows, *shape[:2], beside.shape[-1]))
            h = jnp.concatenate([x, planes], -1)
        if net.kind == "dcgan":
            for i, channels in enumerate(net.widths):
                h = act(normed=i > 0)(layer(conv(channels, (4, 4), strides=2), h), train)
            h = h.reshape(rows, -1)
        if net.kind == "resnet":
            for i, channels in enumerate(net.widths):
                branch = layer(conv(channels, (3, 3)), act()(h, train) if i else h)  # pixels need no activation
                branch = layer(conv(channels, (3, 3)), act()(branch, train))
                h = _halve(branch) + layer(conv(channels, (1, 1)), _halve(h))
            h = act()(h, train).sum((-3, -2))
        logits = layer(nn.Dense(1, kernel_init=_init(net)), h)[..., 0]
        if self.projection:
            logits += (h * layer(nn.Dense(h.shape[-1], use_bias=False, kernel_init=_init(net)), y)).sum(-1)
        return logits
