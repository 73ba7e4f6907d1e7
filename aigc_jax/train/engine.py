"""A family compiled for a mesh of devices: where arrays lie, how batches reach them, what one call runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..core import Family, State, step_key
from ..data import Data, Info
from .progress import counted

# A parameter smaller than this is copied to every device rather than cut: gathering it in every layer of every step
# would cost more than the memory it saves.
CUT_FROM = 2**20

# On the CPU jaxlib 0.10.2 sends convolutions to YNNPACK, where they are slower than on its older path: the step of a
# convolutional VAE took 40 ms, and 29 with YNNPACK for products and reductions only (a VAE of dense layers the same in
# both). Other versions and other devices compile with their defaults.
COMPILER_OPTIONS = {
    ("0.10.2", "cpu"): {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    }
}


def compiler_options(device) -> dict | None:
    """What `jax.jit` is told for this device; None: nothing."""
    return COMPILER_OPTIONS.get((jaxlib.__version__, device.platform))


def compilation_cache() -> None:
    """Keeps what XLA compiles on disk, so that a second start compiles nothing; a cache of the user's own stays."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aigc_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    """The first `devices` devices (0: all) along one axis named data."""
    chosen = jax.devices()[: devices or None]
    # Auto: under make_mesh's default, Explicit, scans and gathers raise ShardingTypeError.
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


def shardings_of(family: Family, template: State, mesh) -> State:
    """Where each leaf lies: the family's rules first, then large leaves cut along their largest divisible axis."""

    def spec(path, leaf):
        name = jax.tree_util.keystr(path)
        for pattern, rule in family.rules:
            if re.search(pattern, name):
                return rule
        axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
        if mesh.size == 1 or leaf.size < CUT_FROM or not axes:
            return P()
        axis = max(axes, key=lambda i: leaf.shape[i])
        return P(*[None] * axis, "data")

    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), template)


class ReadFailed(OSError):
    """A batch could not be read from its source."""


class Feed:
    """A data set's batches on a mesh, each process and device with its own contiguous rows of every global batch."""

    def __init__(self, data: Data, mesh):
        self.data, self.mesh = data, mesh
        self.arrays, self._ahead = {}, None
        if data.resident:
            arrays, self._rows, self._take = data.resident
            self.arrays = jax.device_put(arrays, NamedSharding(mesh, P()))

    def host(self, seed: int, i: int, size: int, stop: int):
        """What the host sends for batch i: the row numbers of a resident set, else the batch itself.

        `stop` is the number of batches that will be asked for. Raises ReadFailed where the set cannot be read.
        """
        if self.data.resident:
            return self._rows(seed, i, size)
        if self.data.info.examples is None:
            return self.data.batch(seed, i, size)
        try:
            if self._ahead is None or self._ahead.asked != (seed, size) or i not in (self._ahead.i, self._ahead.i + 1):
                self._ahead = _Ahead(self.data, seed, i, size, stop)
            return self._ahead.batch(i)
        except (OSError, ValueError) as e:
            self._ahead = None
            raise ReadFailed(str(e)) from e

    def place(self, x, axis: int = 0):
        """Host arrays on the mesh, cut along `axis`."""
        sharding = NamedSharding(self.mesh, P(*[None] * axis, "data"))
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda cut: a[cut]), x)

    def take(self, arrays, x):
        """Inside the compiled step: the batch."""
        return self._take(arrays, x) if self.data.resident else x

    def batch(self, arrays, x):
        """The same, spread over the devices."""
        return jax.lax.with_sharding_constraint(self.take(arrays, x), NamedSharding(self.mesh, P("data")))


def ratios(total: dict[str, float], info: Info) -> dict[str, float]:
    """What is reported of text and music beside the means: sums over sums, as means of ratios weigh short rows more."""
    found = {}
    for per in ("token", "frame"):
        if f"{per}s" in total:
            found[f"nll_nats_per_{per}"] = total["nll_nats"] / total[f"{per}s"] if total[f"{per}s"] else math.nan
    if "tokens" in total and info.bytes_per_token:
        found["nll_bits_per_byte"] = found["nll_nats_per_token"] / math.log(2) / info.bytes_per_token
    return found


class _Ahead:
    """The batches i, i + 1, ... of a set that is read from disk, made in threads (grain) before they are asked for."""

    def __init__(self, data: Data, seed: int, i: int, size: int, stop: int):
        import grain

        self.asked, self.i = (seed, size), i
        batches = grain.MapDataset.range(i, stop).map(lambda j: data.batch(seed, j, size))
        cores = os.cpu_count() or 1
        self._left = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)))
        self._now = next(self._left)

    def batch(self, i: int) -> dict:
        """Batch i, the last one again or the one after it."""
        if i != self.i:
            self.i, self._now = i, next(self._left)
        return self._now


