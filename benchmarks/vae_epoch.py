"""One epoch of the 784-400-20-400-784 VAE beside plain PyTorch: batch 128, 60,000 images in memory, Adam, float32.

    make bench        (installs PyTorch; about 2 minutes on 2 cores)

Each side runs in a process of its own with two threads, epochs in turn; the row gives medians and their ratio. Ours is
what `train.fit` runs: the compiled loop over resident data. PyTorch's is a plain script, eager and compiled, with the
faster of its Adam implementations. GFLOP/s counts matrix products only; the share is of the same library's own product
of 1024 x 1024 float32 matrices, timed in the same run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

import numpy as np

BATCH, EXAMPLES, HIDDEN, LATENTS, SIDE = 128, 60_000, 400, 20, 1024
STEPS = -(-EXAMPLES // BATCH)
WEIGHTS = 784 * HIDDEN + HIDDEN * 2 * LATENTS + LATENTS * HIDDEN + HIDDEN * 784
# Forward, and backward twice that, but for the gradient of the images, which nobody needs.
EPOCH_FLOP = 2 * EXAMPLES * (3 * WEIGHTS - 784 * HIDDEN)
PRODUCTS = 20
PRODUCT_FLOP = PRODUCTS * 2 * SIDE**3


def images() -> np.ndarray:
    """60,000 images of noise: speed does not depend on what they show."""
    return np.random.default_rng(0).integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8)


def ours() -> dict:
    """The epoch as train compiles it, and XLA's own product."""
    import jax
    import jax.numpy as jnp

    from aigc_jax import data, vae
    from aigc_jax.core import Optim
    from aigc_jax.train import Run
    from aigc_jax.train.engine import Engine

    cfg = vae.Config(latent_dim=LATENTS, hidden=(HIDDEN,), activation="relu", optim=Optim(lr=1e-3))
    source = data.from_arrays({"image": images()})
    engine = Engine(vae.make, cfg, Run(steps=10**6, batch_size=BATCH, steps_per_call=STEPS), source)
    held = {"state": engine.init(), "step": 0}

    def epoch():
        held["state"], metrics = engine.advance(held["state"], held["step"], STEPS)
        held["step"] += STEPS
        jax.block_until_ready(metrics)

    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)) / SIDE**0.5, jnp.float32)
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, PRODUCTS, lambda _, b: b @ a, a))
    return {"epoch": epoch, "product": lambda: multiply(a).block_until_ready()}


def torchs(compiled: bool, fused: bool) -> dict:
    """The same epoch in plain PyTorch, and its own product."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(2)
    torch.manual_seed(0)

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS))
            self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784))

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, -1)
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            nll = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
            return (nll + kl) / len(x)

    model = VAE()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    x = torch.from_numpy(images()).reshape(EXAMPLES, 784).float() / 255
    loss_of = torch.compile(model) if compiled else model

    def epoch():
        order = torch.randperm(EXAMPLES)
        for i in range(0, EXAMPLES, BATCH):
            loss = loss_of(x[order[i : i + BATCH]])
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        loss.item()

    a = torch.randn(SIDE, SIDE) / SIDE**0.5

    def product():
        b = a
        for _ in range(PRODUCTS):
            b = b @ a

    return {"epoch": epoch, "product": product}


WORKERS = {
    "ours": ours,
    "torch eager": lambda: torchs(compiled=False, fused=False),
    "torch eager, fused Adam": lambda: torchs(compiled=False, fused=True),
    "torch compiled": lambda: torchs(compiled=True, fused=True),
}


def main() -> None:
    """Times all workers in turn and prints the row."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--worker", choices=tuple(WORKERS))
    args = p.parse_args()
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    from benchmarks import _alternate

    if args.worker:
        if hasattr(os, "sched_setaffinity"):  # XLA has no flag for its threads: it takes the cores that it may run on
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        _alternate.serve(WORKERS[args.worker]())
        return
    workers = {name: _alternate.Worker(__file__, name) for name in WORKERS}
    medians = _alternate.alternate(workers, ("product", "epoch"), args.repeats)
    for worker in workers.values():
        worker.close()

    print(f"median of {args.repeats}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| side | epoch, s | GFLOP/s | own product, GFLOP/s | share of it |")
    print("| --- | --- | --- | --- | --- |")
    for name in WORKERS:
        epoch, product = EPOCH_FLOP / medians[name, "epoch"] / 1e9, PRODUCT_FLOP / medians[name, "product"] / 1e9
        print(f"| {name} | {medians[name, 'epoch']:.2f} | {epoch:.0f} | {product:.0f} | {epoch / product:.2f} |")
    best = min((name for name in WORKERS if name != "ours"), key=lambda name: medians[name, "epoch"])
    print(f"\nours / {best}: {medians['ours', 'epoch'] / medians[best, 'epoch']:.2f} of the time;", end=" ")
    print(f"matrix products: XLA at {medians[best, 'product'] / medians['ours', 'product']:.2f}x PyTorch's speed")


if __name__ == "__main__":
    main()
