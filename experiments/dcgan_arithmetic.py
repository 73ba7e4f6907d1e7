"""Arithmetic with latents, walks between them, and samples as a training set: Radford et al. 2016 (DCGAN), figs. 4 and 7, table 3

    python -m experiments.dcgan_arithmetic    about 35 minutes on 2 cores; MNIST (12 MB)

Downloads MNIST or takes its files as vae_manifold does. Three generators are trained: a DCGAN, a
DCGAN with labels, and the first GAN's MLP with labels.

- Arithmetic. The paper subtracts "neutral woman" from "smiling woman" and adds "neutral man"; each
  is the mean latent of three samples. Here a bold 3 minus a thin 3 plus a thin 7 has to be a bold
  7. The paper shows a few pictures. Here 500 triples are scored: the class by our classifier, bold
  as more ink than the median of that class. The same sum of pixels, and a random difference added
  to the thin 7, are the controls. A mean of three bold 7s is the oracle.
- Walks. The picture of a straight line between two latents should change in small steps.
- Table 3. The nearest of 50,000 labelled samples gives a test digit its class. The paper has 2.98 %
  error for DCGAN, 6.28 % for GAN and 3.1 % for as many real digits.

The nets are small. The DCGANs see 8 epochs, the MLP, which is faster, 31.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.train import Run
from experiments import _cli, _gan, _pictures
from experiments._cli import Row, Scale, Source

DCGAN = _gan.dcgan((32, 64), (32, 64), ema=0.99)
MLP = gan.Config(optim=_gan.ADAM, disc_optim=_gan.ADAM, ema=0.99)
ARMS = ("DCGAN without labels", "DCGAN", "MLP")


@dataclass(frozen=True)
class Setup:
    """Flags of dcgan_arithmetic. Classes of the nets that take labels are set to 10."""

    dcgan: gan.Config = DCGAN
    mlp: gan.Config = MLP
    mlp_steps: int = 12_000
    run: Run = Run("runs/dcgan_arithmetic", 3000, 128, save_every=1000, log_every=100, keep=1)
    data: Source = Source("mnist")
    training: int = 50_000
    samples: int = 50_000  # labelled samples of table 3
    pool: int = 20_000  # samples from which bold and thin digits are taken
    triples: int = 500

    def __post_init__(self):
        _cli.at_least(self, mlp_steps=1, training=1, samples=10, pool=100, triples=8)
        _pictures.check_known(self.data, "dcgan_arithmetic")


SMOKE = {"dcgan.shape": (8, 8, 1), "dcgan.levels": 17, "mlp": _gan.small(MLP)}
SMOKE |= {"dcgan.gen.widths": (16, 32), "dcgan.disc.widths": (16, 32)}
SMOKE |= {"run.folder": "runs/dcgan_arithmetic-smoke", "run.steps": 200, "data.name": "digits"}
SMOKE |= {"mlp_steps": 200, "training": 1237, "samples": 500, "pool": 2000, "triples": 20}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "digits 8x8, small nets, 200 updates"),
    "cpu": Scale(
        Setup(), "MNIST for faces; small nets, 3,000 updates of 128 (MLP: 12,000), one seed"
    ),
}
ERROR = "{}: nearest sample's class is wrong (% of test digits)"
REAL, BETTER = "training digits", "MLP minus DCGAN: nearest sample's class is wrong (%)"
TWICE = "DCGAN over training digits: nearest sample's class is wrong"
SAME = "bold a - thin a + thin b: samples of class b (%; oracle: mean of bold b)"
JOINT = "bold a - thin a + thin b: bold samples of class b (%; oracle: mean of bold b)"
THIN = "thin b: bold samples of class b (%)"
RANDOM = "thin b + a random difference of such means: bold samples of class b (%)"
PIXELS = "bold a - thin a + thin b, in pixels: bold samples of class b (%)"
JUMP = "walks: largest step over mean step, worst of 64"
CRITERIA = {BETTER: "> 0", TWICE: "<= 2", SAME: ">= 60", JOINT: ">= 60", JUMP: "< 4"}
INVARIANTS = {THIN: "< 50"}
PAPER = {"DCGAN": 2.98, "MLP": 6.28, REAL: 3.1}


def config(setup: Setup, arm: str) -> gan.Config:
    """Returns the model of an arm."""
    cfg = setup.mlp if arm == "MLP" else setup.dcgan
    return cfg if arm == "DCGAN without labels" else replace(cfg, classes=10)


# ------------------------------------------------------------------------------------ arithmetic


def ink(images: np.ndarray) -> np.ndarray:
    """Returns the mean of each image's pixels [N]."""
    return images.reshape(len(images), -1).mean(-1)


