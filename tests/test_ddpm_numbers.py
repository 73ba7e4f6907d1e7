"""Diffusion away from the easy case: every schedule, spacing, prediction and dtype, against closed forms in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import ddpm, train
from aigc_jax.commands.sample import DiffusionOptions
from aigc_jax.ddpm import binomial, bounds, schedules

pytestmark = pytest.mark.slow  # test_ddpm.py holds what all of them rest on

MEAN, STD = 0.3, 0.5  # of x_0
LEARNED = ddpm.Config(
    shape=(1,),
    schedule="learned",
    variance="beta_tilde",
    objective="vlb",
    times="low_discrepancy",
    net=ddpm.NetConfig("mlp", (4,), dropout=0.0),
)


def key(i):
    return jax.random.key(i)


def bulging(T, end=1.0):
    """A path that is neither straight nor preserves variance: x_t is up to 1.5 times that of the straight one."""
    u = np.arange(1, T + 1) / T
    scale = 1 + 2 * u * (1 - u) + (end - 1) * u
    return schedules.from_levels((scale * (1 - u)) ** 2, (scale * u) ** 2)


SCHEDULES = {
    "linear": ddpm.linear_schedule(1000),
    "cosine": ddpm.cosine_schedule(1000),
    "even": ddpm.discretise(lambda u: -13.3 + 26.6 * u, 1000),  # in log signal-to-noise ratio
    "learned": ddpm.schedule_of(LEARNED, {"gamma": ddpm.init_gamma(key(0))}),
    "straight": ddpm.straight_schedule(1000),
    "bulging": bulging(1000),
}
NATURAL = {"straight": "velocity", "bulging": "velocity"}  # else eps


def tables(schedule):
    """signal^2 and noise^2, float64."""
    return np.asarray(schedule.alpha_bar, np.float64), np.asarray(
        ddpm.noise_variance(schedule), np.float64
    )


def factors(schedule, std=STD, dtype=jnp.float32):
    """{prediction: (slope, offset)} of the best prediction for x_0 ~ N(MEAN, std^2), linear in x_t; made in float64."""
    a, n = tables(schedule)
    x_0 = a**0.5 * std**2 / (a * std**2 + n), n / (a * std**2 + n) * MEAN
    eps = n**0.5 / (a * std**2 + n), -((a * n) ** 0.5) / (a * std**2 + n) * MEAN
    v = tuple(a**0.5 * e - n**0.5 * x for e, x in zip(eps, x_0, strict=True))
    velocity = tuple(e - x for e, x in zip(eps, x_0, strict=True))
    return {
        name: [jnp.asarray(f, dtype) for f in both]
        for name, both in (("x_0", x_0), ("eps", eps), ("v", v), ("velocity", velocity))
    }


def exact(schedule, prediction="eps", dtype=jnp.float32):
    slope, offset = factors(schedule, dtype=dtype)[prediction]

    def fn(x, t):
        return slope[t][:, None] * x + offset[t][:, None]

    return fn


def standardised(n=4000, dtype=np.float32):
    z = np.random.default_rng(0).normal(size=(n, 1))
    return jnp.asarray((z - z.mean()) / z.std(), dtype)


# ----------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("T", [1, 2, 3, 7, 21, 100, 1000])
def test_steps_are_distinct_and_visit_both_ends(T):
    several = [ddpm.cosine_schedule(T), ddpm.discretise(lambda u: -13.3 + 18.3 * u**1.2, T)]
    several.append(ddpm.straight_schedule(T))
    for schedule in several:
        for steps in {1, 2, min(10, T), T // 2, T - 1, T} & set(range(1, T + 1)):
            for spacing in ("uniform", "quadratic", "log_snr", "karras"):
                few = ddpm.respace(schedule, steps, spacing)
                assert len(few.t) == steps and (np.diff(few.t) > 0).all() and few.t[-1] == T - 1
                assert steps == 1 or few.t[0] == 0
                np.testing.assert_array_equal(
                    few.alpha_bar, np.asarray(schedule.alpha_bar, np.float64)[few.t]
                )


@pytest.mark.parametrize("T", [2, 3, 1000])
def test_traced_levels_choose_the_steps_of_those_at_hand(T):
    """But for ties, which float32 breaks another way."""
    run = jax.jit(
        lambda s, steps, spacing: ddpm.respace(s, steps, spacing).t, static_argnums=(1, 2)
    )
    several = [ddpm.cosine_schedule(T), ddpm.discretise(lambda u: -13.3 + 18.3 * u**1.2, T)]
    several.append(ddpm.straight_schedule(T))
    for schedule in several:
        for spacing in ("log_snr", "karras"):
            t = np.asarray(run(jax.tree.map(jnp.asarray, schedule), min(10, T), spacing))
            assert (np.diff(t) > 0).all() and t[-1] == T - 1 and t[0] == 0
            assert np.abs(t - ddpm.respace(schedule, min(10, T), spacing).t).max() <= 1


def test_steps_lie_evenly_in_what_they_are_named_after():
    a, n = tables(SCHEDULES["linear"])
    sigma = (n / a) ** 0.5
    ramp = np.linspace(0, 1, 10)
    karras = (
        sigma[0] ** (1 / 7) + ramp * (sigma[-1] ** (1 / 7) - sigma[0] ** (1 / 7))
    ) ** 7  # eq. 5, the least first
    for spacing, wanted in (
        ("karras", karras),
        ("log_snr", sigma[0] ** (1 - ramp) * sigma[-1] ** ramp),
    ):
        t = ddpm.respace(SCHEDULES["linear"], 10, spacing).t
        nearest = np.abs(np.log(sigma)[None] - np.log(wanted)[:, None]).argmin(1)
        assert np.abs(t - nearest).max() <= (1 if spacing == "karras" else 0)
    # A gap that is wider than a step is one step: sigma 641 to 20,000 takes none of the other levels away.
    a, n = tables(SCHEDULES["cosine"])
    t = ddpm.respace(SCHEDULES["cosine"], 10, "karras").t
    place = ((n / a) ** (0.5 / 7))[t]
    assert t[-2:].tolist() == [998, 999]
    np.testing.assert_allclose(np.diff(place)[:-1], np.diff(place)[:-1].mean(), rtol=0.15)
    with pytest.raises(ValueError, match="spacing 'karras' depends on the noise levels"):
        schedules.spaced(10, 3, "karras")


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_ancestral_sampling_and_inpainting_respace_themselves(spacing):
    schedule, x_T = SCHEDULES["cosine"], standardised(8)
    few, fn = ddpm.respace(schedule, 5, spacing), exact(schedule)
    given = {"known": x_T, "mask": jnp.arange(8)[:, None] < 4}
    for sample, options in ((ddpm.sample_ddpm, {}), (ddpm.inpaint, given)):
        by_itself = sample(schedule, fn, x_T, key(1), steps=5, spacing=spacing, **options)
        np.testing.assert_array_equal(by_itself, sample(few, fn, x_T, key(1), **options))


def test_a_family_takes_its_samplers_spacing():
    cfg = ddpm.Config(
        shape=(2,), T=50, schedule="cosine", ema=0.0, net=ddpm.NetConfig("mlp", (8,), dropout=0.0)
    )
    family = ddpm.make(cfg)
    state = jax.jit(family.init)(key(0))
    state = state._replace(params=jax.tree.map(lambda x: x + 0.1, state.params))

    def draw(sampler, **options):
        return jax.jit(partial(family.sample, n=3, sampler=sampler, steps=6, **options))(
            state, key(1)
        )

    for sampler, own, other in (("ddpm", "uniform", "karras"), ("heun", "log_snr", "uniform")):
        by_default = draw(sampler)
        np.testing.assert_array_equal(by_default, draw(sampler, spacing=own))
        assert np.abs(by_default - draw(sampler, spacing=other)).max() > 1e-4
    with pytest.raises(
        ValueError,
        match="spacing must be one of uniform, paper, quadratic, log_snr, karras, not 'even'",
    ):
        draw("ddim", spacing="even")


def test_the_command_line_passes_spacing_on_and_refuses_what_does_not_divide():
    cfg = ddpm.Config(shape=(2,), T=50, net=ddpm.NetConfig("mlp", (8,)))
    assert DiffusionOptions().options(cfg) == {}  # the model decides
    assert DiffusionOptions(spacing="karras").options(cfg)["spacing"] == "karras"
    assert DiffusionOptions(spacing="paper", steps=10).options(cfg)["steps"] == 10
    with pytest.raises(
        train.Refused, match="--diffusion.spacing paper needs --diffusion.steps that divide 50"
    ):
        DiffusionOptions(spacing="paper", steps=7).options(cfg)


# -------------------------------------------------------------------------------------------------------- the samplers


@partial(jax.jit, static_argnames=("solve", "steps", "spacing"))
def spread(schedule, slope, offset, solve, steps, **spacing):
    """Of 4,000 samples; levels and the exact velocity are arguments, so that schedules share what is compiled."""

    def fn(x, t):
        return slope[t][:, None] * x + offset[t][:, None]

    x_T = standardised()
    return solve(schedule, fn, x_T, steps=steps, prediction="velocity", **spacing).std()


def spreads(schedule, solve, **spacing):
    given = jax.tree.map(jnp.asarray, schedule), *factors(schedule)["velocity"]
    return [float(spread(*given, solve, steps, **spacing)) for steps in (10, 20, 50)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_steps_reach_the_spread_of_the_data(name):
    for solve, limits in (
        (ddpm.sample_dpm_solver, (0.11, 0.03, 0.005)),
        (ddpm.sample_heun, (0.1, 0.03, 0.01)),
    ):
        found = spreads(SCHEDULES[name], solve)
        assert (np.abs(np.array(found) - STD) < limits).all(), (solve, found)


@pytest.mark.parametrize(
    ("name", "due"), [("linear", (0.392, 0.476, 0.501)), ("cosine", (0.469, 0.498, 0.501))]
)
def test_the_step_into_level_0_is_of_first_order(name, due):
    """Evenly in t it is six times as long as the one before: to second order 0.693, 0.621 and 0.528 on linear."""
    np.testing.assert_allclose(
        spreads(SCHEDULES[name], ddpm.sample_dpm_solver, spacing="uniform"), due, atol=1e-3
    )


def flow_by_hand(name, schedule, steps, spacing, x):
    """DPM-Solver++(2M) or Heun in the angle, on a straight path in u; in float64, one level at a time."""
    a, n = (table[ddpm.respace(schedule, steps, spacing).t] for table in tables(schedule))

    def x_0_hat(x, i):
        return MEAN + a[i] ** 0.5 * STD**2 / (a[i] * STD**2 + n[i]) * (x - a[i] ** 0.5 * MEAN)

    def v(x, i):
        if not schedule.preserves_variance:
            return (x - x_0_hat(x, i)) / n[i] ** 0.5
        return (a[i] ** 0.5 * x - x_0_hat(x, i)) / n[i] ** 0.5

    lam, before = 0.5 * np.log(np.maximum(a, 1e-300) / n), None  # infinite without signal
    phi = np.arccos(a**0.5) if schedule.preserves_variance else n**0.5
    for i in range(steps - 1, 0, -1):
        if name == "heun":
            step = phi[i - 1] - phi[i]
            x = x + step * (v(x, i) + v(x + step * v(x, i), i - 1)) / 2
            continue
        d, h = x_0_hat(x, i), lam[i - 1] - lam[i]
        first_order = before is None or i == 1 or a[i + 1] == 0
        second = 0 if first_order else h / (lam[i] - lam[i + 1]) / 2
        step = d if not second else d + second * (d - before)
        x, before = (n[i - 1] / n[i]) ** 0.5 * x - a[i - 1] ** 0.5 * np.expm1(-h) * step, d
    return x_0_hat(x, 0)


def test_solvers_are_those_written_by_hand():
    x = np.array([[1.5], [-0.4], [0.0]])
    cases = [
        ("cosine", 1, "uniform"),
        ("cosine", 2, "uniform"),
        ("cosine", 3, "karras"),
        ("cosine", 12, "uniform"),
        ("linear", 12, "karras"),
        ("learned", 12, "quadratic"),
        ("straight", 1, "uniform"),
        ("straight", 12, "uniform"),
        ("straight", 12, "log_snr"),
    ]
    for name, steps, spacing in cases:
        schedule = SCHEDULES[name]
        prediction = NATURAL.get(name, "eps")
        how = {"steps": steps, "spacing": spacing, "prediction": prediction}
        for solver, solve in (("heun", ddpm.sample_heun), ("dpm_solver", ddpm.sample_dpm_solver)):
            fn = exact(schedule, prediction)
            got = solve(schedule, fn, jnp.asarray(x, jnp.float32), **how)
            by_hand = flow_by_hand(solver, schedule, steps, spacing, x)
            np.testing.assert_allclose(
                got, by_hand, rtol=1e-3, atol=3e-3, err_msg=f"{solver} {spacing} {steps}"
            )


SAMPLERS = {
    "ddpm": lambda s, fn, x, **how: ddpm.sample_ddpm(
        ddpm.respace(s, 10, "karras"), fn, x, key(1), **how
    ),
    "ddim": lambda s, fn, x, **how: ddpm.sample_ddim(s, fn, x, key(1), steps=10, eta=0.5, **how),
    "invert": lambda s, fn, x, **how: ddpm.ddim_invert(s, fn, x, steps=10, **how),
    "dpm_solver": lambda s, fn, x, **how: ddpm.sample_dpm_solver(s, fn, x, steps=10, **how),
    "heun": lambda s, fn, x, **how: ddpm.sample_heun(s, fn, x, steps=10, **how),
    "inpaint": lambda s, fn, x, **how: ddpm.inpaint(
        ddpm.respace(s, 10, "log_snr"),
        fn,
        x,
        key(1),
        known=np.ones(x.shape, np.uint8),
        mask=(np.arange(x.shape[1])[None] % 2).repeat(len(x), 0).astype(np.float16),
        repeats=2,
        **how,
    ),
    "interpolate": lambda s, fn, x, **how: ddpm.interpolate(
        ddpm.respace(s, 10, "karras"),
        fn,
        x,
        x[::-1],
        key(1),
        t=7,
        shares=np.array([0.2, 0.7]),
        **how,
    ),
}
BOUNDS = {
    "vlb": lambda s, fn, x, **how: ddpm.vlb(ddpm.respace(s, 10, "log_snr"), fn, x, key(1), **how),
    "ode": lambda s, fn, x, **how: ddpm.ode_log_likelihood(s, fn, x, key(1), steps=10, **how),
}


@pytest.mark.parametrize("of", ["learned", "straight", "bulging"])
@pytest.mark.parametrize("name", SAMPLERS | BOUNDS)
def test_a_function_of_v_or_x_0_is_as_good_as_one_of_eps_or_velocity(name, of):
    schedule, x = SCHEDULES[of], standardised(8).reshape(4, 2)
    call = partial((SAMPLERS | BOUNDS)[name], schedule)
    natural = NATURAL.get(of, "eps")
    expected = call(exact(schedule, natural), x, prediction=natural)
    for prediction in ("v", "velocity", "x_0") if name in ("ddpm", "heun", "vlb") else ("v",):
        got = call(exact(schedule, prediction), x, prediction=prediction)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-4)
    with pytest.raises(
        ValueError,
        match="prediction must be eps, x_0, v or velocity, not 'mu' .*convert it to x_0 first",
    ):
        call(exact(schedule), x, prediction="mu")


def test_continuous_bounds_take_v_and_x_0():
    x = standardised(64)

    def fn(prediction):
        def predict(x, u):
            g = (-8 + 13 * u)[:, None]
            a, n = jax.nn.sigmoid(-g), jax.nn.sigmoid(g)
            eps = jnp.sqrt(n) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + n)
            x_0 = (x - jnp.sqrt(n) * eps) / jnp.sqrt(a)
            v = jnp.sqrt(a) * eps - jnp.sqrt(n) * x_0
            return {"eps": eps, "x_0": x_0, "v": v, "velocity": eps - x_0}[prediction]

        return predict

    due, *others = (
        ddpm.continuous_vlb(lambda u: -8 + 13 * u, fn(p), x, key(0), prediction=p)
        for p in ("eps", "x_0", "v", "velocity")
    )
    for other in others:
        np.testing.assert_allclose(other, due, rtol=2e-3, atol=1e-3)


def test_a_detour_through_eps_costs_what_v_keeps():
    """A v that is known to bfloat16 only, cosine of T = 1000, whose sqrt(alpha_bar) ends at 5e-5."""
    schedule, z = SCHEDULES["cosine"], standardised(200)

    def v_fn(x, t):
        return exact(schedule, "v")(x, t).astype(jnp.bfloat16)

    def eps_fn(x, t):
        return ddpm.convert(schedule, v_fn(x, t), x, t, given="v", wanted="eps").astype(
            jnp.bfloat16
        )

    for name, solve in (("heun", ddpm.sample_heun), ("dpm_solver", ddpm.sample_dpm_solver)):
        due = flow_by_hand(name, schedule, 10, "log_snr", np.asarray(z, np.float64))
        direct = np.abs(solve(schedule, v_fn, z, steps=10, prediction="v") - due).max()
        around = np.abs(solve(schedule, eps_fn, z, steps=10) - due).max()
        assert direct < 0.02 and around > 3 * direct, (name, direct, around)
    # In float32 too: what x_0 was, after a way there and back.
    x, t = standardised(500), jnp.full(500, 999)
    v = exact(schedule, "v")(x, t)
    eps = ddpm.convert(schedule, v, x, t, given="v", wanted="eps")
    due = MEAN + (tables(schedule)[0][-1] ** 0.5 * STD**2) * np.asarray(x, np.float64)
    direct = np.abs(ddpm.convert(schedule, v, x, t, given="v", wanted="x_0") - due).max()
    around = np.abs(ddpm.convert(schedule, eps, x, t, given="eps", wanted="x_0") - due).max()
    assert direct < 1e-6 and around > 100 * direct


@pytest.mark.parametrize("prediction", ["v", "x_0", "mu"])
def test_guidance_acts_on_the_nets_own_prediction(prediction):
    """Of each it is the same line: guided eps, and guided predictions made eps."""
    cfg = ddpm.Config(
        shape=(3,),
        classes=2,
        T=30,
        schedule="cosine",
        prediction=prediction,
        ema=0.0,
        net=ddpm.NetConfig("mlp", (8,), dropout=0.0),
    )
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(ddpm.make(cfg).init)(key(0)).params)
    x, t, label = (
        jax.random.normal(key(1), (4, 3)),
        jnp.array([0, 9, 20, 25]),
        jnp.array([0, 1, 1, 0]),
    )
    cond, uncond = (ddpm.eps_fn_of(cfg, params, y)(x, t) for y in (label, None))
    fn, own = ddpm.predict_fn_of(cfg, params, label, 1.5)
    assert own == ("x_0" if prediction == "mu" else prediction)
    guided = ddpm.convert(ddpm.cosine_schedule(30), fn(x, t), x, t, given=own, wanted="eps")
    np.testing.assert_allclose(guided, ddpm.guide(cond, uncond, 1.5), rtol=1e-3, atol=1e-3)


def test_a_net_of_mu_is_sampled_in_few_steps():
    """Its mu is the mean one step of T below, whatever steps are visited: converted by all T levels."""
    schedule = ddpm.cosine_schedule(200)
    x_0_fn, z = exact(schedule, "x_0"), standardised(50)

    def mu(x, t):
        return ddpm.q_posterior(schedule, x_0_fn(x, t), x, t)[0]

    def back(x, t):
        return ddpm.convert(schedule, mu(x, t), x, t, given="mu", wanted="x_0")

    due = ddpm.sample_heun(schedule, x_0_fn, z, steps=9, prediction="x_0")
    np.testing.assert_allclose(
        ddpm.sample_heun(schedule, back, z, steps=9, prediction="x_0"), due, atol=2e-3
    )


# --------------------------------------------------------------------------------------------------------- the density


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_gives_the_density_of_every_schedule(name):
    schedule, x = SCHEDULES[name], jnp.array([[0.3], [0.8], [-0.4]])
    variance = (
        STD**2 + ddpm.noise_variance(schedule)[0] / np.asarray(schedule.alpha_bar, np.float64)[0]
    )
    due = -0.5 * np.log(2 * np.pi * variance) - (np.asarray(x)[:, 0] - MEAN) ** 2 / 2 / variance
    # The model's x_T is N(0, 1), that of the data what the last level leaves: the learned one ends at gamma = 5.
    a, n = (table[-1] for table in tables(schedule))
    last = a * STD**2 + n
    z = (np.asarray(x)[:, 0] - MEAN) / variance**0.5
    x_T = a**0.5 * MEAN + last**0.5 * z
    due = due - 0.5 * x_T**2 + 0.5 * np.log(last) + 0.5 * z**2
    assert abs(due[0] + 0.2258) < 0.005
    fn, natural = exact(schedule, "v"), NATURAL.get(name, "eps")
    for trace, spacing in (("hutchinson", "uniform"), ("exact", "karras")):
        got = jax.jit(
            partial(
                ddpm.ode_log_likelihood,
                schedule,
                fn,
                steps=200,
                trace=trace,
                spacing=spacing,
                prediction="v",
            )
        )(x, key(0))
        np.testing.assert_allclose(got, due, atol=1e-3)
    density = partial(
        ddpm.ode_log_likelihood, schedule, exact(schedule, natural), prediction=natural
    )
    got = jax.jit(partial(density, steps=200, trace="exact"))(x, key(0))
    np.testing.assert_allclose(got, due, atol=1e-3)
    assert np.isfinite(density(x, key(0), steps=2)).all()


def test_the_flow_and_heun_on_a_path_that_ends_in_wider_noise():
    """x_T has the standard deviation 1.5: the density is that of x_T ~ N(0, I), and a wider x_T gives the data."""
    schedule, x = bulging(1000, end=1.5), jnp.array([[0.3], [0.8], [-0.4]])
    a, n = tables(schedule)
    np.testing.assert_allclose([a[-1], n[-1]], [0, 1.5**2])
    fn, how = exact(schedule, "velocity"), {"steps": 200, "prediction": "velocity"}
    variance = STD**2 + n[0] / a[0]
    z = (np.asarray(x)[:, 0] - MEAN) / variance**0.5  # x_T = 1.5 z
    due = -0.5 * np.log(2 * np.pi * variance) - (1.5 * z) ** 2 / 2 + np.log(1.5)
    got = ddpm.ode_log_likelihood(schedule, fn, x, key(0), trace="exact", **how)
    np.testing.assert_allclose(got, due, atol=1e-3)
    x_T = 1.5 * jnp.array([[-1.0], [0.0], [2.0]])
    got = ddpm.sample_heun(schedule, fn, x_T, **how)
    np.testing.assert_allclose(got[:, 0], MEAN + STD * np.array([-1, 0, 2]), atol=2e-3)


def test_the_flow_gives_the_density_of_several_dimensions():
    cov, schedule = np.array([[0.5, 0.3], [0.3, 0.4]]), SCHEDULES["cosine"]
    a, n = tables(schedule)
    matrices = (n**0.5)[:, None, None] * np.linalg.inv(
        a[:, None, None] * cov + n[:, None, None] * np.eye(2)
    )
    matrices = jnp.asarray(matrices, jnp.float32)
    x = np.random.default_rng(0).multivariate_normal(np.zeros(2), cov, 50)
    whole = cov + n[0] / a[0] * np.eye(2)
    due = -0.5 * np.einsum("bi,ij,bj->b", x, np.linalg.inv(whole), x) - 0.5 * np.log(
        np.linalg.det(2 * np.pi * whole)
    )
    for shape in ((50, 2), (50, 1, 2, 1)):

        def eps_fn(x, t):
            return jnp.einsum("bij,bj->bi", matrices[t], x.reshape(-1, 2)).reshape(x.shape)

        density = jax.jit(
            partial(ddpm.ode_log_likelihood, schedule, eps_fn, steps=100, trace="exact")
        )
        np.testing.assert_allclose(
            density(jnp.asarray(x.reshape(shape), jnp.float32), key(0)), due, atol=0.01
        )


@pytest.mark.parametrize(
    ("low", "high"), [(-110.0, 10.0), (-13.0, 100.0)], ids=["no noise", "no signal"]
)
def test_levels_without_noise_or_signal_give_numbers(low, high):
    """In float32 alpha_bar is 1 at the first level and noise2 0; or alpha_bar 0 at the last."""
    x = jnp.array([[0.3], [-0.2]])

    @jax.jit
    def run(ends):
        schedule = ddpm.discretise(lambda u: ends[0] + (ends[1] - ends[0]) * u, 400)

        def fn(x, t):
            a, n = (
                schedules.extract(table, t, x)
                for table in (schedule.alpha_bar, ddpm.noise_variance(schedule))
            )
            return jnp.sqrt(a) * jnp.sqrt(n) * (x - jnp.sqrt(a) * MEAN) / (
                a * STD**2 + n
            ) - jnp.sqrt(n) * (
                MEAN + jnp.sqrt(a) * STD**2 / (a * STD**2 + n) * (x - jnp.sqrt(a) * MEAN)
            )

        def eps_fn(x, t):
            return ddpm.convert(schedule, fn(x, t), x, t, given="v", wanted="eps")

        return {
            "ode": ddpm.ode_log_likelihood(
                schedule, fn, x, key(0), steps=200, trace="exact", prediction="v"
            ),
            "ode of eps": ddpm.ode_log_likelihood(
                schedule, eps_fn, x, key(0), steps=200, trace="exact"
            ),
            "heun": ddpm.sample_heun(schedule, fn, x, steps=50, prediction="v"),
            "dpm_solver": ddpm.sample_dpm_solver(schedule, fn, x, steps=50, prediction="v"),
            "ddpm": ddpm.sample_ddpm(schedule, fn, x, key(1), prediction="v"),
        }

    found = run(jnp.array([low, high]))
    assert all(np.isfinite(x).all() for x in found.values()), found
    due = -0.5 * np.log(2 * np.pi * STD**2) - (np.asarray(x)[:, 0] - MEAN) ** 2 / 2 / STD**2
    for name in ("ode", "ode of eps"):
        np.testing.assert_allclose(found[name], due, atol=0.01)


# ---------------------------------------------------------------------------------------------------------- the dtypes


@pytest.mark.parametrize(("of", "prediction"), [("cosine", "v"), ("straight", "velocity")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_dtype_of_their_noise(name, of, prediction):
    """And the digits of float32, up to one rounding at the end."""
    schedule, z = (
        SCHEDULES[of],
        standardised(8).reshape(4, 2).astype(jnp.bfloat16).astype(jnp.float16),
    )
    fn = exact(schedule, prediction)
    call = partial(SAMPLERS[name], schedule, fn, prediction=prediction)
    due = call(z.astype(jnp.float32))
    assert due.dtype == jnp.float32
    for x, limit in ((z.astype(jnp.bfloat16), 1.5e-2), (np.asarray(z), 2e-3)):
        got = call(x)
        assert got.dtype == x.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), due, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", BOUNDS)
def test_likelihoods_of_half_precision_are_float32(name):
    schedule, x = SCHEDULES["cosine"], standardised(8).reshape(4, 2).astype(jnp.bfloat16)
    due = BOUNDS[name](schedule, exact(schedule), x.astype(jnp.float32))
    for given in (x, np.asarray(x, np.float32)):
        got = BOUNDS[name](schedule, exact(schedule), given)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("of", "natural"), [("cosine", "eps"), ("straight", "velocity")])
@pytest.mark.parametrize("name", SAMPLERS | BOUNDS)
def test_float64_keeps_its_digits_and_float32_its_dtype(name, of, natural):
    schedule = SCHEDULES[of]
    with jax.enable_x64(True):
        x, call = (
            np.random.default_rng(0).normal(size=(4, 2)),
            partial((SAMPLERS | BOUNDS)[name], schedule),
        )
        fn = exact(schedule, "v", dtype=jnp.float64)
        due = call(fn, x, prediction="v")
        narrow = call(fn, x.astype(np.float32), prediction="v")
        assert due.dtype == jnp.float64 and narrow.dtype == jnp.float32
        if name in ("ddpm", "ode", "vlb"):
            got = call(exact(schedule, natural, dtype=jnp.float64), x, prediction=natural)
            np.testing.assert_allclose(got, due, rtol=1e-9, atol=1e-9)
        if name in ("invert", "dpm_solver", "heun"):  # the others draw other noise in float64
            np.testing.assert_allclose(narrow, due, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", ["straight", "cosine"])
def test_float64_is_exact_and_not_float32_in_disguise(of):
    schedule, x = SCHEDULES[of], np.array([[1.5], [-0.4]])
    due = {name: flow_by_hand(name, schedule, 12, "log_snr", x) for name in ("heun", "dpm_solver")}
    with jax.enable_x64(True):
        for name, solve in (("heun", ddpm.sample_heun), ("dpm_solver", ddpm.sample_dpm_solver)):
            got = solve(
                schedule, exact(schedule, "v", dtype=jnp.float64), x, steps=12, prediction="v"
            )
            np.testing.assert_allclose(got, due[name], rtol=1e-11, atol=1e-11)
        a, n = tables(schedule)
        got = ddpm.q_sample(schedule, x, np.array([0, 999]), x[::-1].copy())
        np.testing.assert_allclose(
            got[:, 0], (a[[0, 999]] ** 0.5) * x[:, 0] + n[[0, 999]] ** 0.5 * x[::-1, 0], rtol=1e-14
        )
        even = ddpm.discretise(lambda u: -13.3 + 18.3 * u, 100)
        noise2 = 1 / (1 + np.exp(-np.linspace(-13.3, 5, 100)))
        np.testing.assert_allclose(ddpm.noise_variance(even), noise2, rtol=1e-12)


def test_a_learned_schedule_is_respaced_where_it_is_traced():
    """Its own ends decide which steps are taken, inside jit; in float16 too."""
    cfg = LEARNED

    @jax.jit
    def run(params, x):
        schedule = ddpm.schedule_of(cfg, params)

        def fn(x, t):
            a, n = (
                schedules.extract(table, t, x)
                for table in (schedule.alpha_bar, ddpm.noise_variance(schedule))
            )
            return jnp.sqrt(n) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + n)

        density = ddpm.ode_log_likelihood(
            schedule, fn, x, key(0), steps=200, spacing="karras", trace="exact"
        )
        return [SAMPLERS[name](schedule, fn, x) for name in ("dpm_solver", "heun")], density

    params, z = {"gamma": ddpm.init_gamma(key(0))}, standardised(400)
    samples, density = run(params, z)
    for x in samples:
        assert abs(float(x.std()) - STD) < 0.03
    schedule = SCHEDULES["learned"]
    due = jax.jit(
        partial(ddpm.ode_log_likelihood, schedule, exact(schedule), steps=200, trace="exact")
    )(z, key(0))
    np.testing.assert_allclose(density, due, atol=2e-3)
    samples, density = jax.eval_shape(run, params, z.astype(jnp.float16))
    assert all(x.dtype == jnp.float16 for x in samples) and density.dtype == jnp.float32


def test_bits_of_any_dtype_and_of_many_steps():
    """P(x_{t-1} = 1 | x_t = 0, x_0 = 1) at T = 4000 is a beta of 1e-5, whose digits 1 minus a sum had lost."""
    schedule, rate = ddpm.cosine_schedule(4000), 0.2
    t = np.array([1, 5, 100, 3999])
    beta = schedule.beta[t]
    earlier, noise_earlier = (table[t] for table in schedules.previous(schedule))
    for x_0 in (0.0, 1.0):
        for x_t in (0.0, 1.0):
            one = (earlier * x_0 + noise_earlier * rate) * (
                1 - beta * (1 - rate) if x_t else beta * (1 - rate)
            )
            zero = (earlier * (1 - x_0) + noise_earlier * (1 - rate)) * (
                beta * rate if x_t else 1 - beta * rate
            )
            bits = (np.full((4, 1), bit, np.float32) for bit in (x_0, x_t))
            got = binomial.q_posterior(schedule, *bits, t, rate)[:, 0]
            np.testing.assert_allclose(got, one / (one + zero), rtol=2e-6)
    short, x_T = ddpm.cosine_schedule(12), np.arange(12).reshape(4, 3) % 2

    @jax.jit
    def run(x):
        def logits_fn(x, t):
            return 4 * x - 2

        return binomial.sample(short, logits_fn, x, key(0), rate=rate), binomial.vlb(
            short, logits_fn, x, key(0), rate=rate
        )

    bits, nats = run(jnp.asarray(x_T, jnp.bfloat16))
    due_bits, due_nats = run(jnp.asarray(x_T, jnp.float32))
    assert bits.dtype == jnp.bfloat16 and nats.dtype == jnp.float32
    np.testing.assert_array_equal(bits, due_bits)
    np.testing.assert_allclose(nats, due_nats, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- digits elsewhere


def test_a_beta_that_rounds_to_one_keeps_its_way_back():
    """Two levels of gamma -13 .. 18: alpha_bar falls to 2e-8, and 1 - beta has no digits in float32."""
    ends = np.array([-13.0, 18.0])
    fine = ddpm.discretise(lambda u: -13 + 31 * u, 300)
    noise2, alpha_bar = 1 / (1 + np.exp(-ends)), 1 / (1 + np.exp(ends))
    x_0, x_t = np.array([[0.5]], np.float32), np.array([[-1.5]], np.float32)
    kept = alpha_bar[1] / alpha_bar[0]
    due = (alpha_bar[0] ** 0.5 * (1 - kept) * x_0 + kept**0.5 * noise2[0] * x_t) / noise2[1]
    for few in (
        ddpm.respace(fine, 2),
        jax.jit(lambda g: ddpm.discretise(lambda u: -13 + g * u, 2))(31.0),
    ):
        mean, variance = ddpm.q_posterior(few, x_0, x_t, np.array([1]))
        np.testing.assert_allclose(mean, due, rtol=1e-4)
        np.testing.assert_allclose(variance[0, 0], noise2[0], rtol=1e-4)
        np.testing.assert_allclose(schedules.step_signal_squared(few)[1], kept, rtol=1e-4)
    assert np.isfinite(ddpm.sample_ddpm(ddpm.respace(fine, 2), exact(fine), x_t, key(0))).all()


def test_the_divergence_of_nearly_equal_normals_is_not_rounding():
    ratio = 1 + np.array([[1e-2], [1e-3], [-1e-4]])
    got = bounds.gaussian_kl(0.0, jnp.asarray(ratio, jnp.float32), 0.0, jnp.ones((3, 1)))
    seen = np.asarray(ratio, np.float32).astype(np.float64)  # the ratio that float32 holds
    np.testing.assert_allclose(got, 0.5 * (seen - 1 - np.log(seen))[:, 0], rtol=2e-3)


def test_noises_of_any_size_are_mixed_on_their_sphere():
    a, b = (np.random.default_rng(i).normal(size=(3, 5)) for i in (0, 1))
    cos = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    theta = np.arccos(cos)[:, None]
    due = (np.sin(0.7 * theta) * a + np.sin(0.3 * theta) * b) / np.sin(theta)
    for scale in (1.0, 1e25, 1e-25):
        got = ddpm.slerp(
            jnp.asarray(scale * a, jnp.float32), jnp.asarray(scale * b, jnp.float32), 0.3
        )
        np.testing.assert_allclose(np.asarray(got, np.float64) / scale, due, rtol=1e-4, atol=1e-5)
    half = ddpm.slerp(a.astype(np.float16), b.astype(np.float16), 0.3)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half.astype(jnp.float32), due, rtol=5e-3, atol=5e-3)
    zero = np.zeros((3, 5), np.float32)
    for pair in (
        (zero, b.astype(np.float32)),
        (zero, zero),
        (b.astype(np.float32), -b.astype(np.float32)),
    ):
        assert np.isfinite(ddpm.slerp(*pair, 0.3)).all()


def test_no_time_lies_beyond_the_last_step():
    for T in (1, 3, 1000, 4096, 10_000):
        u = jnp.asarray([0.0, 0.5, 1 - 2**-24, 1.0], jnp.float32)
        t = bounds.step_at(u, T)
        assert t.max() == T - 1 and t[0] == 0 and t[1] == T // 2


def test_the_target_of_v_is_not_a_quotient():
    """A net that says 0 at the last step of a cosine schedule, x_0 far out: the loss is the square of v itself."""
    cfg = ddpm.Config(
        shape=(1,),
        T=1000,
        schedule="cosine",
        prediction="v",
        ema=0.0,
        net=ddpm.NetConfig("mlp", (4,), dropout=0.0),
    )
    params = jax.jit(ddpm.make(cfg).init)(key(0)).params
    a, n = tables(SCHEDULES["cosine"])
    x_0, eps = np.full((2, 1), 3e-4, np.float32), np.full((2, 1), 1.0, np.float32)
    loss = jax.jit(partial(ddpm.losses, cfg), static_argnums=4)
    got = loss(params, jnp.asarray(x_0), jnp.full(2, 999), jnp.asarray(eps), None)
    np.testing.assert_allclose(
        got, (a[-1] ** 0.5 - n[-1] ** 0.5 * 3e-4) ** 2 * np.ones(2), rtol=1e-3
    )


@pytest.mark.parametrize(
    "eta", [np.float32(2.0), jnp.float32(-0.5), np.array(1.5), 1.01, float("nan")]
)
def test_an_eta_that_is_none_is_refused_whatever_its_type(eta):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"eta must lie in 0\.\.1"):
        ddpm.sample_ddim(ddpm.cosine_schedule(3), lambda x, t: x, x, key(0), steps=2, eta=eta)
    with pytest.raises(ValueError, match="be 0 with sigma_hat"):
        ddpm.sample_ddim(
            ddpm.cosine_schedule(3),
            lambda x, t: x,
            x,
            key(0),
            steps=2,
            eta=jnp.float32(1.0),
            sigma_hat=True,
        )


def test_points_that_are_no_bits_are_refused():
    cfg = ddpm.DiscreteConfig(dim=4, T=3, net=ddpm.NetConfig("mlp", (4,), dropout=0.0))
    family = ddpm.make_discrete(cfg)
    state = jax.jit(family.init)(key(0))
    for wrong in (
        np.full((2, 4), 0.5, np.float32),
        jnp.full((2, 4), 2.0),
        np.full((2, 4), np.nan, np.float32),
    ):
        for act in (family.evaluate, family.step):
            with pytest.raises(ValueError, match="points must be bits, 0 or 1"):
                act(state, {"points": wrong}, key(1))
    bits = np.eye(4, dtype=bool)[:2]
    jax.eval_shape(family.evaluate, state, {"points": bits}, key(1))
