"""The learned schedule of Kingma et al. 2021 ("VDM"), in continuous time u in [0, 1].

gamma(u) is minus the log signal-to-noise ratio: signal^2 = sigmoid(-gamma) = 1 - noise^2.
The bound depends on gamma only through its two ends. Between them, gamma changes only the variance
of the estimate of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Params = Any


def init_gamma(key: Key[Array, ""], *, levels: int = 256) -> Params:
    """Returns parameters of `gamma`, nearly straight from 2 log(2 / (6 (levels - 1))) to 5.

    At the lower end the noise is a sixth of the distance between grey levels. For 256 levels that
    is VDM's -13.3 (section 6).

    The sigmoids rise at random places over [0, 1]. If they all rose at the same place, as with
    biases of 0, gamma would stay nearly straight however long it is trained.
    """
    k_slope, k_place, k_height = jax.random.split(key, 3)
    return {
        "ends": jnp.array([2 * math.log(2 / 6 / (levels - 1)), 5.0], jnp.float32),
        "line": jnp.zeros((), jnp.float32),
        "first": 0.5 + 0.25 * jax.random.normal(k_slope, (1024,), jnp.float32),
        # The line ends at softplus(0) = log 2.
        "place": math.log(2) * jax.random.uniform(k_place, (1024,), jnp.float32),
        "last": jax.random.normal(k_height, (1024,), jnp.float32) - 6.0,
    }


def gamma(params: Params, u: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns gamma(u) of VDM's monotone network (appendix H), with both ends learned.

    A line plus 1024 sigmoids of it with positive weights, scaled such that `ends` are the values at
    u = 0 and u = 1.
    """

    def increasing(u):
        line = jax.nn.softplus(params["line"]) * u
        slope = 20 * jax.nn.softplus(params["first"])
        h = jax.nn.sigmoid(slope[None] * (line[:, None] - params["place"][None]))
        return line + h @ jax.nn.softplus(params["last"])

    low, high = increasing(jnp.array([0.0, 1.0], jnp.float32))
    ends = params["ends"]
    return ends[0] + (ends[1] - ends[0]) * (increasing(u) - low) / (high - low)


def loss(
    bound: Callable,
    params: Params,
    key: Key[Array, ""],
    k_drop: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Returns the mean bound, with a gradient that trains each part of `params` in its own way.

    The network and the ends of gamma minimise the bound. The rest of gamma, on which the mean does
    not depend, minimises the second moment of the estimate, and so its variance. VDM makes one pass
    per update, with a gradient rule of its own; this makes two passes.

    bound: bound(params, key, k_drop) -> [B], an estimate of the bound.
    params: `gamma`, the parameters of the function above, and those of the network.
    """
    fixed = jax.lax.stop_gradient(params)
    only_inner = {**fixed, "gamma": {**params["gamma"], "ends": fixed["gamma"]["ends"]}}
    all_but_inner = {**params, "gamma": {**fixed["gamma"], "ends": params["gamma"]["ends"]}}
    k_drops = (None, None) if k_drop is None else jax.random.split(k_drop)
    k_mean, k_square = jax.random.split(key)
    estimate = bound(all_but_inner, k_mean, k_drops[0])
    second_moment = (bound(only_inner, k_square, k_drops[1]) ** 2).mean()
    return estimate.mean() + second_moment - jax.lax.stop_gradient(second_moment)
