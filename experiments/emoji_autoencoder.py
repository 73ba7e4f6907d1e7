"""Emoji as 8x8x4 latents: the first stage of latent diffusion (Rombach et al. 2022), and a VQ-VAE beside it

    python -m experiments.emoji_autoencoder     about 60 minutes on 2 cores; downloads nothing

Trains a KL autoencoder and a VQ-VAE (van den Oord et al. 2017) on emoji of 32x32 pixels. PSNR, a
mean over pictures, is measured on two held-out sets: known emoji in a skin tone that was kept out
(test), and emoji that were kept out in every tone (unseen). Beside it stand the principal
components of the training pictures: 256 of them are as many numbers as the latents. Shorter runs
with several weights of the KL term show distortion against rate. The paper has no numbers for this
set: the criteria are ours.

The trained model lies in the run's folder `kl`. The folder `measured` holds its averaged parameters
with the mean and standard deviation of the latents, for a diffusion model of them.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from aigc_jax import data, figures, metrics, train, vae
from aigc_jax.core import Optim
from aigc_jax.train import Run
from aigc_jax.vae import autoencoder, vq
from experiments import _cli, _emoji
from experiments._cli import Row, Scale, Source

STEPS, VQ_STEPS, ARM_STEPS = _emoji.AUTOENCODER_STEPS, 1500, 500
MODEL, NETS, optim = _emoji.AUTOENCODER, _emoji.NETS, _emoji.autoencoder_optim
VQ = vae.VQConfig(
    **NETS, scale=0.1, codes=512, code_dim=4, restart=0.1, ema=0.998, optim=optim(VQ_STEPS)
)


@dataclass(frozen=True)
class Setup:
    """Flags of emoji_autoencoder."""

    model: vae.AutoencoderConfig = MODEL
    vq: vae.VQConfig = VQ
    run: Run = Run("runs/emoji_autoencoder", STEPS, 32, eval_every=500, save_every=500)
    data: Source = Source("emoji")
    vq_steps: int = VQ_STEPS  # updates of the VQ-VAE
    betas: tuple[float, ...] = (0.03, 0.3, 3.0)  # rising weights of the KL term, for the curve
    arm_steps: int = ARM_STEPS  # updates for each of them
    components: tuple[int, ...] = (128, 256, 512)  # principal components to compare with

    def __post_init__(self):
        _cli.at_least(self, vq_steps=1, arm_steps=1)
        if len(self.betas) < 2 or list(self.betas) != sorted(set(self.betas)) or self.betas[0] < 0:
            raise ValueError(
                f"betas must be two or more rising numbers from 0 on, got {self.betas}"
            )
        most, asked = math.prod(self.model.shape), self.components
        if not asked or min(asked) < 1 or max(asked) > most or len(set(asked)) < len(asked):
            raise ValueError(f"components must hold different numbers in 1..{most}, got {asked}")


TINY = {"widths": (16, 16), "blocks": 0}
SMOKE = Setup(
    replace(MODEL, **TINY, ema=0.9, optim=optim(80)),
    replace(VQ, **TINY, codes=64, ema=0.9, optim=optim(40)),
    Run("runs/emoji_autoencoder-smoke", 80, 32, eval_every=80),
    vq_steps=40,
    betas=(0.03, 30.0),
    arm_steps=30,
    components=(16, 64),
)
SCALES = {
    "smoke": Scale(SMOKE, "tiny nets, 80 updates"),
    "cpu": Scale(
        Setup(),
        "emoji of 32x32, a net that begins at 16x16 and has no attention, a Gaussian likelihood "
        "without perceptual and adversarial losses (paper: 256x256 photographs)",
    ),
}
PSNR = "{model}: PSNR, {split} (dB, mean over pictures)"
TEST, UNSEEN = (PSNR.format(model="KL", split=split) for split in ("test", "unseen"))
VARIANCE = "KL: scaled latents of train, largest |variance - 1| of a channel"
USED = "VQ: codes that occur on train (%)"
BITS = "VQ: rate (bits per picture, all codes equally probable)"
RATE = "KL weights: smallest fall of the rate from one to the next (bits per picture, test)"
DISTORTION = "KL weights: smallest fall of PSNR from one to the next (dB, sampled latents, test)"
CRITERIA = {
    TEST: ">= 28",
    UNSEEN: ">= 25.5, above 256 principal components",
    USED: ">= 50",
    RATE: "> 0",
    DISTORTION: "> 0",
}
INVARIANTS = {TEST: "> 10", VARIANCE: "<= 1e-3", RATE: "> 0"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both autoencoders and the arms of the curve, and measures them."""
    splits = {split: setup.data.load(split) for split in ("train", "test", "unseen")}
    pictures = {
        split: _cli.arrays(part)["image"] / np.float32(255) for split, part in splits.items()
    }
    held = splits["unseen"]
    found, shown = _cli.kept(), {"pictures": held_out(pictures)}
    principal = components(setup, pictures)  # first, because it needs no training

    kl = train.fit(
        vae.make_autoencoder, setup.model, place(setup, folder / "kl"), splits["train"], valid=held
    )
    found += [Row("KL: parameters", _cli.parameters(kl)), *principal]
    params = measured(setup, kl, folder / "measured", splits["train"], pictures["train"])
    found += kl_rows(setup.model, params, pictures)
    shown["KL"] = in_chunks(kl_facts, setup.model, params, shown["pictures"])["images"]

    steps = {"steps": setup.vq_steps}
    coded = train.fit(
        vae.make_vq, setup.vq, place(setup, folder / "vq", **steps), splits["train"], valid=held
    )
    w = vq.weights(setup.vq, coded.state)
    found += [Row("VQ: parameters", _cli.parameters(coded)), *vq_rows(setup.vq, w, pictures)]
    shown["VQ"] = in_chunks(vq_facts, setup.vq, w, shown["pictures"])["images"]

    arms = []
    for beta in setup.betas:
        model = replace(setup.model, beta=beta, optim=optim(setup.arm_steps))
        at = place(setup, folder / f"beta{beta:g}", steps=setup.arm_steps)
        arm = train.fit(vae.make_autoencoder, model, at, splits["train"])
        arms.append(rate_and_psnr(setup.model, _cli.weights(arm), pictures["test"]))
        found += arm_rows(f"KL weight {beta:g}, {setup.arm_steps} updates", arms[-1])
    pairs = list(zip(arms, arms[1:], strict=False))
    found.append(Row(RATE, min(a[0] - b[0] for a, b in pairs)))
    found.append(Row(DISTORTION, min(a[1] - b[1] for a, b in pairs)))
    plot(setup, folder, shown, arms, found)
    return found


