"""Tensor parallelism: what a mesh with an axis named model splits of the nets.

Of each pair of products the first has its outputs split over the axis, the second its inputs
(Shoeybi et al. 2019, "Megatron-LM", section 3): attention by heads, an MLP by its middle, a
residual block by the channels between its convolutions. So the devices of the axis sum activations
once per pair.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

# For Family.rules. Optimizer moments and averages have the same names, so they follow.
TRANSFORMER = (
    (r"'qkv'\]\['kernel'", P("model")),  # by inputs; FusedDense moves it to its outputs
    (r"'(q|k|v|up)'\]\['kernel'", P(None, "model")),
    (r"'(q|k|v|up)'\]\['bias'", P("model")),
    (r"(block|attention|context)\w*'\]\['(out|down)'\]\['kernel'", P("model")),
    (r"'wte'\]\['embedding'", P("model")),  # by tokens
    (r"'head'\]\['kernel'", P(None, "model")),
    (r"'head'\]\['bias'", P("model")),
)
UNET = (
    *TRANSFORMER,
    (r"'(down|middle|up)\w+'\]\['Conv_0'\]\['kernel'", P(None, None, None, "model")),
    (r"'(down|middle|up)\w+'\]\['Conv_1'\]\['kernel'", P(None, None, "model")),
    (r"'(down|middle|up)\w+'\]\['Dense_0'\]\['kernel'", P(None, "model")),
    (r"'(down|middle|up)\w+'\]\['(Conv_0|Dense_0)'\]\['bias'", P("model")),
    (r"'(down|middle|up)\w+'\]\['GroupNorm_1'\]\['(scale|bias)'", P("model")),
)


def constrain(x: Array, *axes: str | None) -> Array:
    """Splits x over the mesh, if there is one: for each dimension the name of an axis, or None.

    `constrain(x, "data")` splits the rows only. Where parameters are split over data too, XLA would
    otherwise split the features of the activations like them, and exchange rows in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis if axis in mesh.auto_axes else None for axis in axes]
    if not any(axes) or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def check_divides(n: int, what: str) -> None:
    """Raises ValueError where a mesh has an axis named model that does not divide n."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape["model"] if "model" in mesh.auto_axes else 1
    if n % size:
        raise ValueError(
            f"{size} devices (the axis model) cannot share {n} {what}: take a multiple of {size}, "
            f"or a divisor of {n} as the axis model"
        )
