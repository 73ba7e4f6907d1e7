"""Diffusion against exact mathematics: Gaussian data, whose score, bound and flow are known in closed form; mixtures;
brute-force Bayes."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aigc_jax import ddpm
from aigc_jax.core import Optim
from aigc_jax.ddpm import bounds, process, samplers, schedules

LINEAR, COSINE = ddpm.linear_schedule(1000), ddpm.cosine_schedule(1000)
STRAIGHT = ddpm.straight_schedule(1000)
SHORT = {
    "linear": ddpm.linear_schedule(25),
    "cosine": ddpm.cosine_schedule(12),
    "straight": ddpm.straight_schedule(12),
}


def key(i):
    return jax.random.key(i)


def normal(i, *shape):
    return jax.random.normal(key(i), shape)


def levels(schedule):
    """signal^2 and noise^2 [S], float64."""
    return np.asarray(schedule.alpha_bar, np.float64), np.asarray(ddpm.noise_variance(schedule))


def natural(schedule):
    """The prediction that has numbers at all levels of a schedule."""
    return "eps" if schedule.preserves_variance else "velocity"


def exact(schedule, cov, mean=0.0, prediction="eps"):
    """The best prediction for data N(mean, cov), cov [d, d] or a number, as a function of (x_t, t).

    x_t - signal mean, times noise C^-1 for eps and signal cov C^-1 for x_0 - mean, with C = signal^2 cov + noise^2 I.
    """
    cov, (a, n) = np.atleast_2d(np.asarray(cov, np.float64)), levels(schedule)
    a, n, eye = a[:, None, None], n[:, None, None], np.eye(len(cov))
    inverse = np.linalg.inv(a * cov + n * eye)
    eps, x_0 = n**0.5 * inverse, a**0.5 * cov @ inverse
    matrices, of_mean = {"eps": (eps, 0), "x_0": (x_0, 1), "velocity": (eps - x_0, -1)}[prediction]
    matrices, roots = (jnp.asarray(f, jnp.float32) for f in (matrices, a[:, :, 0] ** 0.5))

    def fn(x, t):
        return jnp.einsum("bij,bj->bi", matrices[t], x - roots[t] * mean) + of_mean * mean

    return fn


def exact_eps(schedule, cov, mean=0.0):
    return exact(schedule, cov, mean)


# -------------------------------------------------------------------------------------------------------- the process


def test_schedules_are_those_of_the_papers():
    assert (
        round(float(LINEAR.alpha_bar[499]), 4) == 0.0786
        and round(float(COSINE.alpha_bar[499]), 4) == 0.4938
    )
    for schedule, first in ((LINEAR, 167), (COSINE, 185)):
        share = schedules.beta_tilde(schedule) / schedule.beta
        assert int(np.argmax(share >= 0.99)) == first
    np.testing.assert_allclose(LINEAR.beta[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    assert COSINE.beta.max() <= 0.999 and COSINE.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(ddpm.linear_schedule(200).beta[[0, -1]], [5e-4, 0.1], rtol=1e-12)
    straight = ddpm.discretise(lambda u: -6 + 11 * u, 23)
    np.testing.assert_allclose(
        straight.alpha_bar, 1 / (1 + np.exp(np.linspace(-6, 5, 23))), rtol=1e-5
    )
    assert len(ddpm.discretise(lambda u: -6 + 11 * u, 1).t) == 1


@pytest.mark.parametrize("T", [1, 20])
def test_a_schedule_whose_beta_reaches_one_is_refused(T):
    with pytest.raises(ValueError, match="linear_schedule needs T >= 21"):
        ddpm.linear_schedule(T)
    assert len(ddpm.cosine_schedule(T).beta) == T


def test_a_traced_schedule_keeps_its_digits_where_the_noise_is_least():
    """VDM's ends, a thousand levels: 1 - alpha_bar is 2e-6 there, and beta a fiftieth of it."""
    got = jax.jit(lambda g: ddpm.discretise(lambda u: g + 18.3 * u, 1000))(-13.3)
    g = -13.3 + 18.3 * np.linspace(0, 1, 1000)
    noise2 = 1 / (1 + np.exp(-g))
    beta = np.append(noise2[0], 1 - (1 - noise2[1:]) / (1 - noise2[:-1]))
    np.testing.assert_allclose(ddpm.noise_variance(got), noise2, rtol=1e-5)
    np.testing.assert_allclose(got.beta, beta, rtol=1e-3)
    few = ddpm.respace(got, 100)
    np.testing.assert_allclose(
        np.cumprod(1 - np.asarray(few.beta, np.float64)), 1 - noise2[few.t], rtol=1e-4
    )


@pytest.mark.parametrize(
    "gamma", [lambda u: -10 + 130 * u, lambda u: 5 - 10 * u], ids=["too far", "falling"]
)
def test_a_schedule_without_a_way_back_is_refused(gamma):
    with pytest.raises(ValueError, match="betas of a schedule must lie between 0 and 1: at step"):
        ddpm.discretise(gamma, 10)
    beta = np.linspace(0.01, 1, 10)
    schedule = ddpm.Schedule(beta, np.cumprod(1 - beta), np.arange(10))
    for call in (ddpm.sample_ddpm, ddpm.vlb):
        with pytest.raises(ValueError, match="at step 9 it is 1"):
            call(schedule, lambda x, t: x, normal(0, 3, 2), key(1))
    with pytest.raises(ValueError, match="at step 9 it is 1"):
        ddpm.sample_heun(schedule, lambda x, t: x, normal(0, 3, 2), steps=10)


def test_only_step_0_has_the_variance_of_step_1():
    """Of levels that flatten beta-tilde falls with t: no other step may be lifted."""
    schedule = ddpm.discretise(lambda u: -1 + 3 * u**0.25, 20)
    tilde, t = np.asarray(schedules.beta_tilde(schedule)), jnp.arange(20)
    expected = np.append(tilde[1], tilde[1:])
    x = jnp.zeros((20, 1))
    np.testing.assert_allclose(
        bounds.positive_variance(schedule, "beta_tilde", x, t)[:, 0], expected, rtol=1e-5
    )
    np.testing.assert_allclose(ddpm.learned_variance(schedule, x - 1, t)[:, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(
        ddpm.learned_variance(schedule, x + 1, t)[:, 0], schedule.beta, rtol=1e-4
    )


@pytest.mark.slow
def test_parallel_noises_are_mixed_in_a_line():
    a = normal(0, 4, 3)
    np.testing.assert_allclose(ddpm.slerp(a, 1.0001 * a, 0.5), a, rtol=2e-4)
    mixed = ddpm.slerp(a, normal(1, 4, 3), 0.3)
    assert (
        np.isfinite(mixed).all()
        and np.isfinite(jax.grad(lambda a: ddpm.slerp(a, a, 0.5).sum())(a)).all()
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: ddpm.sample_ddpm(COSINE, lambda x, t: x, x, key(0), start=1001),
            "start counts levels, 0..1000",
        ),
        (
            lambda x: ddpm.sample_ddpm(COSINE, lambda x, t: x, x, key(0), start=-3),
            "start counts levels, 0..1000",
        ),
        (
            lambda x: ddpm.sample_ddim(COSINE, lambda x, t: x, x, key(0), steps=5, eta=3.0),
            "eta must lie in 0..1",
        ),
        (
            lambda x: ddpm.sample_ddim(COSINE, lambda x, t: x, x, key(0), steps=5, eta=-1.0),
            "eta must lie in 0..1",
        ),
        (
            lambda x: ddpm.sample_ddim(
                COSINE, lambda x, t: x, x, key(0), steps=5, eta=0.5, sigma_hat=True
            ),
            "be 0 with sigma_hat",
        ),
        (
            lambda x: ddpm.ode_log_likelihood(COSINE, lambda x, t: x, x, key(0), steps=1),
            "steps counts levels, 2..1000",
        ),
    ],
)
def test_samplers_refuse_what_they_would_do_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(0, 3, 2))