def place(setup: Setup, folder: Path, **changes) -> Run:
    """Returns the run of one model, in a folder of its own."""
    return replace(setup.run, folder=str(folder), **changes)


def held_out(pictures: dict) -> np.ndarray:
    """Returns the first 10 test pictures and the first 20 unseen ones."""
    return np.concatenate([pictures["test"][:10], pictures["unseen"][:20]])


# ------------------------------------------------------------------------------------ measurements


@partial(jax.jit, static_argnums=0)
def kl_facts(cfg: vae.AutoencoderConfig, params, x: jax.Array) -> dict:
    """Returns, per picture: latents, images of their means and of one sample, bound, KL term."""
    terms = autoencoder.elbo(cfg, params, x, jax.random.key(0))
    z = autoencoder.latents(cfg, params, x, jax.random.key(1))
    return {
        "nll_nats": -terms["elbo"],
        "kl_nats": terms["kl"],
        "latents": autoencoder.latents(cfg, params, x),
        "images": autoencoder.reconstruct(cfg, params, x),
        "sampled": autoencoder.images(cfg, params, z),
    }


@partial(jax.jit, static_argnums=0)
def vq_facts(cfg: vae.VQConfig, w, x: jax.Array) -> dict:
    """Returns, per picture: its codes and their image."""
    codes = vq.encode(cfg, w, x)
    return {"codes": codes, "images": vq.decode(cfg, w, codes)}


def in_chunks(function, cfg, weights, x: np.ndarray, size: int = 250):
    """Returns function(cfg, weights, x), made from equal chunks of x; the last one is filled up."""
    pieces = []
    for i in range(0, len(x), size):
        rows = np.minimum(np.arange(i, i + size), len(x) - 1)
        pieces.append(jax.device_get(function(cfg, weights, jnp.asarray(x[rows]))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(x)], *pieces)


def components(setup: Setup, pictures: dict) -> list[Row]:
    """Returns PSNR of the projections on the principal components of the training pictures."""
    flat = {split: x.reshape(len(x), -1).astype(np.float64) for split, x in pictures.items()}
    mean = flat["train"].mean(0)
    d, most = len(mean), max(setup.components)
    covariance = np.cov(flat["train"].T)
    axes = scipy.linalg.eigh(covariance, subset_by_index=(d - most, d - 1))[1]  # values rise
    rows = []
    for split in ("test", "unseen"):
        x = flat[split]
        for k in setup.components:
            near = axes[:, -k:]
            x_hat = np.clip(mean + (x - mean) @ near @ near.T, 0, 1)
            name = PSNR.format(model=f"{k} principal components", split=split)
            rows.append(Row(name, metrics.psnr(x, x_hat)))
    return rows


def measured(setup: Setup, kl: train.Result, folder: Path, training: data.Data, x: np.ndarray):
    """Returns the averaged parameters with the latents' mean and standard deviation.

    A run of one update at rate 0 keeps them in a folder, for `train.load`.
    """
    params = autoencoder.measure(kl.config, _cli.weights(kl), jnp.asarray(x))
    still = replace(kl.config, ema=0.0, optim=Optim("sgd", lr=0.0))
    run = place(setup, folder, steps=1)
    return train.fit(vae.make_autoencoder, still, run, training, params=params).state.params


