"""Likelihoods of the pixels, importance weighted training, two layers, labels, convolutions, half precision."""

import dataclasses
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from aigc_jax import data, vae

from .test_vae import CFG, images, key, params_of

TWO = dataclasses.replace(
    CFG, shape=(2, 2, 1), latent_dim=1, upper_dim=1, hidden=(4,), upper_hidden=(3,)
)
MLP = dataclasses.replace(CFG, latent_dim=2, hidden=(5,))


def float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


# --------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretised_logistic_sums_to_one_and_is_scipys(levels):
    rng = np.random.default_rng(levels)
    mean = np.concatenate([rng.normal(0.5, 0.5, 20), [0.0, 1.0, 5.0]])[:, None]
    log_scale = np.concatenate([rng.normal(-2, 1.5, 20), [-12.0, -12.0, 3.0]])[:, None]
    x = np.arange(levels)[None] / (levels - 1)
    ours = vae.log_logistic(
        *(jnp.asarray(a, jnp.float32) for a in np.broadcast_arrays(x, mean, log_scale)),
        levels=levels,
    )
    np.testing.assert_allclose(logsumexp(np.asarray(ours, np.float64), axis=1), 0, atol=2e-5)
    edges = (np.arange(levels + 1) - 0.5) / (levels - 1)
    edges[[0, -1]] = -np.inf, np.inf
    upper, lower = (
        stats.logistic(mean[:20], np.exp(log_scale[:20])).cdf(e) for e in (edges[1:], edges[:-1])
    )
    np.testing.assert_allclose(np.exp(ours[:20]), upper - lower, atol=2e-6)


def test_discretised_logistic_keeps_its_gradient_where_nothing_fits():
    def nll(mean, log_scale):
        return vae.log_logistic(jnp.full((1,), 0.5), mean, log_scale, levels=256).sum()

    for mean, log_scale in ((50.0, -12.0), (-50.0, -3.0), (0.5, -12.0), (0.5, 8.0), (0.5, 20.0)):
        value, slopes = jax.value_and_grad(nll, (0, 1))(
            jnp.full((1,), mean), jnp.full((1,), log_scale)
        )
        assert np.isfinite([value, slopes[0][0], slopes[1][0]]).all(), (mean, log_scale)
    assert jax.grad(nll)(jnp.full((1,), 50.0), jnp.full((1,), -3.0))[0] < -1  # towards the pixel


def test_learned_gaussian_is_scipys_and_never_narrower_than_a_level():
    cfg = dataclasses.replace(CFG, likelihood="gaussian")
    rng = np.random.default_rng(0)
    mean, raw = rng.normal(size=(2, 5, 4, 4, 1))
    x = images(5)
    sigma = np.exp(-np.log(16) + np.log1p(np.exp(raw + np.log(16))))
    assert (sigma > 1 / 16).all()
    expected = stats.norm(mean, sigma).logpdf(x).sum((1, 2, 3))
    decoded = jnp.asarray(np.concatenate([mean, raw], -1), jnp.float32)
    np.testing.assert_allclose(vae.log_likelihood(cfg, x, decoded), expected, rtol=1e-5)
    certain = jnp.concatenate(
        [x, jnp.full_like(x, -1e4)], -1
    )  # the right mean, no doubt at all: still bounded
    bound = 16 * (np.log(16) - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(vae.log_likelihood(cfg, x, certain), bound, rtol=1e-5)


def test_bits_per_dim_of_what_knows_nothing_are_those_of_the_levels():
    nll = jnp.full((3,), 16 * np.log(17))  # uniform over 17 levels, 16 pixels
    np.testing.assert_allclose(
        vae.bits_per_dim(dataclasses.replace(CFG, likelihood="logistic"), nll),
        np.log2(17),
        rtol=1e-6,
    )
    density = dataclasses.replace(CFG, likelihood="gaussian")  # density 1 on [0, 1]: 16 levels wide
    np.testing.assert_allclose(vae.bits_per_dim(density, jnp.zeros(3)), 4, rtol=1e-6)


def test_bits_per_dim_of_a_gaussian_come_near_the_logistics_probabilities():
    """A wide sigma: the density times the level's width is the mass of the level, to second order."""
    x = jnp.asarray(np.random.default_rng(0).integers(40, 200, (4, 4, 4, 1)) / 255, jnp.float32)
    cfg = dataclasses.replace(CFG, levels=256, likelihood="gaussian", sigma=0.2)
    density = vae.bits_per_dim(cfg, -vae.log_likelihood(cfg, x, jnp.full_like(x, 0.5)))
    edges = (np.asarray(x, np.float64) + d / 510 for d in (1, -1))
    upper, lower = (stats.norm(0.5, 0.2).cdf(e) for e in edges)
    np.testing.assert_allclose(density, -np.log2(upper - lower).mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.slow
def test_bits_are_reported_where_the_likelihood_is_one_of_the_images():
    cfg = dataclasses.replace(CFG, likelihood="logistic")
    batch = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1)), jnp.uint8)
    }

    def values(cfg):
        family = vae.make(cfg)
        return jax.jit(family.evaluate)(jax.jit(family.init)(key()), batch, key(4))

    got = values(cfg)
    np.testing.assert_allclose(got["nll_bits_per_dim"], vae.bits_per_dim(cfg, got["nll_nats"]))
    assert "nll_bits_per_dim" not in values(
        CFG
    )  # grey levels under a Bernoulli: no likelihood of anything
    assert "nll_bits_per_dim" in values(dataclasses.replace(CFG, binarisation="dynamic"))