class Engine:
    """A family compiled for a mesh, or for pmap over the same devices: its first state, its steps, its scores.

    `init`, restored checkpoints, scores and `view` speak of one State. What `advance` takes and gives is
    `enter(state)`: that State itself on a mesh, for pmap a copy a device, stacked.
    """

    def __init__(self, make, cfg, run, data: Data):
        self.run, self.mesh, self.family = run, mesh_of(run.devices), make(cfg)
        k_init, self.k_step, self.k_eval, _ = jax.random.split(jax.random.key(run.seed), 4)
        self.feed = Feed(data, self.mesh)
        init = partial(self.family.init, k_init)
        shapes = jax.eval_shape(init)
        shardings = shardings_of(self.family, shapes, self.mesh)
        self.template = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
        )
        step = make(cfg, axis_name="data").step if run.pmap else self.family.step

        def one(state, arrays, x, key):
            if run.pmap:  # this device's rows, its own key, gradients averaged over the axis
                return step(state, self.feed.take(arrays, x), step_key(key, state.step, "data"))
            # core.spread finds the mesh here. Under jax.disable_jit it would refuse the arrays, which are concrete.
            eager = jax.config.jax_disable_jit
            with contextlib.nullcontext() if eager else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return step(state, self.feed.batch(arrays, x), step_key(key, state.step))

        def several(state, arrays, xs, key, count):
            # The loop's length is a traced number: whatever is left to do before the next save runs through the same
            # compiled code, so where a run is cut into calls never changes a bit.
            def body(i, carry):
                state, log = carry
                state, metrics = one(state, arrays, jax.tree.map(lambda x: x[i], xs), key)
                return state, jax.tree.map(lambda a, m: a.at[i].set(m), log, metrics)

            log = jax.eval_shape(one, state, arrays, jax.tree.map(lambda x: x[0], xs), key)[1]
            log = jax.tree.map(lambda m: jnp.zeros((run.steps_per_call, *m.shape), m.dtype), log)
            return jax.lax.fori_loop(0, count, body, (state, log))

        self._options = compiler_options(self.mesh.devices.flat[0])
        self._init = jax.jit(init, out_shardings=shardings)
        if run.pmap:  # it takes no compiler options
            devices = list(self.mesh.devices.flat)
            compiled = partial(jax.pmap, axis_name="data", out_axes=(0, None), devices=devices, donate_argnums=0)
            self._one = compiled(one, in_axes=(0, 0, 0, None))
            self._several = compiled(several, in_axes=(0, 0, 0, None, None))
            stacked = NamedSharding(self.mesh, P("data"))
            copy = jax.jit(
                lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x[None], (len(devices), *x.shape)), tree),
                out_shardings=stacked,
            )
            self.enter, self.feed.arrays = copy, copy(self.feed.arrays)
            self.view = jax.jit(lambda state: jax.tree.map(lambda x: x[0], state), out_shardings=shardings)
        else:
            out = (shardings, NamedSharding(self.mesh, P()))
            compiled = partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=self._options)
            self._one, self._several = compiled(one), compiled(several)
            self.enter = self.view = lambda state: state

    def init(self, warm: State | None = None) -> State:
        """The state before step 0, from the seed; with the parameters of `warm` where that is given."""
        state = self._init()
        if warm is None:
            return state
        for name in ("params", "extra", "ema"):
            if getattr(state, name) is not None:
                placed = jax.tree.map(lambda t: t.sharding, getattr(self.template, name))
                state = state._replace(**{name: jax.device_put(getattr(warm, name), placed)})
        return state

    def _place(self, x, axis: int):
        """A batch's rows, which lie along `axis`, on the devices; for pmap as [devices, ..., rows of one, ...]."""
        if not self.run.pmap:
            return self.feed.place(x, axis)
        n = self.mesh.size

        def cut(a):
            return np.moveaxis(a.reshape(*a.shape[:axis], n, a.shape[axis] // n, *a.shape[axis + 1 :]), axis, 0)

        return self.feed.place(jax.tree.map(cut, x))

    def advance(self, state, step: int, count: int):
        """`count` updates from `step` on, at most steps_per_call; metrics have a leading axis where that is above 1."""
        k, size = self.run.steps_per_call, self.run.batch_size
        if k == 1:
            x = self._place(self.feed.host(self.run.seed, step, size, self.run.steps), 0)
            return self._one(state, self.feed.arrays, x, self.k_step)
        hosts = [self.feed.host(self.run.seed, step + min(i, count - 1), size, self.run.steps) for i in range(k)]
        xs = self._place(jax.tree.map(lambda *x: np.stack(x), *hosts), 1)
        return self._several(state, self.feed.arrays, xs, self.k_step, count)

    def scorer(self, feed: Feed):
        """score(state) -> means of `family.evaluate` over a finite set, every example once, always the same noise."""

        @partial(jax.jit, compiler_options=self._options)
        def sums(state, arrays, x, weight, key):
            values = self.family.evaluate(state, feed.batch(arrays, x), key)
            return {name: jnp.sum(v * weight) for name, v in values.items()}

        n, size = feed.data.info.examples, self.run.batch_size

        def score(state: State) -> dict[str, float]:
            total: dict[str, float] = {}
            batches = -(-n // size)
            for i in counted("evaluating", range(batches)):
                # The last batch is filled up with examples of weight 0, so that no example counts twice.
                weight = feed.place((i * size + np.arange(size) < n).astype(np.float32))
                x, key = feed.place(feed.host(0, i, size, batches)), jax.random.fold_in(self.k_eval, i)
                for name, value in jax.device_get(sums(state, feed.arrays, x, weight, key)).items():
                    total[name] = total.get(name, 0.0) + float(value)
            return ratios(total, feed.data.info) | {name: value / n for name, value in total.items()}

        return score
