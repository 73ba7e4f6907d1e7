"""A family compiled for a mesh: where arrays lie, how batches get there, what one call runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..core import Family, State, step_key
from ..data import Data, Info
from . import per_device
from .progress import counted

# A parameter smaller than this is copied to every device rather than split. To gather it in every
# layer of every step would cost more than the memory that it saves.
CUT_FROM = 2**20

# On the CPU jaxlib sends convolutions to YNNPACK, which is slower than its older path. These
# options keep YNNPACK for products and reductions only. The step of a convolutional VAE took 40 ms,
# and 29 with them (0.10.2); that of a U-Net 1.8 s, and 1.4 with them (0.12.0.1). Nets of dense
# layers take the same in both. Other devices and versions compile with defaults.
NO_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}
COMPILER_OPTIONS = {
    ("0.10.2", "cpu"): NO_CONVOLUTIONS,
    ("0.12.0.1", "cpu"): NO_CONVOLUTIONS,
}


def compiler_options(device) -> dict | None:
    """The compiler_options of `jax.jit` for this device; None: the defaults."""
    return COMPILER_OPTIONS.get((jaxlib.__version__, device.platform))


def init_options(device) -> dict | None:
    """The compiler_options for a state's initialisation, which is compiled to run once.

    On the CPU, LLVM's level 1 of 3 needs 2 to 5 times less time: 4 s instead of 15 for a U-Net.
    The last bit of a weight may differ from that of level 3.
    """
    return {"xla_backend_optimization_level": 1} if device.platform == "cpu" else None


def compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start compiles nothing.

    A cache that the user has set stays.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aigc_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def mesh_of(devices: list, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh of these devices with the axis data, and with tensor > 1 an axis model of that size.

    On a TPU the axes follow its links, where that can be.
    """
    shape, names = (len(devices),), ("data",)
    if tensor > 1:
        shape, names = (len(devices) // tensor, tensor), ("data", "model")
    places = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: under the default, Explicit, scans and gathers raise ShardingTypeError.
    return jax.sharding.Mesh(places, names, axis_types=(AxisType.Auto,) * len(names))


def shardings_of(family: Family, template: State, mesh) -> State:
    """The sharding of each leaf.

    The family's rules come first. They mean nothing for an axis that the mesh lacks, or that does
    not divide. What is still large is split over the axis data too, along its largest free
    dimension that divides (FSDP: Rajbhandari et al. 2020, "ZeRO", stage 3).
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path)
        rule = next((rule for pattern, rule in family.rules if re.search(pattern, name)), P())
        return NamedSharding(mesh, _spec(rule, leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, template)


def _spec(rule: P, shape: tuple[int, ...], axes: dict[str, int]) -> P:
    """The PartitionSpec of one leaf: what applies of its rule, then data on a large rest."""

    def pieces(names) -> int:
        return math.prod(axes.get(name, 0) for name in names)  # 0: the mesh lacks an axis

    split = [names if isinstance(names, tuple) else (names,) if names else () for names in rule]
    split = [*split, *[()] * (len(shape) - len(split))] if len(rule) <= len(shape) else []
    split = [
        names if pieces(names) and n % pieces(names) == 0 else ()
        for names, n in zip(split or [()] * len(shape), shape, strict=True)
    ]
    rest = math.prod(shape) // math.prod(map(pieces, split))
    used = "data" in (name for names in split for name in names)
    free = [i for i, n in enumerate(shape) if not split[i] and n % axes["data"] == 0]
    if rest >= CUT_FROM and axes["data"] > 1 and free and not used:
        split[max(free, key=lambda i: shape[i])] = ("data",)
    while split and not split[-1]:
        split.pop()
    return P(*(names[0] if len(names) == 1 else names or None for names in split))


def global_update(family: Family, mesh):
    """Returns update(state, batch, key), which sees the whole batch; XLA splits it over the mesh.

    key: the run's; each step derives its own from it.
    """

    def update(state, batch, key):
        # core.shard_rows and nn.sharding find the mesh here. Under jax.disable_jit it would refuse
        # the arrays, which are concrete.
        eager = jax.config.jax_disable_jit
        abstract = mesh.abstract_mesh
        with contextlib.nullcontext() if eager else jax.sharding.use_abstract_mesh(abstract):
            return family.step(state, batch, step_key(key, state.step))

    return update


def ratios(total: dict[str, float], info: Info) -> dict[str, float]:
    """What is reported of text and music beside the means: nll per token, per frame, per byte.

    Each is a total divided by a total: the mean of per-row ratios would overweight short rows.
    """
    found = {}
    if "nll_nats" not in total:  # a family of one's own may count tokens and report no likelihood
        return found
    for unit in ("token", "frame"):
        if count := total.get(f"{unit}s"):
            found[f"nll_nats_per_{unit}"] = total["nll_nats"] / count
        elif f"{unit}s" in total:
            found[f"nll_nats_per_{unit}"] = math.nan
    if "tokens" in total and info.bytes_per_token:
        bits_per_token = found["nll_nats_per_token"] / math.log(2)
        found["nll_bits_per_byte"] = bits_per_token / info.bytes_per_token
    return found


class ReadFailed(OSError):
    """A batch could not be read from its source."""


class Feed:
    """The batches of a data set on a mesh; each device holds its own contiguous rows of a batch.

    A set that fits into memory lies on the devices (`arrays`), and the host sends row numbers. Of
    any other set the host sends the batches.
    """

    def __init__(self, data: Data, mesh):
        self.data, self.mesh = data, mesh
        self.arrays, self._prefetcher = {}, None
        if data.resident:
            arrays, self._rows, self._take = data.resident
            self.arrays = jax.device_put(arrays, NamedSharding(mesh, P()))

    def from_host(self, seed: int, i: int, size: int, stop: int):
        """What the host sends for batch i: row numbers of a resident set, else the batch itself.

        stop: the number of batches that will be asked for. Raises ReadFailed where the set cannot
        be read.
        """
        if self.data.resident:
            return self._rows(seed, i, size)
        if self.data.info.examples is None:
            return self.data.batch(seed, i, size)
        try:
            if self._prefetcher is None or not self._prefetcher.has(seed, i, size):
                read = partial(self._read, seed, size)
                self._prefetcher = Prefetcher(read, (seed, size), i, stop)
            return self._prefetcher.batch(i)
        except (OSError, ValueError) as e:
            self._prefetcher = None
            raise ReadFailed(str(e)) from e

    def _read(self, seed: int, size: int, i: int) -> dict:
        if not self.reads_part:
            return self.data.batch(seed, i, size)
        return self.data.part(seed, i, size, self.rows_here(size))

    @property
    def reads_part(self) -> bool:
        """Whether this process reads its own rows only: of several, of a set that is streamed."""
        return self.data.part is not None and self.mesh.is_multi_process

    def rows_here(self, size: int) -> np.ndarray:
        """The rows of a batch that lie on this process's devices, in ascending order."""
        sharding = NamedSharding(self.mesh, P("data"))
        held = sharding.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[rows] for (rows,) in held]))

    def place(self, x, axis: int = 0):
        """Puts host arrays on the mesh, with `axis` split over the devices."""
        sharding = NamedSharding(self.mesh, P(*[None] * axis, "data"))
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), x
        )

    def place_batch(self, x, size: int, axis: int = 0):
        """Does the same for what `from_host` gave of batches of `size` rows."""
        if not self.reads_part:
            return self.place(x, axis)
        sharding = NamedSharding(self.mesh, P(*[None] * axis, "data"))
        rows = self.rows_here(size)

        def put(a):
            def piece(index):
                wanted = np.arange(size)[index[axis]]
                return np.take(a[index[:axis]], np.searchsorted(rows, wanted), axis)

            shape = (*a.shape[:axis], size, *a.shape[axis + 1 :])
            return jax.make_array_from_callback(shape, sharding, piece)

        return jax.tree.map(put, x)

    def take(self, arrays, x):
        """Returns the batch: rows x of `arrays`, or x itself; runs in the compiled step."""
        return self._take(arrays, x) if self.data.resident else x

    def sharded_batch(self, arrays, x):
        """Returns the same batch, its rows split over the devices of the mesh."""
        rows = NamedSharding(self.mesh, P("data"))
        return jax.lax.with_sharding_constraint(self.take(arrays, x), rows)