# ---------------------------------------------------------------------------------------------------------- two layers


def brute_weights(cfg, params, x, z):
    """log p(x, z) - log q(z|x) by scipy, [k, B], for draws z as `vae.draw` gives them."""

    def log_normal(z, mu, logvar):
        return stats.norm(np.asarray(mu), np.exp(np.asarray(logvar) / 2)).logpdf(z).sum(-1)

    z_1, z_2 = (np.asarray(a, np.float64) for a in z)
    p = 1 / (1 + np.exp(-np.asarray(vae.decode(cfg, params, z[0]), np.float64)))
    x_ = np.asarray(x)
    log_p = (x_ * np.log(p) + (1 - x_) * np.log(1 - p)).sum((2, 3, 4))
    log_p += log_normal(z_1, *vae.decode_upper(cfg, params, z[1])) + log_normal(z_2, 0.0, 0.0)
    return (
        log_p
        - log_normal(z_1, *vae.encode(cfg, params, x))
        - log_normal(z_2, *vae.encode_upper(cfg, params, z[0]))
    )


@pytest.mark.slow
def test_weights_of_two_layers_are_the_definition():
    cfg = dataclasses.replace(TWO, latent_dim=3, upper_dim=2)
    params, x = params_of(cfg), images(4, cfg)
    z = vae.sample_posterior(cfg, params, x, key(), k=6)
    assert [a.shape for a in z] == [(6, 4, 3), (6, 4, 2)]
    np.testing.assert_allclose(
        vae.log_weights(cfg, params, x, key(), k=6), brute_weights(cfg, params, x, z), rtol=2e-4
    )


@pytest.mark.slow
def test_bound_of_two_layers_reaches_the_evidence_by_quadrature():
    params, x = params_of(TWO), (images(3, TWO) > 0.5).astype(jnp.float32)
    grid = np.linspace(-7, 7, 281)
    z_1, z_2 = (g.reshape(-1, 1) for g in np.meshgrid(grid, grid))
    z = tuple(jnp.asarray(z, jnp.float32)[:, None].repeat(3, 1) for z in (z_1, z_2))
    log_p = vae.log_prior(TWO, params, z) + vae.log_likelihood(
        TWO, x[None], vae.decode(TWO, params, z[0])
    )
    evidence = logsumexp(np.asarray(log_p, np.float64), axis=0) + 2 * np.log(grid[1] - grid[0])
    bound = jax.jit(partial(vae.iwae_bound, TWO, k=20_000, chunk=1000))(params, x, key())
    np.testing.assert_allclose(bound, evidence, atol=0.02)
    assert (vae.elbo(TWO, params, x, key(), k=4000)["elbo"] < evidence).all()