def test_steps_are_spaced_as_said():
    assert schedules.spaced(1000, 4).tolist() == [0, 333, 666, 999] and schedules.spaced(
        1000, 1
    ).tolist() == [999]
    assert schedules.spaced(1000, 4, "paper").tolist() == [0, 250, 500, 750]
    assert schedules.spaced(10, 10, "quadratic").tolist() == list(range(10))
    for T in (1, 2, 7, 50, 1000):
        for steps in {1, 2, T // 3, T // 2, T - 1, T} - {0}:
            for spacing in ("uniform", "quadratic"):
                found = schedules.spaced(T, min(steps, T), spacing)
                assert (
                    (np.diff(found) > 0).all()
                    and found[-1] == T - 1
                    and (found[0] == 0 or steps == 1)
                )
    for bad, words in (
        ((10, 11), r"steps must lie in 1..10, got 11"),
        ((10, 0), r"steps must lie in 1..10, got 0"),
        ((10, 3, "paper"), "needs steps that divide T = 10, got 3"),
        ((10, 3, "log"), "spacing must be one of uniform, paper, quadratic"),
    ):
        with pytest.raises(ValueError, match=words):
            schedules.spaced(*bad)


PATHS = {
    "1000": LINEAR,
    "12": SHORT["cosine"],
    "respaced": ddpm.respace(LINEAR, 7),
    "straight": SHORT["straight"],
    "straight, respaced": ddpm.respace(STRAIGHT, 7, "quadratic"),
    "wide": schedules.from_levels(np.linspace(0.9, 0.5, 6) ** 2, np.linspace(0.3, 3, 6) ** 2),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_is_bayes_rule(name):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), as a product of two normals in x_{t-1}."""
    schedule = PATHS[name]
    a, n = levels(schedule)
    x_0, x_t = (np.asarray(normal(i, 5, 2), np.float64) for i in (1, 2))
    for t in {*range(0, len(a), max(1, len(a) // 5)), len(a) - 1}:
        mean, variance = ddpm.q_posterior(
            schedule, jnp.asarray(x_0), jnp.asarray(x_t), jnp.full(5, t)
        )
        if t == 0:
            np.testing.assert_allclose(mean, x_0, atol=1e-6)
            assert not variance.any()
            continue
        r, beta = (a[t] / a[t - 1]) ** 0.5, schedule.beta[t]
        np.testing.assert_allclose(r**2 * n[t - 1] + beta, n[t], rtol=1e-9)  # the marginal of x_t
        precision = r**2 / beta + 1 / n[t - 1]
        expected = (r / beta * x_t + a[t - 1] ** 0.5 / n[t - 1] * x_0) / precision
        np.testing.assert_allclose(mean, expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(variance.reshape(-1), 1 / precision, rtol=1e-5)


@pytest.mark.parametrize("schedule", [LINEAR, STRAIGHT], ids=["linear", "straight"])
def test_a_respaced_process_has_the_same_marginals(schedule):
    few = ddpm.respace(schedule, 10, "quadratic")
    (a, n), (every_a, every_n) = levels(few), levels(schedule)
    np.testing.assert_allclose(a, every_a[few.t], rtol=1e-12)
    np.testing.assert_allclose(n, every_n[few.t], rtol=1e-12)
    step, variance = schedules.step_signal_squared(few), 0.0
    np.testing.assert_allclose(np.cumprod(step), a, rtol=1e-9)
    for i in range(10):  # one step after the other
        variance = step[i] * variance + few.beta[i]
        np.testing.assert_allclose(variance, n[i], rtol=1e-9)
    x_0, eps = normal(1, 4, 3), normal(2, 4, 3)
    for i in (0, 9):
        same = ddpm.q_sample(schedule, x_0, jnp.full(4, int(few.t[i])), eps)
        np.testing.assert_array_equal(ddpm.q_sample(few, x_0, jnp.full(4, i), eps), same)


def test_a_schedule_knows_its_signal_and_noise():
    for schedule in (LINEAR, COSINE, ddpm.respace(LINEAR, 10), STRAIGHT):
        power = 2 if schedule.preserves_variance else 1
        np.testing.assert_allclose(schedule.signal**power + schedule.noise**power, 1, rtol=1e-12)
        t, x_0, eps = jnp.array([0, 4, 9]), normal(1, 3, 2), normal(2, 3, 2)
        expected = schedule.signal[t][:, None] * x_0 + schedule.noise[t][:, None] * eps
        np.testing.assert_allclose(
            ddpm.q_sample(schedule, x_0, t, eps), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("T", [1, 2, 12, 1000])
def test_a_straight_schedule_is_the_line_from_x_0_to_noise(T):
    schedule, u = ddpm.straight_schedule(T), np.arange(1, T + 1) / T
    np.testing.assert_allclose(schedule.noise, u, rtol=1e-14)
    np.testing.assert_allclose(schedule.signal, 1 - u, atol=1e-14)
    assert (
        schedule.signal[-1] == 0 and schedule.noise[-1] == 1 and schedule.t.tolist() == [*range(T)]
    )
    earlier, beta = (
        u - 1 / T,
        np.ones(T),
    )  # in exact fractions (u - u') (u + u' - 2 u u') / (1 - u')^2
    beta[:] = (u - earlier) * (u + earlier - 2 * u * earlier) / (1 - earlier) ** 2
    np.testing.assert_allclose(schedule.beta, beta, rtol=1e-9)
    x_0 = normal(0, 3, 2)
    np.testing.assert_array_equal(
        ddpm.prior_kl(schedule, x_0), np.zeros(3)
    )  # nothing of x_0 is left


def test_levels_that_preserve_variance_make_the_same_tables():
    general = schedules.from_levels(COSINE.alpha_bar, ddpm.noise_variance(COSINE))
    assert COSINE.preserves_variance and not general.preserves_variance
    np.testing.assert_allclose(general.beta, COSINE.beta, rtol=1e-9)
    for table in (
        schedules.beta_tilde,
        schedules.step_signal_squared,
        schedules.log_sigma,
        process.posterior_factors,
    ):
        np.testing.assert_allclose(table(general), table(COSINE), rtol=1e-9)
    for spacing in schedules.SPACINGS:
        one, other = (ddpm.respace(s, 10, spacing) for s in (general, COSINE))
        np.testing.assert_array_equal(one.t, other.t)
        np.testing.assert_allclose(one.beta, other.beta, rtol=1e-9)


def test_paper_spacing_of_a_path_that_does_not_preserve_variance_is_refused():
    with pytest.raises(ValueError, match="'paper' begins at step 90, where x_t has another"):
        ddpm.respace(ddpm.straight_schedule(100), 10, "paper")
    ddpm.respace(ddpm.straight_schedule(10), 10, "paper")


@pytest.mark.parametrize(
    ("signal", "noise", "words"),
    [
        ([0.9, 0.0, 0.0], [0.1, 0.5, 1.0], "only the last signal .* at step 1 alpha_bar is 0"),
        ([0.9, np.nan, 0.0], [0.1, 0.5, 1.0], "only the last signal .* at step 1 alpha_bar is nan"),
        (
            [0.9, 0.5, 0.4],
            [0.1, 0.5, 0.3],
            "noise / signal .* at step 2 it does not, .* 0.16 and 0.09",
        ),
        ([0.9, 0.5, 0.0], [0.0, 0.5, 1.0], "noise / signal .* at step 0 it does not"),
        ([0.9, 0.5, 0.0], [0.1, 0.5, np.inf], "noise / signal .* at step 2 it does not"),
    ],
)
def test_a_path_without_a_way_back_is_refused(signal, noise, words):
    with pytest.raises(ValueError, match=words):
        schedules.from_levels(np.square(signal), np.square(noise))


def test_a_path_with_the_betas_of_another_is_refused():
    straight, x = SHORT["straight"], normal(0, 3, 2)
    wrong = straight._replace(beta=SHORT["cosine"].beta)
    for call in (ddpm.sample_ddpm, ddpm.vlb):
        with pytest.raises(ValueError, match="beta at step 0 .* its levels give 0.006944"):
            call(wrong, lambda x, t: x, x, key(1), prediction="velocity")
    # Levels in float32 are no other path.
    ddpm.respace(schedules.check(STRAIGHT._replace(beta=np.float32(STRAIGHT.beta))), 5)
    schedules.check(jax.tree.map(lambda x: np.asarray(x, np.float32), STRAIGHT))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "heun", "invert", "vlb", "ode"])
def test_eps_is_refused_where_it_does_not_give_x_0(name):
    calls = {
        "ddpm": lambda s, f, x: ddpm.sample_ddpm(s, f, x, key(0)),
        "ddim": lambda s, f, x: ddpm.sample_ddim(s, f, x, key(0), steps=3),
        "dpm_solver": lambda s, f, x: ddpm.sample_dpm_solver(s, f, x, steps=3),
        "heun": lambda s, f, x: ddpm.sample_heun(s, f, x, steps=3),
        "invert": lambda s, f, x: ddpm.ddim_invert(s, f, x, steps=3),
        "vlb": lambda s, f, x: ddpm.vlb(s, f, x, key(0)),
        "ode": lambda s, f, x: ddpm.ode_log_likelihood(s, f, x, key(0), steps=3),
    }
    with pytest.raises(
        ValueError, match="'eps' says nothing about x_0 at the last level, .* give velocity"
    ):
        calls[name](SHORT["straight"], lambda x, t: x, normal(0, 3, 2))


@pytest.mark.parametrize("name", ["cosine", "straight", "wide"])
@pytest.mark.parametrize("given", process.PREDICTIONS)
@pytest.mark.parametrize("wanted", process.PREDICTIONS)
def test_predictions_are_one_another(given, wanted, name):
    schedule = (SHORT | PATHS)[name]
    last = len(schedule.t) - 1 - (name == "straight" and given == "eps")  # see check_eps
    t = jnp.array([0, 3, last])
    x_0, eps = normal(1, 3, 2, 2, 1), normal(2, 3, 2, 2, 1)
    x_t = ddpm.q_sample(schedule, x_0, t, eps)
    signal, noise = (
        level[np.asarray(t)].reshape(-1, 1, 1, 1) for level in (schedule.signal, schedule.noise)
    )
    true = {"eps": eps, "x_0": x_0, "v": signal * eps - noise * x_0, "velocity": eps - x_0}
    true["mu"] = ddpm.q_posterior(schedule, x_0, x_t, t)[0]
    got = ddpm.convert(
        schedule, jnp.asarray(true[given], jnp.float32), x_t, t, given=given, wanted=wanted
    )
    # alpha_bar is 2e-6 at the last step of cosine: what divides by its root loses three digits.
    np.testing.assert_allclose(got, true[wanted], atol=2e-3 if given == "eps" else 2e-4)


# --------------------------------------------------------------------------------------------------------- the bounds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "sigma"), [(0.1, 0.05), (0.93, 0.01), (-3.0, 0.1), (0.0, 2.0), (1.0, 0.003)]
)
def test_grey_levels_have_the_mass_of_a_normal(mean, sigma):
    levels = jnp.linspace(-1, 1, 17)[:, None]
    got = bounds.log_discretised(
        levels, jnp.full((17, 1), mean), jnp.full((17, 1), sigma**2), levels=17
    )
    edges = np.concatenate([[-np.inf], (np.arange(16) + 0.5) / 8 - 1, [np.inf]])
    a, b = (edges[:-1] - mean) / sigma, (edges[1:] - mean) / sigma
    flip = a + b > 0
    a, b = np.where(flip, -b, a), np.where(flip, -a, b)
    low, high = stats.norm.logcdf(a), stats.norm.logcdf(b)
    expected = high + np.log1p(-np.exp(low - high))
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)).sum(), 1, rtol=1e-5)
    slope = jax.grad(
        lambda m, s: bounds.log_discretised(
            levels, jnp.full((17, 1), m), jnp.full((17, 1), s), levels=17
        ).sum(),
        (0, 1),
    )(mean, sigma**2)
    assert np.isfinite(slope).all()


def expected_bound(schedule, s2, variances):
    """E[-log p(x_0:T) + log q(x_1:T | x_0)], x_0 ~ N(0, s2): p's chain is linear in x, so second moments suffice."""
    a, n = (np.append(first, table) for first, table in zip((1, 0), levels(schedule), strict=True))
    second = a * s2 + n  # E[x_t^2], x_0 first
    total = 0.5 * (math.log(2 * math.pi) + second[-1])
    for t, beta in enumerate(schedule.beta):
        x_0_hat = a[t + 1] ** 0.5 * s2 / second[t + 1]  # of x_t
        r = (a[t + 1] / a[t]) ** 0.5
        factor = (a[t] ** 0.5 * beta * x_0_hat + r * n[t]) / n[t + 1]
        both = r * second[t]  # E[x_{t-1} x_t]
        error = second[t] - 2 * factor * both + factor**2 * second[t + 1]
        total += 0.5 * (math.log(2 * math.pi * variances[t]) + error / variances[t])
        total -= 0.5 * math.log(2 * math.pi * math.e * beta)
    return total


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
def test_the_bound_of_gaussian_data(name, sigma2):
    schedule, s2 = SHORT[name], 0.3
    prediction = natural(schedule)
    fn = exact(schedule, s2, prediction=prediction)
    x_0 = math.sqrt(s2) * normal(0, 40_000, 1)
    got = jax.jit(partial(ddpm.vlb, schedule, fn, sigma2=sigma2, prediction=prediction))(
        x_0, key(1)
    )
    tilde = schedules.beta_tilde(schedule)
    variances = schedule.beta if sigma2 == "beta" else np.concatenate([tilde[1:2], tilde[1:]])
    expected = expected_bound(schedule, s2, variances)
    assert abs(got.mean() - expected) < 4 * got.std() / 200 and got.std() / 200 < 0.02 * expected
    entropy = 0.5 * math.log(2 * math.pi * math.e * s2)
    assert expected > entropy


@pytest.mark.parametrize(
    "schedule",
    [SHORT["straight"], ddpm.straight_schedule(1), ddpm.respace(STRAIGHT, 5, "log_snr")],
    ids=["12", "1", "respaced"],
)
def test_the_bound_on_a_straight_path_is_the_entropy_where_the_chain_is_right(schedule):
    """Gaussian data, the exact denoiser and the exact variance of x_{t-1} given x_t: x_T has no trace of x_0."""
    s2, mean = 0.3, 0.7
    second = np.append(s2, levels(schedule)[0] * s2 + levels(schedule)[1])
    right = second[:-1] - schedules.step_signal_squared(schedule) * second[:-1] ** 2 / second[1:]
    every = STRAIGHT if schedule.t[-1] > 500 else schedule
    table = np.zeros(len(every.t))
    table[schedule.t] = right
    fn = exact(every, s2, mean, "velocity")

    def sigma2(x_t, t):
        return jnp.asarray(table, jnp.float32)[t][:, None]

    x_0 = mean + math.sqrt(s2) * normal(0, 40_000, 1)
    got = jax.jit(partial(ddpm.vlb, schedule, fn, sigma2=sigma2, prediction="velocity"))(
        x_0, key(1)
    )
    entropy = 0.5 * math.log(2 * math.pi * math.e * s2)
    assert abs(got.mean() - entropy) < 4 * got.std() / 200 and got.std() / 200 < 0.02


@pytest.mark.slow
def test_the_bound_is_tight_where_the_chain_is_right():
    """For data N(0, I) the reversed chain is Gaussian with variance beta: any number of steps costs nothing."""
    x_0 = normal(0, 40_000, 1)
    short = (SHORT["linear"], SHORT["cosine"], ddpm.cosine_schedule(1), ddpm.respace(LINEAR, 3))
    for schedule in short:
        terms = jax.jit(
            partial(
                ddpm.vlb_terms,
                schedule,
                exact_eps(LINEAR if schedule.t[-1] > 500 else schedule, 1.0),
            )
        )
        got = terms(x_0, key(1)).sum(0)
        assert abs(got.mean() - 0.5 * math.log(2 * math.pi * math.e)) < 4 * got.std() / 200
    # For a single point it is beta_tilde, and no step but the first costs anything at all.
    point, schedule = jnp.full((100, 1), 0.25), SHORT["linear"]

    def eps_fn(x, t):
        a = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None]
        return (x - jnp.sqrt(a) * 0.25) / jnp.sqrt(1 - a)

    terms = ddpm.vlb_terms(schedule, eps_fn, point, key(0), levels=17, sigma2="beta_tilde")
    np.testing.assert_allclose(terms[1:-1], 0, atol=1e-5)
    last = schedule.alpha_bar[-1]
    np.testing.assert_allclose(
        terms[-1], 0.5 * (last * 0.25**2 - last - math.log(1 - last)), atol=1e-6
    )
    straight = SHORT["straight"]
    u = jnp.asarray(straight.noise, jnp.float32)
    terms = ddpm.vlb_terms(
        straight,
        lambda x, t: (x - 0.25) / u[t][:, None],
        point,
        key(0),
        levels=17,
        sigma2="beta_tilde",
        prediction="velocity",
    )
    np.testing.assert_allclose(terms[1:], 0, atol=1e-5)


