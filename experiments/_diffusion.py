"""What the diffusion scripts share: exact denoisers, bounds in bits, compiled sampling, and their figures."""

from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import ddpm, figures, train
from aigc_jax.ddpm.process import signal_and_noise
from aigc_jax.train.engine import compiler_options
from aigc_jax.train.progress import counted
from experiments import _cli


def denoise(x_t, signal, noise, centres: np.ndarray, std: float):
    """Returns E[eps | x_t] [B, d] where x_t = signal x_0 + noise eps and x_0 is a mixture of equal
    normals.

    Component k has the posterior of a normal, eps = noise (x_t - signal c_k) / v, and the weight
    softmax(-|x_t - signal c_k|^2 / 2v), with v = signal^2 std^2 + noise^2. signal and noise: [B,
    1].
    """
    v = signal**2 * std**2 + noise**2
    apart = x_t[:, None] - signal[:, None] * jnp.asarray(centres, jnp.float32)[None]
    share = jax.nn.softmax(-0.5 * (apart**2).sum(-1) / v, -1)
    return noise / v * (share[..., None] * apart).sum(1)


def exact_eps(schedule: ddpm.Schedule, centres: np.ndarray, std: float):
    """Returns the exact eps_fn(x_t, t) of the mixture, at the steps t of this schedule."""

    def eps_fn(x_t, t):
        signal, noise = signal_and_noise(schedule, t, x_t)
        return denoise(x_t, signal, noise, centres, std)

    return eps_fn


def mixture_nll(x: np.ndarray, centres: np.ndarray, std: float) -> np.ndarray:
    """Returns -log p(x) [N] in nats, float64, of equal normals of width std around the centres [K,
    d].
    """
    squared = ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(-1) / (2 * std**2)
    least = squared.min(-1, keepdims=True)
    d = x.shape[-1]
    inside = np.log(np.exp(least - squared).sum(-1)) - least[:, 0]
    return np.log(len(centres)) + d / 2 * np.log(2 * np.pi * std**2) - inside


def check_guidance(setup) -> None:
    """Raises ValueError unless w holds 0, and the model can be guided where it holds more."""
    if 0.0 not in setup.w:
        raise ValueError(f"w must hold 0, got {setup.w}")
    if max(setup.w) > 0 and not setup.model.unlabelled:
        raise ValueError("guidance needs training without labels: set model.unlabelled above 0")


def compiled(f, **options):
    """Compiles a function as train does: on some CPUs, convolutions need an option."""
    return jax.jit(f, compiler_options=compiler_options(jax.devices()[0]), **options)


def unit(x) -> np.ndarray:
    """Returns images in [-1, 1] as images in [0, 1], clipped."""
    return np.clip((np.asarray(x) + 1) / 2, 0, 1)


def bound(result: train.Result, x_0: np.ndarray, label, key, *, batch: int = 180) -> np.ndarray:
    """Returns every term of the bound, [T + 1] in bits per dim, as means over the images.

    x_0: [N, H, W, C] in [-1, 1]. Term 0 is the decoder's, the last is the prior's L_T (Ho et al.
    2020, eq. 5).
    """
    cfg, params = result.config, _cli.weights(result)

    def terms(params, x_0, label, key):
        schedule = ddpm.schedule_of(cfg, params)
        eps_fn = ddpm.eps_fn_of(cfg, params, label)
        return ddpm.vlb_terms(schedule, eps_fn, x_0, key, levels=cfg.levels, sigma2=cfg.variance)

    run, found = compiled(terms), []
    for i in counted("bound", range(0, len(x_0), batch)):
        given = None if label is None else jnp.asarray(label[i : i + batch])
        part = run(params, jnp.asarray(x_0[i : i + batch]), given, jax.random.fold_in(key, i))
        found.append(np.asarray(part, np.float64))
    return np.concatenate(found, -1).mean(-1) / (x_0[0].size * np.log(2))


def sampled_bound(
    result, examples: dict, key, *, terms: int, batch: int = 100
) -> tuple[float, float]:
    """Returns the bound of a set's arrays in bits per dim, from `terms` of T terms per image (0:
    all).

    The second number is the standard error over images. It holds both how the images differ and
    what the random draws of steps and noise add.
    """
    run = compiled(ddpm.make(replace(result.config, terms=terms)).evaluate)
    names = ("image", "label") if result.config.classes else ("image",)
    found = []
    for i in counted("bound", range(0, len(examples["image"]), batch)):
        part = {name: jnp.asarray(examples[name][i : i + batch]) for name in names}
        values = run(result.state, part, jax.random.fold_in(key, i))
        found.append(np.asarray(values["nll_bits_per_dim"], np.float64))
    bits = np.concatenate(found)
    return float(bits.mean()), float(bits.std(ddof=1) / len(bits) ** 0.5)