@pytest.mark.slow
def test_elbo_of_two_layers_is_the_mean_log_weight():
    cfg = dataclasses.replace(TWO, latent_dim=3, upper_dim=2)
    params, x = params_of(cfg), images(2, cfg)
    weights = np.asarray(vae.log_weights(cfg, params, x, key(0), k=20_000))
    ours = vae.elbo(cfg, params, x, key(1), k=20_000)
    np.testing.assert_array_less(
        np.abs(ours["elbo"] - weights.mean(0)), 4 * weights.std(0) * np.sqrt(2 / 20_000)
    )
    np.testing.assert_allclose(ours["elbo"], ours["reconstruction"] - ours["kl"], rtol=1e-6)


def test_samples_of_two_layers_follow_the_prior():
    """With linear maps the marginal of z_1 is a Gaussian that is known."""
    cfg = dataclasses.replace(
        TWO, latent_dim=2, upper_dim=1, upper_hidden=(), hidden=(), likelihood="gaussian", sigma=1.0
    )
    family = vae.make(cfg)
    state = jax.jit(family.init)(key())
    head = {
        "kernel": jnp.asarray([[0.05, -0.1, 0, 0]]),
        "bias": jnp.asarray([0.5, 0.5, -5.0, -6.0]),
    }
    state.params["upper_decoder"] = {"params": {"Dense_0": head}}
    dense = {"kernel": jnp.asarray([[1.0, 0, 0.5, 0], [0, 1.0, 0, 0.5]]), "bias": jnp.zeros(4)}
    state.params["decoder"] = {"params": {"Dense_0": dense}}
    drawn = np.asarray(family.sample(state, key(2), n=20_000)).reshape(-1, 4)[:, :2]
    expected = np.outer([0.05, -0.1], [0.05, -0.1]) + np.diag(np.exp([-5.0, -6.0]))
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.0006)
    np.testing.assert_allclose(drawn.mean(0), 0.5, atol=0.005)


# ------------------------------------------------------------------------------------------------- importance weighted


