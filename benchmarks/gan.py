"""The GAN's training beside plain PyTorch, float32, Adam, 60,000 images in memory:

mlp    100 updates of both nets, the 2014 paper's: 100-1200-1200-784, 784-240x5-240x5-1 maxout with dropout, batch 100

    make bench        (installs PyTorch; about 3 minutes for this file on 2 cores)

As benchmarks/vae.py: one process per side with two threads, tasks in turn, medians. Both sides draw new noise for
each of the two updates and run D on real and on fake images.
"""

from __future__ import annotations

import os
import sys

import numpy as np

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from benchmarks import _alternate  # noqa: E402
from benchmarks._alternate import PRODUCTS, SIDE, Task  # noqa: E402

UPDATES, BATCH = 100, 100
_G = (100 * 1200, 1200 * 1200 + 1200 * 784)  # multiply-adds an image: the first layer and the rest
_D = (784 * 1200, 240 * 1200 + 240)
# D's update: G forward, D forward and backward on two batches, but no gradient of the pixels. G's update: both forward,
# G's gradients but not the noise's, D's gradient of its inputs only.
MACS = sum(_G) + 2 * (2 * _D[0] + 3 * _D[1]) + 2 * _G[0] + 3 * _G[1] + 2 * sum(_D)
TASKS = {"mlp": Task(UPDATES, BATCH, 2 * UPDATES * BATCH * MACS)}


def images() -> np.ndarray:
    """60,000 images of noise: speed does not depend on what they show."""
    return np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), dtype=np.uint8)


def ours() -> dict:
    """As train compiles it, and XLA's own product."""
    import jax
    import jax.numpy as jnp

    from aigc_jax import data, gan
    from aigc_jax.train import Run
    from aigc_jax.train.engine import Engine

    run = Run(steps=10**6, batch_size=BATCH, steps_per_call=UPDATES)
    engine = Engine(gan.make, gan.Config(), run, data.from_arrays({"image": images()}))
    held = {"state": engine.init(), "step": 0}

    def mlp():
        held["state"], metrics = engine.advance(held["state"], held["step"], UPDATES)
        held["step"] += UPDATES
        jax.block_until_ready((held["state"], metrics))

    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)) / SIDE**0.5, jnp.float32)
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, PRODUCTS, lambda _, b: b @ a, a))
    return {"mlp": mlp, "product": lambda: multiply(a).block_until_ready()}


def torchs(compiled: bool, fused: bool) -> dict:
    """The same in plain PyTorch, and its own product."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(2)
    torch.manual_seed(0)
    x = torch.from_numpy(images()).reshape(-1, 784).float() / 255

    class Maxout(nn.Module):
        def __init__(self, a, b, pieces=5):
            super().__init__()
            self.linear, self.pieces = nn.Linear(a, b * pieces), pieces

        def forward(self, h):
            return self.linear(h).view(len(h), self.pieces, -1).amax(1)

    gen = nn.Sequential(nn.Linear(100, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 784),
                        nn.Sigmoid())  # fmt: skip
    disc = nn.Sequential(nn.Dropout(0.2), Maxout(784, 240), nn.Dropout(0.5), Maxout(240, 240), nn.Dropout(0.5),
                         nn.Linear(240, 1))  # fmt: skip
    adams = {
        net: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=fused)
        for net in (gen, disc)
    }
    g, d = (torch.compile(gen), torch.compile(disc)) if compiled else (gen, disc)

    def mlp():
        order = torch.randperm(len(x))
        for i in range(UPDATES):
            real = x[order[i * BATCH : (i + 1) * BATCH]]
            with torch.no_grad():
                fake = g(torch.randn(BATCH, 100))
            loss = F.softplus(-d(real)).mean() + F.softplus(d(fake)).mean()
            adams[disc].zero_grad(set_to_none=True)
            loss.backward()
            adams[disc].step()
            disc.requires_grad_(False)
            loss = F.softplus(-d(g(torch.randn(BATCH, 100)))).mean()
            adams[gen].zero_grad(set_to_none=True)
            loss.backward()
            adams[gen].step()
            disc.requires_grad_(True)
        loss.item()

    a = torch.randn(SIDE, SIDE) / SIDE**0.5

    def product():
        b = a
        for _ in range(PRODUCTS):
            b = b @ a

    return {"mlp": mlp, "product": product}


WORKERS = {
    "ours": ours,
    "PyTorch eager": lambda: torchs(compiled=False, fused=False),
    "PyTorch eager, fused Adam": lambda: torchs(compiled=False, fused=True),
    "PyTorch compiled, fused Adam": lambda: torchs(compiled=True, fused=True),
}


if __name__ == "__main__":
    _alternate.main(__file__, __doc__, WORKERS, TASKS)
