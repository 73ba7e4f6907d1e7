"""DDPM's U-Net beside Hugging Face `diffusers`, float32, noise of 28x28 pixels, batch 64:

train    8 updates: mean square error of eps at uniform t of 1000, Adam, 60,000 images in memory, no EMA, no clipping
forward  8 passes of the net alone, without gradient
sample   20 steps of ancestral sampling, the schedule respaced, x_0_hat clipped

    make bench        (installs PyTorch and diffusers; this file alone: python benchmarks/ddpm.py)

As benchmarks/vae.py: one process per side with two threads, tasks in turn, medians. An `update` of the tables is a
pass of the net in `forward` and a step in `sample`. Both nets are one function with the same parameters, 2.6 million.
They have 32, 64 and 128 channels at 28x28, 14x14 and 7x7, and one block per resolution (two on the way up). One head
of attention is at 14x14 and in the middle. Ours is what `train.fit` runs, one update per call, and `sample_ddpm`,
compiled as train compiles it. The peer is diffusers' UNet2DModel in a plain loop, and the loop of its DDPMPipeline.
"""

from __future__ import annotations

import os
import sys

import numpy as np

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from benchmarks import _alternate  # noqa: E402
from benchmarks._alternate import PRODUCTS, SIDE, Task  # noqa: E402

UPDATES, PASSES, STEPS, BATCH = 8, 8, 20, 64
HEIGHT, WIDTHS, BLOCKS, ATTENTION, GROUPS = 28, (32, 64, 128), 1, (14,), 8
PARAMETERS = 2_586_337  # of both nets