@pytest.mark.slow
def test_the_bound_in_continuous_time_depends_on_the_ends_alone():
    """Its limit for data N(m, s2), exact denoiser: entropy of x_0 and what the two ends add, for every gamma."""
    m, s2, low, high = 0.4, 0.25, -7.0, 4.0
    x_0 = m + 0.5 * normal(0, 200_000, 1)

    def run(gamma):
        def eps_fn(x, u):
            a = jax.nn.sigmoid(-gamma(u))[:, None]
            return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * m) / (a * s2 + 1 - a)

        return jax.jit(partial(ddpm.continuous_vlb, gamma, eps_fn))(x_0, key(1))

    gammas = {
        "straight": lambda u: low + (high - low) * u,
        "square": lambda u: low + (high - low) * u**2,
        "bent": lambda u: low + (high - low) * (u + jnp.sin(2 * jnp.pi * u) / 8),
    }
    # KL(q(x_u | x_0) || its marginal) is the integral between the ends: the mutual information of x_0 and x_u.
    mutual = [0.5 * math.log(1 + s2 * math.exp(-g)) for g in (low, high)]
    a = 1 / (1 + math.exp(high))
    prior = 0.5 * (a * (s2 + m**2) - a - math.log(1 - a))
    noise = math.exp(low)
    decoder = 0.5 * math.log(2 * math.pi * math.e * noise)
    expected = decoder + mutual[0] - mutual[1] + prior
    for name, gamma in gammas.items():
        got = run(gamma)
        assert abs(got.mean() - expected) < 4 * got.std() / len(x_0) ** 0.5, name
        assert got.std() / len(x_0) ** 0.5 < 0.015
    few = ddpm.discretise(gammas["straight"], 400)

    def eps_fn(x, t):
        a = few.alpha_bar[t][:, None]
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * m) / (a * s2 + 1 - a)

    steps = jax.jit(partial(ddpm.vlb, few, eps_fn, sigma2="beta_tilde"))(x_0[:20_000], key(2))
    continuous = run(gammas["straight"])
    # The same but for the decoder, whose variance is half of the first noise here (that of beta_tilde at step 1).
    assert steps.mean() > continuous.mean() - 4 * steps.std() / 20_000**0.5


@pytest.mark.slow
def test_grey_levels_in_continuous_time():
    """One level in 5, exact denoiser: the prior's KL, and a decoder that knows it as well as the first noise allows."""
    x_0 = jnp.full((5000, 1), 0.5)

    def gamma(u):
        return -8 + 13 * u

    def eps_fn(x, u):
        a = jax.nn.sigmoid(-gamma(u))[:, None]
        return (x - jnp.sqrt(a) * 0.5) / jnp.sqrt(1 - a)

    got = ddpm.continuous_vlb(gamma, eps_fn, x_0, key(0), levels=5)
    a = 1 / (1 + math.exp(5.0))
    np.testing.assert_allclose(got, 0.5 * (a * 0.25 - a - math.log(1 - a)), atol=1e-5)
    vague = ddpm.continuous_vlb(lambda u: 4.0 + u, lambda x, u: eps_fn(x, u), x_0, key(0), levels=5)
    assert (vague > 0.5).mean() > 0.9  # almost nothing is known: log 5 but for the noise


def test_the_flow_gives_the_density():
    cov = np.array([[0.5, 0.3], [0.3, 0.4]])
    x = jnp.asarray(
        np.random.default_rng(0).multivariate_normal(np.zeros(2), cov, 200), jnp.float32
    )
    first = 1 / LINEAR.alpha_bar[0] - 1
    exact = stats.multivariate_normal(np.zeros(2), cov + first * np.eye(2)).logpdf(x)
    density = jax.jit(
        partial(ddpm.ode_log_likelihood, LINEAR, exact_eps(LINEAR, cov)),
        static_argnames=("steps", "trace"),
    )
    errors = [
        np.abs(density(x, key(0), steps=steps, trace="exact") - exact).max()
        for steps in (125, 250, 500)
    ]
    assert errors[2] < 0.02 and errors[0] > 2.5 * errors[1] > 5 * errors[2]  # second order
    # Unbiased over its probe vectors, of which +-1 has two kinds here: equal signs and unequal ones.
    several = np.stack([density(x, key(i), steps=500, trace="hutchinson") for i in range(12)])
    kinds = [
        several[np.abs(several - value).argmin(0), np.arange(200)]
        for value in (several.min(0), several.max(0))
    ]
    assert np.abs(several - exact[None]).max() > 0.1
    np.testing.assert_allclose(np.mean(kinds, 0), exact, atol=0.02)
    with pytest.raises(ValueError, match="trace must be hutchinson or exact"):
        ddpm.ode_log_likelihood(LINEAR, exact_eps(LINEAR, cov), x, key(0), steps=5, trace="all")


