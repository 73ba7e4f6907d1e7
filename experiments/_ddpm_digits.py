"""The diffusion model of 8x8 digits that several scripts analyse.

With the same --run.folder they share one training.
"""

from dataclasses import replace

import numpy as np

from aigc_jax import ddpm, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _pictures

MODEL = ddpm.Config(
    shape=(8, 8, 1),
    levels=17,
    classes=10,
    unlabelled=0.1,
    T=100,
    schedule="cosine",
    prediction="v",
    variance="learned",
    objective="hybrid",
    terms=8,
    net=ddpm.NetConfig(widths=(32, 64), blocks=1, attention=(4,), groups=8, dropout=0.1),
    ema=0.99,
    optim=Optim(lr=2e-3, clip=1.0, warmup=100, decay=2400, floor=0.05),
)
SMOKE = replace(
    MODEL,
    T=50,
    terms=4,
    net=replace(MODEL.net, widths=(16, 32), attention=(), dropout=0.0),
    ema=0.98,
    optim=Optim(lr=2e-3, clip=1.0, warmup=20),
)


def run(folder: str, **changes) -> Run:
    """Returns the run of scale cpu, with changes."""
    usual = Run(
        folder, steps=2500, batch_size=128, eval_every=250, save_every=500, log_every=100, keep=1
    )
    return replace(usual, **changes)


def smoke_run(folder: str, **changes) -> Run:
    """Returns the run of scale smoke, with changes."""
    small = {"steps": 400, "batch_size": 64, "eval_every": 200, "save_every": 400}
    return run(folder, **{**small, **changes})


def judged_by(setup) -> tuple[dict, metrics.Pretrained, np.ndarray]:
    """Returns the training digits, our classifier, and its features of them."""
    seen = _cli.arrays(setup.data.load(f"train[:{setup.training}]"))
    net = metrics.load_classifier(setup.data.name)
    return seen, net, net.apply(seen["image"] / (setup.model.levels - 1))[1]


def fitted(setup) -> train.Result:
    """Returns the model in setup.run.folder, after training it there if it is not complete."""
    training, held, _ = _pictures.three(setup.data, setup.training, 1237)
    return train.fit(ddpm.make, setup.model, setup.run, training, valid=held)
