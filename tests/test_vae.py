"""The VAE against closed forms, quadrature and brute force."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logsumexp, ndtri

from aigc_jax import data, vae
from experiments import _criteria, ppca_exact

CFG = vae.Config(shape=(4, 4, 1), levels=17, latent_dim=3, hidden=(12, 8))


def key(i=3):
    return jax.random.key(i)


def params_of(cfg, scale=1.0):
    params = jax.jit(vae.make(cfg).init)(jax.random.key(1)).params
    return jax.tree.map(lambda x: scale * x, params)


def images(n=6, cfg=CFG, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((n, *cfg.shape)), jnp.float32)


def test_kl_is_the_integral():
    """Against quadrature, dimension by dimension."""
    rng = np.random.default_rng(0)
    mu, logvar = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    grid = np.linspace(-12, 12, 200_001)
    expected = np.zeros(2)
    for b in range(2):
        for z in range(3):
            q = stats.norm(mu[b, z], np.exp(logvar[b, z] / 2))
            expected[b] += np.trapezoid(
                q.pdf(grid) * (q.logpdf(grid) - stats.norm.logpdf(grid)), grid
            )
    np.testing.assert_allclose(
        vae.gaussian_kl(jnp.asarray(mu), jnp.asarray(logvar)), expected, rtol=1e-5
    )
    assert (vae.gaussian_kl(jnp.zeros((4, 3)), jnp.zeros((4, 3))) == 0).all()


def test_log_normal_is_scipys():
    rng = np.random.default_rng(1)
    x, mu, logvar = rng.normal(size=(3, 2, 5))
    expected = stats.norm(mu, np.exp(logvar / 2)).logpdf(x).sum(-1)
    np.testing.assert_allclose(
        vae.log_normal(*map(jnp.asarray, (x, mu, logvar))), expected, rtol=1e-5
    )


def test_bernoulli_likelihood_in_float64_and_at_extreme_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 1)) * 5, jnp.float32)
    x = (images(5) > 0.5).astype(jnp.float32)
    p = expit(np.asarray(logits, np.float64))
    expected = np.where(x > 0, np.log(p), np.log1p(-p)).sum((1, 2, 3))
    np.testing.assert_allclose(vae.log_likelihood(CFG, x, logits), expected, rtol=1e-5)
    far = jnp.full((1, 4, 4, 1), 200.0)
    value, slope = jax.value_and_grad(
        lambda l: vae.log_likelihood(CFG, jnp.zeros((1, 4, 4, 1)), l).sum()
    )(far)
    assert value == -3200 and jnp.isfinite(slope).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bernoulli_gradient_is_x_minus_the_probability(dtype):
    """At logit 0, at -0, and as far as floats and infinity go; likewise its own derivative by x."""
    logits = np.array([0.0, -0.0, 1e-8, 3.0, -3.0, 20.0, -200.0, 6e4, -np.inf, np.inf])
    x, l = (
        jnp.asarray(a.reshape(1, -1, 1, 1), dtype)
        for a in np.meshgrid(np.array([0.0, 0.25, 1.0]), logits)
    )
    slope = jax.grad(lambda l: vae.log_likelihood(CFG, x, l).astype(jnp.float32).sum())(l)
    expected = np.asarray(x, np.float64) - expit(np.asarray(l, np.float64))
    np.testing.assert_allclose(
        slope.astype(jnp.float32), expected, atol=float(jnp.finfo(dtype).eps)
    )
    one = partial(vae.log_likelihood, CFG)
    for pixel, logit, value in (
        (1.0, np.inf, 0.0),
        (0.0, -np.inf, 0.0),
        (0.0, np.inf, -np.inf),
        (1.0, -np.inf, -np.inf),
    ):
        assert one(*(jnp.full((1, 1, 1, 1), a, dtype) for a in (pixel, logit)))[0] == value
    by_x = jax.grad(lambda x: one(x, l[:, :-6]).astype(jnp.float32).sum())(x[:, :-6])
    np.testing.assert_array_equal(by_x, l[:, :-6])
    assert (
        jax.grad(jax.grad(lambda l: one(jnp.ones((1, 1, 1, 1)), l[None, None, None, None])[0]))(0.0)
        == -0.25
    )


def test_bernoulli_likelihood_keeps_small_losses():
    """-log p = log(1 + e^-l), of which x l - softplus(l) keeps nothing beyond l = 17."""
    l = jnp.array([10.0, 30.0, 80.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(
        -vae.log_likelihood(CFG, jnp.ones_like(l), l), np.log1p(np.exp(-l.ravel())), rtol=1e-6
    )


def test_bernoulli_likelihood_sums_to_one():
    """Over all 2^9 binary images of 3x3 pixels."""
    cfg = dataclasses.replace(CFG, shape=(3, 3, 1))
    every = ((np.arange(512)[:, None] >> np.arange(9)) & 1).astype(np.float32).reshape(512, 3, 3, 1)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 1)), jnp.float32)
    total = logsumexp(
        vae.log_likelihood(cfg, jnp.asarray(every), jnp.broadcast_to(logits, every.shape))
    )
    assert abs(total) < 1e-4


def test_gaussian_likelihood_is_scipys_density():
    cfg = dataclasses.replace(CFG, likelihood="gaussian", sigma=0.3)
    x, mean = images(5), images(5, seed=1)
    expected = stats.norm(np.asarray(mean, np.float64), 0.3).logpdf(x).sum((1, 2, 3))
    np.testing.assert_allclose(vae.log_likelihood(cfg, x, mean), expected, rtol=1e-5)


@pytest.mark.slow
def test_elbo_is_the_mean_log_weight():
    """Two estimators of one number: with exact KL, and as the mean of log weights. 3 s.e. of the difference."""
    params, x = params_of(CFG, 2.0), images(4)
    log_w = np.asarray(vae.log_weights(CFG, params, x, key(), k=4000))
    assert log_w.shape == (4000, 4)
    terms = jax.vmap(lambda k: vae.elbo(CFG, params, x, k)["elbo"])(
        jax.random.split(jax.random.key(9), 4000)
    )
    difference = np.asarray(terms).mean(0) - log_w.mean(0)
    se = np.sqrt((np.asarray(terms).var(0) + log_w.var(0)) / 4000)
    assert (np.abs(difference) < 4 * se).all()
    one = vae.elbo(CFG, params, x, key())
    np.testing.assert_allclose(one["elbo"], one["reconstruction"] - one["kl"], rtol=1e-6)
    other = vae.elbo(dataclasses.replace(CFG, beta=7.0), params, x, key())["elbo"]
    np.testing.assert_array_equal(one["elbo"], other)  # beta is never inside


@pytest.mark.slow
def test_iwae_bound_is_the_log_mean_weight_in_any_chunks():
    params, x = params_of(CFG, 2.0), images(4)
    keys = [jax.random.fold_in(key(), j) for j in range(4)]
    log_w = np.concatenate([vae.log_weights(CFG, params, x, k, k=3) for k in keys])[:10]
    expected = logsumexp(log_w.astype(np.float64), axis=0) - np.log(10)
    got = jax.jit(partial(vae.iwae_bound, CFG, k=10, chunk=3))(params, x, key())
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    whole = vae.iwae_bound(CFG, params, x, key(), k=10)
    log_w = np.asarray(
        vae.log_weights(CFG, params, x, jax.random.fold_in(key(), 0), k=10), np.float64
    )
    np.testing.assert_allclose(whole, logsumexp(log_w, axis=0) - np.log(10), rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        vae.iwae_bound(CFG, params, x, key(), k=0)


def test_iwae_bound_reaches_the_evidence_by_quadrature():
    """One latent: log p(x) by integration over z."""
    cfg = dataclasses.replace(CFG, latent_dim=1)
    params, x = params_of(cfg, 1.5), images(3)
    params["encoder"] = jax.tree.map(
        lambda w: 0.2 * w, params["encoder"]
    )  # near the prior: weights of small variance
    z = jnp.linspace(-8, 8, 4001)[:, None]
    log_joint = (
        vae.log_likelihood(cfg, x[:, None], vae.decode(cfg, params, z)[None])
        + stats.norm.logpdf(z[:, 0])[None]
    )
    evidence = logsumexp(np.asarray(log_joint, np.float64), axis=1) + np.log(16 / 4000)
    bound = vae.iwae_bound(cfg, params, x, key(), k=20_000, chunk=1000)
    np.testing.assert_allclose(bound, evidence, atol=0.02)


@pytest.mark.slow
def test_exact_posterior_gives_constant_weights_and_a_wrong_one_does_not(tmp_path):
    """The oracle of the experiment, at smoke scale: every criterion holds."""
    rows = {r.quantity: r.ours for r in ppca_exact.run(ppca_exact.SCALES["smoke"].setup, tmp_path)}
    for quantity, criterion in ppca_exact.CRITERIA.items():
        assert _criteria.parse(criterion)(rows[quantity]), (quantity, criterion, rows[quantity])


def test_ppca_oracle_is_scipys():
    w, b = data.points.ppca_parameters(7, 3)
    x = np.random.default_rng(0).normal(size=(5, 7))
    expected = stats.multivariate_normal(b, w @ w.T + 0.09 * np.eye(7)).logpdf(x)
    np.testing.assert_allclose(ppca_exact.log_p(x, w, b, 0.3), expected, rtol=1e-10)
    log_w = np.random.default_rng(1).normal(size=(12, 5))
    np.testing.assert_allclose(ppca_exact.bounds(log_w, 1), log_w.mean(0))
    np.testing.assert_allclose(ppca_exact.bounds(log_w, 12), logsumexp(log_w, axis=0) - np.log(12))


@pytest.mark.slow
def test_gradient_is_that_of_the_elbo_by_finite_differences():
    cfg = dataclasses.replace(CFG, hidden=(5,), optim=vae.Optim("sgd", lr=1.0))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params_of(cfg))
        x = images(4).astype(jnp.float64)

        def value(t):
            moved = jax.tree.map(
                lambda p: p + t * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape),
                params,
            )
            return vae.elbo(cfg, moved, x, key())["elbo"].mean()

        numeric = (value(1e-6) - value(-1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(value)(0.0), numeric, rtol=1e-6)


@pytest.mark.slow
def test_step_weighs_the_kl_with_beta():
    cfg = dataclasses.replace(CFG, beta=4.0)
    family = vae.make(cfg)
    batch = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1)), jnp.uint8)
    }
    _, metrics = family.step(family.init(key()), batch, jax.random.key(4))
    np.testing.assert_allclose(
        metrics["loss"], 4 * metrics["kl_nats"] - metrics["reconstruction_nats"], rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics["elbo_nats"], metrics["reconstruction_nats"] - metrics["kl_nats"], rtol=1e-6
    )


@pytest.mark.slow
def test_no_example_sees_another():
    """Gradients: the bound of image i depends on image i alone."""
    params, x = params_of(CFG), images(3)
    slopes = jax.jacobian(lambda x: vae.elbo(CFG, params, x, key())["elbo"])(x)
    size = np.abs(np.asarray(slopes)).sum((2, 3, 4))
    assert (size[~np.eye(3, dtype=bool)] == 0).all() and (np.diag(size) > 0).all()


# ----------------------------------------------------------------------------------------------------------- pixels in


def batch_of(levels, n=2000):
    image = np.tile(np.arange(16).reshape(1, 4, 4, 1) * (levels - 1) // 15, (n, 1, 1, 1)).astype(
        np.uint8
    )
    return {"image": jnp.asarray(image), "index": jnp.arange(n)}


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_preprocess_divides_by_the_largest_level(levels):
    x = vae.preprocess(dataclasses.replace(CFG, levels=levels), batch_of(levels, 1), key())
    assert x.dtype == jnp.float32 and float(x.min()) == 0 and float(x.max()) == 1
    np.testing.assert_allclose(
        x[0, ..., 0], np.asarray(batch_of(levels, 1)["image"])[0, ..., 0] / (levels - 1), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_binarisation_draws_bernoullis_with_the_pixels_as_means(kind):
    cfg = dataclasses.replace(CFG, binarisation=kind)
    batch = batch_of(17)
    x = np.asarray(vae.preprocess(cfg, batch, key()))
    p = np.asarray(batch["image"])[0] / 16
    assert set(np.unique(x)) == {0.0, 1.0}
    assert (np.abs(x.mean(0) - p) <= 4.5 * np.sqrt(p * (1 - p) / len(x))).all()
    again = np.asarray(vae.preprocess(cfg, batch, jax.random.key(77)))
    assert (again == x).all() == (kind == "static")
    if kind == "static":  # an image keeps its draw wherever in a batch it turns up
        order = np.random.default_rng(0).permutation(len(x))
        shuffled = {"image": batch["image"][order], "index": batch["index"][order]}
        np.testing.assert_array_equal(vae.preprocess(cfg, shuffled, key()), x[order])


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.slow
def test_manifold_is_the_grid_of_the_paper():
    cfg = dataclasses.replace(CFG, latent_dim=2)
    params = params_of(cfg)
    grid = vae.manifold(cfg, params, side=5)
    assert grid.shape == (5, 5, 4, 4, 1)
    at = ndtri((np.arange(5) + 0.5) / 5)
    z = jnp.asarray([[at[3], at[-1]]], jnp.float32)  # row 0 is the top, z_2 largest; column 3
    np.testing.assert_allclose(grid[0, 3], jax.nn.sigmoid(vae.decode(cfg, params, z))[0], atol=1e-6)
    with pytest.raises(ValueError, match="latent_dim = 2"):
        vae.manifold(CFG, params_of(CFG))


@pytest.mark.slow
def test_interpolation_ends_at_the_reconstructions():
    params, a, b = params_of(CFG), images(2), images(2, seed=5)
    line = vae.interpolate(CFG, params, a, b, steps=7)
    assert line.shape == (2, 7, 4, 4, 1)
    np.testing.assert_allclose(line[:, 0], vae.reconstruct(CFG, params, a), atol=1e-6)
    np.testing.assert_allclose(line[:, -1], vae.reconstruct(CFG, params, b), atol=1e-6)


def test_wild_inputs_stay_finite():
    """A logvar far outside float32's range of exp is clipped."""
    params = jax.tree.map(lambda x: 1e4 * x, params_of(CFG))
    terms = vae.elbo(CFG, params, images(3), key())
    assert jnp.isfinite(terms["kl"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic", "gaussian"])
@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8])
def test_binarised_images_may_be_bool_or_whole_numbers(likelihood, dtype):
    """As floats in the likelihood, its slope included; of whole numbers the encoder cannot tell levels from bits."""
    cfg = dataclasses.replace(CFG, likelihood=likelihood)
    params, x = params_of(cfg), np.random.default_rng(0).integers(0, 2, (3, 4, 4, 1))
    floats, same = jnp.asarray(x, jnp.float32), x.astype(dtype)
    decoded = vae.decode(cfg, params, jnp.ones((3, 3)))

    def both(x):
        return jax.value_and_grad(lambda decoded: vae.log_likelihood(cfg, x, decoded).sum())(
            decoded
        )

    for given in (same, jnp.asarray(same)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), both(given), both(floats))
    if dtype is bool:
        np.testing.assert_array_equal(
            vae.encode(cfg, params, same), vae.encode(cfg, params, floats)
        )
        for bound in (partial(vae.iwae_bound, k=3, chunk=2), partial(vae.dreg_bound, k=2)):
            jax.eval_shape(partial(bound, cfg, params), jnp.asarray(same), key())
    else:
        with pytest.raises(
            ValueError, match=f"image must be floats.*got {np.dtype(dtype)}.*preprocess"
        ):
            vae.encode(cfg, params, same)