def concepts(images: np.ndarray, label: np.ndarray) -> dict[int, tuple[np.ndarray, ...]]:
    """Returns for each class the rows of its boldest and thinnest tenth, and its median ink.

    Classes of fewer than 30 images are left out.
    """
    found = {}
    for k in np.unique(label):
        rows = np.flatnonzero(label == k)
        if len(rows) >= 30:
            rows = rows[np.argsort(ink(images[rows]))]
            tenth = len(rows) // 10
            found[int(k)] = (rows[-tenth:], rows[:tenth], np.median(ink(images[rows])))
    return found


def triples(z: np.ndarray, found: dict, n: int) -> dict[str, np.ndarray]:
    """Returns n times mean latents of three samples: bold and thin a, bold and thin b; and b [n]."""
    rng = np.random.default_rng(0)
    latents = {name: [] for name in ("bold a", "thin a", "bold b", "thin b")}
    classes = []
    for _ in range(n):
        a, b = rng.choice(list(found), 2, replace=False)
        rows = found[a][0], found[a][1], found[b][0], found[b][1]
        for name, each in zip(latents, rows, strict=True):
            latents[name].append(z[rng.choice(each, 3, replace=False)].mean(0))
        classes.append(b)
    return {name: np.stack(each) for name, each in latents.items()} | {"class": np.array(classes)}