class Prefetcher:
    """Reads the batches i, i + 1, ... of a set on disk in threads (grain), ahead of their use."""

    def __init__(self, read: Callable, asked: tuple[int, int], i: int, stop: int):
        """read: `read(i)` returns batch i of the seed and size that `asked` holds."""
        import grain

        self._asked, self._i = asked, i
        batches = grain.MapDataset.range(i, stop).map(read)
        cores = os.cpu_count() or 1
        options = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)
        self._left = iter(batches.to_iter_dataset(options))
        self._batch = next(self._left)

    def has(self, seed: int, i: int, size: int) -> bool:
        """Whether batch i is the last one that was given, or the one after it."""
        return self._asked == (seed, size) and i in (self._i, self._i + 1)

    def batch(self, i: int) -> dict:
        """Batch i, for which `has` is true."""
        if i != self._i:
            self._i, self._batch = i, next(self._left)
        return self._batch


class Engine:
    """A family compiled for a mesh of devices: its first state, its updates, its scores.

    With run.tensor > 1 the matrices of a layer are split too, as `Family.rules` say.
    With run.pmap every device updates from its own rows (`per_device`). Else one compiled update
    sees the whole batch, and XLA splits the work.
    """

    def __init__(self, make, cfg, run, data: Data, *, devices: list | None = None):
        """devices: by default the first run.devices of all processes."""
        devices = devices or jax.devices()[: run.devices or None]
        self.run, self.mesh, self.family = run, mesh_of(devices, run.tensor), make(cfg)
        k_init, self.k_step, self.k_eval, _ = jax.random.split(jax.random.key(run.seed), 4)
        self.feed = Feed(data, self.mesh)
        self._options = compiler_options(self.mesh.devices.flat[0])

        init = partial(self.family.init, k_init)
        shapes = jax.eval_shape(init)
        if run.pmap:
            shardings = per_device.replicated(shapes, self.mesh)
            update = per_device.update_of(make(cfg, axis_name="data").step, self.feed)
        else:
            shardings, update = shardings_of(self.family, shapes, self.mesh), self._global()
        self.template = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        options = init_options(self.mesh.devices.flat[0])
        self._init = jax.jit(init, out_shardings=shardings, compiler_options=options)

        updates = partial(self._updates, update)
        if run.pmap:
            update, updates = per_device.over_mesh(update, updates, self.mesh)
        compiled = partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=(shardings, NamedSharding(self.mesh, P())),
            compiler_options=self._options,
        )
        self._update, self._update_many = compiled(update), compiled(updates)

    def _global(self):
        """One update of the whole batch: rows x of `arrays`."""
        update = global_update(self.family, self.mesh)
        return lambda state, arrays, x, key: update(state, self.feed.sharded_batch(arrays, x), key)

    def _updates(self, update, state, arrays, xs, key, count):
        """`count` updates; batch i lies at index i of the first axis of xs.

        `count` is traced, so calls of every length run one compiled program. The result therefore
        has the same bits however a run is split into calls.
        """

        def body(i, carry):
            state, log = carry
            state, metrics = update(state, arrays, jax.tree.map(lambda x: x[i], xs), key)
            return state, jax.tree.map(lambda a, m: a.at[i].set(m), log, metrics)

        first = jax.tree.map(lambda x: x[0], xs)
        shapes = jax.eval_shape(update, state, arrays, first, key)[1]
        most = self.run.steps_per_call
        log = jax.tree.map(lambda m: jnp.zeros((most, *m.shape), m.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, log))

    def init(self, warm: State | None = None) -> State:
        """The state before step 0, from the seed; with the parameters of `warm` if given."""
        state = self._init()
        if warm is None:
            return state
        for name in ("params", "extra", "ema"):
            if getattr(state, name) is not None:
                sharding = jax.tree.map(lambda t: t.sharding, getattr(self.template, name))
                state = state._replace(**{name: jax.device_put(getattr(warm, name), sharding)})
        return state

    def advance(self, state, step: int, count: int):
        """`count` updates from `step` on, at most run.steps_per_call; donates the state.

        Returns the new state and the metrics, which have a leading axis where steps_per_call is
        above 1.
        """
        run, k = self.run, self.run.steps_per_call
        if k == 1:
            x = self.feed.from_host(run.seed, step, run.batch_size, run.steps)
            x = self.feed.place_batch(x, run.batch_size)
            return self._update(state, self.feed.arrays, x, self.k_step)
        steps = [step + min(i, count - 1) for i in range(k)]  # the loop reads the first `count`
        sent = [self.feed.from_host(run.seed, i, run.batch_size, run.steps) for i in steps]
        xs = self.feed.place_batch(jax.tree.map(lambda *x: np.stack(x), *sent), run.batch_size, 1)
        return self._update_many(state, self.feed.arrays, xs, self.k_step, count)

    def scorer(self, feed: Feed):
        """Returns score(state): means of `family.evaluate` over a finite set.

        Every example counts once, and the noise is always the same.
        """

        @partial(jax.jit, compiler_options=self._options)
        def sums(state, arrays, x, weight, key):
            values = self.family.evaluate(state, feed.sharded_batch(arrays, x), key)
            return {name: jnp.sum(v * weight) for name, v in values.items()}

        n, size = feed.data.info.examples, self.run.batch_size

        def score(state: State) -> dict[str, float]:
            total: dict[str, float] = {}
            batches = -(-n // size)
            for i in counted("evaluating", range(batches)):
                # The last batch is filled up with examples of weight 0, which do not count.
                weight = feed.place((i * size + np.arange(size) < n).astype(np.float32))
                x = feed.place_batch(feed.from_host(0, i, size, batches), size)
                key = jax.random.fold_in(self.k_eval, i)
                for name, value in jax.device_get(sums(state, feed.arrays, x, weight, key)).items():
                    total[name] = total.get(name, 0.0) + float(value)
            return ratios(total, feed.data.info) | {name: v / n for name, v in total.items()}

        return score
