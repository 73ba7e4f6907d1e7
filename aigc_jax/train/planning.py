"""What an update would need on devices that are not here: memory, operations, traffic.

XLA compiles the update for a topology and says what the program needs. A TPU's topology needs the
package libtpu, and no TPU. Nothing is run, so nothing here is a measurement.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .checks import check_shared, divisors
from .engine import compiler_options, global_update, mesh_of, shardings_of
from .record import Refused


class Chip(NamedTuple):
    """What one chip has, by its maker's page (cloud.google.com/tpu/docs, 2026).

    libtpu keeps a part of v5e's 16 GiB for itself: its message of too large programs says so.
    """

    memory: float  # bytes
    flops: float  # bfloat16 operations per second
    bandwidth: float  # bytes per second of its memory
    links: float  # bytes per second to all other chips, both directions together


CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 819e9, 400e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 1200e9),
    "v6e": Chip(32 * 2**30, 918e12, 1638e9, 800e9),
}
ONE_HOST = {"v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}  # libtpu wants to know some host
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class DoesNotFit(Refused):
    """The compiler found no way to hold the program in the memory of a chip."""


class NeedsLibtpu(Refused):
    """The topology is a TPU's, and libtpu is not installed."""


class Plan(NamedTuple):
    """What one update of a program needs. Bytes and `compiled_flops` are per device."""

    devices: int
    arguments: int  # the state, the batch and the key
    temporaries: int
    outputs: int  # the new state and the metrics
    reused: int  # of the outputs, what lies where the arguments lay
    code: int  # the program itself
    flops: int  # products and convolutions of the whole update, by formula
    compiled_flops: float  # as the compiler counts; a loop's body once
    traffic: dict[str, tuple[int, int]]  # kind of collective: (how many, bytes)

    @property
    def memory(self) -> int:
        """The bytes that a device needs at once."""
        return self.arguments + self.temporaries + self.outputs - self.reused + self.code

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Returns the least seconds of an update by what limits it.

        The products take their time at the peak rate of bfloat16. The memory reads the arguments
        and writes the outputs, each once. The links carry the results of the collectives once. An
        all-reduce needs up to four times that.
        """
        moved = sum(size for _, size in self.traffic.values())
        return {
            "products": self.flops / self.devices / chip.flops,
            "memory": (self.arguments + self.outputs) / chip.bandwidth,
            "links": moved / chip.links,
        }


def devices_of(topology: str) -> list:
    """Returns the devices of a topology such as cpu:8 or v5e:4x4, none of which need be here."""
    kind, _, shape = topology.partition(":")
    n = r"[1-9]\d*"
    if not re.fullmatch(rf"cpu:{n}|(v5e|v6e):{n}x{n}|v5p:{n}x{n}x{n}", topology):
        raise Refused(
            f"topology must be cpu:N, v5e:AxB, v6e:AxB or v5p:AxBxC, as v5e:4x4 is; got {topology}"
        )
    if kind == "cpu":
        return _virtual(int(shape))
    count = math.prod(map(int, shape.split("x")))
    if importlib.util.find_spec("libtpu") is None:
        raise NeedsLibtpu(
            f"{topology} needs libtpu: pip install 'jax[tpu]' (no TPU is needed), or plan for "
            f"cpu:{count}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no server what machine this is
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", ONE_HOST[kind])
    from jax.experimental import topologies

    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **one_chip
        ).devices
    except RuntimeError as e:  # JAX's own error for an unknown shape is one
        why = " ".join(str(e).split())[:200]
        if "lockfile" in why:
            raise Refused(f"another process uses libtpu: wait until it ends ({why})") from e
        known = "2x2x1, 2x2x2 and 2x2x4" if kind == "v5p" else "2x2, 2x4 and 4x4"
        raise Refused(
            f"libtpu gives no topology {topology}: take one chip or a shape such as {known}, or "
            f"install the libtpu that fits this JAX, pip install 'jax[tpu]' ({why})"
        ) from e
    return list(found)


def _virtual(count: int) -> list:
    if len(jax.devices("cpu")) < count:
        raise Refused(
            f"this process has {len(jax.devices('cpu'))} CPU devices, not {count}: set "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.devices("cpu")[:count]


def plan(make: Callable, cfg, batch: dict, devices: list, *, tensor: int = 1) -> Plan:
    """Compiles an update of make(cfg) for devices, and returns its Plan.

    batch: arrays, or what has a shape and a dtype. The devices divide it.
    tensor: so many devices share each layer, as `Run.tensor` says.

    Raises Refused where something does not divide, and DoesNotFit where the compiler says so.
    """
    size = np.shape(jax.tree.leaves(batch)[0])[0]
    if len(devices) % tensor:
        raise Refused(f"{len(devices)} devices do not divide into groups of {tensor} (tensor)")
    parts = divisors(cfg, len(devices), tensor)
    step = math.prod(parts.values())
    if size % step:
        what = " x ".join(f"{n} {name}" for name, n in parts.items() if n > 1)
        raise Refused(
            f"a batch of {size} does not divide by {what}; one of {-(-size // step) * step} "
            "(batch_size) does"
        )
    mesh, family = mesh_of(devices, tensor), make(cfg)
    state = jax.eval_shape(family.init, jax.random.key(0))
    key = jax.eval_shape(jax.random.key, 0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
    update = global_update(family, mesh)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    places = shardings_of(family, state, mesh)
    check_shared(places, tensor)
    compiled = jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(places, jax.tree.map(lambda _: rows, batch), whole),
        out_shardings=(places, whole),
        compiler_options=compiler_options(devices[0]),
    )
    try:
        program = compiled.lower(state, batch, key).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        why = " ".join(str(e).split())[:200]
        raise DoesNotFit(f"a batch of {size} does not fit: {why}") from e
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Plan(
        len(devices),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        flops(update, state, batch, key),
        cost.get("flops", math.nan),
        traffic(program.as_text()),
    )


def flops(f: Callable, *args) -> int:
    """Returns how many operations the products and convolutions of f(*args) take, by formula.

    A product [M, K] x [K, N] takes 2 M K N. The body of a scan counts as often as it runs, that of
    a `while` loop once, and of the branches of a `cond` the most expensive. Pallas kernels are not
    counted, ragged products neither.
    """
    return _flops(jax.make_jaxpr(f)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        inner = [_flops(each) for each in _inner(eqn.params)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            total += _convolution(eqn)
        elif eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name == "shard_map":  # its body has the shapes of one device
            total += eqn.params["mesh"].size * sum(inner)
        elif eqn.primitive.name != "pallas_call":
            total += eqn.params.get("length", 1) * sum(inner)
    return total


def _convolution(eqn) -> int:
    """Returns the operations of a convolution: zeros of padding and dilation cost nothing."""
    x, kernel = (var.aval.shape for var in eqn.invars)
    out, p = eqn.outvars[0].aval.shape, eqn.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    taps = 1  # pairs of an output and an input value, for one channel of each
    for i, (low, _) in enumerate(p["padding"]):
        o, k = np.ogrid[: out[out_spec[2 + i]], : kernel[kernel_spec[2 + i]]]
        place = o * p["window_strides"][i] + k * p["rhs_dilation"][i] - low
        gap = p["lhs_dilation"][i]
        inside = (place >= 0) & (place <= (x[x_spec[2 + i]] - 1) * gap) & (place % gap == 0)
        taps *= int(inside.sum())
    return 2 * taps * out[out_spec[0]] * out[out_spec[1]] * kernel[kernel_spec[1]]


def _inner(params: dict) -> list:
    """Returns the programs within an equation, such as the body of a scan."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def traffic(program: str) -> dict[str, tuple[int, int]]:
    """Returns {kind: (how many, bytes)} of the collectives in a compiled program's text.

    The body of a loop counts as often as it runs, where the text says how often; else once. Copies
    of one collective (a TPU's program has some that overlap with products) count once, and every
    branch of a conditional does.
    """
    found = {}
    for place, (line, times) in enumerate(_executed(program)):
        call = COLLECTIVE.search(line)
        if call:
            channel = re.search(r"channel_id=(\d+)", line)
            who = (call["kind"], channel[1] if channel else f"line {place}")
            # A start other than all-reduce's names operands, then results, then counters.
            results = call["start"] and call["kind"] != "all-reduce"
            size = times * _bytes(call["shape"], results=bool(results))
            found[who] = max(found.get(who, (0, 0)), (times, size))
    total = {}
    for (kind, _), (times, size) in found.items():
        count, sizes = total.get(kind, (0, 0))
        total[kind] = (count + times, sizes + size)
    return total


