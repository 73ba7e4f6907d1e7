"""What the diffusion scripts compute besides training, against independent mathematics."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aigc_jax import data, ddpm
from aigc_jax.core import Family
from aigc_jax.train import Result
from experiments import (
    _cli,
    _ddpm_arms,
    _diffusion,
    ddim_steps,
    ddpm_fashion,
    guidance,
    progressive,
    schedules,
    vdm_invariance,
)
from experiments import heartbeat_and_swiss_roll as known

CENTRES = np.array([[0.5, -1.0], [1.0, 1.0], [-1.2, 0.3]])


@pytest.mark.slow
def test_the_exact_denoiser_is_the_slope_of_the_log_density():
    """eps_hat = -noise times the slope of log q(x_t), by autodiff of the mixture's own density."""
    schedule = ddpm.cosine_schedule(50)
    x = jax.random.normal(jax.random.key(0), (7, 2))
    t = jnp.array([0, 3, 10, 20, 30, 40, 49])

    def log_q(x, t):
        a = jnp.asarray(schedule.alpha_bar, jnp.float32)[t]
        v = a * 0.3**2 + 1 - a
        apart = x[None] - jnp.sqrt(a) * jnp.asarray(CENTRES, jnp.float32)
        return jax.nn.logsumexp(-0.5 * (apart**2).sum(-1) / v)

    slope = jax.vmap(jax.grad(log_q))(x, t)
    noise = jnp.sqrt(jnp.asarray(ddpm.noise_variance(schedule), jnp.float32))[t][:, None]
    got = _diffusion.exact_eps(schedule, CENTRES, 0.3)(x, t)
    np.testing.assert_allclose(got, -noise * slope, rtol=2e-4, atol=2e-5)


def test_the_mixtures_density_is_that_of_its_normals():
    x = np.random.default_rng(0).normal(size=(20, 2))
    p = np.mean([stats.multivariate_normal(c, 0.3**2).pdf(x) for c in CENTRES], 0)
    np.testing.assert_allclose(_diffusion.mixture_nll(x, CENTRES, 0.3), -np.log(p), rtol=1e-12)


@pytest.mark.slow
def test_the_rolls_density_integrates_to_one_and_its_variance_is_one():
    side = np.linspace(-3.2, 3.2, 161)
    at = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    total = (2 ** known.roll_log2(at, 0.1, cells=2000)).sum() * (side[1] - side[0]) ** 2
    assert abs(total - 1) < 1e-3
    x = known.rolls(50_000, 0.01, 0).resident[0]["points"]
    assert abs(x.var(0).mean() - 1) < 0.02 and np.abs(x.mean(0)).max() < 0.02


def test_the_five_heartbeats():
    x = known.heartbeats(1000, 20, 0).resident[0]["points"]
    found, counts = np.unique(x, axis=0, return_counts=True)
    assert len(found) == 5 and (counts == 200).all() and (x.sum(1) == 4).all()
    assert all((np.diff(np.flatnonzero(row)) == 5).all() for row in found)


def test_the_rolls_levels_reach_from_its_width_to_noise():
    cfg = replace(known.ROLL, T=40, width=0.01)
    schedule = known.levels(cfg)
    np.testing.assert_allclose(
        np.sqrt(ddpm.noise_variance(schedule) / schedule.alpha_bar)[[0, -1]],
        [0.01, np.exp(2.5)],
        rtol=1e-4,
    )


@pytest.mark.slow
def test_the_roll_learns_mean_and_variance():
    """No net yet: v = 0 and raw = 0, so the variance is the geometric mean of beta and beta-tilde."""
    cfg = replace(known.ROLL, T=10, width=0.2, net=ddpm.NetConfig("mlp", (8,), dropout=0.0))
    family = known.make_roll(cfg)
    params = jax.jit(family.init)(jax.random.key(0)).params
    schedule = known.levels(cfg)
    t = jnp.array([1, 5, 9])
    noise2 = np.asarray(ddpm.noise_variance(schedule))
    tilde = schedule.beta * np.append(0, noise2[:-1]) / noise2
    x_t = jnp.ones((3, 2))
    eps_hat, raw = known.model(cfg, params)(x_t, t)
    np.testing.assert_allclose(eps_hat, noise2[t][:, None] ** 0.5 * x_t, rtol=1e-4)  # of v = 0
    got = np.asarray(ddpm.learned_variance(schedule, raw, t))
    np.testing.assert_allclose(
        got, np.sqrt(schedule.beta * tilde)[t][:, None] * np.ones((1, 2)), rtol=1e-4
    )


