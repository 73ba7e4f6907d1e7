"""Bounds against a model whose log p(x) is known: a linear-Gaussian VAE is probabilistic PCA

    python -m experiments.ppca_exact    under 30 s on 2 cores; downloads nothing, trains nothing

With orthogonal loadings the exact posterior of probabilistic PCA (Tipping & Bishop 1999) has a
diagonal covariance. So `vae.Encoder` without hidden layers can be set to it by hand. Expect, in
float64: with the exact posterior every log weight equals log p(x). With a wrong one the ELBO equals
L_1, and L_1 <= L_10 <= L_100 <= L_5000 <= log p(x) (Burda et al. 2016, theorem 1).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, figures, vae
from aigc_jax.data import points
from experiments import _cli
from experiments._cli import Row, Scale


@dataclass(frozen=True)
class Setup:
    """Flags of ppca_exact."""

    folder: str = "runs/ppca_exact"
    dim: int = 30  # of x
    latents: int = 10
    std: float = 0.3  # of the noise on x
    examples: int = 200  # x drawn from the model
    k: int = 5000  # draws of z per x, for the largest bound
    wider: float = 1.3  # the wrong posterior: its standard deviation, as a factor
    # The wrong posterior's mean: off by so many standard deviations, in 5 latents.
    shift: float = 0.3
    seed: int = 0

    def __post_init__(self):
        _cli.at_least(self, latents=5, examples=2)
        if self.k < 1000 or self.k % 100:
            raise ValueError(f"k must be at least 1000 and a multiple of 100, got {self.k}")


SMOKE = Setup(folder="runs/ppca_exact-smoke", examples=100, k=1000)
SCALES = {
    "smoke": Scale(SMOKE, "fewer examples, 1,000 draws"),
    "cpu": Scale(Setup(), "exact mathematics, no paper protocol"),
}

CONSTANT = "exact posterior: largest |log weight - log p(x)| (nats)"
GAP = "wrong posterior: |ELBO - L_1| (nats; +- s.e. of the difference)"
GAP_SE = "wrong posterior: |ELBO - L_1| in standard errors"
RISE = "wrong posterior: smallest step L_1, L_10, L_100, L_k, log p(x), in s.e. of the paired difference"
GAIN = "wrong posterior: L_10 - L_1 (nats; +- s.e.)"
LEFT = "wrong posterior: |log p(x) - L_k| (nats; +- s.e.)"
CRITERIA = {CONSTANT: "< 1e-4", GAP_SE: "< 3", RISE: ">= -3", GAIN: "> 0.2", LEFT: "< 0.05"}
INVARIANTS = CRITERIA


def log_p(x: np.ndarray, w: np.ndarray, b: np.ndarray, std: float) -> np.ndarray:
    """Returns log N(x; b, W W^T + std^2 I) in nats, [N], for x [N, dim] (eq. 3)."""
    root = np.linalg.cholesky(w @ w.T + std**2 * np.eye(len(b)))
    z = np.linalg.solve(root, (x - b).T)
    return -0.5 * (z**2).sum(0) - np.log(np.diag(root)).sum() - 0.5 * len(b) * np.log(2 * np.pi)


def linear_vae(w, b, std: float, *, wider: float = 1.0, shift: float = 0.0):
    """Returns (cfg, params) of a VAE that is PPCA. Its encoder is the exact posterior; `wider` and
    `shift` make it wrong.

    q(z|x) = N(M^-1 W^T (x - b), std^2 M^-1), M = W^T W + std^2 I (eq. 6), diagonal because the
    columns of W are orthogonal.
    """
    dim, k = w.shape
    m = np.diag(w.T @ w) + std**2
    sd, to_mu = std / np.sqrt(m), w / m
    off = shift * sd * (np.arange(k) < 5)
    cfg = vae.Config(shape=(1, dim, 1), latent_dim=k, hidden=(), likelihood="gaussian", sigma=std)
    kernel = np.concatenate([to_mu, np.zeros((dim, k))], 1)
    bias = np.concatenate([off - b @ to_mu, 2 * np.log(wider * sd)])
    encoder = {"Gaussian_0": {"Dense_0": {"kernel": kernel, "bias": bias}}}
    decoder = {"Dense_0": {"kernel": w.T, "bias": b}}
    params = {"encoder": {"params": encoder}, "decoder": {"params": decoder}}
    return cfg, jax.tree.map(jnp.asarray, params)


def bounds(log_w: np.ndarray, k: int) -> np.ndarray:
    """Returns L_k of every x, [N], from log weights [K, N]: log-mean-exp, averaged over groups."""
    groups = log_w[: len(log_w) // k * k].reshape(-1, k, log_w.shape[1])
    top = groups.max(1, keepdims=True)
    return (np.log(np.exp(groups - top).mean(1)) + top[:, 0]).mean(0)


def log_weights(cfg: vae.Config, params, images, key, k: int) -> np.ndarray:
    """Returns log weights [k, N], a hundred draws at a time."""
    hundred = jax.jit(partial(vae.log_weights, cfg, k=100))
    keys = [jax.random.fold_in(key, i) for i in range(k // 100)]
    return np.concatenate([hundred(params, images, key) for key in keys])


def run(setup: Setup, folder: Path) -> list[Row]:
    """Measures everything in float64, with numpy's own log p as the oracle."""
    sizes = {"dim": setup.dim, "latents": setup.latents}
    x = data.load("ppca", "test", examples=setup.examples, std=setup.std, **sizes)
    x = _cli.arrays(x)["points"].astype(np.float64)
    folder.mkdir(parents=True, exist_ok=True)
    w, b = points.ppca_parameters(**sizes)
    truth = log_p(x, w, b, setup.std)
    k_exact, k_wrong, k_elbo = jax.random.split(jax.random.key(setup.seed), 3)
    with jax.enable_x64(True):
        images = jnp.asarray(x.reshape(-1, 1, setup.dim, 1))
        exact = log_weights(*linear_vae(w, b, setup.std), images, k_exact, 1000)
        cfg, params = linear_vae(w, b, setup.std, wider=setup.wider, shift=setup.shift)
        log_w = log_weights(cfg, params, images, k_wrong, setup.k)
        elbo = jax.jit(lambda key: vae.elbo(cfg, params, images, key)["elbo"])
        elbos = np.stack([elbo(jax.random.fold_in(k_elbo, i)) for i in range(1000)])
    assert log_w.dtype == np.float64
    levels = {f"L_{k}": bounds(log_w, k) for k in (1, 10, 100, setup.k)} | {"log p": truth}
    found = _cli.kept()
    found += compare(exact, log_w, elbos, levels)
    plot(setup, folder, levels)
    return found


