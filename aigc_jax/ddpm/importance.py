"""Importance sampling of t (Nichol & Dhariwal 2021, "improved DDPM", eq. 18).

t is drawn with probability p_t ~ sqrt(E[L_t^2]), where L_t is the loss at t. The loss is divided by
T p_t, so that its expectation stays that of uniform t. Its variance is smaller.

The history of losses is a dictionary of two arrays [T]. `square` is a running mean of L_t^2, where
the paper keeps the last ten losses. `count` says how often each t has been drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

History = dict[str, Array]


def init_history(T: int) -> History:
    """Returns the history before the first update."""
    return {"square": jnp.ones(T, jnp.float32), "count": jnp.zeros(T, jnp.int32)}


def draw_t(
    history: History,
    key: Key[Array, ""],
    n: int,
) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
    """Returns t [n], drawn from p, and the weights 1 / (T p_t) [n] of their losses.

    t is uniform until every t has been drawn ten times. From then on a thousandth of p is uniform.
    """
    T = len(history["square"])
    p = jnp.sqrt(history["square"])
    total = p.sum()
    p = 0.999 * p / jnp.where(total > 0, total, 1.0) + 0.001 / T
    known = (history["count"] >= 10).all() & (total > 0)
    p = jnp.where(known, p, 1 / T)
    t = jax.random.categorical(key, jnp.log(p), shape=(n,))
    return t, 1 / (T * p[t])


def update_history(
    history: History,
    t: Int[Array, "n"],
    loss: Float[Array, "n"],
    axis_name: str | None = None,
) -> History:
    """Returns the history with these losses added.

    axis_name: the losses of all devices are added, so that the history stays equal on all of them.
    """
    T = len(history["square"])
    square = jnp.zeros(T, jnp.float32).at[t].add(jax.lax.stop_gradient(loss) ** 2)
    count = jnp.zeros(T, jnp.int32).at[t].add(1)
    if axis_name is not None:
        square, count = jax.lax.psum((square, count), axis_name)
    mean = 0.9 * history["square"] + 0.1 * square / jnp.maximum(count, 1)
    return {
        "square": jnp.where(count > 0, mean, history["square"]),
        "count": history["count"] + count,
    }
