"""The KL autoencoder against closed forms: likelihoods, KL term, PPCA, latents of unit variance."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from aigc_jax import data, metrics, train, vae
from aigc_jax.core import EMA, Optim, State
from aigc_jax.vae import autoencoder

CFG = vae.AutoencoderConfig(
    shape=(8, 12, 3), latent_channels=2, widths=(4, 6), blocks=1, groups=2, scale=0.1
)
LINEAR = vae.AutoencoderConfig(
    shape=(2, 2, 1), latent_channels=2, widths=(), patch=2, likelihood="gaussian", scale=0.3
)
key = jax.random.key
encode = jax.jit(autoencoder.encode, static_argnums=0)
decode = jax.jit(autoencoder.decode, static_argnums=0)
elbo = jax.jit(autoencoder.elbo, static_argnums=0)
latents = jax.jit(autoencoder.latents, static_argnums=0)
images = jax.jit(autoencoder.images, static_argnums=0)
reconstruct = jax.jit(autoencoder.reconstruct, static_argnums=0)


def pictures(n=5, cfg=CFG, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((n, *cfg.shape)), jnp.float32)


def shaken(cfg=CFG):
    """Parameters with noise on all of them, because the blocks' last layers begin at 0."""
    params = jax.jit(partial(autoencoder.init, cfg))(key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key(2), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return {**jax.tree.unflatten(tree, moved), "latents": params["latents"]}


# ------------------------------------------------------------------------------- likelihood and KL


@pytest.mark.parametrize("likelihood", ["laplace", "gaussian"])
def test_likelihood_is_scipys(likelihood):
    cfg = dataclasses.replace(CFG, likelihood=likelihood, scale=0.07)
    x, x_hat = pictures(), pictures(seed=1)
    density = stats.laplace if likelihood == "laplace" else stats.norm
    expected = density(np.float64(x_hat), 0.07).logpdf(np.float64(x)).sum((1, 2, 3))
    np.testing.assert_allclose(autoencoder.log_likelihood(cfg, x, x_hat), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_bound_is_its_terms_and_the_kl_is_the_closed_form():
    params, x = shaken(), pictures()
    mu, logvar = (np.float64(a) for a in encode(CFG, params, x))
    assert np.abs(mu).max() > 0.1 and np.abs(logvar).max() > 0.1
    expected = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3))
    terms = elbo(CFG, params, x, key(3))
    np.testing.assert_allclose(terms["kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(terms["elbo"], terms["reconstruction"] - terms["kl"], rtol=1e-6)
    z = mu + np.exp(logvar / 2) * np.asarray(jax.random.normal(key(3), mu.shape))
    x_hat = decode(CFG, params, jnp.asarray(z, jnp.float32))
    likelihood = autoencoder.log_likelihood(CFG, x, x_hat)
    np.testing.assert_allclose(terms["reconstruction"], likelihood, rtol=1e-4)


@pytest.mark.slow
def test_the_loss_weighs_the_kl_by_beta_and_the_metrics_do_not():
    cfg = dataclasses.replace(CFG, beta=0.3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, *CFG.shape), np.uint8)}
    params = shaken()
    state = State(jnp.zeros((), jnp.int32), None, ())
    loss = jax.jit(partial(autoencoder.loss, cfg))
    value, (extra, found) = loss(params, state, batch, key(4))
    expected = 0.3 * found["kl_nats"] - found["reconstruction_nats"]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    elbo = found["reconstruction_nats"] - found["kl_nats"]
    np.testing.assert_allclose(found["elbo_nats"], elbo, rtol=1e-5)
    assert extra is None


