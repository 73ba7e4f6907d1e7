"""A multilayer perceptron, and the nets made of it: G, D, and a diffusion net for points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .blocks import FusedDense, NormAct, class_logits, inputs_per_unit, linear, recompute
from .embeddings import Condition

HIDDEN = "_MLP_0"  # the name that saved parameters of G and D have


class MLP(nn.Module):
    """Hidden layers (linear, norm, activation, dropout), then a linear layer if `out` is not 0.

    Dropout is on where the caller passes an rng named dropout and `train` is not False.
    """

    widths: tuple[int, ...]
    activation: str = "relu"  # of `ACTIVATIONS`, or maxout, swiglu
    out: int = 0  # outputs of a last linear layer; 0: the last hidden layer is returned
    norm: str = "none"  # none | batch | spectral
    first_norm: bool = True  # False: the first layer has no BatchNorm
    pieces: int = 5  # linear pieces of a maxout unit
    dropout: float | None = None  # of hidden layers
    input_dropout: float | None = None
    bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    out_init: Any = nn.initializers.lecun_normal()
    names: tuple[str, ...] = ()  # of the linear layers; (): Dense_0, Dense_1, ...
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "*B D"],
        condition: Float[Array, "*B C"] | None = None,
        train: bool | None = None,
    ) -> Array:
        """Returns [*B, widths[-1]] or [*B, out]. Each layer adds a linear map of `condition`."""
        if self.input_dropout is not None:
            h = self._drop(h, self.input_dropout, train)
        for i in range(len(self.widths)):
            layer = partial(MLP._layer, i=i, train=train)
            h = recompute(layer, self.remat)(self, h, condition)
        return self._dense(len(self.widths), self.out, self.out_init)(h) if self.out else h

    def _layer(self, h, condition, *, i: int, train: bool | None):
        if self.activation == "swiglu" and self.names:  # as in a transformer's block
            return self._drop_hidden(self._swiglu(h, i), train)
        width = self.widths[i] * inputs_per_unit(self.activation, self.pieces)
        h = linear(self._dense(i, width, self.kernel_init), h, self.norm, bool(train))
        if condition is not None:
            h = h + nn.Dense(width, dtype=self.dtype)(condition)
        norm = self.norm if i or self.first_norm else "none"
        options = {"pieces": self.pieces, "axis_name": self.axis_name, "dtype": self.dtype}
        # Saved statistics have the name _Act_.
        h = NormAct(norm, self.activation, **options, name=f"_Act_{i}")(h, bool(train))
        return self._drop_hidden(h, train)

    def _swiglu(self, h, i: int):
        """Returns silu(gate) * up; over a mesh each device has the same units of both."""
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype, "name": self.names[i]}
        both = FusedDense(2, self.widths[i], self.bias, **options)(h)
        return nn.silu(both[..., 0, :]) * both[..., 1, :]

    def _drop_hidden(self, h, train: bool | None):
        return h if self.dropout is None else self._drop(h, self.dropout, train)

    def _dense(self, i: int, width: int, init: Any) -> nn.Dense:
        name = self.names[i] if self.names else None
        return nn.Dense(width, self.bias, kernel_init=init, dtype=self.dtype, name=name)

    def _drop(self, h, rate: float, train: bool | None):
        off = not self.has_rng("dropout") if train is None else not train
        return nn.Dropout(rate, deterministic=off)(h)


class MLPGenerator(nn.Module):
    """G: noise [B, Z] and one-hot labels [B, classes] -> images [B, H, W, C] or points [B, d].

    Images lie in [-1, 1]: they end in a sigmoid, as in GAN, which is rescaled. Points end in a
    linear layer.
    """

    shape: tuple[int, ...]  # of one sample
    mlp: Callable[..., MLP]  # makes the hidden layers, as partial(MLP, (256, 256)) does
    output_bias: tuple[float, ...] = ()  # first biases of the last layer; (): zeros

    @nn.compact
    def __call__(self, z, y=None, train: bool = False):
        mlp, given = self.mlp(name=HIDDEN), self.output_bias

        def bias(key, shape, dtype):
            return jnp.asarray(given, dtype) if given else jnp.zeros(shape, dtype)

        h = mlp(z if y is None else jnp.concatenate([z, y.astype(z.dtype)], -1), train=train)
        options = {"kernel_init": mlp.kernel_init, "bias_init": bias, "dtype": mlp.dtype}
        h = nn.Dense(prod(self.shape), **options)(h).reshape(-1, *self.shape).astype(jnp.float32)
        return 2 * nn.sigmoid(h) - 1 if len(self.shape) == 3 else h


class MLPDiscriminator(nn.Module):
    """D: images [B, H, W, C] or points [B, d], and one-hot labels [B, classes] -> logits [B].

    Images in [-1, 1] are taken back to [0, 1] first, as D sees them in GAN.
    """

    mlp: Callable[..., MLP]  # makes the hidden layers, as partial(MLP, (256, 256)) does
    projection: bool = False  # how labels enter: as in `class_logits`; False: beside x

    @nn.compact
    def __call__(self, x, y=None, train: bool = False):
        mlp, rows = self.mlp(name=HIDDEN), len(x)
        y = jnp.zeros((rows, 0), x.dtype) if y is None else y.astype(x.dtype)
        beside = y[..., :0] if self.projection else y
        h = (x.reshape(rows, -1) + 1) / 2 if x.ndim == 4 else x
        h = mlp(jnp.concatenate([h, beside], -1), train=train)
        labels = y if self.projection else None
        return class_logits(h, labels, mlp.kernel_init, mlp.norm, train, mlp.dtype)


class TimeMLP(nn.Module):
    """x_t [B, ...], time [B] in 0 .. 1000, label [B] -> [B, out], float32, 0 at first.

    The condition is added in every layer.
    """

    out: int
    classes: int = 0  # 0: no labels
    widths: tuple[int, ...] = (128, 128, 128)
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x_t, t, label=None):
        condition = Condition(self.widths[0], 64, self.classes, self.dtype, name="condition")
        condition = nn.silu(condition(t, label))
        mlp = MLP(self.widths, "silu", dropout=self.dropout, dtype=self.dtype, remat=self.remat)
        nn.share_scope(self, mlp)  # its parameters are this module's own
        h = mlp(x_t.reshape(len(x_t), -1), condition)
        zeros = nn.initializers.zeros
        last = nn.Dense(self.out, kernel_init=zeros, dtype=self.dtype, name="out")
        return last(h).astype(jnp.float32)
