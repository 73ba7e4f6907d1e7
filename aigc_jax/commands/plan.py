"""The command plan: what an update of a run would need on devices that are not here."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from importlib.metadata import version

import jax

from .. import train
from ..train import folder as folders
from ..train.checks import divisors
from ..train.planning import (
    CHIPS,
    Chip,
    DoesNotFit,
    NeedsLibtpu,
    Plan,
    devices_of,
    largest_batch,
)
from ..train.record import model_of
from .runs import DataFolder, load_source
from .shared import Folder, Trust, trusted


def plan(
    run_folder: Folder,
    /,
    *,
    topology: str = "cpu:4",
    mesh: str = "",
    batch_size: int | None = None,
    data_folder: DataFolder = None,
    trust: Trust = (),
) -> None:
    """Compiles an update of a run for devices that are not here, and prints what it needs.

    The batch is split over the devices, and large parameters too. Nothing is trained. Where the
    program does not fit, changes of the config are tried that take less memory. The exit code is
    then 1.

    Args:
        run_folder: what a training run wrote.
        topology: cpu:N, v5e:AxB, v6e:AxB or v5p:AxBxC. All but cpu need libtpu; none needs a TPU.
            Without libtpu the CPU's plan is shown, and the exit code is 2.
        mesh: such as data=8,model=2: groups of 2 devices share each layer, and 8 groups divide the
            batch. By default as run.tensor says.
        batch_size: examples of an update, over all devices; by default the run's.
        data_folder: where the set's original files lie, if it needs any.
        trust: a module of your own that made the run and may be imported; can be given repeatedly.
    """
    asked = topology
    topology, devices = devices_for(asked)
    record = folders.read(run_folder)
    make, cfg = model_of(record, run_folder, trusted(trust))
    source = load_source(run_folder, "data", data_folder)
    if record["run"].get("pmap"):
        raise train.Refused(f"{run_folder} trains with run.pmap, which plan does not know")
    size = record["run"]["batch_size"] if batch_size is None else batch_size
    tensor = tensor_of(mesh, len(devices)) if mesh else record["run"].get("tensor", 1)

    def batch(size: int) -> dict:
        return source.batch(0, 0, size)

    if not report(make, cfg, batch, size, topology, devices, tensor):
        raise SystemExit(1)
    if topology != asked:  # nothing was said of the chips
        raise SystemExit(2)


def devices_for(topology: str) -> tuple[str, list]:
    """Returns the topology and its devices; call it before JAX looks for devices of its own.

    Without libtpu, as many virtual CPUs stand for the chips of a TPU. A line says so.
    """
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdecimal() and int(count):
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", int(count))
    try:
        return topology, devices_of(topology)
    except NeedsLibtpu as e:
        virtual = f"cpu:{math.prod(map(int, count.split('x')))}"
        print(f"{e}. What follows is of {virtual}.", file=sys.stderr)
        return devices_for(virtual)


def report(
    make: Callable,
    cfg,
    batch: Callable[[int], dict],
    size: int,
    topology: str,
    devices: list,
    tensor: int,
) -> bool:
    """Prints the plan of an update of make(cfg), and what to change where it does not fit.

    batch: batch(n) returns n examples, as arrays or as jax.ShapeDtypeStruct.
    tensor: the number of devices that share each layer.

    Returns whether the program fits; True for CPUs, whose memory is not known.
    """
    if size < 1:
        raise train.Refused(f"batch_size must be at least 1, got {size}")
    chip = CHIPS.get(topology.partition(":")[0])

    def planned(cfg, size: int) -> Plan:
        return train.plan(make, cfg, batch(size), devices, tensor=tensor)

    try:
        first = planned(cfg, size)
    except DoesNotFit as e:
        print(f"chip     does not fit: {e}")
        advise(planned, cfg, size, chip)
        return False
    show(topology, size, first, tensor)
    step = math.prod(divisors(cfg, first.devices, tensor).values())
    return chip is None or show_chip(planned, cfg, size, first, chip, step)


def tensor_of(mesh: str, devices: int) -> int:
    """Returns how many devices share a layer in a mesh such as data=8,model=2."""
    found = re.fullmatch(r"data=(\d+)(?:,model=(\d+))?|model=(\d+)(?:,data=(\d+))?", mesh)
    if not found:
        raise train.Refused(f"mesh must be such as data=8,model=2, got {mesh!r}")
    rows, tensor = int(found[1] or found[4] or 1), int(found[2] or found[3] or 1)
    if rows * tensor != devices:
        raise train.Refused(f"mesh {mesh} has {rows * tensor} devices, the topology {devices}")
    return tensor


def show_chip(planned, cfg, size: int, first: Plan, chip: Chip, step: int) -> bool:
    """Prints whether a plan fits a chip, how many examples would, and the bound of its time.

    step: what a batch must be a multiple of. Returns whether it fits.
    """
    fits, room = first.memory <= chip.memory, _bytes(chip.memory)
    if fits:
        print(f"chip     fits into {room}")
        show_largest(planned, cfg, size, first, chip, step)
    else:
        over = _bytes(first.memory - chip.memory)
        print(f"chip     does not fit into {room}: {over} too much per device")
        advise(planned, cfg, size, chip)
    seconds = first.bounds(chip)
    limit = max(seconds, key=seconds.get)
    print(f"bound    at least {1e3 * seconds[limit]:.3g} ms per update: {limit} (no measurement)")
    return fits


def show_largest(planned, cfg, size: int, first: Plan, chip: Chip, step: int) -> None:
    """Prints about how many examples would fit, by a batch of twice the size, or else of half."""
    for other in (2 * size, size // 2 // step * step):
        try:
            plans = {size: first, other: planned(cfg, other)} if other else {}
        except DoesNotFit:
            print(f"         {other} examples do not fit")
            continue
        if plans:
            sizes = tuple(sorted(plans))
            most = largest_batch(*(plans[n] for n in sizes), sizes, chip, step)
            print(f"         {how_many(most, sizes)}")
        return


def advise(planned, cfg, size: int, chip: Chip) -> None:
    """Prints what changes of a config that does not fit would need."""
    print(
        "         Other ways, not tried: more chips, a smaller batch, and for transformer, DiT and "
        "U-Net model=N in --mesh."
    )
    for words, changed in lighter(cfg):
        try:
            memory = planned(changed, size).memory
        except DoesNotFit as e:
            print(f"         {words}: does not fit ({e})")
        except ValueError as e:  # such as a batch that has not so many parts
            print(f"         {words}: cannot be ({e})")
        else:
            verdict = "fits" if memory <= chip.memory else "does not fit"
            print(f"         {words}: {verdict}, {_bytes(memory)} per device")


def lighter(cfg) -> Iterator[tuple[str, object]]:
    """Yields (what changes, the changed config) where a config has fields that save memory."""
    nets = {name: getattr(cfg, name, None) for name in ("net", "gen", "disc")}
    again = {
        name: replace(net, remat=True)
        for name, net in nets.items()
        if is_dataclass(net) and getattr(net, "remat", True) is not True
    }
    if getattr(cfg, "remat", True) is not True:
        again["remat"] = True
    try:
        changed = replace(cfg, **again)
    except ValueError:  # a net that cannot recompute, such as StyleGAN2's
        again = {}
    if again:
        cfg = changed
        yield "blocks recomputed in the backward pass (remat)", cfg
    if hasattr(cfg, "micro"):
        cfg = replace(cfg, micro=4 * cfg.micro)
        yield f"{'remat and ' if again else ''}{cfg.micro} micro-batches (model.micro)", cfg


def show(topology: str, size: int, found: Plan, tensor: int = 1) -> None:
    """Prints a plan; bytes are per device."""
    by = "the CPU's compiler, not a TPU's"
    if not topology.startswith("cpu"):
        by = f"libtpu {version('libtpu')}, jaxlib {version('jaxlib')}"
    mesh = f"data={found.devices // tensor}" + (f",model={tensor}" if tensor > 1 else "")
    print(f"devices  {found.devices} of {topology} as {mesh}, compiled by {by}")
    print(f"batch    {size} examples over all devices")
    print(
        f"memory   {_bytes(found.memory)} per device: {_bytes(found.arguments)} state and batch, "
        f"{_bytes(found.temporaries)} temporaries, {_bytes(found.code)} program"
    )
    print(
        f"products {found.flops:.4g} operations per update by formula; the compiler counts "
        f"{found.compiled_flops * found.devices:.4g} of all kinds"
    )
    for kind, (count, moved) in found.traffic.items():
        print(f"traffic  {kind}: {count} of {_bytes(moved)} together, per device")
    if not found.traffic:
        print("traffic  none between devices")


def how_many(most: int | None, sizes: tuple[int, int]) -> str:
    """Returns in words how many examples would fit, from the memory at two sizes."""
    between = f"by the memory of {sizes[0]:,} and {sizes[1]:,}"
    if most is None:
        return f"how many examples would fit is unknown, {between}"
    if most > 1000 * sizes[1]:  # too far to draw a line through two points
        return f"more than {1000 * sizes[1]:,} examples would fit, {between}"
    return f"about {most:,} examples would fit, {between}"


def _bytes(n: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"