def ppca():
    """A linear model with orthogonal columns W, and its exact posterior as the encoder."""
    rng = np.random.default_rng(3)
    W = np.linalg.qr(rng.normal(size=(4, 2)))[0] * [1.5, 0.7]
    m, sigma = rng.normal(size=4), LINEAR.scale
    M = W.T @ W + sigma**2 * np.eye(2)
    P = np.linalg.solve(M, W.T)  # E[z|x] = P (x - m), Cov[z|x] = sigma^2 M^-1, diagonal here
    kernels = {"encoder": np.zeros((3, 3, 4, 4)), "decoder": np.zeros((3, 3, 2, 4))}
    kernels["encoder"][1, 1, :, :2] = P.T / 2  # the nets see and give 2 x - 1
    kernels["decoder"][1, 1] = 2 * W.T
    logvar = np.log(sigma**2 / np.diag(M))
    biases = {"encoder": np.concatenate([P @ (0.5 - m), logvar]), "decoder": 2 * m - 1}
    params = autoencoder.init(LINEAR, key(0))
    for net in kernels:
        out = {"kernel": kernels[net], "bias": biases[net]}
        out = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), out)
        assert jax.tree.map(jnp.shape, params[net]["params"]["out"]) == jax.tree.map(np.shape, out)
        params[net] = {"params": {"out": out}}
    x = m + rng.normal(size=(6, 2)) @ W.T + sigma * rng.normal(size=(6, 4))
    log_p = stats.multivariate_normal(m, W @ W.T + sigma**2 * np.eye(4)).logpdf(x)
    return params, jnp.asarray(x.reshape(6, 2, 2, 1), jnp.float32), log_p


@pytest.mark.slow
def test_a_linear_autoencoder_is_ppca():
    """With the exact posterior every weight p(x, z) / q(z|x) is p(x), and the bound is tight."""
    params, x, log_p = ppca()
    mu, logvar = encode(LINEAR, params, x)
    z = mu + jnp.exp(logvar / 2) * jax.random.normal(key(5), mu.shape)
    weight = autoencoder.log_likelihood(LINEAR, x, decode(LINEAR, params, z))
    z, mu, logvar = (a.reshape(6, 2) for a in (z, mu, logvar))
    weight += vae.log_normal(z, 0.0, 0.0) - vae.log_normal(z, mu, logvar)
    np.testing.assert_allclose(weight, log_p, atol=2e-5)
    many = jnp.tile(x, (2000, 1, 1, 1))
    bound = np.asarray(elbo(LINEAR, params, many, key(6))["elbo"]).reshape(2000, 6)
    error = bound.std(0) / np.sqrt(2000)
    assert (error < 0.03).all() and (np.abs(bound.mean(0) - log_p) < 4.5 * error).all()
    other = {**params, "encoder": jax.tree.map(lambda a: a + 0.2, params["encoder"])}
    loose = np.asarray(elbo(LINEAR, other, many, key(6))["elbo"]).reshape(2000, 6)
    assert (loose.mean(0) < log_p - 10 * error).any()


def test_psnr_of_an_image_that_is_reproduced_exactly_is_100_db():
    x = pictures(3)
    x_hat = x.at[1].add(0.1).at[2].add(1e-6)
    found = autoencoder.errors(x, x_hat)
    assert found["mse"][0] == 0 and found["mse"][2] > 0
    np.testing.assert_allclose(found["psnr_db"], [100, 20, 100], rtol=1e-5)
    np.testing.assert_allclose(metrics.psnr(x, x_hat), 220 / 3, rtol=1e-5)


# ------------------------------------------------------------------------- latents of unit variance


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_measured_latents_have_mean_0_and_variance_1(sampled):
    """A number of images that the chunks do not divide, each image once."""
    params, x = shaken(), pictures(70)
    measured = autoencoder.measure(CFG, params, x, sampled=sampled, chunk=32)
    mu, logvar = (np.float64(a) for a in encode(CFG, params, x))
    axes = (0, 1, 2)
    variance = mu.var(axes) + (np.exp(logvar).mean(axes) if sampled else 0)
    np.testing.assert_allclose(measured["latents"]["mean"], mu.mean(axes), atol=1e-5)
    np.testing.assert_allclose(measured["latents"]["std"], np.sqrt(variance), rtol=1e-5)
    if sampled:
        many = jnp.tile(x, (300, 1, 1, 1))
        z = latents(CFG, measured, many, key(3))
    else:
        z = latents(CFG, measured, x)
    assert z.shape[1:] == CFG.latent_shape == (4, 6, 2)
    np.testing.assert_allclose(np.var(z, axes), 1, atol=0.02 if sampled else 1e-3)
    np.testing.assert_allclose(np.mean(z, axes), 0, atol=0.02 if sampled else 1e-3)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], measured["encoder"])