def test_the_tilted_density_by_its_definition():
    """w = 0 is the class's own normal on the grid; w = 3 weighs it with p(c|x)^3."""
    at = np.stack(np.meshgrid(guidance.SIDE, guidance.SIDE - guidance.SIDE.mean()), -1)
    each = np.stack(
        [stats.multivariate_normal(c, guidance.STD**2).pdf(at) for c in guidance.CENTRES]
    )
    for w in (0, 3):
        expected = each[0] * (each[0] / each.sum(0)) ** w
        np.testing.assert_allclose(
            guidance.tilted(w), expected / expected.sum(), rtol=1e-9, atol=1e-15
        )


def test_histogram_bits_are_those_of_counting():
    training, test = np.array([[0, 1], [0, 2], [1, 2]]), np.array([[0, 2], [2, 2]])
    bits = -np.log2([3 / 6, 3 / 6, 1 / 6, 3 / 6])
    np.testing.assert_allclose(
        _diffusion.histogram_bits(training, test, 3), bits.mean(), rtol=1e-12
    )


def test_beta_tilde_agrees_first_where_the_paper_says():
    assert schedules.first_agreeing(ddpm.linear_schedule(1000)) == 167
    assert schedules.first_agreeing(ddpm.cosine_schedule(1000)) == 185


def test_entropy_of_the_grid_and_its_ends_by_quadrature():
    entropy, ends = vdm_invariance.entropy_and_ends()
    side = np.linspace(-0.12, 0.12, 401)
    near = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2) + vdm_invariance.CENTRES[0]
    nll = _diffusion.mixture_nll(near, vdm_invariance.CENTRES, vdm_invariance.STD)
    one_mode = (np.exp(-nll) * nll).sum() * (side[1] - side[0]) ** 2
    np.testing.assert_allclose(entropy, 25 * one_mode, atol=1e-3)
    assert 0.005 < ends < 0.006


def test_every_schedule_of_vdm_has_the_same_ends_and_rises():
    for gamma in vdm_invariance.SCHEDULES.values():
        values = np.asarray(gamma(jnp.linspace(0, 1, 101)))
        np.testing.assert_allclose(
            values[[0, -1]], [vdm_invariance.LOW, vdm_invariance.HIGH], rtol=1e-4
        )
        assert (np.diff(values) > 0).all()


@pytest.mark.slow
def test_bent_time_makes_no_estimate_quieter_than_the_least():
    straight, least = vdm_invariance.least_variance()
    setup = replace(vdm_invariance.SCALES["smoke"].setup, samples=200_000)
    bent = vdm_invariance.estimates(vdm_invariance.SCHEDULES["bent"], setup, 0).var()
    linear = vdm_invariance.estimates(vdm_invariance.SCHEDULES["linear"], setup, 1).var()
    assert least < straight and bent > least
    np.testing.assert_allclose(linear, straight, rtol=0.05)


# ----------------------------------------------------------------------------------------------- an untrained model

TINY = ddpm.Config(
    shape=(4, 4, 1),
    levels=17,
    classes=2,
    T=21,
    net=ddpm.NetConfig("mlp", (8,), dropout=0.0),
    ema=0.0,
)


def untrained(seed=0):
    family = ddpm.make(TINY)
    info = data.from_arrays({"image": np.zeros((2, 4, 4, 1), np.uint8), "label": np.arange(2)}).info
    return Result(Family(*family), jax.jit(family.init)(jax.random.key(seed)), TINY, info, None)