def kl_rows(cfg: vae.AutoencoderConfig, params, pictures: dict) -> list[Row]:
    """Returns rows of the KL autoencoder: errors, bound, KL term, latents."""
    rows, facts = [], {}
    for split, x in pictures.items():
        facts[split] = in_chunks(kl_facts, cfg, params, x)
        name = PSNR.format(model="KL", split=split)
        rows.append(Row(name, metrics.psnr(x, facts[split]["images"])))
    nll, kl = (float(facts["test"][name].mean()) for name in ("nll_nats", "kl_nats"))
    per_pixel = nll / math.prod(cfg.shape)
    rows.append(Row("KL: negative bound, test (nats per pixel and channel)", per_pixel))
    rows.append(Row("KL: KL term, test (nats per picture)", kl))
    z = facts["train"]["latents"].astype(np.float64)
    rows.append(Row(VARIANCE, float(np.abs(z.var((0, 1, 2)) - 1).max())))
    mu = z * np.asarray(params["latents"]["std"])
    active = int((mu.var(0) > 0.01).sum())
    rows.append(Row(f"KL: active latents of {mu[0].size} (variance of the mean > 0.01)", active))
    return rows


def vq_rows(cfg: vae.VQConfig, w, pictures: dict) -> list[Row]:
    """Returns rows of the VQ-VAE: errors, use of the codes, rate."""
    rows = []
    for split, x in pictures.items():
        facts = in_chunks(vq_facts, cfg, w, x)
        rows.append(Row(PSNR.format(model="VQ", split=split), metrics.psnr(x, facts["images"])))
        if split == "train":
            count = vq.usage(jnp.asarray(facts["codes"]), cfg.codes)
            rows.append(Row(USED, 100 * float((count > 0).mean())))
            rows.append(
                Row(f"VQ: perplexity on train, of {cfg.codes}", float(vq.perplexity(count)))
            )
    bits = math.prod(cfg.latent_shape) * math.log2(cfg.codes)
    rows.append(Row(BITS, bits))
    return rows


def rate_and_psnr(cfg: vae.AutoencoderConfig, params, x: np.ndarray):
    """Returns the KL term in bits per picture, PSNR of sampled latents and of their means."""
    facts = in_chunks(kl_facts, cfg, params, x)
    psnr, means = (metrics.psnr(x, facts[name]) for name in ("sampled", "images"))
    return float(facts["kl_nats"].mean()) / math.log(2), psnr, means


def arm_rows(name: str, values) -> list[Row]:
    """Returns the rows of one point of the curve."""
    rate, psnr, means = values
    return [
        Row(f"{name}: rate (bits per picture, test)", rate),
        Row(f"{name}: PSNR, test, sampled latents (dB)", psnr),
        Row(f"{name}: PSNR, test, mean latents (dB)", means),
    ]


# ---------------------------------------------------------------------------------------- figures


@_cli.costs("emoji_autoencoder.png")
def plot(setup: Setup, folder: Path, shown: dict, arms: list, found: list[Row]) -> None:
    """Draws pictures over their reconstructions, the learning curves, and rate against distortion."""
    values = {row.quantity: row.ours for row in found}
    thirds = [slice(i, i + 10) for i in (0, 10, 20)]
    grid = np.concatenate(
        [shown[name][part] for part in thirds for name in ("pictures", "KL", "VQ")]
    )
    fig, (axes,) = figures.figure(1, 3, size=(15, 5))
    title = "pictures, KL, VQ; 10 of test, then 20 of unseen"
    figures.images(axes[0], grid, 10, title=title)
    curves = {name: _cli.history(folder / name.lower(), "psnr_db") for name in ("KL", "VQ")}
    figures.curves(axes[1], curves, xlabel="updates", ylabel="PSNR, unseen (dB)", title="training")
    for k in setup.components:
        level = values[PSNR.format(model=f"{k} principal components", split="unseen")]
        figures.level(axes[1], level, f"{k} components", at=0.98)
    axes[1].legend(loc=(0.6, 0.2))
    rate, psnr, _ = zip(*arms, strict=True)
    bits, of_codes = values[BITS], values[PSNR.format(model="VQ", split="test")]
    points = {
        "KL, by weight": (rate, psnr),
        f"VQ, {setup.vq.codes} codes": ([bits], [of_codes]),
    }
    labels = {"xlabel": "rate (bits per picture)", "ylabel": "PSNR, test (dB)"}
    figures.curves(axes[2], points, **labels, title="distortion against rate")
    axes[2].legend(loc="lower right")
    kl, coded = (
        f"{name} {values[PSNR.format(model=name, split='unseen')]:.1f}" for name in ("KL", "VQ")
    )
    latents = " x ".join(map(str, setup.model.latent_shape))
    weights = ", ".join(f"{beta:g}" for beta in setup.betas)
    lengths = f"KL {setup.run.steps} updates, VQ {setup.vq_steps}"
    caption = f"latents {latents}; {lengths}; right: KL weights {weights}, {setup.arm_steps} each; "
    caption += f"PSNR on unseen: {kl}, {coded} dB"
    figures.save(fig, folder / "emoji_autoencoder.png", caption)


if __name__ == "__main__":
    _cli.main("emoji_autoencoder")
