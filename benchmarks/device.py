"""One update of three nets on the device that is here: time, throughput, and the share of the device's peak.

gpt2   nanoGPT's form of GPT-2 (124 million parameters, no biases), 1,024 tokens, bfloat16; PyTorch's time beside it,
       if PyTorch is installed
dit    DiT-S/2 on latents of 32 x 32 x 4, bfloat16
unet   DDPM's U-Net for CIFAR-10, bfloat16

    python benchmarks/device.py --out runs/device.json       (minutes on a GPU or TPU; --tiny: seconds on a CPU)

Operations are counted by formula (`train.planning.flops`), without what remat repeats. MFU is their rate divided by
the maker's peak for dense bfloat16 products. Of an unknown device there is none. Each time is the median of
`--repeats` runs of `--updates` updates; batches are drawn on the host and lie on the device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

PEAKS = {  # dense bfloat16 operations per second, by the makers' pages; the first name that fits
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "TPU v4": 275e12,
}
TPUS = {"TPU v6": "v6e", "TPU v5 lite": "v5e", "TPU v5": "v5p"}  # names in train.planning.CHIPS


def nets(tiny: bool) -> dict:
    """Returns {name: (make, config, a batch, what an example counts as, how many per example)}."""
    from aigc_jax import ddpm, transformer

    text = transformer.Config(vocab=50304, bias=False, dtype="bfloat16", scan=True, remat="dots")
    dit = ddpm.NetConfig("dit", (384,) * 12, heads=6, dtype="bfloat16", dropout=0.0, scan=True)
    unet = ddpm.NetConfig(dtype="bfloat16")
    latents = ddpm.Config(shape=(32, 32, 4), levels=None, net=dit)
    pictures = ddpm.Config(shape=(32, 32, 3), net=unet)
    sizes = {"gpt2": 16, "dit": 64, "unet": 64}
    if tiny:
        text = replace(text, vocab=64, context=32, layers=2, heads=2, width=32)
        latents = replace(latents, shape=(8, 8, 4), net=replace(dit, widths=(32, 32), heads=2))
        small = replace(unet, widths=(8, 16), groups=4, blocks=1, attention=())
        pictures = replace(pictures, shape=(8, 8, 3), net=small)
        sizes = dict.fromkeys(sizes, 4)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, text.vocab, (sizes["gpt2"], text.context + 1)).astype(np.int32)
    points = rng.normal(size=(sizes["dit"], *latents.shape)).astype(np.float32)
    image = rng.integers(0, 256, (sizes["unet"], *pictures.shape)).astype(np.uint8)
    return {
        "gpt2": (transformer.make, text, {"tokens": tokens}, "tokens", text.context),
        "dit": (ddpm.make, latents, {"points": points}, "images", 1),
        "unet": (ddpm.make, pictures, {"image": image}, "images", 1),
    }


def peak(kind: str) -> float | None:
    """Returns the peak rate of a device by its name; None if it is not listed."""
    from aigc_jax.train.planning import CHIPS

    rates = PEAKS | {name: CHIPS[chip].flops for name, chip in TPUS.items()}
    return next((rate for name, rate in rates.items() if name in kind), None)


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Returns the median time of a call, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def ours(make, cfg, batch: dict, updates: int, repeats: int) -> dict:
    """Returns what one update of ours takes, on one device."""
    import jax

    from aigc_jax.train.engine import compiler_options
    from aigc_jax.train.planning import flops

    device = jax.local_devices()[0]
    family, key = make(cfg), jax.random.key(0)
    options = {"compiler_options": compiler_options(device)}
    jitted = jax.jit(family.step, donate_argnums=0, **options)
    held = {"state": jax.jit(family.init)(key)}
    batch = jax.device_put(batch, device)
    shapes = jax.eval_shape(family.init, key)
    plain = (
        replace(cfg, net=replace(cfg.net, remat=None))
        if hasattr(cfg, "net")
        else replace(cfg, remat=False)
    )
    count = flops(make(plain).step, shapes, batch, key)

    def run():
        for i in range(updates):
            held["state"], metrics = step(held["state"], batch, jax.random.fold_in(key, i))
        jax.block_until_ready((held["state"], metrics))

    begin = time.perf_counter()
    step = jitted.lower(held["state"], batch, key).compile()
    compiled = time.perf_counter() - begin
    return {"seconds": seconds(run, repeats) / updates, "flop": count, "compile_seconds": compiled}


def torchs(cfg, batch: dict, updates: int, repeats: int) -> float | None:
    """Returns the seconds of an update of the same GPT-2 in PyTorch; None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from nanogpt import GPT

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(cfg.vocab, cfg.context, cfg.layers, cfg.heads, cfg.width).to(device)
    adam = model.optimizer(True)
    if device == "cuda":
        model = torch.compile(model)
    tokens = torch.from_numpy(batch["tokens"]).long().to(device)

    def run():
        for _ in range(updates):
            with torch.autocast(device, torch.bfloat16):
                loss = model(tokens[:, :-1], tokens[:, 1:])
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        loss.item()  # waits for the device

    return seconds(run, repeats) / updates


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of Python and of each package."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **found}


def row(name: str, net: tuple, updates: int, repeats: int) -> dict:
    """Returns the measured row of one net."""
    import jax

    make, cfg, batch, unit, each = net
    found = ours(make, cfg, batch, updates, repeats)
    peer = torchs(cfg, batch, updates, repeats) if name == "gpt2" else None
    size, kind = len(next(iter(batch.values()))), jax.local_devices()[0].device_kind
    rate = found["flop"] / found["seconds"]
    return {
        "net": name,
        "device": kind,
        "cores": os.cpu_count(),
        "batch": size,
        "ms_per_update": 1e3 * found["seconds"],
        f"{unit}_per_second": size * each / found["seconds"],
        "operations_per_update": found["flop"],
        "operations_per_second": rate,
        "mfu": rate / peak(kind) if peak(kind) else None,
        "time_over_pytorchs": found["seconds"] / peer if peer else None,
        "compile_seconds": found["compile_seconds"],
        "versions": versions("jax", "jaxlib", *["torch"] * (peer is not None)),
    }


def main() -> None:
    """Measures the nets one after the other, prints a table and writes the rows."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--nets", nargs="+", choices=("gpt2", "dit", "unet"), default=("gpt2", "dit", "unet")
    )
    p.add_argument("--updates", type=int, default=10)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--tiny", action="store_true", help="small nets, to try this file on a CPU")
    p.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = p.parse_args()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    every, rows = nets(args.tiny), []
    print(
        "| net | device | batch | ms per update | per second | operations per second | MFU | ours / PyTorch |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.nets:
        found = row(name, every[name], args.updates, args.repeats)
        rows.append(found)
        rate = next(
            f"{v:,.0f} {k.split('_')[0]}"
            for k, v in found.items()
            if k.endswith("s_per_second") and "op" not in k
        )
        mfu = "-" if found["mfu"] is None else f"{100 * found['mfu']:.0f} %"
        peer = "-" if found["time_over_pytorchs"] is None else f"{found['time_over_pytorchs']:.2f}"
        print(
            f"| {name} | {found['device']} | {found['batch']} | {found['ms_per_update']:.2f} | {rate} | "
            f"{found['operations_per_second']:.3g} | {mfu} | {peer} |",
            flush=True,
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