COLLECTIVE = re.compile(rf"= (?P<shape>.+?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
NAME = re.compile(r"[\w.\-]+")
CALLED = re.compile(  # such as body=%name, or branch_computations={%one, %two}
    r"(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
)


def _executed(program: str) -> list[tuple[str, int]]:
    """Returns (line, how often it runs) of a compiled program's text."""
    parts, name, entry = {"": []}, "", ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            parts[name] = []
            entry = name if head[1] else entry
        else:
            parts[name].append(line)

    def walk(name: str, times: int) -> list:
        found = [(line, times) for line in parts[name]]
        for line in parts[name]:
            called = [(how, n) for how, names in CALLED.findall(line) for n in NAME.findall(names)]
            condition = next((n for how, n in called if how == "condition"), None)
            for how, other in called:
                often = _trips(line, parts.get(condition, [])) if how == "body" else 1
                found += walk(other, times * often) if other in parts else []
        return found

    return walk(entry, 1)


def _trips(loop: str, condition: list[str]) -> int:
    """Returns how often a loop runs, by what the compiler wrote or by "i < N"; 1 if unknown."""
    known = re.search(r"known_trip_count\D*(\d+)", loop)
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", text := "\n".join(condition))
    if known:
        return int(known[1])
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else 1


def _bytes(shape: str, *, results=False) -> int:
    """Returns the bytes of a shape as XLA prints it: f32[8,16]{1,0}, or several in brackets.

    results: of operands and as many results, count the results only.
    """
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    if results:
        arrays = [each for each in arrays if each != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    total = 0
    for dtype, sizes in arrays:
        bits = int((re.findall(r"\d+", dtype) or [8])[0])  # pred has no number
        total += math.prod(int(n) for n in sizes.split(",") if n) * max(bits, 8) // 8
    return total


def largest_batch(
    first: Plan, second: Plan, sizes: tuple[int, int], chip: Chip, step: int
) -> int | None:
    """Returns about how many examples fit, from the memory at two sizes, taken as a line.

    It is a multiple of `step`, which the devices and micro-batches divide, and 0 where not even
    that many fit. None: the memory does not grow from one size to the other, as of tiny nets.
    """
    per_example = (second.memory - first.memory) / (sizes[1] - sizes[0])
    if per_example <= 0:
        return None
    fits = (chip.memory - first.memory) / per_example + sizes[0]
    return max(0, int(fits // step * step))