@pytest.mark.slow
def test_images_undoes_the_scale_of_latents():
    params, x = shaken(), pictures()
    measured = autoencoder.measure(CFG, params, x)
    expected = reconstruct(CFG, params, x)
    assert expected.min() >= 0 and expected.max() <= 1 and expected.std() > 0.05
    found = images(CFG, measured, latents(CFG, measured, x))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(reconstruct(CFG, measured, x), expected, atol=1e-6)


@pytest.mark.slow
def test_sampled_latents_follow_the_posterior():
    params = autoencoder.measure(CFG, shaken(), pictures())
    x = jnp.tile(pictures(1), (4000, 1, 1, 1))
    z = latents(CFG, params, x, key(7))
    mu, logvar = encode(CFG, params, x[:1])
    std = jnp.exp(logvar[0] / 2) / params["latents"]["std"][None, None]
    mean = latents(CFG, params, x[:1])[0]
    np.testing.assert_allclose((z.mean(0) - mean) / std, 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(z.std(0) / std, 1, atol=0.06)


@pytest.mark.slow
def test_a_run_folder_keeps_the_scale_and_training_does_not_move_it(tmp_path):
    """Trained, measured, kept by a run of one update with rate 0, loaded."""
    digits = data.load("digits", "train[:96]")
    cfg = vae.AutoencoderConfig(
        shape=(8, 8, 1), levels=17, latent_channels=2, widths=(4, 4), blocks=1, groups=2, ema=0.9
    )
    run = train.Run(str(tmp_path / "trained"), steps=3, batch_size=32)
    trained = train.fit(vae.make_autoencoder, cfg, run, digits)
    assert (trained.state.params["latents"]["std"] == 1).all()
    x = autoencoder.preprocess(cfg, digits.batch(0, 0, 96))
    params = autoencoder.measure(cfg, EMA(cfg.ema).read(trained.state), x)
    still = dataclasses.replace(cfg, ema=0.0, optim=Optim("sgd", lr=0.0))
    run = train.Run(str(tmp_path / "measured"), steps=1, batch_size=32)
    train.fit(vae.make_autoencoder, still, run, digits, params=params)
    loaded = train.load(tmp_path / "measured").state.params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    z = latents(cfg, loaded, x)
    np.testing.assert_allclose(np.var(z, (0, 1, 2)), 1, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_neither_weight_decay_nor_the_average_moves_the_scale(ema):
    """Measured after two updates, then trained on. Samples and errors are those of the new scale."""
    optim = optax.adamw(0.1, weight_decay=0.5)  # of all parameters; Optim decays kernels alone
    cfg = dataclasses.replace(LINEAR, ema=ema, optim=optim)
    family = vae.make_autoencoder(cfg)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *cfg.shape), np.uint8)
    state, step = jax.jit(family.init)(key(0)), jax.jit(family.step)
    for i in range(4):
        if i == 2:
            params = autoencoder.measure(cfg, autoencoder.weights(cfg, state), pictures(5, cfg))
            assert np.abs(params["latents"]["std"] - 1).min() > 0.01
            moments = {"latents": params["latents"]}
            state = state._replace(params={**state.params, **moments})
            if ema:  # a State takes them in both
                state = state._replace(ema={**state.ema, **moments})
        before = state.params
        state, _ = step(state, {"image": pixels}, key(i))
    assert max(jax.tree.leaves(jax.tree.map(_largest_move, before, state.params))) > 0.01
    used = autoencoder.weights(cfg, state)
    for latents_of in (state.params, used):
        jax.tree.map(np.testing.assert_array_equal, latents_of["latents"], params["latents"])
    z = jax.random.normal(key(5), (3, *cfg.latent_shape))
    expected = images(cfg, used, z)
    np.testing.assert_allclose(family.sample(state, key(5), n=3), expected, atol=1e-5)
    if ema:
        assert used is state.ema


def _largest_move(a, b):
    return float(np.abs(a - b).max())