def prior(cfg: ddpm.Config, image: np.ndarray) -> float:
    """Returns L_T of a schedule that is not learned, bits per dim."""
    x_0 = ddpm.preprocess(cfg, {"image": image})
    nats = float(ddpm.prior_kl(ddpm.schedule_of(cfg, {}), x_0).mean())
    return nats / (x_0[0].size * np.log(2))


def histogram_bits(training: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Returns the bits per dim of test pixels under each pixel's histogram over the training
    images.

    One count is added per level.
    """
    counts = (
        np.stack([(training == level).sum(0) for level in range(levels)]).astype(np.float64) + 1
    )
    p = np.take_along_axis(counts / counts.sum(0), test.astype(int), 0)
    return float(-np.log2(p).mean())


def way(result: train.Result, key, *, n: int, label=None) -> tuple[np.ndarray, np.ndarray]:
    """Samples n pictures and returns every x_t and every x_0_hat, [T + 1, n, H, W, C] in [0, 1],
    noise first.
    """
    cfg = result.config

    def sample(state, key):
        params = _cli.weights(result._replace(state=state))
        k_start, k_way = jax.random.split(key)
        schedule, given = (
            ddpm.schedule_of(cfg, params),
            None if label is None else jnp.asarray(label),
        )
        x_T = jax.random.normal(k_start, (n, *cfg.shape))
        eps_fn = ddpm.eps_fn_of(cfg, params, given)
        x_0, (x_t, x_0_hat) = ddpm.sample_ddpm(
            schedule, eps_fn, x_T, k_way, sigma2=cfg.variance, clip=1.0, path=True
        )
        return jnp.concatenate([x_T[None], x_t]), x_0_hat

    x_t, x_0_hat = compiled(sample)(result.state, key)
    return unit(x_t), unit(x_0_hat)


def draw_way(ax, way: tuple[np.ndarray, np.ndarray], which: Iterable[int]) -> None:
    """Draws for each picture a row of x_t and, below it, the row of x_0_hat that the net predicts
    from it.
    """
    x_t, x_0_hat = way
    T = len(x_0_hat)
    left = [round(share * T) for share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)]
    pictures = []
    for i in which:
        pictures += [x_t[T - t, i] for t in (*left, 0)]
        pictures += [*(x_0_hat[T - t, i] for t in left), x_0_hat[-1, i]]
    steps = ", ".join(map(str, left))
    title = f"x_t, the predicted x_0 below it, with these steps left: {steps}, 0"
    figures.images(ax, np.stack(pictures), len(left) + 1, title=title)


def draw_bound(ax, result: train.Result, watched: str) -> None:
    """Draws the bound while training."""
    curve = _cli.history(result.folder, "nll_bits_per_dim")
    title = f"{watched}: bound from {result.config.terms} of {result.config.T} terms"
    figures.curves(
        ax, {watched: curve}, xlabel="updates", ylabel="bound (bits per dim)", title=title
    )


def draw_terms(ax, terms: dict[str, np.ndarray]) -> None:
    """Draws the terms L_0, L_1, ... of bounds {name: [T + 1]}, without the prior's."""
    curves = {name: (np.arange(1, len(each)), each[:-1]) for name, each in terms.items()}
    ylabel, title = "L_{t-1} (bits per dim)", "terms of the bound on test digits"
    figures.curves(ax, curves, xlabel="t", ylabel=ylabel, title=title)
    ax.set(xscale="log", yscale="log")


def about(setup) -> str:
    """Returns a sentence for captions: the data, the net, its steps and its updates."""
    model, run = setup.model, setup.run
    net = {"unet": "U-Net", "dit": "DiT", "mlp": "MLP"}[model.net.kind]
    updates = f"{run.steps:,} updates of {run.batch_size} images"
    widths = ", ".join(map(str, model.net.widths))
    return f"Trained on {setup.data.name}: {net} (widths {widths}), T = {model.T}, {updates}."


def plot(path, result: train.Result, samples: dict, way: tuple, caption: str, watched: str) -> None:
    """Draws what a trained model gives: samples {title: (pictures, columns)}, denoising, its bound.

    way: x_t and x_0_hat of the few pictures whose denoising is drawn, as from `way`.
    """
    fig, ((*grids, denoising, bound),) = figures.figure(1, len(samples) + 2)
    for ax, (title, (pictures, columns)) in zip(grids, samples.items(), strict=True):
        figures.images(ax, pictures, columns, title=title)
    draw_way(denoising, way, range(way[0].shape[1]))
    draw_bound(bound, result, watched)
    figures.save(fig, path, caption)