def compare(exact: np.ndarray, log_w: np.ndarray, elbos: np.ndarray, levels: dict) -> list[Row]:
    """Returns the rows. The x are given, so errors come from the independent draws of each x."""
    *bound, truth = levels.values()
    gaps = [later - earlier for earlier, later in zip(bound, [*bound[1:], truth], strict=True)]
    gap, left = elbos.mean(0) - levels["L_1"], truth - bound[-1]
    variance = elbos.var(0, ddof=1) / len(elbos) + log_w.var(0, ddof=1) / len(log_w)
    gap_se = np.sqrt(variance.sum()) / len(truth)

    def se(difference):
        return difference.std(ddof=1) / np.sqrt(len(difference))

    return [
        Row("log p(x), mean over the examples (nats)", bound[-1].mean(), oracle=truth.mean()),
        Row(CONSTANT, float(np.abs(exact - truth).max()), oracle=0.0),
        Row(GAP, float(abs(gap.mean())), error=float(gap_se), oracle=0.0),
        Row(GAP_SE, float(abs(gap.mean()) / gap_se)),
        Row(RISE, float(min(g.mean() / se(g) for g in gaps))),
        Row(GAIN, float(gaps[0].mean()), error=float(se(gaps[0]))),
        Row(LEFT, float(abs(left.mean())), error=float(se(left)), oracle=0.0),
    ]


@_cli.costs("ppca_exact.png")
def plot(setup: Setup, folder: Path, levels: dict) -> None:
    """Draws how far each bound lies below log p(x)."""
    fig, ((ax,),) = figures.figure(1, 1)
    below = [float((levels["log p"] - level).mean()) for level in levels.values()][:-1]
    curves = {"wrong posterior": ([1, 10, 100, setup.k], below)}
    title = "importance-weighted bounds approach log p(x)"
    figures.curves(ax, curves, xlabel="draws k", ylabel="log p(x) - L_k (nats)", title=title)
    ax.set(xscale="log", yscale="log")
    wrong = f"sd times {setup.wider}, mean off by {setup.shift} sd in 5 latents"
    sizes = f"{setup.dim} dimensions, {setup.latents} latents, {setup.examples} examples"
    caption = f"Probabilistic PCA: {sizes}, float64. The posterior is wrong: {wrong}."
    figures.save(fig, folder / "ppca_exact.png", caption)


if __name__ == "__main__":
    _cli.main("ppca_exact")