# ------------------------------------------------------------------------------ options and refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (4, 6, 2)),
        ({"shape": (16, 8, 3), "widths": (2, 4, 4), "patch": 2}, (2, 1, 2)),
        ({"widths": (4,), "latent_channels": 5}, (8, 12, 5)),
        ({"shape": (9, 6, 1), "widths": (), "patch": 3}, (3, 2, 2)),
    ],
)
def test_shapes_of_every_function(change, shape):
    cfg = dataclasses.replace(CFG, **change)
    params = jax.eval_shape(partial(autoencoder.init, cfg), key(0))
    x = jnp.zeros((5, *cfg.shape), jnp.float32)

    def shape_of(function, *args):
        found = jax.eval_shape(partial(function, cfg), params, *args)
        return [a.shape for a in jax.tree.leaves(found)]

    assert cfg.latent_shape == shape
    assert shape_of(autoencoder.encode, x) == [(5, *shape)] * 2
    assert shape_of(autoencoder.latents, x) == [(5, *shape)]
    z = jnp.zeros((5, *shape), jnp.float32)
    assert shape_of(autoencoder.decode, z) == shape_of(autoencoder.images, z) == [x.shape]
    assert shape_of(autoencoder.reconstruct, x) == [x.shape]
    assert shape_of(autoencoder.elbo, x, key(0)) == [(5,)] * 3
    assert shape_of(autoencoder.measure, x)[-2:] == [shape[-1:]] * 2


@pytest.mark.slow
def test_latents_keep_the_places_of_what_they_describe():
    """A change of one corner moves the latents near it; GroupNorm carries a little further."""
    params, x = shaken(), pictures(1)
    changed = encode(CFG, params, x.at[:, 0, 0].set(0.0))[0]
    moved = np.abs(changed - encode(CFG, params, x)[0]).sum((0, 3))
    assert moved[:2, :2].mean() > 4 * moved[2:, 3:].mean()


@pytest.mark.slow
def test_bfloat16_is_close_and_gives_float32():
    params, x = shaken(), pictures()
    low = dataclasses.replace(CFG, bfloat16=True)
    for cfg in (CFG, low):
        mu, logvar = encode(cfg, params, x)
        x_hat = decode(cfg, params, mu)
        assert mu.dtype == logvar.dtype == x_hat.dtype == jnp.float32
        found = elbo(cfg, params, x, key(0))
        assert all(v.dtype == jnp.float32 and jnp.isfinite(v).all() for v in found.values())
    exact, rounded = (encode(cfg, params, x)[0] for cfg in (CFG, low))
    assert 1e-5 < np.abs(exact - rounded).max() < 0.2
    half = encode(CFG, params, x.astype(jnp.bfloat16))[0]
    assert half.dtype == jnp.float32 and np.abs(half - exact).max() < 0.2


@pytest.mark.slow
def test_remat_changes_no_gradient():
    params, x = shaken(), pictures()

    def gradient(cfg):
        return jax.grad(lambda p: elbo(cfg, p, x, key(0))["elbo"].mean())(params)

    plain, again = gradient(CFG), gradient(dataclasses.replace(CFG, remat=True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), plain, again)


@pytest.mark.slow
def test_in_float64_all_of_it_is_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), shaken())
        x = jnp.asarray(np.random.default_rng(0).random((3, *CFG.shape)))
        terms = elbo(CFG, params, x, key(0))
        z = latents(CFG, autoencoder.measure(CFG, params, x), x)
        assert {a.dtype for a in (*terms.values(), z)} == {jnp.dtype("float64")}
        np.testing.assert_allclose(z.var((0, 1, 2)), 1, atol=1e-9)

        def value(t):  # the derivative along one direction, against a central difference
            moved = jax.tree.map(lambda a: a * (1 + t), params)
            return elbo(CFG, moved, x, key(0))["elbo"].mean()

        slope, h = jax.grad(value)(0.0), 1e-6
        np.testing.assert_allclose(slope, (value(h) - value(-h)) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (9, 12, 3)}, "divisible by 2, .* got 9 x 12 pixels"),
        ({"shape": (8, 12, 3), "patch": 4}, "divisible by 8, .* got 8 x 12"),
        ({"shape": (0, 12, 3)}, "three positive numbers"),
        ({"widths": (4, 5)}, r"multiples of model.groups = 2, got \(4, 5\)"),
        ({"widths": (0, 4)}, "positive multiples"),
        ({"patch": 0}, "model.patch must be at least 1, got 0"),
        ({"blocks": -1}, "model.blocks must be at least 0, got -1"),
        ({"latent_channels": 0}, "model.latent_channels must be at least 1, got 0"),
        ({"levels": 1}, r"model.levels must lie in 2\.\.256, got 1"),
        ({"scale": 0.0}, r"model.scale must be positive, got 0\.0"),
        ({"scale": float("inf")}, "model.scale must be positive, got inf"),
        ({"beta": -1.0}, r"model.beta must be at least 0, got -1\.0"),
        ({"beta": float("nan")}, "model.beta must be at least 0, got nan"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"micro": 0}, "model.micro must be at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as e:
        dataclasses.replace(CFG, **change)
    assert "\n" not in str(e.value)