def sums(result: train.Result, means: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the pictures of the means, of their sum, and of the two controls."""
    out = {name: drawn(result, means[name]) for name in ("bold a", "thin a", "bold b", "thin b")}
    out["result"] = drawn(result, means["bold a"] - means["thin a"] + means["thin b"])
    # Two means of three latents of N(0, I) differ by N(0, 2 / 3).
    other = np.random.default_rng(1).normal(0, (2 / 3) ** 0.5, means["thin b"].shape)
    out["random"] = drawn(result, means["thin b"] + other.astype(np.float32))
    out["pixels"] = np.clip(out["bold a"] - out["thin a"] + out["thin b"], 0, 1)
    return out


def arithmetic(setup: Setup, result: train.Result) -> tuple[list[Row], np.ndarray]:
    """Returns the rows of the arithmetic, and the pictures of 8 triples and their results."""
    classify = metrics.load_classifier(setup.data.name).apply
    z = np.asarray(gan.noise(result.config, jax.random.key(1), setup.pool))
    pool = drawn(result, z)
    found = concepts(pool, classify(pool)[0].argmax(-1))
    if len(found) < 2:
        raise ValueError(f"samples of {len(found)} classes only: there is nothing to add")
    means = triples(z, found, setup.triples)
    out = sums(result, means)
    middle = np.array([found[b][2] for b in means["class"]])
    right = {name: classify(x)[0].argmax(-1) == means["class"] for name, x in out.items()}
    bold = {name: right[name] & (ink(x) > middle) for name, x in out.items()}

    def share(holds) -> float:
        return 100 * float(np.mean(holds))

    rows = [Row(SAME, share(right["result"]), oracle=share(right["bold b"]))]
    rows.append(Row(JOINT, share(bold["result"]), oracle=share(bold["bold b"])))
    names = {THIN: "thin b", RANDOM: "random", PIXELS: "pixels"}
    rows += [Row(words, share(bold[name])) for words, name in names.items()]
    shown = [out[name][:8] for name in ("bold a", "thin a", "thin b", "result")]
    return rows, np.stack(shown, 1).reshape(-1, *pool.shape[1:])


def drawn(result: train.Result, z: np.ndarray, chunk: int = 500) -> np.ndarray:
    """Returns the images [N, H, W, C] in [0, 1] of latents [N, Z]."""
    cfg, variables = result.config, gan.generator_of(result.config, result.state)
    draw = jax.jit(partial(gan.generate, cfg))
    images = [draw(variables, z[i : i + chunk]) for i in range(0, len(z), chunk)]
    return (np.concatenate(images) + 1) / 2


def walks(result: train.Result, steps: int = 33) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pictures [64, steps, ...] of straight lines between latents, and their steps.

    A step is the distance between neighbouring pictures.
    """
    ends = np.asarray(gan.noise(result.config, jax.random.key(2), 128)).reshape(64, 2, 1, -1)
    share = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    z = ends[:, 0] * (1 - share) + ends[:, 1] * share
    images = drawn(result, z.reshape(64 * steps, -1)).reshape(64, steps, -1)
    return images, np.linalg.norm(np.diff(images, axis=1), axis=-1)


# --------------------------------------------------------------------------------------- the run


def neighbour_rows(setup: Setup, results: dict, training: data.Data, test: data.Data) -> list[Row]:
    """Returns the rows of table 3, and their criteria's."""
    label = np.arange(setup.samples) % 10
    sets = {
        arm: (train.sample(results[arm], jax.random.key(0), n=len(label), chunk=500, label=label))
        for arm in ("DCGAN", "MLP")
    }
    labelled = {arm: (images, label) for arm, images in sets.items()}
    n = min(setup.samples, training.info.examples)
    labelled[REAL] = (_pictures.pixels(training, n), _cli.arrays(training)["label"][:n])
    real, own = _pictures.pixels(test), _cli.arrays(test)["label"]
    error = {
        name: 100 * metrics.nearest_neighbour_error(*pair, real, own)
        for name, pair in labelled.items()
    }
    paper = PAPER if setup.data.name == "mnist" else {}
    rows = [Row(ERROR.format(name), value, paper.get(name)) for name, value in error.items()]
    rows.append(Row(BETTER, error["MLP"] - error["DCGAN"]))
    return [*rows, Row(TWICE, error["DCGAN"] / error[REAL])]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains three generators, and measures arithmetic, walks and table 3."""
    training = setup.data.load(f"train[:{setup.training}]")
    results = {}
    for arm in ARMS:
        config(setup, arm).check(training.info)
    for arm in ARMS:
        steps = setup.mlp_steps if arm == "MLP" else setup.run.steps
        place = replace(setup.run, folder=str(folder / arm.replace(" ", "_")), steps=steps)
        results[arm] = train.fit(gan.make, config(setup, arm), place, training)
    rows, free = _cli.kept(), results["DCGAN without labels"]
    with _cli.costs(BETTER, TWICE):
        rows += neighbour_rows(setup, results, training, setup.data.load("test"))
    images, steps = walks(free)
    rows.append(Row(JUMP, float((steps.max(-1) / steps.mean(-1)).max())))
    with _cli.costs(SAME, JOINT):
        found, pictures = arithmetic(setup, free)
        rows += found
        plot(setup, folder, free, pictures, images)
    return rows


@_cli.costs("dcgan_arithmetic.png")
def plot(setup: Setup, folder: Path, result, pictures: np.ndarray, lines: np.ndarray) -> None:
    """Draws samples, walks between latents, and triples with their result."""
    shape = result.config.shape
    fig, ((samples, walk, sums),) = figures.figure(1, 3)
    shown = train.sample(result, jax.random.key(0), n=64)
    figures.images(samples, shown, 8, title="DCGAN: samples, not chosen")
    lines = lines[:8, ::4].reshape(-1, *shape)
    figures.images(walk, lines, 9, title="each row: a straight line of latents")
    figures.images(sums, pictures, 4, title="bold a, thin a, thin b, and bold a - thin a + thin b")
    caption = f"{setup.data.name}, {setup.run.steps:,} updates of {setup.run.batch_size} images."
    figures.save(fig, folder / "dcgan_arithmetic.png", caption)


if __name__ == "__main__":
    _cli.main("dcgan_arithmetic")