# -------------------------------------------------------------------------------------------------------- the samplers


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_ancestral_samples_have_the_variance_of_their_chain(name):
    schedule, s2 = SHORT[name], 0.3
    (a, n), (earlier, noise_earlier) = levels(schedule), schedules.previous(schedule)
    prediction = natural(schedule)
    fn = exact(schedule, s2, prediction=prediction)
    for sigma2, added in (("beta", schedule.beta), ("beta_tilde", schedules.beta_tilde(schedule))):
        variance = 1.0
        for t in range(len(a))[::-1]:
            x_0_hat = a[t] ** 0.5 * s2 / (a[t] * s2 + n[t])
            of_x_0 = earlier[t] ** 0.5 * schedule.beta[t] / n[t]
            factor = of_x_0 * x_0_hat + (a[t] / earlier[t]) ** 0.5 * noise_earlier[t] / n[t]
            variance = factor**2 * variance + (added[t] if t else 0.0)  # no noise in the last step
        x = jax.jit(partial(ddpm.sample_ddpm, schedule, fn, sigma2=sigma2, prediction=prediction))(
            normal(0, 50_000, 1), key(1)
        )
        assert abs(x.var() / variance - 1) < 4 * (2 / 50_000) ** 0.5


def some_velocity(x, t):
    """Of no process: what samplers do with it is the subject."""
    return jnp.sin(3 * x) + 0.1 * x[:, ::-1] - 0.002 * t[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "spacing"), [(1, "uniform"), (5, "log_snr"), (12, "uniform")])
def test_ddim_on_a_straight_path_is_eulers_method_and_heun_heuns(steps, spacing):
    """x + (u' - u) velocity from level to level, the last one to u = 0; of any velocity at all."""
    schedule = SHORT["straight"]
    t = ddpm.respace(schedule, steps, spacing).t
    u, how = (t + 1) / 12, {"steps": steps, "spacing": spacing, "prediction": "velocity"}
    with jax.enable_x64(True):
        x_T = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))

        def v(x, i):
            return some_velocity(x, jnp.full(5, t[i]))

        euler = heun = x_T
        for i in range(steps)[::-1]:
            to = u[i - 1] if i else 0.0
            euler = euler + (to - u[i]) * v(euler, i)
            first = v(heun, i)
            second = v(heun + (to - u[i]) * first, i - 1) if i else first
            heun = heun + (to - u[i]) * (first + second) / 2
        got = ddpm.sample_ddim(schedule, some_velocity, x_T, key(0), **how)
        np.testing.assert_allclose(got, euler, rtol=1e-12, atol=1e-12)
        got = ddpm.sample_heun(schedule, some_velocity, x_T, **how)
        np.testing.assert_allclose(got, heun, rtol=1e-12, atol=1e-12)
        # And back to noise. The first step takes eps_hat as if x_0 lay at the first level.
        eps_hat = x_T + (1 - u[0]) * v(x_T, 0)
        back = (1 - u[0]) * x_T + u[0] * eps_hat
        for i in range(1, steps):
            back = back + (u[i] - u[i - 1]) * v(back, i - 1)
        got = ddpm.ddim_invert(schedule, some_velocity, x_T, **how)
        np.testing.assert_allclose(got, back, rtol=1e-12, atol=1e-12)


def test_ddim_on_a_straight_path_with_eta_one_is_ancestral_sampling():
    x_T, fn = normal(0, 100, 2), exact(STRAIGHT, [[0.5, 0.2], [0.2, 0.3]], 0.4, "velocity")
    few, how = ddpm.respace(STRAIGHT, 9, "quadratic"), {"prediction": "velocity"}
    ancestral = ddpm.sample_ddpm(few, fn, x_T, key(1), sigma2="beta_tilde", **how)
    implicit = ddpm.sample_ddim(
        STRAIGHT, fn, x_T, key(1), steps=9, eta=1.0, spacing="quadratic", **how
    )
    np.testing.assert_allclose(implicit, ancestral, atol=1e-4)


def test_ddim_with_eta_one_is_ancestral_sampling():
    x_T, eps_fn = normal(0, 100, 2), exact_eps(LINEAR, [[0.5, 0.2], [0.2, 0.3]])
    few = ddpm.respace(LINEAR, 9, "quadratic")
    ancestral = ddpm.sample_ddpm(few, eps_fn, x_T, key(1), sigma2="beta_tilde")
    implicit = ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(1), steps=9, eta=1.0, spacing="quadratic")
    np.testing.assert_allclose(implicit, ancestral, atol=1e-4)
    assert (
        np.abs(
            implicit - ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(1), steps=9, spacing="quadratic")
        ).max()
        > 0.1
    )


@pytest.mark.slow
def test_deterministic_samplers_follow_the_flow():
    """x_0 = x_T sqrt(var x_0 / var x_T) for a Gaussian; DDIM is of first order, the other two of second."""
    s2 = 0.3
    eps_fn, x_T = exact_eps(LINEAR, s2), jnp.array([[1.5], [-0.4]])
    ends = [LINEAR.alpha_bar[i] * s2 + 1 - LINEAR.alpha_bar[i] for i in (0, -1)]
    # To the first level along the flow; from there x_0_hat in one step.
    first = (1 - (1 - LINEAR.alpha_bar[0]) / ends[0]) / LINEAR.alpha_bar[0] ** 0.5
    true = np.asarray(x_T) * (ends[0] / ends[1]) ** 0.5 * first
    order = {"ddim": 1, "dpm_solver": 2, "heun": 2}
    errors = {}
    for name in order:
        errors[name] = []
        for steps in (25, 50, 100, 200):
            if name == "ddim":
                got = ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(0), steps=steps)
            else:
                got = getattr(ddpm, f"sample_{name}")(LINEAR, eps_fn, x_T, steps=steps)
            errors[name].append(float(np.abs(got - true).max()))
        falls = np.array(errors[name][:-1]) / np.array(errors[name][1:])
        assert (falls[1:] > 1.6 if order[name] == 1 else falls[1:] > 2.8).all(), (
            name,
            errors[name],
        )
    assert errors["heun"][1] < errors["ddim"][1] and errors["dpm_solver"][2] < errors["ddim"][2]
    # A step of DDIM, by hand.
    few = ddpm.respace(LINEAR, 2)
    eps = np.asarray(eps_fn(x_T, jnp.array([999, 999])))
    a, b = few.alpha_bar[1], few.alpha_bar[0]
    x = b**0.5 * (np.asarray(x_T) - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    expected = (x - (1 - b) ** 0.5 * np.asarray(eps_fn(jnp.asarray(x), jnp.array([0, 0])))) / b**0.5
    np.testing.assert_allclose(
        ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(0), steps=2), expected, rtol=1e-3
    )
    # With x_0_hat clipped, eps_hat is what that x_0_hat says.
    clipped = np.clip((np.asarray(x_T) - (1 - a) ** 0.5 * eps) / a**0.5, -0.1, 0.1)
    x = b**0.5 * clipped + (1 - b) ** 0.5 * (np.asarray(x_T) - a**0.5 * clipped) / (1 - a) ** 0.5
    _, (way, _) = ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(0), steps=2, clip=0.1, path=True)
    np.testing.assert_allclose(way[0], x, rtol=1e-3)
    # Of second order with uneven steps too, where DPM-Solver weighs the last two by their lengths.
    falls = [
        float(
            np.abs(
                ddpm.sample_dpm_solver(LINEAR, eps_fn, x_T, steps=steps, spacing="quadratic") - true
            ).max()
        )
        for steps in (50, 100, 200)
    ]
    assert falls[0] > 2.8 * falls[1] > 2.8**2 * falls[2], falls
    for solve in (ddpm.sample_heun, ddpm.sample_dpm_solver):
        one = solve(LINEAR, eps_fn, x_T, steps=1)
        np.testing.assert_allclose(
            one, ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(0), steps=1), rtol=1e-5
        )


def test_sigma_hat_adds_the_larger_noise():
    """Data at 0: eps_hat = x / sqrt(1 - a) forgets x_t at eta = 1, so that only the noise added last is left."""
    schedule = SHORT["linear"]

    def eps_fn(x, t):
        return x / jnp.sqrt(1 - jnp.asarray(schedule.alpha_bar, jnp.float32)[t])[:, None]

    _, (x, _) = ddpm.sample_ddim(
        schedule, eps_fn, normal(0, 40_000, 1), key(1), steps=25, sigma_hat=True, path=True
    )
    tilde, variance = schedules.beta_tilde(schedule), 1.0
    for i, t in enumerate(range(24, 0, -1)):
        kept = (1 - schedule.alpha_bar[t - 1] - tilde[t]) / (1 - schedule.alpha_bar[t])
        variance = kept * variance + schedule.beta[t]
        assert abs(x[i].var() / variance - 1) < 5 * (2 / 40_000) ** 0.5
    np.testing.assert_allclose(x[-1], 0, atol=1e-5)


