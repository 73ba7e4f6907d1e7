"""Updates by device, as jax.pmap ran them (`Run.pmap`), by means of jax.shard_map.

Every device holds the whole state. It runs the update on its own rows of the batch with its own
noise, and the step averages gradients over the axis "data".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..core import step_key


def replicated(shapes, mesh):
    """Returns the sharding of each leaf: whole on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), shapes)


def update_of(step: Callable, feed) -> Callable:
    """Returns update(state, arrays, x, key) of this device's rows, with a key of its own.

    step: of a family that was made with axis_name="data".
    """

    def update(state, arrays, x, key):
        return step(state, feed.take(arrays, x), step_key(key, state.step, "data"))

    return update


def over_mesh(update: Callable, updates: Callable, mesh) -> tuple[Callable, Callable]:
    """Returns one update and several of them, run by every device of the mesh.

    The rows x of one update lie along the first axis. Those of several have the batches before.
    """
    # With check_vma, gradients arrive already summed, and the mean would be n times too large.
    placed = partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False)
    whole, rows, stacked = P(), P("data"), P(None, "data")
    one = placed(update, in_specs=(whole, whole, rows, whole))
    return one, placed(updates, in_specs=(whole, whole, stacked, whole, whole))