def macs() -> tuple[int, int]:
    """Multiply-adds an image, forward: the first convolution, whose input needs no gradient, and the rest."""
    condition = 4 * WIDTHS[0]

    def residual(a, b, pixels):
        return pixels * 9 * (a * b + b * b) + condition * b + (a != b) * pixels * a * b

    def attention(width, pixels):
        return 4 * pixels * width**2 + 2 * pixels**2 * width

    def block(a, b, height):
        return residual(a, b, height**2) + (height in ATTENTION) * attention(b, height**2)

    a, heights = WIDTHS[0], [HEIGHT // 2**level for level in range(len(WIDTHS))]
    skips, rest = [a], WIDTHS[0] * condition + condition**2
    for level, (b, height) in enumerate(zip(WIDTHS, heights, strict=True)):
        if level:
            rest += height**2 * 9 * a * a
            skips.append(a)
        for _ in range(BLOCKS):
            rest, a = rest + block(a, b, height), b
            skips.append(a)
    rest += 2 * residual(a, a, height**2) + attention(a, height**2)
    for level, (b, height) in reversed(list(enumerate(zip(WIDTHS, heights, strict=True)))):
        for _ in range(BLOCKS + 1):
            rest, a = rest + block(a + skips.pop(), b, height), b
        rest += (level > 0) * (2 * height) ** 2 * 9 * b * b
    return HEIGHT**2 * 9 * WIDTHS[0], rest + HEIGHT**2 * 9 * WIDTHS[0]


FIRST, REST = macs()
TASKS = {
    "train": Task(UPDATES, BATCH, 2 * UPDATES * BATCH * (2 * FIRST + 3 * REST)),
    "forward": Task(PASSES, BATCH, 2 * PASSES * BATCH * (FIRST + REST)),
    "sample": Task(STEPS, BATCH, 2 * STEPS * BATCH * (FIRST + REST)),
}


def images() -> np.ndarray:
    """60,000 images of noise: speed does not depend on what they show."""
    return np.random.default_rng(0).integers(0, 256, (60_000, HEIGHT, HEIGHT, 1), dtype=np.uint8)


def ours() -> dict:
    """As train compiles it, and XLA's own product."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from aigc_jax import data, ddpm
    from aigc_jax.core import Optim
    from aigc_jax.train import Run
    from aigc_jax.train.engine import Engine, compiler_options

    net = ddpm.NetConfig(
        widths=WIDTHS, blocks=BLOCKS, attention=ATTENTION, heads=1, groups=GROUPS, dropout=0.0
    )
    cfg = ddpm.Config(shape=(HEIGHT, HEIGHT, 1), net=net, ema=0.0, optim=Optim(lr=2e-4))
    engine = Engine(
        ddpm.make, cfg, Run(steps=10**6, batch_size=BATCH), data.from_arrays({"image": images()})
    )
    held, params = {"state": engine.init(), "step": 0}, engine.init().params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == PARAMETERS, f"our net has {count} parameters, not {PARAMETERS}"
    compiled = partial(jax.jit, compiler_options=compiler_options(jax.devices()[0]))
    few = ddpm.respace(ddpm.linear_schedule(cfg.T), STEPS)
    x, t = jnp.ones((BATCH, *cfg.shape)), jnp.arange(BATCH)

    @compiled
    def predict(params, x, t):
        return ddpm.predict(cfg, params, x, t)[0]

    @compiled
    def draw(params, key):
        k_start, k_way = jax.random.split(key)
        x_T = jax.random.normal(k_start, x.shape)
        return ddpm.sample_ddpm(
            few, ddpm.eps_fn_of(cfg, params), x_T, k_way, sigma2="beta", clip=1.0
        )

    def train():
        for _ in range(UPDATES):
            held["state"], metrics = engine.advance(held["state"], held["step"], 1)
            held["step"] += 1
        jax.block_until_ready((held["state"], metrics))

    def forward():
        for _ in range(PASSES):
            predict(params, x, t).block_until_ready()

    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)) / SIDE**0.5, jnp.float32)
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, PRODUCTS, lambda _, b: b @ a, a))
    return {
        "train": train,
        "forward": forward,
        "sample": lambda: draw(params, jax.random.key(0)).block_until_ready(),
        "product": lambda: multiply(a).block_until_ready(),
    }


def unet():
    """diffusers' UNet2DModel in the form of our net.

    Cosines before sines and downsampling padded on both sides are its defaults. One head is
    attention_head_dim=None. GroupNorm's eps is Flax's.
    """
    from diffusers import UNet2DModel

    kinds = ["Attn" if HEIGHT // 2**level in ATTENTION else "" for level in range(len(WIDTHS))]
    net = UNet2DModel(
        sample_size=HEIGHT, in_channels=1, out_channels=1, layers_per_block=BLOCKS, block_out_channels=WIDTHS,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=None, norm_num_groups=GROUPS, norm_eps=1e-6,
    )  # fmt: skip
    count = sum(p.numel() for p in net.parameters())
    assert count == PARAMETERS, f"diffusers' net has {count} parameters, not {PARAMETERS}"
    return net


def diffusers(compiled: bool, fused: bool, channels_last: bool = False) -> dict:
    """The same with diffusers in PyTorch, and PyTorch's own product."""
    import torch
    from diffusers import DDPMScheduler
    from torch.nn import functional as F

    torch.set_num_threads(2)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images_ = (
        torch.from_numpy(images()).permute(0, 3, 1, 2).float().contiguous(memory_format=layout)
        / 127.5
        - 1
    )
    # fixed_large is our "beta", linspace our "uniform"; x_0_hat is clipped to 1 by default, beta linear to .02.
    scheduler = DDPMScheduler(1000, variance_type="fixed_large", timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    net = unet().to(memory_format=layout)
    adam = torch.optim.Adam(net.parameters(), lr=2e-4, fused=fused)
    call = torch.compile(net) if compiled else net
    x, t = (
        torch.ones(BATCH, 1, HEIGHT, HEIGHT).contiguous(memory_format=layout),
        torch.arange(BATCH),
    )

    def train():
        net.train()
        order = torch.randperm(len(images_))
        for i in range(UPDATES):
            x_0 = images_[order[i * BATCH : (i + 1) * BATCH]]
            t, eps = torch.randint(1000, (BATCH,)), torch.randn_like(x_0)
            loss = F.mse_loss(call(scheduler.add_noise(x_0, eps, t), t, return_dict=False)[0], eps)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        loss.item()

    @torch.no_grad()
    def forward():
        net.eval()
        for _ in range(PASSES):
            call(x, t, return_dict=False)

    @torch.no_grad()
    def sample():
        net.eval()
        x_t = torch.randn_like(x)
        for t in scheduler.timesteps:
            x_t = scheduler.step(call(x_t, t, return_dict=False)[0], t, x_t).prev_sample

    a = torch.randn(SIDE, SIDE) / SIDE**0.5

    def product():
        b = a
        for _ in range(PRODUCTS):
            b = b @ a

    return {"train": train, "forward": forward, "sample": sample, "product": product}


WORKERS = {
    "ours": ours,
    "diffusers eager": lambda: diffusers(compiled=False, fused=False),
    "diffusers eager, fused Adam": lambda: diffusers(compiled=False, fused=True),
    "diffusers eager, fused Adam, channels last": lambda: diffusers(
        compiled=False, fused=True, channels_last=True
    ),
    "diffusers compiled, fused Adam": lambda: diffusers(compiled=True, fused=True),
}


if __name__ == "__main__":
    _alternate.main(__file__, __doc__, WORKERS, TASKS)
