"""A small run in a process of its own, to be killed: `python -m tests.trainee FOLDER`; reports as one JSON line."""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import time

import jax
import numpy as np

from aigc_jax import data, gan, train, vae
from aigc_jax.core import Optim, make_step

CFG = vae.Config(
    shape=(8, 8, 1), levels=17, latent_dim=4, hidden=(32,), ema=0.9, optim=Optim(lr=1e-3)
)
ACCUMULATING = dataclasses.replace(
    CFG, micro=2
)  # what runs of several steps a call train: all that a resume must keep
# BatchNorm, spectral norm, dropout, two optimizers, several updates of D a step: all that a resume must keep.
GAN = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=4,
    gen=gan.NetConfig(widths=(16,), norm="batch"),
    disc=gan.NetConfig(widths=(16,), activation="leaky_relu", norm="spectral", dropout=(0.2, 0.5)),
    n_critic=2,
    ema=0.9,
)


# Noise inputs, lazy penalties, a mean path, a mean style.
STYLE = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=4,
    gen=gan.NetConfig("style", (4, 4)),
    disc=gan.NetConfig("style", (4, 4)),
    penalty="r1",
    penalty_weight=1.0,
    lazy=3,
    mixing=0.9,
    path_length=2.0,
    ema=0.9,
)
# Two pools of old fakes.
CYCLE = gan.CycleConfig(shape=(2,), gen_widths=(8,), disc_widths=(8,), pool=20)
DIGITS = data.load("digits")
FAMILIES = {
    "vae": (vae.make, CFG, DIGITS),
    "gan": (gan.make, GAN, DIGITS),
    "stylegan": (gan.make, STYLE, DIGITS),
    "cyclegan": (
        gan.make_cycle,
        CYCLE,
        data.pair(data.load("ring", examples=400), data.load("grid", examples=300)),
    ),
}


def make_nan(cfg: vae.Config, *, axis_name=None):
    """The VAE with a loss that is not finite from update 8 on."""
    family = vae.make(cfg)

    def loss(params, state, batch, key):
        value = vae.elbo(cfg, params, vae.preprocess(cfg, batch, key), jax.random.fold_in(key, 1))[
            "elbo"
        ].mean()
        return -value * jax.numpy.where(state.step >= 7, jax.numpy.nan, 1.0), (state.extra, {})

    return family._replace(step=make_step(loss, cfg.optim))


def _spoiled(cfg: vae.Config, part: str, value: float):
    """The VAE, one array of whose state is spoiled by update 8, whose own loss and gradient are finite."""
    family = vae.make(cfg)

    def step(state, batch, key):
        done, metrics = family.step(state, batch, key)
        leaves, tree = jax.tree.flatten(getattr(done, part))
        at = next(
            i for i, x in enumerate(leaves) if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        )
        leaves[at] = jax.numpy.where(state.step == 7, value, leaves[at]).astype(leaves[at].dtype)
        return done._replace(**{part: tree.unflatten(leaves)}), metrics

    return family._replace(step=step)


def make_nan_params(cfg: vae.Config, *, axis_name=None):
    """Parameters hold NaN after update 8."""
    return _spoiled(cfg, "params", jax.numpy.nan)


def make_inf_ema(cfg: vae.Config, *, axis_name=None):
    """The average holds infinity after update 8."""
    return _spoiled(cfg, "ema", jax.numpy.inf)


def make_nan_moments(cfg: vae.Config, *, axis_name=None):
    """The optimizer's moments hold NaN after update 8."""
    return _spoiled(cfg, "opt_state", jax.numpy.nan)


def wait_for(condition, *processes: subprocess.Popen) -> None:
    """Returns once the condition holds; fails where a process ends before. The limit is a backstop only."""
    end = time.monotonic() + 600
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.0005)


def end(processes) -> None:
    """Kills what still runs, so that no test leaves a process to the next."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()


def slow(source: data.Data, seconds: float) -> data.Data:
    """The same data, each batch a little late: time to be killed in."""
    arrays, rows, take = source.resident

    def late(*at):
        time.sleep(seconds)
        return rows(*at)

    return source._replace(resident=(arrays, late, take))


def fingerprint(state) -> str:
    """sha256 of all bits of a state."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def main() -> None:
    """Trains and reports."""
    p = argparse.ArgumentParser()
    p.add_argument("folder")
    p.add_argument("--family", default="vae", choices=FAMILIES)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--save-every", type=int, default=5)
    p.add_argument("--steps-per-call", type=int, default=1)
    p.add_argument("--seconds", type=float, default=0.01)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", type=int, default=2)
    args = p.parse_args()
    seen = []
    advance = train.engine.Engine.advance

    def counted(self, state, step, count):
        seen.extend(range(step, step + count))
        return advance(self, state, step, count)

    train.engine.Engine.advance = counted
    run = train.Run(
        folder=args.folder,
        steps=args.steps,
        batch_size=16,
        save_every=args.save_every,
        log_every=1,
        steps_per_call=args.steps_per_call,
        seed=args.seed,
        keep=args.keep,
    )
    make, cfg, source = FAMILIES[args.family]
    if cfg is CFG and args.steps_per_call > 1:
        cfg = ACCUMULATING
    result = train.fit(make, cfg, run, slow(source, args.seconds))
    print(
        json.dumps(
            {
                "first": seen[0] if seen else None,
                "updates": len(seen),
                "sha": fingerprint(result.state),
            }
        )
    )


if __name__ == "__main__":
    main()