@pytest.mark.slow
def test_inversion_comes_back_and_more_so_with_more_steps():
    eps_fn, x_0 = exact_eps(LINEAR, 0.3), 0.55 * normal(0, 500, 1)
    errors = []
    for steps in (10, 50, 250, 1000):
        x_T = ddpm.ddim_invert(LINEAR, eps_fn, x_0, steps=steps)
        errors.append(
            float(((ddpm.sample_ddim(LINEAR, eps_fn, x_T, key(1), steps=steps) - x_0) ** 2).mean())
        )
    assert sorted(errors, reverse=True) == errors and errors[-1] < 1e-3
    assert abs(float(x_T.std()) - 1) < 0.1
    # Three steps by hand: eps_hat where each begins, the first where it ends.
    few, x = ddpm.respace(LINEAR, 3), np.asarray(x_0)
    for step, (asked, before) in enumerate(
        ((0, 1.0), (0, few.alpha_bar[0]), (1, few.alpha_bar[1]))
    ):
        eps = np.asarray(eps_fn(jnp.asarray(x), jnp.full(500, few.t[asked])))
        to = few.alpha_bar[step]
        x = to**0.5 * (x - (1 - before) ** 0.5 * eps) / before**0.5 + (1 - to) ** 0.5 * eps
    np.testing.assert_allclose(
        ddpm.ddim_invert(LINEAR, eps_fn, x_0, steps=3), x, rtol=1e-3, atol=1e-4
    )


def test_a_schedule_may_be_an_argument_of_a_compiled_function():
    eps_fn, x_T = exact_eps(LINEAR, 0.3), normal(0, 4, 2)
    given = jax.tree.map(jnp.asarray, LINEAR)
    for f in (ddpm.sample_ddim, lambda s, e, x, k, steps: ddpm.ddim_invert(s, e, x, steps=steps)):
        got = jax.jit(lambda s, f=f: f(s, eps_fn, x_T, key(1), steps=20))(given)
        np.testing.assert_allclose(
            got, f(LINEAR, eps_fn, x_T, key(1), steps=20), rtol=1e-2, atol=1e-3
        )


MODES = jnp.array([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])


def mixture_eps(schedule, weights, s=0.15):
    """Of three equal normals around MODES."""

    def eps_fn(x, t):
        a = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None]
        v = a * s**2 + 1 - a
        away = x[:, None] - jnp.sqrt(a)[:, None] * MODES[None]
        share = jax.nn.softmax(jnp.log(weights)[None] - 0.5 * (away**2).sum(-1) / v, -1)
        return jnp.sqrt(1 - a) * (share[..., None] * away).sum(1) / v

    return eps_fn


def test_a_mixture_is_sampled_with_its_weights():
    weights = jnp.array([0.5, 0.3, 0.2])
    x = ddpm.sample_ddpm(
        ddpm.respace(LINEAR, 100), mixture_eps(LINEAR, weights), normal(0, 20_000, 2), key(1)
    )
    distance = jnp.linalg.norm(x[:, None] - MODES[None], axis=-1)
    np.testing.assert_allclose(
        np.bincount(distance.argmin(1), minlength=3) / 20_000, weights, atol=0.015
    )
    assert (distance.min(1) < 3 * 0.15).mean() > 0.97


@pytest.mark.slow
def test_guidance_is_the_score_of_the_tilted_density():
    """grad log p(x | c)^(1 + w) / p(x)^w, by automatic differentiation of log densities."""
    t, x, w, s = jnp.full(5, 300), normal(0, 5, 2), 1.7, 0.15
    a = float(LINEAR.alpha_bar[300])

    def log_p(x, weights):
        away = ((x[None] - a**0.5 * MODES) ** 2).sum(-1)
        return jax.nn.logsumexp(-0.5 * away / (a * s**2 + 1 - a) + jnp.log(weights))

    one, every = jnp.array([1.0, 1e-30, 1e-30]), jnp.ones(3) / 3
    got = ddpm.guide(mixture_eps(LINEAR, one)(x, t), mixture_eps(LINEAR, every)(x, t), w)
    score = jax.vmap(jax.grad(lambda x: (1 + w) * log_p(x, one) - w * log_p(x, every)))(x)
    np.testing.assert_allclose(got, -((1 - a) ** 0.5) * score, rtol=1e-3, atol=1e-4)
    cond, uncond = normal(1, 3, 2), normal(2, 3, 2)
    np.testing.assert_array_equal(ddpm.guide(cond, uncond, 0.0), cond)
    np.testing.assert_allclose(ddpm.guide(cond, uncond, -1.0), uncond, atol=1e-6)


@pytest.mark.slow
def test_inpainting_keeps_what_is_known_and_fits_the_rest_to_it():
    rho = 0.9
    eps_fn = exact_eps(LINEAR, [[1.0, rho], [rho, 1.0]])
    known, mask = (
        jnp.stack([normal(3, 4000), jnp.zeros(4000)], 1),
        jnp.array([[True, False]]) & jnp.ones((4000, 1), bool),
    )
    few = ddpm.respace(LINEAR, 50)
    slopes = []
    for repeats in (1, 10):
        fill = jax.jit(partial(ddpm.inpaint, few, eps_fn, repeats=repeats))
        x = np.asarray(fill(normal(0, 4000, 2), key(1), known=known, mask=mask), np.float64)
        np.testing.assert_array_equal(x[:, 0], known[:, 0])
        slopes.append((x[:, 0] * x[:, 1]).mean() / (x[:, 0] ** 2).mean())
        rest = (x[:, 1] - slopes[-1] * x[:, 0]).var()
    assert abs(rest / (1 - rho**2) - 1) < 0.2  # and the conditional variance, of 10 repeats
    # The conditional mean is rho x; replaced noise alone falls short of it, going back and forth mends that.
    assert slopes[0] < slopes[1] - 0.05 and abs(slopes[1] - rho) < 0.06
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        ddpm.inpaint(few, eps_fn, known, key(1), known=known, mask=mask, repeats=0)


@pytest.mark.slow
def test_interpolation_between_images():
    a, b, shares = normal(0, 3, 2), normal(1, 3, 2), jnp.array([0.0, 0.25, 1.0])
    eps_fn = exact_eps(LINEAR, 0.3)

    def between(t):
        return ddpm.interpolate(LINEAR, eps_fn, a, b, key(2), t=t, shares=shares)

    blend = (1 - shares)[:, None, None] * a[None] + shares[:, None, None] * b[None]
    np.testing.assert_allclose(between(0), blend, atol=1e-6)
    np.testing.assert_allclose(between(1), blend, atol=0.1)  # one step of the least noise
    with pytest.raises(ValueError, match=r"t counts steps taken, 0..1000, got 1001"):
        between(1001)
    c = ddpm.slerp(a, b, 0.3)
    np.testing.assert_allclose(ddpm.slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(ddpm.slerp(a, b, 1.0), b, atol=1e-5)
    u, v = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    middle = ddpm.slerp(jnp.asarray(u), jnp.asarray(v), 0.5)
    np.testing.assert_allclose(middle, (u + v) / 2**0.5, atol=1e-6)
    assert c.shape == a.shape


def test_the_way_is_shown_and_clipping_holds():
    eps_fn = exact_eps(LINEAR, 0.3)
    few = ddpm.respace(LINEAR, 6)
    x_0, (x, hats) = ddpm.sample_ddpm(few, eps_fn, 3 * normal(0, 4, 2), key(1), clip=0.2, path=True)
    assert (
        x.shape == hats.shape == (6, 4, 2)
        and np.abs(hats).max() <= 0.2
        and np.abs(x_0).max() <= 0.2
    )
    np.testing.assert_array_equal(x[-1], x_0)
    for name in ("heun", "dpm_solver"):
        x = getattr(samplers, f"sample_{name}")(
            LINEAR, eps_fn, 3 * normal(0, 4, 2), steps=6, clip=0.2
        )
        assert np.abs(x).max() <= 0.2
    with pytest.raises(ValueError, match="sigma2 must be beta, beta_tilde, learned or a function"):
        ddpm.sample_ddpm(few, eps_fn, x, key(1), sigma2="large")


# ------------------------------------------------------------------------------------------------ nets and the family

TINY = ddpm.Config(
    shape=(8, 8, 1),
    levels=17,
    classes=3,
    T=25,
    terms=0,
    ema=0.0,
    optim=Optim(lr=1e-3),
    net=ddpm.NetConfig(widths=(8, 16), blocks=1, attention=(4,), groups=4, dropout=0.0),
)
DENSE = dataclasses.replace(
    TINY, net=ddpm.NetConfig("mlp", (8,), dropout=0.0)
)  # where the net is not the subject
POINTS = ddpm.Config(
    shape=(2,), T=25, terms=0, ema=0.0, net=ddpm.NetConfig("mlp", (16, 16), dropout=0.0)
)
NETS = {
    "unet": TINY,
    "dit": dataclasses.replace(TINY, net=ddpm.NetConfig("dit", (16, 16), heads=2, dropout=0.0)),
    "mlp": dataclasses.replace(POINTS, classes=3),
}


def shaken(cfg, seed=0):
    """A state whose parameters are away from their initial values, so that no branch is zero."""
    state = jax.jit(ddpm.make(cfg).init)(key(0))
    rng = np.random.default_rng(seed)
    return state._replace(
        params=jax.tree.map(
            lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), state.params
        )
    )


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 17, (n, 8, 8, 1)).astype(np.uint8),
        "label": rng.integers(0, 3, n).astype(np.int32),
    }


