"""The form of a GAN's generator and discriminator, as data, and the modules that it names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..core import check_at_least, check_fields
from ..nn import (
    MLP,
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
    StyleDiscriminator,
    StyleGenerator,
)


def _uniform(scale: float):
    """Returns the initialiser U(-scale, scale)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale)


INITIALISERS = {
    "lecun": lambda scale: nn.initializers.lecun_normal(),
    "he": lambda scale: nn.initializers.he_normal(),
    "normal": nn.initializers.normal,
    "uniform": _uniform,
    "orthogonal": nn.initializers.orthogonal,
}


@dataclass(frozen=True)
class NetConfig:
    """The form of a generator or of a discriminator.

    A new field has the default None, so that a run recorded before it can be continued.
    """

    kind: Literal["mlp", "dcgan", "resnet", "style"] = "mlp"
    # mlp: hidden layers from the input on; dcgan, resnet: channels at H/2, H/4, ...; style:
    # channels at H, H/2, ...
    widths: tuple[int, ...] = (1200, 1200)
    activation: Literal["relu", "leaky_relu", "tanh", "maxout"] = "relu"  # leaky: slope 0.2
    pieces: int = 5  # linear pieces of a maxout unit (Goodfellow et al. 2013)
    # G: none, batch, class_batch (scale and bias per class); D: none, batch, spectral, layer,
    # instance.
    norm: Literal["none", "batch", "class_batch", "spectral", "layer", "instance"] = "none"
    dropout: tuple[float, float] = (0.0, 0.0)  # mlp: of the input, of every hidden layer
    # Of kernels; biases begin at 0.
    init: Literal["lecun", "he", "normal", "uniform", "orthogonal"] = "lecun"
    init_scale: float = 1.0  # standard deviation of normal, bound of uniform, gain of orthogonal
    # Of activations. None: float32. Parameters are always float32.
    dtype: Literal["float32", "bfloat16"] | None = None
    # dcgan, resnet: the height of the maps whose pixels attend to each other (SAGAN).
    attention: int | None = None
    mapping: int | None = None  # style: layers of G's mapping; None: 2
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] | None = None

    def check(self, name: str) -> None:
        """Raises ValueError, naming the field `model.<name>.<field>`."""
        check_fields(self, name=f"model.{name}")
        check_at_least(self, 2, "pieces", name=f"model.{name}")
        if any(width < 1 for width in self.widths) or (not self.widths and self.kind != "mlp"):
            raise ValueError(f"model.{name}.widths must hold positive widths, got {self.widths}")
        if not all(0 <= rate < 1 for rate in self.dropout):
            got = self.dropout
            raise ValueError(f"model.{name}.dropout must be two shares in [0, 1), got {got}")
        if not self.init_scale > 0:
            raise ValueError(f"model.{name}.init_scale must be positive, got {self.init_scale}")
        if self.kind != "mlp" and (self.activation == "maxout" or any(self.dropout)):
            raise ValueError(f"model.{name}: maxout and dropout are for kind mlp, not {self.kind}")
        if self.kind == "style":
            _check_style(self, name)
        elif self.mapping is not None:
            raise ValueError(f"model.{name}.mapping is for kind style, not {self.kind}")
        if self.kind == "mlp" and (self.attention or self.norm in ("instance", "class_batch")):
            raise ValueError(
                f"model.{name}: attention and the norms instance and class_batch are for kinds "
                "dcgan and resnet, not mlp"
            )


def _check_style(net: NetConfig, name: str) -> None:
    """Raises ValueError for fields that the nets of StyleGAN2 do not have."""
    default = NetConfig()
    for field in ("activation", "norm", "init", "init_scale", "attention", "remat"):
        if getattr(net, field) != getattr(default, field):
            got = getattr(net, field)
            raise ValueError(f"model.{name}.{field} is not for kind style, got {got}")
    if net.mapping is not None and net.mapping < 1:
        raise ValueError(f"model.{name}.mapping must be at least 1, got {net.mapping}")


def _options(net: NetConfig, axis_name: str | None) -> dict:
    """Returns the fields that all modules share."""
    return {
        "widths": tuple(net.widths),
        "activation": net.activation,
        "norm": net.norm,
        "kernel_init": INITIALISERS[net.init](net.init_scale),
        "axis_name": axis_name,
        "dtype": jnp.dtype(net.dtype or "float32"),
        "remat": net.remat or False,
    }


def _mlp(net: NetConfig, axis_name: str | None, first_norm: bool):
    """Returns what makes the hidden layers of an mlp."""
    input_dropout, dropout = net.dropout
    return partial(
        MLP,
        **_options(net, axis_name),
        first_norm=first_norm,
        pieces=net.pieces,
        input_dropout=input_dropout,
        dropout=dropout,
    )


def Generator(
    net: NetConfig,
    shape: tuple[int, ...],
    output_bias: tuple[float, ...] = (),
    axis_name: str | None = None,
    latents: int = 0,
) -> nn.Module:
    """Returns the module G(z [B, Z], y [B, classes], train) -> samples [B, *shape].

    output_bias: first biases of the last layer of an mlp; (): zeros. latents: how many numbers of z
    enter the mapping of kind style; the others are its noise inputs.
    """
    if net.kind == "style":
        dtype = jnp.dtype(net.dtype or "float32")
        return StyleGenerator(shape, latents, tuple(net.widths), net.mapping or 2, axis_name, dtype)
    if net.kind == "mlp":
        return MLPGenerator(shape, _mlp(net, axis_name, True), output_bias)
    options = {**_options(net, axis_name), "attention": net.attention}
    return ConvGenerator(shape, residual=net.kind == "resnet", **options)


def Discriminator(
    net: NetConfig,
    projection: bool = False,
    axis_name: str | None = None,
) -> nn.Module:
    """Returns the module D(x [B, ...], y [B, classes], train) -> logits [B].

    projection: labels enter by an inner product with the last features, else beside x.
    """
    if net.kind == "mlp":
        return MLPDiscriminator(_mlp(net, axis_name, False), projection)
    if net.kind == "style":
        return StyleDiscriminator(tuple(net.widths), jnp.dtype(net.dtype or "float32"))
    options = {**_options(net, axis_name), "attention": net.attention}
    return ConvDiscriminator(residual=net.kind == "resnet", projection=projection, **options)