def test_a_likelihood_that_does_not_exist_is_refused():
    cfg = dataclasses.replace(CFG)
    object.__setattr__(cfg, "likelihood", "cauchy")  # in pytest, jaxtyping would refuse it first
    with pytest.raises(ValueError, match="must be one of laplace, gaussian, not 'cauchy'"):
        cfg.__post_init__()


def test_images_and_latents_that_do_not_fit_are_refused():
    params = {}  # all are refused before a net is applied
    with pytest.raises(ValueError, match=r"images must be \[B, 8, 12, 3\], got \(5, 8, 8, 3\)"):
        encode(CFG, params, jnp.zeros((5, 8, 8, 3), jnp.float32))
    with pytest.raises(ValueError, match="`preprocess` takes whole-number"):
        encode(CFG, params, jnp.zeros((5, 8, 12, 3), jnp.uint8))
    for wrong in (-1.0, 255.0):
        with pytest.raises(ValueError, match=r"image must lie in \[0, 1\], got"):
            autoencoder.encode(CFG, params, jnp.full((1, 8, 12, 3), wrong, jnp.float32))
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, 6, 2\], got \(5, 4, 6, 3\)"):
        decode(CFG, params, jnp.zeros((5, 4, 6, 3), jnp.float32))
    for source, words in (("ring", "holds points"), ("digits", r"the images are \(8, 8, 1\)")):
        with pytest.raises(ValueError, match=words):
            CFG.check(data.load(source).info)
    with pytest.raises(ValueError, match="levels is 256, the images have 17"):
        dataclasses.replace(CFG, shape=(8, 8, 1)).check(data.load("digits").info)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_it_learns_to_reconstruct_digits():
    digits = data.load("digits")
    cfg = vae.AutoencoderConfig(
        shape=(8, 8, 1),
        levels=17,
        widths=(8, 16),
        blocks=1,
        groups=4,
        scale=0.1,
        ema=0.9,
        likelihood="gaussian",
        optim=Optim(lr=3e-3, clip=1.0),
    )
    family = vae.make_autoencoder(cfg)
    state, step = family.init(key(0)), jax.jit(family.step)
    for i in range(150):
        state, _ = step(state, digits.batch(0, i, 64), key(i))
    batch = digits.batch(1, 0, 64)
    found = jax.jit(family.evaluate)(state, batch, key(0))
    x = np.asarray(autoencoder.preprocess(cfg, batch))
    mean = metrics.psnr(x, np.broadcast_to(x.mean(0), x.shape))
    assert found["psnr_db"].mean() > mean + 3
    x_hat = reconstruct(cfg, EMA(cfg.ema).read(state), jnp.asarray(x))
    np.testing.assert_allclose(found["psnr_db"].mean(), metrics.psnr(x, x_hat), rtol=1e-5)
    np.testing.assert_allclose(found["mse"], np.square(x - x_hat).mean((1, 2, 3)), rtol=1e-4)
    bound = found["kl_nats"] - found["reconstruction_nats"]
    np.testing.assert_allclose(found["nll_nats"], bound, rtol=1e-5)
    np.testing.assert_allclose(found["nll_nats_per_dim"], bound / 64, rtol=1e-5)
