"""The command plan: what an update of a run would need on devices that are not here."""

from __future__ import annotations

import contextlib

import jax

from .. import train
from ..train import folder as folders
from ..train.planning import CHIPS, DoesNotFit, Plan, devices_of, largest_batch
from ..train.record import model_of
from .runs import DataFolder, load_source
from .shared import Folder, Trust, trusted


def plan(
    run_folder: Folder,
    /,
    *,
    topology: str = "cpu:8",
    batch_size: int | None = None,
    data_folder: DataFolder = None,
    trust: Trust = (),
) -> None:
    """Compiles an update of a run for devices that are not here, and prints what it needs.

    The batch is split over the devices, and large parameters too. Nothing is trained.

    Args:
        run_folder: what a training run wrote.
        topology: cpu:N, v5e:AxB, v6e:AxB or v5p:AxBxC. All but cpu need libtpu; none needs a TPU.
        batch_size: examples of an update, over all devices; by default the run's.
        data_folder: where the set's original files lie, if it needs any.
        trust: as for sample.
    """
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdecimal() and int(count):
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", int(count))
    devices = devices_of(topology)
    record = folders.read(run_folder)
    make, cfg = model_of(record, run_folder, trusted(trust))
    source = load_source(run_folder, "data", data_folder)
    if record["run"].get("pmap"):
        raise train.Refused(f"{run_folder} trains with run.pmap, which plan does not know")
    size = record["run"]["batch_size"] if batch_size is None else batch_size
    if size < 1:
        raise train.Refused(f"batch_size must be at least 1, got {size}")
    first = train.plan(make, cfg, source.batch(0, 0, size), devices)
    show(topology, size, first)
    if chip := CHIPS.get(kind):
        verdict = "fits" if first.memory <= chip.memory else "does not fit"
        print(f"chip     {verdict} into {chip.memory / 2**30:.0f} GiB")
        try:
            second = train.plan(make, cfg, source.batch(0, 0, 2 * size), devices)
            sizes = (size, 2 * size)
            print(f"         {how_many(largest_batch(first, second, sizes, chip), sizes)}")
        except DoesNotFit:
            print(f"         twice as many examples, {2 * size}, do not fit")
        seconds = first.bounds(chip)
        limit = max(seconds, key=seconds.get)
        print(
            f"bound    at least {1e3 * seconds[limit]:.3g} ms per update: {limit} (no measurement)"
        )


def show(topology: str, size: int, found: Plan) -> None:
    """Prints a plan; bytes are per device."""
    by = "the CPU's compiler, not a TPU's" if topology.startswith("cpu") else "libtpu"
    print(f"devices  {found.devices} of {topology}, compiled by {by}; a batch of {size}")
    print(
        f"memory   {_bytes(found.memory)} per device: {_bytes(found.arguments)} state and batch, "
        f"{_bytes(found.temporaries)} temporaries"
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