def test_batches_and_images_of_another_form_are_refused():
    static = dataclasses.replace(CFG, binarisation="static")
    with pytest.raises(ValueError, match="takes 'index' in a batch, got image"):
        vae.preprocess(static, {"image": np.zeros((2, 4, 4, 1), np.uint8)}, key())
    with pytest.raises(ValueError, match="takes 'image' in a batch, got picture"):
        vae.preprocess(CFG, {"picture": np.zeros((2, 4, 4, 1), np.uint8)}, key())
    with pytest.raises(ValueError, match=r"images must be \[..., 4, 4, 1\], got \(2, 3, 4, 1\)"):
        vae.encode(CFG, params_of(CFG), images()[:2, :3])


@pytest.mark.slow
def test_images_beyond_0_and_1_are_refused():
    """With pixels up to 255 the cross-entropy of bernoulli is no bound: it was +137 nats."""
    params = params_of(CFG)
    for wrong in (255 * images(), images() - 0.5, np.full((2, 4, 4, 1), 1.1, np.float32)):
        with pytest.raises(ValueError, match=r"image must lie in \[0, 1\], got .*preprocess"):
            vae.elbo(CFG, params, wrong, key())
    rounded = jnp.asarray(images(), jnp.bfloat16) * 1.004
    assert (vae.elbo(CFG, params, rounded, key())["elbo"] < 0).all()
    gaussian = dataclasses.replace(CFG, likelihood="gaussian", sigma=1.0)
    assert jnp.isfinite(vae.elbo(gaussian, params, 9 * images(), key())["elbo"]).all()


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "field, value",
    [
        ("shape", (28, 28)),
        ("levels", 1),
        ("latent_dim", 0),
        ("hidden", (0,)),
        ("activation", "gelu"),
        ("likelihood", "cauchy"),
        ("binarisation", "yes"),
        ("sigma", 0.0),
        ("beta", -1.0),
        ("micro", 0),
        ("ema", 1.0),
    ],
)
def test_bad_config_is_refused_by_name_and_value(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        vae.Config(**{field: value})


def test_config_refuses_data_that_does_not_fit():
    digits = data.load("digits").info
    good = vae.Config(shape=(8, 8, 1), levels=17)
    good.check(digits)
    for cfg, words in (
        (vae.Config(), r"shape is \(28, 28, 1\).*\(8, 8, 1\)"),
        (dataclasses.replace(good, levels=256), "levels is 256.*17"),
    ):
        with pytest.raises(ValueError, match=words):
            cfg.check(digits)
    with pytest.raises(ValueError, match="points"):
        good.check(data.load("ring").info)
    with pytest.raises(ValueError, match="gaussian"):
        vae.Config(likelihood="gaussian", binarisation="static")