def test_the_u_net_of_cifar_has_the_papers_parameters():
    """35.7 million (DDPM, appendix B)."""
    shapes = jax.eval_shape(ddpm.make(ddpm.Config()).init, key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params)) == 35_746_307


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("unet", "dit") else []) for n in NETS],
)
def test_nets_take_time_and_label_and_no_other_row(name):
    cfg = NETS[name]
    params = shaken(cfg).params
    x, t, label = normal(1, 4, *cfg.shape), jnp.array([0, 5, 5, 24]), jnp.array([0, 1, 2, 0])

    @jax.jit
    def predict(params, x, t, label):
        """The net's value, and the slope of its second row."""
        value, back = jax.vjp(lambda x: ddpm.predict(cfg, params, x, t, label)[0], x)
        return value, back(jnp.zeros_like(value).at[1].set(1.0))[0]

    value, slope = predict(params, x, t, label)
    assert value.shape == x.shape
    for other in ((x, t + 1, label), (x, t, label + 1)):
        assert np.abs(predict(params, *other)[0] - value).max(tuple(range(1, x.ndim))).min() > 1e-4
    assert slope[1].any() and not slope[jnp.array([0, 2, 3])].any()
    fresh = jax.jit(ddpm.make(cfg).init)(key(0)).params
    assert not predict(fresh, x, t, label)[0].any()  # the last layer begins at 0


def test_without_labels_the_net_is_given_the_one_for_none():
    params, x, t = shaken(DENSE).params, normal(1, 4, *DENSE.shape), jnp.array([0, 5, 5, 24])
    none = ddpm.predict(DENSE, params, x, t, jnp.full(4, 3))[0]
    np.testing.assert_allclose(ddpm.predict(DENSE, params, x, t)[0], none, rtol=1e-6)


def test_guided_eps_is_the_guided_mix_of_two():
    params, x, t = shaken(DENSE).params, normal(1, 4, 8, 8, 1), jnp.array([0, 5, 9, 24])
    label = jnp.array([0, 1, 2, 0])
    plain = [ddpm.eps_fn_of(DENSE, params, x)(normal(1, 4, 8, 8, 1), t) for x in (label, None)]
    guided = ddpm.eps_fn_of(DENSE, params, label, 1.5)(x, t)
    np.testing.assert_allclose(guided, 2.5 * plain[0] - 1.5 * plain[1], atol=1e-5)
    each = jnp.array([0.0, 1.5, -1.0, 0.5])
    several = ddpm.eps_fn_of(DENSE, params, label, each)(x, t)
    wide = each[:, None, None, None]
    np.testing.assert_allclose(several, (1 + wide) * plain[0] - wide * plain[1], atol=1e-5)
    with pytest.raises(ValueError, match="guidance .w. needs a label or a context"):
        ddpm.eps_fn_of(DENSE, params, None, 1.5)
    np.testing.assert_array_equal(ddpm.eps_fn_of(DENSE, params, label, 0.0)(x, t), plain[0])


@pytest.mark.slow
def test_a_learned_schedule_of_one_step_is_asked_at_its_last_level():
    """T levels between u = 0 and 1, of one level the last, as `discretise` has it: a net that says back its time."""
    net = ddpm.NetConfig("mlp", (4,), dropout=0.0)
    for T, times in ((1, [1.0]), (3, [0.0, 0.5, 1.0])):
        cfg = ddpm.Config(
            shape=(2,),
            T=T,
            schedule="learned",
            variance="beta_tilde",
            objective="vlb",
            times="low_discrepancy",
            net=net,
            ema=0.0,
        )
        params = shaken(cfg).params
        x, t = normal(0, T, 2), jnp.arange(T)
        expected = ddpm.predict(cfg, params, x, jnp.array(times))[0]
        np.testing.assert_allclose(
            ddpm.eps_fn_of(cfg, params)(x, t), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"classes": 0}, {"w": 3.0}, "guidance .w. needs labels or contexts in training"),
        (
            {"unlabelled": 0.0},
            {"w": 2.0},
            "guidance .w. needs labels or contexts in training",
        ),
        ({"classes": 0}, {"label": np.zeros(2, int)}, "takes no labels"),
        ({}, {"label": np.zeros(1, int)}, "one entry for each of 2 samples"),
        ({}, {"eta": 1.0}, "eta is an option of the sampler ddim"),
    ],
)
def test_sampling_refuses_what_would_have_no_effect(change, options, words):
    cfg = dataclasses.replace(TINY, **change)
    family = ddpm.make(cfg)
    state = jax.eval_shape(family.init, key(0))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda state, key: family.sample(state, key, n=2, **options), state, key(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        (p, s)
        for s in ("cosine", "straight")
        for p in process.PREDICTIONS
        if (p, s) != ("eps", "straight")
    ],
)
def test_objectives_agree_where_they_are_one(prediction, schedule):
    """SNR weighting of x_0 is the error of eps; SNR + 1 would be that of v; for eps both are L_simple of eps."""
    cfg = dataclasses.replace(DENSE, prediction=prediction, schedule=schedule, T=12)
    params, x_0 = shaken(cfg).params, ddpm.preprocess(cfg, images(6))
    t, eps, label = jnp.array([1, 3, 5, 7, 9, 10]), normal(3, 6, 8, 8, 1), jnp.zeros(6, int)
    schedule = ddpm.schedule_of(cfg, params)
    x_t = ddpm.q_sample(schedule, x_0, t, eps)
    value, _ = ddpm.predict(cfg, params, x_t, t, label)
    eps_hat = ddpm.convert(schedule, value, x_t, t, given=prediction, wanted="eps")
    of_eps = ((eps - eps_hat) ** 2).mean((1, 2, 3))
    ab, rest = (level[np.asarray(t)] for level in levels(schedule))
    snr = ab / rest

    def each(objective):
        return ddpm.losses(
            dataclasses.replace(cfg, objective=objective), params, x_0, t, eps, label
        )

    np.testing.assert_allclose(each("snr"), of_eps, rtol=2e-3)
    if prediction != "eps":
        np.testing.assert_allclose(
            each("truncated_snr"), of_eps * np.maximum(snr, 1) / snr, rtol=2e-3
        )
    np.testing.assert_allclose(each("min_snr"), of_eps * np.minimum(snr, 5) / snr, rtol=2e-3)
    own = {"eps": of_eps, "x_0": of_eps / snr, "v": of_eps * (ab + rest) ** 2 / ab}
    own["velocity"] = of_eps * (1 + snr**-0.5) ** 2
    own["mu"] = of_eps / snr * (process.posterior_factors(schedule)[0][np.asarray(t)]) ** 2
    np.testing.assert_allclose(each("simple"), own[prediction], rtol=2e-3)
    # L_t for t > 0 is a weighted error of eps too (DDPM eq. 12).
    beta = schedule.beta[np.asarray(t)]
    weight = beta / (2 * schedules.step_signal_squared(schedule)[np.asarray(t)] * rest)
    tilde = schedules.beta_tilde(schedule)[np.asarray(t)]
    variances = 0.5 * (tilde / beta - 1 - np.log(tilde / beta))
    np.testing.assert_allclose(
        each("vlb"), cfg.T * (weight * of_eps + variances) / math.log(2), rtol=2e-3
    )


@pytest.mark.slow
def test_velocity_on_a_straight_path_has_the_loss_of_flow_matching():
    """|net(x_t, t) - (eps - x_0)|^2 at x_t = (1 - u) x_0 + u eps, at u = 1/T and u = 1 too."""
    cfg = dataclasses.replace(POINTS, schedule="straight", prediction="velocity", T=5)
    params, x_0, eps = shaken(cfg).params, normal(1, 5, 2), normal(2, 5, 2)
    t = jnp.arange(5)
    u = (t[:, None] + 1) / 5
    value, _ = ddpm.predict(cfg, params, (1 - u) * x_0 + u * eps, t)
    expected = ((value - (eps - x_0)) ** 2).mean(-1)
    got = ddpm.losses(cfg, params, x_0, t, eps, None)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for objective in (
        "snr",
        "truncated_snr",
        "min_snr",
        "vlb",
    ):  # no weight of the last level is infinite
        each = ddpm.losses(dataclasses.replace(cfg, objective=objective), params, x_0, t, eps, None)
        assert np.isfinite(each).all(), objective