def batch_of(cfg, n=8):
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.integers(0, cfg.levels, (n, *cfg.shape)), jnp.uint8)}
    return batch | (
        {"label": jnp.asarray(rng.integers(0, cfg.classes, n), jnp.int32)} if cfg.classes else {}
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_training_logs_the_bound_that_it_trains(objective):
    cfg = dataclasses.replace(CFG, objective=objective, k=7)
    family, batch = vae.make(cfg), batch_of(cfg)
    state = jax.jit(family.init)(key())
    _, metrics = jax.jit(family.step)(state, batch, key(4))
    k_x, k_z = jax.random.split(key(4))
    log_w = np.asarray(
        vae.log_weights(cfg, state.params, vae.preprocess(cfg, batch, k_x), k_z, k=7), np.float64
    )
    np.testing.assert_allclose(
        metrics["iwae_nats"], (logsumexp(log_w, axis=0) - np.log(7)).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["elbo_nats"], log_w.mean(), rtol=1e-5)
    assert metrics["loss"] == -metrics["iwae_nats"] and metrics["iwae_nats"] > metrics["elbo_nats"]
    values = jax.jit(family.evaluate)(state, batch, key(4))
    np.testing.assert_allclose(values["nll_nats"], np.log(7) - logsumexp(log_w, axis=0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg, beta", [(MLP, 1.0), (dataclasses.replace(TWO, latent_dim=2, upper_dim=2), 0.3)]
)
def test_gradients_are_the_papers_sums(cfg, beta):
    """IWAE eq. 14 and DReG eq. 8, their weights and single terms made one draw at a time, in float64."""
    k = 3
    with jax.enable_x64(True):
        params, x = float64(params_of(cfg, 2.0)), images(2, cfg).astype(jnp.float64)

        def path(params):
            return vae.sample_posterior(cfg, params, x, key(), k=k)

        @jax.jit
        def log_w(params, q, z):  # q: the parameters of its density
            likelihood = vae.log_likelihood(cfg, x[None], vae.decode(cfg, params, z[0]))
            return likelihood + beta * (
                vae.log_prior(cfg, params, z) - vae.log_posterior(cfg, q, x, z)
            )

        z = path(params)
        w = np.asarray(jax.nn.softmax(log_w(params, params, z), 0))
        theta, q, slope = jax.jit(jax.jacrev(log_w, (0, 1, 2)))(params, params, z)  # [k, B, ...]
        expected = {"iwae": np.zeros_like(flat(params)), "dreg": np.zeros_like(flat(params))}
        pull = jax.jit(lambda cotangent: jax.vjp(path, params)[1](cotangent)[0])
        for i in range(k):
            for b in range(2):
                direct, density, along = jax.tree.map(itemgetter((i, b)), (theta, q, slope))
                phi = flat(pull(along))
                expected["iwae"] += w[i, b] * (flat(direct) + flat(density) + phi)
                expected["dreg"] += (
                    w[i, b] * flat(direct) + w[i, b] * (1 - beta + beta * w[i, b]) * phi
                )
        dreg = jax.grad(lambda p: vae.dreg_bound(cfg, p, x, key(), k=k, beta=beta)[0].sum())(params)
        np.testing.assert_allclose(flat(dreg), expected["dreg"], rtol=1e-8, atol=1e-10)
        iwae = jax.grad(lambda p: jax.nn.logsumexp(log_w(p, p, path(p)), 0).sum())(params)
        np.testing.assert_allclose(flat(iwae), expected["iwae"], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_step_takes_the_gradient_of_the_bound(objective):
    """One SGD step of rate 1, averaged over the batch, against the bound's own gradient on the same draws."""
    cfg = dataclasses.replace(MLP, objective=objective, k=4, optim=vae.Optim("sgd", lr=1.0))
    family, batch = vae.make(cfg), batch_of(cfg, 4)
    state = jax.jit(family.init)(key())
    moved, _ = jax.jit(family.step)(state, batch, key(4))
    k_x, k_z = jax.random.split(key(4))
    x = vae.preprocess(cfg, batch, k_x)

    def bound(params):
        if objective == "dreg":
            return vae.dreg_bound(cfg, params, x, k_z, k=4)[0].mean()
        return (jax.nn.logsumexp(vae.log_weights(cfg, params, x, k_z, k=4), 0) - jnp.log(4)).mean()

    np.testing.assert_allclose(
        flat(moved.params) - flat(state.params), flat(jax.grad(bound)(state.params)), atol=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_doubly_reparameterised_gradient_has_the_same_mean_and_less_noise(beta):
    cfg = dataclasses.replace(MLP, shape=(2, 2, 1))
    params, x, k = params_of(cfg, 0.7), images(2, cfg), 20

    def iwae(params, key):
        z = vae.sample_posterior(cfg, params, x, key, k=k)
        ratio = vae.log_prior(cfg, params, z) - vae.log_posterior(cfg, params, x, z)
        likelihood = vae.log_likelihood(cfg, x[None], vae.decode(cfg, params, z[0]))
        return jax.nn.logsumexp(likelihood + beta * ratio, 0).sum()

    def dreg(params, key):
        return vae.dreg_bound(cfg, params, x, key, k=k, beta=beta)[0].sum()

    draws = {}
    for name, bound in (("iwae", iwae), ("dreg", dreg)):
        keys = jax.random.split(key(len(draws)), 4000)
        grads = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(params, keys)["encoder"]
        draws[name] = np.concatenate([np.reshape(g, (4000, -1)) for g in jax.tree.leaves(grads)], 1)
    gap = draws["iwae"].mean(0) - draws["dreg"].mean(0)
    error = np.sqrt((draws["iwae"].var(0) + draws["dreg"].var(0)) / 4000)
    z = gap[error > 0] / error[error > 0]
    assert np.abs(z).max() < 5 and np.mean(z**2) < 2
    # No law: far from the posterior its draws of large weight can make it the noisier one.
    assert beta < 1 or draws["dreg"].var(0).sum() < 0.5 * draws["iwae"].var(0).sum()


@pytest.mark.slow
def test_doubly_reparameterised_gradient_vanishes_at_the_exact_posterior():
    """There log w does not depend on z, so nothing is left to learn; the plain gradient is all noise."""
    from experiments.ppca_exact import linear_vae

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w = np.linalg.qr(rng.normal(size=(6, 3)))[0] * [1.5, 1.0, 0.7]
        cfg, params = linear_vae(w, rng.normal(size=6), 0.3)
        x = jnp.asarray(rng.normal(size=(4, 1, 6, 1)))
        dreg = jax.grad(lambda p: vae.dreg_bound(cfg, p, x, key(), k=4)[0].sum())(params)
        plain = jax.grad(
            lambda p: jax.nn.logsumexp(vae.log_weights(cfg, p, x, key(), k=4), 0).sum()
        )(params)
        assert (
            np.abs(flat(dreg["encoder"])).max() < 1e-9 < 1e-2 < np.abs(flat(plain["encoder"])).max()
        )
        assert np.abs(flat(dreg["decoder"])).max() > 1e-2


@pytest.mark.slow
def test_elbo_over_more_draws_is_the_same_bound_with_less_noise():
    params, x = params_of(CFG, 2.0), images(2)
    one, ten = (
        np.asarray(
            jax.vmap(lambda q, k=k: vae.elbo(CFG, params, x, q, k=k)["elbo"])(
                jax.random.split(key(), 2000)
            )
        )
        for k in (1, 10)
    )
    np.testing.assert_array_less(
        np.abs(one.mean(0) - ten.mean(0)), 4 * np.sqrt((one.var(0) + ten.var(0)) / 2000)
    )
    np.testing.assert_allclose(one.var(0) / ten.var(0), 10, rtol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("step, weight", [(0, 0.0), (5, 1.0), (10, 2.0), (99, 2.0)])
def test_kl_weight_rises_and_stays(step, weight):
    cfg = dataclasses.replace(CFG, beta=2.0, kl_warmup=10)
    family = vae.make(cfg)
    state = jax.jit(family.init)(key())._replace(step=jnp.asarray(step, jnp.int32))
    _, metrics = jax.jit(family.step)(state, batch_of(cfg), key(4))
    np.testing.assert_allclose(
        metrics["loss"], weight * metrics["kl_nats"] - metrics["reconstruction_nats"], rtol=1e-6
    )


# -------------------------------------------------------------------------------------------------------- active units


@pytest.mark.slow
def test_activity_of_a_linear_encoder_is_known():
    cfg = dataclasses.replace(CFG, hidden=(), latent_dim=2, upper_dim=3, upper_hidden=())
    params, x = params_of(cfg), images(40)
    first, second = jax.jit(partial(vae.activity, cfg, k=2000))(params, x, key())
    head = params["encoder"]["params"]["Gaussian_0"]["Dense_0"]["kernel"][:, :2]
    upper = params["upper_encoder"]["params"]["Dense_0"]["kernel"][:, :3]
    mu = np.asarray(x).reshape(40, -1) @ np.asarray(head)
    np.testing.assert_allclose(first, mu.var(0), rtol=1e-4)
    np.testing.assert_allclose(second, (mu @ np.asarray(upper)).var(0), rtol=0.1, atol=5e-3)


@pytest.mark.slow
def test_noise_does_not_count_as_activity():
    """An encoder that ignores its image: mean over keys 0, though each E_q[z_2] is a mean of few noisy draws."""
    cfg = dataclasses.replace(CFG, hidden=(), latent_dim=2, upper_dim=3, upper_hidden=())
    params = params_of(cfg)
    head = params["encoder"]["params"]["Gaussian_0"]["Dense_0"]
    head["kernel"] = jnp.zeros_like(head["kernel"])
    keys = jax.random.split(key(), 300)
    second = jax.vmap(lambda q: vae.activity(cfg, params, images(40), q, k=2)[1])(keys)
    np.testing.assert_array_less(
        np.abs(second.mean(0)), 4 * np.asarray(second).std(0) / np.sqrt(300)
    )
    assert (np.asarray(second).std(0) > 1e-3).all()


# -------------------------------------------------------------------------------------------------------------- labels

LABELLED = dataclasses.replace(CFG, classes=3)


@pytest.mark.slow
def test_labels_reach_encoder_and_decoder_of_their_own_image_only():
    params, x, label = params_of(LABELLED), images(3), jnp.asarray([0, 1, 2])

    def terms(label):
        mu, _ = vae.encode(LABELLED, params, x, label)
        return np.asarray(mu), np.asarray(vae.decode(LABELLED, params, jnp.zeros((3, 3)), label))

    for before, after in zip(terms(label), terms(label.at[1].set(2)), strict=True):
        changed = (before != after).any(tuple(range(1, before.ndim)))
        assert changed.tolist() == [False, True, False]


@pytest.mark.slow
def test_labels_of_many_draws_are_those_of_the_images():
    params, x, label = params_of(LABELLED), images(3), jnp.asarray([2, 0, 1])
    z = vae.sample_posterior(LABELLED, params, x, key(), k=4, label=label)[0]
    together = vae.decode(LABELLED, params, z, label)
    for b in range(3):
        alone = vae.decode(LABELLED, params, z[:, b], jnp.full(4, label[b]))
        np.testing.assert_allclose(together[:, b], alone, atol=1e-6)


@pytest.mark.slow
def test_conditional_pictures():
    family = vae.make(LABELLED)
    state = jax.jit(family.init)(key())
    turn = family.sample(state, key(2), n=6)
    np.testing.assert_array_equal(turn, family.sample(state, key(2), n=6, label=jnp.arange(6) % 3))
    assert (
        np.asarray(turn) != np.asarray(family.sample(state, key(2), n=6, label=jnp.zeros(6, int)))
    ).any()
    label = jnp.asarray([0, 1, 2])
    line = vae.interpolate(
        LABELLED, state.params, images(3), images(3, seed=4), steps=3, label=label
    )
    np.testing.assert_allclose(
        line[:, 0], vae.reconstruct(LABELLED, state.params, images(3), label), atol=1e-6
    )
    flat_cfg = dataclasses.replace(LABELLED, latent_dim=2)
    grids = [
        vae.manifold(flat_cfg, params_of(flat_cfg), side=2, label=jnp.asarray(c)) for c in (0, 1)
    ]
    assert (np.asarray(grids[0]) != np.asarray(grids[1])).any()


def test_labels_that_are_missing_are_refused():
    with pytest.raises(ValueError, match="needs label="):
        vae.encode(LABELLED, params_of(LABELLED), images(2))
    with pytest.raises(ValueError, match="takes no label"):
        vae.decode(CFG, params_of(CFG), jnp.zeros((2, 3)), jnp.zeros(2, int))
    blank = np.zeros((5, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match="no labels"):
        LABELLED.check(data.from_arrays({"image": blank}, levels=17).info)
    with pytest.raises(ValueError, match="classes is 3, the images have 2"):
        LABELLED.check(
            data.from_arrays({"image": blank, "label": np.arange(5) % 2}, levels=17).info
        )
    LABELLED.check(data.from_arrays({"image": blank, "label": np.arange(5) % 3}, levels=17).info)


# -------------------------------------------------------------------------------------- convolutions and half precision

CONV = dataclasses.replace(CFG, shape=(8, 12, 2), channels=(3, 5), hidden=(7,), classes=2)


@pytest.mark.slow
def test_convolutional_net_takes_any_leading_axes_and_sees_all_pixels():
    params = params_of(CONV)
    label = jnp.asarray([0, 1, 1])
    z = jax.random.normal(key(), (2, 3, CONV.latent_dim))
    decoded = jax.jit(partial(vae.decode, CONV))(params, z, label)
    assert decoded.shape == (2, 3, 8, 12, 2)
    for k in range(2):
        np.testing.assert_allclose(decoded[k], vae.decode(CONV, params, z[k], label), atol=1e-5)
    slope = jax.jit(jax.grad(lambda x: vae.encode(CONV, params, x, label)[0].sum()))(
        images(3, CONV)
    )
    assert (np.abs(slope) > 0).all()
    turned = jax.jit(jax.jacobian(lambda z: vae.decode(CONV, params, z, label[:1])))(z[0, :1])
    assert (np.abs(turned).max((0, -2, -1)) > 0).all()


@pytest.mark.slow
def test_convolution_doubles_the_picture_pixel_by_pixel():
    """One layer by loops: low-resolution pixel (i, j), phase (a, b) -> pixel (2i + a, 2j + b)."""
    cfg = dataclasses.replace(CFG, shape=(4, 6, 2), channels=(3,), hidden=(), activation="tanh")
    params = params_of(cfg)
    z = jax.random.normal(key(), (1, cfg.latent_dim))
    dense, conv = (params["decoder"]["params"][name] for name in ("Dense_0", "Conv_0"))
    low = np.tanh((z @ dense["kernel"] + dense["bias"][None]).reshape(2, 3, 3))
    padded = np.pad(low, ((1, 1), (1, 1), (0, 0)))
    expected = np.zeros((4, 6, 2))
    for i, j, a, b, c in np.ndindex(2, 3, 2, 2, 2):
        feature = (a * 2 + b) * 2 + c
        taps = padded[i : i + 3, j : j + 3] * conv["kernel"][..., feature]
        expected[2 * i + a, 2 * j + b, c] = taps.sum() + conv["bias"][feature]
    np.testing.assert_allclose(vae.decode(cfg, params, z)[0], expected, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_inside_only():
    """Parameters, moments, loss and bounds stay float32, and the gradient points the same way."""
    batch, steps = batch_of(CONV, 16), {}
    for half in (False, True):
        family = vae.make(dataclasses.replace(CONV, bfloat16=half, optim=vae.Optim("sgd", lr=1.0)))
        state = jax.jit(family.init)(key())
        moved, metrics = jax.jit(family.step)(state, batch, key(4))
        assert {
            x.dtype
            for x in jax.tree.leaves(
                (moved.params, metrics, jax.jit(family.evaluate)(state, batch, key()))
            )
        } == {np.dtype("float32")}
        steps[half] = flat(moved.params) - flat(state.params), float(metrics["loss"])
        products = str(jax.make_jaxpr(family.step)(state, batch, key(4))).count("bf16")
        assert (products > 0) == half
    (exact, loss), (rounded, rounded_loss) = steps[False], steps[True]
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert (
        0.99 < cosine < 1 and abs(loss - rounded_loss) < 0.01 * abs(loss) and loss != rounded_loss
    )


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"k": 0}, "model.k must be at least 1, got 0"),
        ({"classes": -1}, "model.classes must be at least 0"),
        ({"upper_dim": -2}, "model.upper_dim must be at least 0"),
        ({"upper_hidden": (3, 0)}, "model.upper_hidden must hold positive widths"),
        ({"channels": (4, -1)}, "model.channels must hold positive widths"),
        ({"channels": (4, 4, 4)}, "halve H and W 3 times, which 4 x 4 pixels do not allow"),
        ({"kl_warmup": -1}, "model.kl_warmup must be at least 0"),
        ({"likelihood": "logistic", "binarisation": "static"}, "likelihood logistic needs none"),
        ({"sigma": 0.0, "likelihood": "gaussian"}, "model.sigma must be positive"),
        ({"sigma": 0.5}, "for likelihood gaussian only"),
    ],
)
def test_bad_fields_are_refused_by_name_and_value(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CFG, **fields)


def test_no_draws_are_refused_by_every_bound():
    params, x = params_of(CFG), images(2)
    for bound in (vae.log_weights, vae.elbo, vae.dreg_bound, vae.iwae_bound):
        with pytest.raises(ValueError, match="at least 1"):
            bound(CFG, params, x, key(), k=0)
    with pytest.raises(ValueError, match="at least 1"):
        vae.iwae_bound(CFG, params, x, key(), k=5, chunk=0)


@pytest.mark.slow
def test_wild_decoders_stay_finite():
    """Raw log scales of any size: the likelihood and its gradient stay in float32."""
    for likelihood in ("gaussian", "logistic"):
        cfg = dataclasses.replace(CFG, likelihood=likelihood)
        for size in (-1e4, 1e4):
            decoded = jnp.full((1, 4, 4, 2), size)
            value, slope = jax.value_and_grad(
                lambda d, cfg=cfg: vae.log_likelihood(cfg, images(1), d).sum()
            )(decoded)
            assert jnp.isfinite(value) and jnp.isfinite(slope).all()
