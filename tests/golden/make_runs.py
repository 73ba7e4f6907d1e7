"""Trains the runs of tests/golden/runs.tar.xz: python tests/golden/make_runs.py writes runs/.

They are made once and never again: `test_golden.py` shows that later versions still load them.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, ddpm, gan, train, transformer, vae
from aigc_jax.core import Optim

HERE = Path(__file__).parent / "runs"
SHAPE = {"shape": (8, 8, 1), "levels": 17, "classes": 10}
RUNS = {
    "vae": (
        vae.make,
        vae.Config(**SHAPE, latent_dim=3, channels=(4,), hidden=(8,), upper_dim=2, ema=0.9),
        data.load("digits"),
    ),
    "gan": (
        gan.make,
        gan.Config(
            **SHAPE,
            latent_dim=3,
            condition="projection",
            gen=gan.NetConfig("resnet", (4, 4), norm="batch"),
            disc=gan.NetConfig("dcgan", (4,), "leaky_relu", norm="spectral"),
            loss="hinge",
            ema=0.9,
        ),
        data.load("digits"),
    ),
    "unet": (
        ddpm.make,
        ddpm.Config(
            **SHAPE,
            T=6,
            schedule="cosine",
            prediction="v",
            variance="learned",
            objective="hybrid",
            times="importance",
            net=ddpm.NetConfig(widths=(4, 8), blocks=1, attention=(4,), groups=2),
            ema=0.9,
        ),
        data.load("digits"),
    ),
    "dit": (
        ddpm.make,
        ddpm.Config(
            **SHAPE,
            T=6,
            schedule="learned",
            variance="beta_tilde",
            objective="vlb",
            times="low_discrepancy",
            net=ddpm.NetConfig("dit", (8, 8), heads=2, patch=4),
            ema=0.0,
        ),
        data.load("digits"),
    ),
    "points": (
        ddpm.make,
        ddpm.Config(shape=(2,), T=25, net=ddpm.NetConfig("mlp", (8, 8), dropout=0.0), ema=0.9),
        data.load("ring"),
    ),
    "transformer": (
        transformer.make,
        transformer.Config(
            vocab=97,
            context=16,
            layers=2,
            heads=2,
            width=8,
            optim=Optim(lr=1e-2, weight_decay=0.1, clip=1.0, warmup=2, decay=10),
        ),
        None,
    ),
    "rotary": (
        transformer.make,
        transformer.Config(
            vocab=97,
            context=16,
            layers=2,
            heads=4,
            width=16,
            positions="rotary",
            norm="rms",
            activation="swiglu",
            bias=False,
            tied=False,
        ),
        None,
    ),
}


def digest(tree) -> str:
    """sha256 of the names, shapes, types and values of a pytree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def shapes(tree) -> dict:
    """{path: shape} of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): list(np.shape(leaf)) for path, leaf in leaves}


def scores(result: train.Result) -> dict:
    """The mean of each value that the family's `evaluate` gives for a fixed batch."""
    rng = np.random.default_rng(0)
    config = result.config
    if hasattr(config, "vocab"):
        batch = {"tokens": rng.integers(0, config.vocab, (4, config.context + 1), np.int32)}
    elif len(config.shape) == 3:
        batch = {"image": rng.integers(0, config.levels, (4, *config.shape), np.uint8)}
    else:
        batch = {"points": rng.normal(size=(4, *config.shape)).astype(np.float32)}
    if getattr(config, "classes", 0):
        batch["label"] = np.arange(4, dtype=np.int32)
    values = jax.jit(result.family.evaluate)(result.state, batch, jax.random.key(0))
    return {name: float(value.mean()) for name, value in values.items()}


def main() -> None:
    """Trains each run for three steps and writes what a later version must find."""
    from aigc_jax.data import text

    tokens = text.from_tokens(np.random.default_rng(0).integers(0, 97, 2000), length=16, vocab=97)
    expected = {}
    for name, (make, config, source) in RUNS.items():
        folder = HERE / name
        run = train.Run(folder=str(folder), steps=3, batch_size=8, devices=1, log_every=1, keep=1)
        train.fit(make, config, run, tokens if source is None else source)
        result = train.load(folder)
        expected[name] = {
            "state": digest(result.state),
            "shapes": shapes(result.state),
            "scores": scores(result),
        }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
