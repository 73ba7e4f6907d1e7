"""The VAE's training beside plain PyTorch, three nets, float32, Adam, 60,000 images in memory:

dense   one epoch of 784-400-20-400-784, batch 128
iwae    60 updates of IWAE k = 50, 784-200-200-50-200-200-784, batch 100: 5,000 rows a decoder pass
conv    60 updates of a convolutional VAE, 28x28 -> 32 at 14x14 -> 64 at 7x7 -> 128 -> 20 and back, batch 128

    make bench        (installs PyTorch; about 6 minutes on 2 cores)

Each side runs in a process of its own with two threads, tasks in turn; a row gives medians and their ratio. Ours is
what `train.fit` runs: the compiled loop over resident data, one update per call for convolutions. PyTorch's is a plain
script, eager and compiled, with the faster of its Adam implementations, convolutions in both memory orders. GFLOP/s
counts matrix products and convolutions only; the share is of the same library's own product of 1024 x 1024 float32
matrices, timed in the same run.
"""

from __future__ import annotations

import math
import os
import sys

import numpy as np

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from benchmarks import _alternate  # noqa: E402
from benchmarks._alternate import PRODUCTS, SIDE, Task  # noqa: E402

EXAMPLES, UPDATES = 60_000, 60
NETS = ("dense", "iwae", "conv")
BATCH = {"dense": 128, "iwae": 100, "conv": 128}
STEPS = {"dense": -(-EXAMPLES // 128), "iwae": UPDATES, "conv": UPDATES}
K = 50
# Multiply-adds per image, forward, as (first layer, rest). Nobody needs the gradient of the images. So the first layer
# costs twice its forward pass, and the rest three times.
_DECODER = 50 * 200 + 200 * 200 + 200 * 784
_SEEN, _DREAMT = 14 * 14 * 9 * 32, 14 * 14 * 9 * 32 * 4  # the convolutions next to the pixels
_INNER = 7 * 7 * 9 * 32 * 64 + 7 * 7 * 9 * 64 * 4 * 32 + 2 * 7 * 7 * 64 * 128 + 128 * 40 + 20 * 128
MACS = {
    "dense": (784 * 400, 400 * 40 + 20 * 400 + 400 * 784),
    "iwae": (784 * 200, 200 * 200 + 200 * 100 + K * _DECODER),
    "conv": (_SEEN, _INNER + _DREAMT),
}
TASKS = {
    net: Task(STEPS[net], BATCH[net], 2 * STEPS[net] * BATCH[net] * (2 * first + 3 * rest))
    for net, (first, rest) in MACS.items()
}


def images() -> np.ndarray:
    """60,000 images of noise: speed does not depend on what they show."""
    return np.random.default_rng(0).integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8)


def ours() -> dict:
    """Each net as train compiles it, and XLA's own product."""
    import jax
    import jax.numpy as jnp

    from aigc_jax import data, vae
    from aigc_jax.core import Optim
    from aigc_jax.train import Run
    from aigc_jax.train.engine import Engine

    source, optim = data.from_arrays({"image": images()}), Optim(lr=1e-3)
    configs = {
        "dense": vae.Config(latent_dim=20, hidden=(400,), activation="relu", optim=optim),
        "iwae": vae.Config(
            latent_dim=50, hidden=(200, 200), activation="tanh", objective="iwae", k=K, optim=optim
        ),
        "conv": vae.Config(
            latent_dim=20, channels=(32, 64), hidden=(128,), activation="relu", optim=optim
        ),
    }

    def task(net):
        a_call = 1 if net == "conv" else STEPS[net]
        engine = Engine(
            vae.make,
            configs[net],
            Run(steps=10**6, batch_size=BATCH[net], steps_per_call=a_call),
            source,
        )
        held = {"state": engine.init(), "step": 0}

        def run():
            for _ in range(STEPS[net] // a_call):
                held["state"], metrics = engine.advance(held["state"], held["step"], a_call)
                held["step"] += a_call
            jax.block_until_ready((held["state"], metrics))

        return run

    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)) / SIDE**0.5, jnp.float32)
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, PRODUCTS, lambda _, b: b @ a, a))
    return {**{net: task(net) for net in NETS}, "product": lambda: multiply(a).block_until_ready()}


def torchs(compiled: bool, fused: bool, channels_last: bool = False) -> dict:
    """The same in plain PyTorch, and its own product."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(2)
    torch.manual_seed(0)
    flat = torch.from_numpy(images()).reshape(EXAMPLES, 784).float() / 255

    def dense(*widths, act=nn.ReLU):
        layers = [
            layer
            for a, b in zip(widths, widths[1:], strict=False)
            for layer in (nn.Linear(a, b), act())
        ]
        return nn.Sequential(*layers[:-1])

    def log_normal(z, mu, logvar):
        return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)

    class VAE(nn.Module):
        def __init__(self, encoder, decoder, k=1):
            super().__init__()
            self.encoder, self.decoder, self.k = encoder, decoder, k

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, -1)
            if self.k == 1:
                z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
                nll = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
                return (nll + 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()) / len(x)
            z = mu + torch.exp(0.5 * logvar) * torch.randn(self.k, *mu.shape)
            many = x.expand(self.k, *x.shape)
            log_p = -F.binary_cross_entropy_with_logits(
                self.decoder(z), many, reduction="none"
            ).sum(-1)
            zero = torch.zeros(())
            log_w = log_p + log_normal(z, zero, zero) - log_normal(z, mu, logvar)
            return -(torch.logsumexp(log_w, 0) - math.log(self.k)).mean()

    def model_of(net):
        if net == "dense":
            return VAE(dense(784, 400, 40), dense(20, 400, 784))
        if net == "iwae":
            return VAE(
                dense(784, 200, 200, 100, act=nn.Tanh), dense(50, 200, 200, 784, act=nn.Tanh), K
            )
        encoder = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
                                nn.Flatten(), dense(3136, 128, 40))  # fmt: skip
        decoder = nn.Sequential(dense(20, 128, 3136), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
                                nn.Conv2d(64, 128, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
                                nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2))  # fmt: skip
        return VAE(encoder, decoder)

    def task(net):
        model, x = model_of(net), flat
        if net == "conv":
            x = flat.reshape(EXAMPLES, 1, 28, 28)
            if channels_last:
                model, x = (
                    model.to(memory_format=torch.channels_last),
                    x.to(memory_format=torch.channels_last),
                )
        adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
        loss_of = torch.compile(model) if compiled else model

        def run():
            order = torch.randperm(EXAMPLES)
            for i in range(STEPS[net]):
                loss = loss_of(x[order[i * BATCH[net] : (i + 1) * BATCH[net]]])
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
            loss.item()

        return run

    a = torch.randn(SIDE, SIDE) / SIDE**0.5

    def product():
        b = a
        for _ in range(PRODUCTS):
            b = b @ a

    return {**{net: task(net) for net in NETS}, "product": product}


WORKERS = {
    "ours": ours,
    "PyTorch eager": lambda: torchs(compiled=False, fused=False),
    "PyTorch eager, fused Adam": lambda: torchs(compiled=False, fused=True),
    "PyTorch eager, fused Adam, channels last": lambda: torchs(
        compiled=False, fused=True, channels_last=True
    ),
    "PyTorch compiled, fused Adam": lambda: torchs(compiled=True, fused=True),
}


if __name__ == "__main__":
    _alternate.main(__file__, __doc__, WORKERS, TASKS)