@pytest.mark.slow
def test_bits_sent_and_the_decoders_make_the_bound():
    """Rate after the last step plus the decoder's bits is the bound, by its own function with the same noise."""
    result, x_0, label = (
        untrained(),
        np.linspace(-1, 1, 48).reshape(3, 4, 4, 1).astype(np.float32),
        np.array([0, 1, 0]),
    )
    rate, decoder, error = progressive.coding(result, x_0, label, jax.random.key(1))
    k_terms, _ = jax.random.split(jax.random.key(1))
    terms = _diffusion.bound(result, x_0, label, k_terms)
    np.testing.assert_allclose(rate[-1] + decoder, terms.sum(), rtol=1e-6)
    assert rate.shape == error.shape == (21,) and (np.diff(rate) >= 0).all()
    np.testing.assert_allclose(rate[0], terms[-1], rtol=1e-6)


@pytest.mark.parametrize("t", [0, 21])
def test_interpolants_end_at_pixels_or_forget(t):
    result, shares = untrained(), np.linspace(0, 1, 3)
    a, b = (
        np.asarray(jax.random.uniform(jax.random.key(i), (2, 4, 4, 1), minval=-1)) for i in (1, 2)
    )
    got = progressive.interpolants(result, a, b, jax.random.key(3), t=t, shares=shares)
    if t == 0:
        np.testing.assert_allclose(got[1], (a + b) / 2, atol=1e-6)
        np.testing.assert_allclose(got[[0, 2]], [a, b], atol=1e-6)
    else:  # an untrained net sees nothing: what is left of a and b is a hundredth
        other = progressive.interpolants(result, -a, -b, jax.random.key(3), t=t, shares=shares)
        assert np.abs(got - other).mean() < 0.1


@pytest.mark.slow
def test_decodings_share_their_start_and_not_their_noise():
    result, x_0 = untrained(), np.zeros((2, 4, 4, 1), np.float32)
    few = progressive.decodings(result, x_0, np.array([0, 1]), jax.random.key(0), t=2, times=3)
    many = progressive.decodings(result, x_0, np.array([0, 1]), jax.random.key(0), t=21, times=3)
    assert few.shape == (3, 2, 4, 4, 1) and 0 < few.var(0).mean() < many.var(0).mean()


@pytest.mark.parametrize(
    ("script", "change", "words"),
    [
        (ddim_steps, {"steps": (200, 1000)}, "^steps must hold one up to 100"),
        (ddim_steps, {"digit_steps": (50, 100)}, "digit_steps must hold one up to 20"),
        (ddim_steps, {"digits": 1}, "digits must be at least 100, got 1"),
        (
            progressive,
            {"pairs": 200},
            "pairs must lie in 10..180, half of the test set, got 200",
        ),
        (
            schedules,
            {"data": _cli.Source("mnist")},
            "^schedules measures by our classifier of digits, not of mnist",
        ),
        (guidance, {"w": (4.0, 0.0)}, "w must grow from 0"),
        (guidance, {"samples": 1}, "samples must be at least 100, got 1"),
        (
            guidance,
            {"model": replace(guidance.Setup.model, unlabelled=0.0)},
            "guidance needs training without labels: set model.unlabelled above 0",
        ),
        (ddpm_fashion, {"w": (1.0,)}, r"w must hold 0, got \(1.0,\)"),
        (
            vdm_invariance,
            {"steps": (8,)},
            r"steps must be two or more rising numbers above 1, got \(8,\)",
        ),
    ],
)
def test_what_could_not_be_measured_is_refused_before_training(script, change, words):
    with pytest.raises(ValueError, match=words):
        replace(script.SCALES["cpu"].setup, **change)


def test_the_rows_of_an_arm_are_means_over_seeds():
    rows = _ddpm_arms.rows("a", ("bits", "score"), (3.0, None), [(1.0, 5.0), (3.0, 5.0)])
    assert rows == [
        ("a: bits", 2.0, 3.0, 1.0, None, None),
        ("a: score", 5.0, None, 0.0, None, None),
    ]


def test_the_roll_is_of_the_plane():
    with pytest.raises(ValueError, match="roll.dim must be 2, got 3"):
        known.RollConfig(dim=3)


def test_minutes_go_on_where_a_stopped_run_left_them(tmp_path):
    lines = [
        {"step": step, "valid": {"minutes": minutes}} for step, minutes in ((10, 1.5), (20, 3.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _cli.clock(str(tmp_path))(None, None, 30)["minutes"] >= 3.0
    assert _cli.clock(str(tmp_path / "new"))(None, None, 10)["minutes"] < 1.5
