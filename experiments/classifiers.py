"""The frozen classifiers behind fid_<set>, precision, recall and classifier scores (aigc_jax/weights)

    python -m experiments.classifiers    about 10 minutes on 2 cores; MNIST and Fashion-MNIST

Downloads MNIST (12 MB) and Fashion-MNIST (31 MB) or takes their files as vae_manifold does. Expect,
on the test splits, about 99.4 % for MNIST, 92.9 % for Fashion-MNIST and 98.6 % for the 8x8 digits.
Test images choose nothing: the weights are the average (EMA) at the last update. The net of the
digits was chosen on train[1100:].

Each set leaves <folder>/<name>.safetensors, which aigc_jax.metrics.load_classifier reads. Copied
into aigc_jax/weights/ it becomes the one that the package ships. Then everything measured with the
old file is another metric: results name the file's sha256.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli
from experiments._classifier import Config, make
from experiments._cli import Row, Scale, Source


def plan(epochs: float, examples: int, batch_size: int, lr: float) -> tuple[int, Optim]:
    """Returns the number of updates, and Adam with a short warm-up and a cosine to 0."""
    steps = round(epochs * examples / batch_size)
    warmup = min(200, steps // 10)
    return steps, Optim(lr=lr, weight_decay=0.01, warmup=warmup, decay=steps - warmup)


EXAMPLES = {"digits": 1437, "mnist": 60_000, "fashion_mnist": 60_000}
MODELS = {
    "digits": Config(shape=(8, 8, 1), levels=17, channels=(32, 64, 32), shift=1, ema=0.995),
    "mnist": Config(),
    "fashion_mnist": Config(shift=1, mirror=True),
}


@dataclass(frozen=True)
class Setup:
    """Flags of classifiers; the sets come from AIGC_DATA, a prepared copy or the network."""

    folder: str = "runs/classifiers"
    sets: tuple[str, ...] = ("digits", "mnist", "fashion_mnist")
    epochs: tuple[float, ...] = (250, 10, 22)  # one number per set
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self):
        if unknown := set(self.sets) - set(MODELS):
            raise ValueError(f"sets are {', '.join(MODELS)}, not {', '.join(sorted(unknown))}")
        if not self.sets or len(self.epochs) != len(self.sets) or min(self.epochs) <= 0:
            raise ValueError(
                f"epochs must hold a positive number for each of {self.sets}, got {self.epochs}"
            )
        _cli.at_least(self, batch_size=1)


SMOKE = Setup(folder="runs/classifiers-smoke", sets=("digits",), epochs=(60,))
SCALES = {
    "smoke": Scale(SMOKE, "digits 8x8 alone, 60 epochs"),
    "cpu": Scale(Setup(), "no paper: small nets of our own"),
}
ACCURACY = "{}: test accuracy (%)"
SIZE = "{}: file (kB)"
CRITERIA = {
    ACCURACY.format("digits"): ">= 96",
    ACCURACY.format("mnist"): ">= 99",
    ACCURACY.format("fashion_mnist"): ">= 90",
    **{SIZE.format(name): "<= 300" for name in MODELS},
}
INVARIANTS = {ACCURACY.format("digits"): ">= 90"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains a classifier per set and writes its weights."""
    sources = {name: Source(name) for name in setup.sets}
    loaded = {name: (source.load("train"), source.load("test")) for name, source in sources.items()}
    found = _cli.kept()
    for epochs, (name, (training, test)) in zip(setup.epochs, loaded.items(), strict=True):
        steps, optim = plan(epochs, EXAMPLES[name], setup.batch_size, setup.lr)
        length = {"steps": steps, "batch_size": setup.batch_size, "save_every": 2000, "keep": 1}
        run = Run(str(folder / name), **length, seed=setup.seed)
        result = train.fit(make, replace(MODELS[name], optim=optim), run, training)
        accuracy, size = write(folder / f"{name}.safetensors", name, result, test, epochs)
        error = 100 * (accuracy * (1 - accuracy) / test.info.examples) ** 0.5
        found.append(Row(ACCURACY.format(name), 100 * accuracy, error=error))
        found.append(Row(f"{name}: parameters", float(_cli.parameters(result))))
        found.append(Row(SIZE.format(name), size / 1000))
    return found


def write(path: Path, name: str, result: train.Result, test, epochs: float) -> tuple[float, int]:
    """Writes weights as float16, with their test accuracy; returns it and the file's bytes."""
    from safetensors.numpy import save_file

    cfg = result.config
    halves = jax.tree.map(lambda x: np.asarray(x, np.float16), jax.device_get(result.state.ema))
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), halves)
    read_back = result._replace(state=result.state._replace(ema=stored))
    accuracy = 1 - train.evaluate(read_back, test)["error"]
    moves = f"shifts of {cfg.shift} pixels{', mirrored' if cfg.mirror else ''}"
    about = {
        "set": name,
        **{field: getattr(cfg, field) for field in ("shape", "channels", "width", "classes")},
        "accuracy": round(accuracy, 6),
        "held_out": f"{test.info.examples} images of the test split",
        "trained": f"python -m experiments.classifiers: {epochs:g} epochs of the train split, {moves}, "
        f"average of decay {cfg.ema}, no selection",
    }
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(halves)
    }
    # One entry: the order in which safetensors writes several, and so the sha256, is not fixed.
    save_file(flat, path, metadata={"about": json.dumps(about)})
    return accuracy, path.stat().st_size


if __name__ == "__main__":
    _cli.main("classifiers")