@pytest.mark.slow
def test_a_learned_variance_lies_between_and_leaves_the_mean_alone():
    cfg = dataclasses.replace(DENSE, variance="learned", objective="hybrid")
    params, x_0, label = shaken(cfg).params, ddpm.preprocess(cfg, images(6)), jnp.zeros(6, int)
    t, eps = jnp.array([0, 1, 3, 9, 20, 24]), normal(3, 6, 8, 8, 1)
    schedule = ddpm.schedule_of(cfg, params)
    tilde = schedules.beta_tilde(schedule)
    tilde[0] = tilde[1]
    for raw, expected in (
        (1.0, schedule.beta),
        (-1.0, tilde),
        (0.0, np.sqrt(schedule.beta * tilde)),
    ):
        got = ddpm.learned_variance(schedule, jnp.full((6, 1, 1, 1), raw), t).reshape(-1)
        np.testing.assert_allclose(got, expected[np.asarray(t)], rtol=1e-5)

    def gradient(objective):
        some = dataclasses.replace(cfg, objective=objective)
        loss = jax.jit(jax.grad(lambda p: ddpm.losses(some, p, x_0, t, eps, label).mean()))
        return np.split(loss(params)["net"]["out"]["kernel"], 2, -1)

    hybrid, bound = gradient("hybrid"), gradient("vlb")
    # The first half is eps, the second the variance: the bound's thousandth reaches the second only.
    x_t = ddpm.q_sample(schedule, x_0, t, eps)
    error = jax.jit(
        jax.grad(lambda p: ((eps - ddpm.predict(cfg, p, x_t, t, label)[0]) ** 2).mean())
    )
    simple = np.split(error(params)["net"]["out"]["kernel"], 2, -1)
    np.testing.assert_allclose(hybrid[0], simple[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(hybrid[1], 0.001 * bound[1], rtol=1e-3, atol=1e-7)
    assert np.abs(bound[0]).max() > 0 and not simple[1].any()


@pytest.mark.slow
def test_evaluation_from_a_few_terms_is_unbiased():
    cfg, batch = dataclasses.replace(DENSE, classes=0), images(8)
    state = shaken(cfg)
    every = jax.jit(ddpm.make(cfg).evaluate)
    few = jax.jit(ddpm.make(dataclasses.replace(cfg, terms=5)).evaluate)
    full = np.stack([every(state, batch, key(i))["nll_nats"] for i in range(30)])
    several = np.stack([few(state, batch, key(i))["nll_nats"] for i in range(300)])
    error = np.hypot(several.std(0) / 300**0.5, full.std(0) / 30**0.5)
    full = full.mean(0)
    assert (np.abs(several.mean(0) - full) < 4.5 * error).all() and (error < 0.1 * full).all()
    values = every(state, batch, key(0))
    np.testing.assert_allclose(
        values["nll_bits_per_dim"], values["nll_nats"] / 64 / math.log(2), rtol=1e-6
    )


@pytest.mark.slow
def test_evaluation_from_a_few_terms_counts_what_is_left_of_x_0(monkeypatch):
    """Levels that leave much of x_0 at the end, so that L_T is not small."""
    monkeypatch.setitem(ddpm.SCHEDULES, "linear", lambda T: schedules._from_beta(np.full(T, 0.05)))
    cfg = dataclasses.replace(POINTS, T=6, net=ddpm.NetConfig("mlp", (4,), dropout=0.0))
    batch = {"points": np.asarray(normal(0, 8, 2))}
    state = jax.jit(ddpm.make(cfg).init)(key(0))

    def draws(terms):
        evaluate = jax.jit(
            jax.vmap(ddpm.make(dataclasses.replace(cfg, terms=terms)).evaluate, (None, None, 0))
        )
        return np.asarray(
            evaluate(state, batch, jax.random.split(key(1 + terms), 3000))["nll_nats"]
        )

    every, few = draws(0), draws(2)
    error = np.hypot(every.std(0), few.std(0)) / 3000**0.5
    last = np.asarray(ddpm.prior_kl(ddpm.schedule_of(cfg, None), jnp.asarray(batch["points"])))
    assert (np.abs(few.mean(0) - every.mean(0)) < 4.5 * error).all() and (error < 0.2 * last).all()


@pytest.mark.slow
def test_uniform_times_reach_both_ends():
    """Far data and a net that says 0 to v: the loss at t is the mean square of v, known at each of two t."""
    cfg = dataclasses.replace(POINTS, T=2, schedule="cosine", prediction="v")
    family, n = ddpm.make(cfg), 20_000
    _, metrics = jax.jit(family.step)(
        jax.jit(family.init)(key(0)), {"points": np.full((n, 2), 10.0)}, key(1)
    )
    noise2 = np.asarray(ddpm.noise_variance(ddpm.cosine_schedule(2)))
    each = 100 * noise2 + 1 - noise2
    np.testing.assert_allclose(metrics["loss"], each.mean(), rtol=0.02)
    assert np.ptp(each) > 0.4 * each.mean()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_labels_is_withheld(share):
    """A net that says x_0 by the label's embedding alone: its squared error counts the labels withheld."""
    cfg = dataclasses.replace(
        POINTS,
        classes=2,
        unlabelled=share,
        prediction="x_0",
        optim=Optim(name="sgd", lr=1.0),
        net=ddpm.NetConfig("mlp", (16,), dropout=0.0),
    )
    family, n = ddpm.make(cfg), 8000
    batch = {"points": np.full((n, 2), 1.0), "label": np.arange(n) % 2}
    state = jax.jit(family.init)(key(0))
    label = state.params["net"]["condition"]["label"]["embedding"]

    def loss(null):  # what the withheld see, far from what the others do
        params = jax.tree.map(lambda a: a, state.params)
        params["net"]["condition"]["label"]["embedding"] = label.at[2].set(null)
        params["net"]["out"]["kernel"] = jnp.full_like(params["net"]["out"]["kernel"], 0.2)
        return float(jax.jit(family.step)(state._replace(params=params), batch, key(1))[1]["loss"])

    values = np.array([loss(null) for null in (0.0, 20.0, 40.0)])
    assert (np.ptp(values) > 0) == (share > 0)
    if share:  # every mark moves the same share of the examples: the rest is common to all three
        params = state.params
        params["net"]["out"]["kernel"] = jnp.full_like(params["net"]["out"]["kernel"], 0.2)
        x_0, t = jnp.ones((n, 2)), jax.random.randint(key(2), (n,), 0, cfg.T)
        eps = jax.random.normal(key(3), (n, 2))

        def all_withheld(null):
            params["net"]["condition"]["label"]["embedding"] = label.at[2].set(null)
            return float(ddpm.losses(cfg, params, x_0, t, eps, jnp.full(n, 2)).mean())

        alone = np.array([all_withheld(null) for null in (0.0, 20.0, 40.0)])
        found = np.diff(values) / np.diff(alone)
        np.testing.assert_allclose(found, share, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [False, True])
def test_half_of_the_images_are_mirrored(mirror):
    """A net that says 0 to x_0: one step of SGD leaves in its last bias the mean of what it was trained on."""
    cfg = ddpm.Config(
        shape=(2, 2, 1),
        levels=2,
        T=25,
        prediction="x_0",
        ema=0.0,
        mirror=mirror,
        optim=Optim(name="sgd", lr=2.0),
        net=ddpm.NetConfig("mlp", (16,), dropout=0.0),
    )
    family, n = ddpm.make(cfg), 4000
    batch = {"image": np.tile(np.array([[1, 0], [0, 0]], np.uint8)[None, :, :, None], (n, 1, 1, 1))}
    state, _ = jax.jit(family.step)(jax.jit(family.init)(key(0)), batch, key(1))
    mean = np.asarray(state.params["net"]["out"]["bias"]).reshape(2, 2)
    np.testing.assert_allclose(mean[1], -1, rtol=1e-5)  # never upside down
    np.testing.assert_allclose(mean[0].sum(), 0, atol=1e-5)
    if mirror:
        assert abs(mean[0, 0]) < 5 / n**0.5
    else:
        np.testing.assert_allclose(mean[0, 0], 1, rtol=1e-5)


@pytest.mark.slow
def test_times_are_drawn_as_said():
    u = np.sort(ddpm.low_discrepancy(key(3), 40))
    assert (np.floor(u * 40) == np.arange(40)).all()
    # Where one t loses far more than the others, it is drawn more, and the weights make up for it.
    cfg = dataclasses.replace(POINTS, times="importance", T=25)
    family = ddpm.make(cfg)
    state, step = jax.jit(family.init)(key(0)), jax.jit(family.step)
    batch = {"points": np.asarray(normal(0, 256, 2))}
    assert state.extra["square"].shape == (25,) and not state.extra["count"].any()
    for i in range(8):
        state, metrics = step(state, batch, key(i))
    assert int(state.extra["count"].sum()) == 8 * 256 and state.extra["square"].min() >= 0
    skewed = state.extra["square"].at[7].set(100 * state.extra["square"].max())
    full = state._replace(extra={"square": skewed, "count": jnp.full(25, 50)})
    plain = state._replace(extra={"square": skewed, "count": jnp.zeros(25, jnp.int32)})
    losses = {
        name: [float(step(s, batch, key(i))[1]["loss"]) for i in range(60)]
        for name, s in (("full", full), ("plain", plain))
    }
    means = {name: (np.mean(v), np.std(v) / 60**0.5) for name, v in losses.items()}
    assert abs(means["full"][0] - means["plain"][0]) < 4 * math.hypot(
        means["full"][1], means["plain"][1]
    )
    drawn = step(full, batch, key(1))[0].extra["count"] - 50
    assert drawn[7] > 3 * np.delete(drawn, 7).max()


@pytest.mark.slow
def test_a_learned_schedule_rises_between_its_ends_and_learns_each_part_its_own_way():
    cfg = dataclasses.replace(
        POINTS,
        schedule="learned",
        variance="beta_tilde",
        objective="vlb",
        times="low_discrepancy",
        optim=Optim(name="sgd", lr=1.0),
    )
    state = shaken(cfg)
    assert abs(ddpm.init_gamma(key(0))["ends"][0] + 13.3) < 0.05  # VDM's, of 256 grey levels
    params = state.params["gamma"]
    u = jnp.linspace(0, 1, 200)
    assert (np.diff(ddpm.gamma(params, u)) > 0).all()
    np.testing.assert_allclose(ddpm.gamma(params, u)[jnp.array([0, -1])], params["ends"], rtol=1e-5)
    batch = {"points": normal(0, 64, 2)}
    new, metrics = jax.jit(ddpm.make(cfg).step)(state, batch, key(5))
    moved = jax.tree.map(lambda a, b: a - b, state.params, new.params)

    def bound(params, i):
        k_loss = jax.random.split(jax.random.split(key(5), 4)[1])[i]
        return ddpm.continuous_nll(cfg, params, batch["points"], None, k_loss) / (2 * math.log(2))

    np.testing.assert_allclose(
        metrics["loss"], jax.jit(bound, static_argnums=1)(state.params, 0).mean(), rtol=1e-5
    )
    plain = jax.jit(jax.grad(lambda p: bound(p, 0).mean()))(state.params)
    square = jax.jit(jax.grad(lambda p: (bound(p, 1) ** 2).mean()))(state.params)
    scale = np.abs(np.concatenate([x.reshape(-1) for x in jax.tree.leaves(plain)])).max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
        moved["net"],
        plain["net"],
    )
    np.testing.assert_allclose(moved["gamma"]["ends"], plain["gamma"]["ends"], rtol=1e-3)
    for name in ("first", "place", "last", "line"):
        limit = 1e-4 * np.abs(square["gamma"][name]).max()
        np.testing.assert_allclose(
            moved["gamma"][name], square["gamma"][name], rtol=1e-2, atol=limit
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [{}, {"schedule": "straight", "prediction": "velocity"}], ids=["linear", "straight"]
)
def test_a_small_model_learns_points_and_samples_them(path):
    """Two points, far apart: every sampler ends near one of them, and the bound falls below a normal's."""
    cfg = dataclasses.replace(
        POINTS,
        classes=2,
        T=50,
        net=ddpm.NetConfig("mlp", (64, 64), dropout=0.0),
        optim=Optim(lr=3e-3),
        ema=0.99,
        **path,
    )
    family = ddpm.make(cfg)
    state, step = jax.jit(family.init)(key(0)), jax.jit(family.step)
    rng = np.random.default_rng(0)
    for i in range(600):
        label = rng.integers(0, 2, 256).astype(np.int32)
        points = np.where(label[:, None] == 0, -1.0, 1.0) + 0.05 * rng.normal(size=(256, 2))
        state, _ = step(state, {"points": points.astype(np.float32), "label": label}, key(i))
    for options in (
        {},
        {"sampler": "heun", "steps": 10},
        {"sampler": "ddim", "steps": 20, "w": 0.2},
    ):
        x = jax.jit(partial(family.sample, n=200, **options))(state, key(1))
        side = np.where(np.arange(200) % 2 == 0, -1.0, 1.0)
        assert (np.abs(x - side[:, None]).max(-1) < 0.4).mean() > 0.95, options
    values = jax.jit(family.evaluate)(
        state, {"points": points.astype(np.float32), "label": label}, key(2)
    )
    assert values["nll_nats"].mean() < 0.5
    with pytest.raises(ValueError, match="sampler must be ddpm, ddim, dpm_solver or heun"):
        family.sample(state, key(1), n=2, sampler="euler")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (8, 8)}, r"model.shape must be \(H, W, C\) or \(d,\)"),
        ({"shape": (9, 9, 1)}, "halve H and W 1 times, which shape .* does not allow"),
        ({"shape": (2,)}, "is for images, shape is .2,.: use mlp"),
        ({"T": 0}, "model.T must be at least 1, got 0"),
        ({"T": 20}, "linear_schedule needs T >= 21"),
        (
            {"variance": "learned"},
            "model.variance 'learned' is trained by objective vlb or hybrid, not simple",
        ),
        (
            {"objective": "hybrid"},
            "model.objective 'hybrid' trains a learned variance: set model.variance",
        ),
        ({"schedule": "learned"}, "model.schedule 'learned' .VDM. goes with prediction eps"),
        (
            {"schedule": "straight"},
            "'straight' ends in pure noise, .* set model.prediction to velocity",
        ),
        ({"objective": "truncated_snr"}, "is for nets that do not predict eps"),
        ({"unlabelled": 1.0}, r"model.unlabelled must lie in \[0, 1\), got 1.0"),
        (
            {"shape": (2,), "net": POINTS.net, "mirror": True},
            r"model.mirror is for images, model.shape",
        ),
        ({"net": ddpm.NetConfig(widths=(32, 0))}, r"model.net.widths must hold .*got \(32, 0\)"),
        ({"net": ddpm.NetConfig(heads=0)}, "model.net.heads must be at least 1, got 0"),
        ({"net": ddpm.NetConfig(widths=(24,))}, "24 does not divide into 32 groups"),
        ({"net": ddpm.NetConfig("dit", (8, 16))}, "widths of a dit are one number for each block"),
        (
            {"net": ddpm.NetConfig("dit", (8, 8), patch=3)},
            "model.net.patch 3 does not divide H and W",
        ),
        ({"ema": 1.0}, "ema must lie in"),
    ],
)
def test_bad_values_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("schedule", "sigmoid", "must be one of linear, cosine, learned, straight, not 'sigmoid'"),
        ("prediction", "score", "must be one of eps, x_0, v, mu, velocity, not 'score'"),
        ("objective", "elbo", "must be one of simple, vlb, hybrid, snr, truncated_snr, min_snr"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(field, value, words):
    cfg = dataclasses.replace(TINY)
    object.__setattr__(cfg, field, value)  # in pytest, jaxtyping would refuse it before our check
    with pytest.raises(ValueError, match=f"model.{field} {words}"):
        cfg.__post_init__()


@pytest.mark.slow
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_a_respaced_learned_variance_is_that_of_the_levels_visited(w):
    """Through the sampler and the bound, against a function of x_t and t that asks the net by itself."""
    net = ddpm.NetConfig("mlp", (8,), dropout=0.0)
    cfg = dataclasses.replace(
        TINY, variance="learned", objective="hybrid", schedule="cosine", T=20, net=net
    )
    params = jax.tree.map(lambda a: 0.3 * a, shaken(cfg).params)
    few = ddpm.respace(ddpm.cosine_schedule(20), 5)
    x, label = normal(0, 5, 8, 8, 1), jnp.array([0, 1, 2, 0, 1])
    eps_fn = ddpm.eps_fn_of(cfg, params, label, w)

    def sigma2(x_t, t):
        _, raw = ddpm.predict(cfg, params, x_t, t, label)
        return ddpm.learned_variance(few, raw, jnp.searchsorted(jnp.asarray(few.t), t))

    for f in (ddpm.sample_ddpm, ddpm.vlb):
        one, other = (f(few, eps_fn, x, key(1), sigma2=how) for how in ("learned", sigma2))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        fixed = f(few, eps_fn, x, key(1), sigma2="beta")
        assert np.abs(one - fixed).max() > 0.01


@pytest.mark.slow
def test_a_learned_variance_asks_the_net_once_a_step():
    cfg = dataclasses.replace(
        TINY,
        variance="learned",
        objective="hybrid",
        T=21,
        net=ddpm.NetConfig("mlp", (8,), dropout=0.0),
    )
    params, schedule, calls = shaken(cfg).params, ddpm.linear_schedule(21), []

    def eps_fn(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return ddpm.eps_fn_of(cfg, params)(x_t, t)

    for f in (ddpm.sample_ddpm, ddpm.vlb):
        calls.clear()
        jax.block_until_ready(f(schedule, eps_fn, normal(0, 2, 8, 8, 1), key(1), sigma2="learned"))
        jax.effects_barrier()
        assert len(calls) == 21
    with pytest.raises(ValueError, match="an eps_fn that gives"):
        ddpm.sample_ddpm(schedule, lambda x, t: x, normal(0, 2, 4), key(1), sigma2="learned")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["beta", "beta_tilde", "ddim", "eta"])
def test_a_schedule_is_learned_through_samplers(how):
    """The slope in gamma's ends of a sample, against a difference: no root of 0 in the last step makes it no number."""
    x_T = normal(0, 3, 2)

    def end(low):
        few = ddpm.discretise(lambda u: low + (4.0 - low) * u, 6)
        eps_fn = exact_eps_traced(few, 0.25)
        if how in ("beta", "beta_tilde"):
            return ddpm.sample_ddpm(few, eps_fn, x_T, key(1), sigma2=how).sum()
        return ddpm.sample_ddim(few, eps_fn, x_T, key(1), steps=5, eta=float(how == "eta")).sum()

    h = 0.01
    expected = (end(-5.0 + h) - end(-5.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(end)(-5.0), expected, rtol=0.02, atol=1e-3)


def exact_eps_traced(schedule, s2):
    """E[eps | x_t] of N(0, s2), by the levels of a schedule under differentiation."""

    def eps_fn(x_t, t):
        ab, rest = (
            schedules.extract(a, t, x_t)
            for a in (schedule.alpha_bar, ddpm.noise_variance(schedule))
        )
        return jnp.sqrt(rest) * x_t / (ab * s2 + rest)

    return eps_fn


@pytest.mark.slow
def test_samples_are_in_range_and_eta_is_passed_on():
    cfg = dataclasses.replace(TINY, T=21, ema=0.0, net=ddpm.NetConfig("mlp", (8,), dropout=0.0))
    family, state = ddpm.make(cfg), shaken(cfg)
    draw = jax.jit(
        lambda eta: family.sample(state, key(0), n=4, sampler="ddim", eta=eta), static_argnums=0
    )
    still, noisy = draw(0.0), draw(1.0)
    assert (np.asarray(still) != np.asarray(noisy)).any()
    for x in (still, noisy):
        assert x.min() >= 0 and x.max() <= 1


@pytest.mark.slow
def test_interpolants_of_one_image_share_their_noise():
    """a = b at step T/2: all shares start from one x_t, and without a net to speak of end within its noise."""
    a = 0.3 * jnp.ones((2, 3))
    eps_fn = exact_eps(LINEAR, 1e-6 * np.eye(3), 0.3)
    between = ddpm.interpolate(
        LINEAR, eps_fn, a, a, key(0), t=500, shares=jnp.array([0.0, 0.5, 1.0])
    )
    np.testing.assert_allclose(between, 0.3, atol=0.05)
    t = jnp.full(2, 499)
    seen = []

    def watch(x, t):
        jax.debug.callback(lambda x, t: seen.append((int(t[0]), np.asarray(x))), x, t)
        return eps_fn(x, t)

    ddpm.interpolate(LINEAR, watch, a, a, key(0), t=500, shares=jnp.array([0.0, 0.5, 1.0]))
    jax.effects_barrier()
    first = next(x for step, x in seen if step == int(t[0])).reshape(3, 2, 3)
    np.testing.assert_allclose(first[1:], first[:1].repeat(2, 0), atol=1e-6)
    assert max(step for step, _ in seen) == 499
