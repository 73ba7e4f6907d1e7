"""Diffusion of latents and under contexts: withheld contexts, guidance, and an exact bound."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, ddpm, train
from aigc_jax.core import Optim

UNET = ddpm.NetConfig("unet", (4,), 1, (4,), groups=2, heads=2, dropout=0.0)
DIT = ddpm.NetConfig("dit", (8, 8), heads=2, dropout=0.0)
CFG = ddpm.Config((4, 4, 2), None, context=(3, 5), T=21, net=UNET, ema=0.0, optim=Optim(lr=1e-3))
X = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
CONTEXT = jax.random.normal(jax.random.key(2), (6, 3, 5))
T = jnp.arange(6) * 3


@pytest.fixture(scope="module", params=["unet", pytest.param("dit", marks=pytest.mark.slow)])
def model(request):
    """A config, and parameters none of which are 0, so that every branch of the net acts."""
    cfg = dataclasses.replace(CFG, net={"unet": UNET, "dit": DIT}[request.param])
    params = jax.jit(ddpm.make(cfg).init)(jax.random.key(0)).params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return cfg, tree.unflatten(noisy)


def predicted(model, context, x=X, t=T):
    cfg, params = model
    net = jax.jit(lambda context: ddpm.predict(cfg, params, x, t, context=context)[0])
    return np.asarray(net(context))


@pytest.mark.slow
def test_each_row_sees_its_own_context(model):
    base = predicted(model, CONTEXT)
    changed = predicted(model, CONTEXT.at[2].add(1.0))
    moved = np.abs(changed - base).reshape(6, -1).max(1)
    assert moved[2] > 1e-2 and (np.delete(moved, 2) < 1e-5).all()


@pytest.mark.slow
def test_no_context_is_a_context_of_zeros(model):
    np.testing.assert_array_equal(predicted(model, None), predicted(model, jnp.zeros((6, 3, 5))))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5)])
def test_one_context_serves_all_rows(model, shape):
    one = CONTEXT[:1].reshape(shape)
    np.testing.assert_array_equal(
        predicted(model, one), predicted(model, jnp.repeat(CONTEXT[:1], 6, 0))
    )


@pytest.mark.slow
def test_a_context_is_a_set(model):
    """Its L vectors may come in any order: positions are the text encoder's affair."""
    np.testing.assert_allclose(
        predicted(model, CONTEXT), predicted(model, CONTEXT[:, ::-1]), atol=2e-5
    )


@pytest.mark.slow
def test_guidance_leads_away_from_no_context_or_from_a_negative_one(model):
    negative = CONTEXT[::-1]
    for away, given in ((None, {}), (negative, {"negative": negative})):
        fn, _ = ddpm.predict_fn_of(*model, context=CONTEXT, w=1.5, **given)
        expected = 2.5 * predicted(model, CONTEXT) - 1.5 * predicted(model, away)
        np.testing.assert_allclose(jax.jit(fn)(X, T), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_guidance_by_a_context_alone_of_a_model_that_also_has_classes():
    cfg = dataclasses.replace(CFG, classes=3)
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(ddpm.make(cfg).init)(jax.random.key(0)).params)
    fn = jax.jit(ddpm.predict_fn_of(cfg, params, context=CONTEXT, w=1.0)[0])
    given, none = (ddpm.predict(cfg, params, X, T, context=c)[0] for c in (CONTEXT, None))
    np.testing.assert_allclose(fn(X, T), 2 * given - none, rtol=1e-4, atol=1e-4)


def test_labels_and_contexts_are_withheld_together_at_the_share_that_is_asked_for():
    cfg = dataclasses.replace(CFG, classes=4, unlabelled=0.25)
    n = 40_000
    given = jnp.zeros(n, jnp.int32), jnp.ones((n, 3, 5))
    label, context = ddpm.withhold(cfg, *given, jax.random.key(5))
    withheld = np.asarray(context == 0).all((1, 2))
    assert (withheld == np.asarray(label == 4)).all()
    assert np.asarray(context[~withheld] == 1).all()
    assert abs(withheld.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.slow
def test_training_reads_the_context_of_the_batch(model):
    cfg, params = model
    state = jax.jit(ddpm.make(cfg).init)(jax.random.key(0))
    whole = dataclasses.replace(cfg, unlabelled=0.0)

    @jax.jit
    def loss(batch):
        return ddpm.training_loss(whole, params, state, batch, jax.random.key(7))

    a, b = (float(loss({"points": X, "context": c})[0]) for c in (CONTEXT, CONTEXT + 1))
    assert abs(a - b) > 1e-3
    with pytest.raises(ValueError, match="the batch has no 'context'"):
        loss({"points": X})
    with pytest.raises(ValueError, match="takes 'points' in a batch, got"):
        loss({"image": np.zeros((6, 4, 4, 2), np.uint8), "context": CONTEXT})


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver", "heun"])
def test_samples_are_floats_that_are_not_clipped(model, sampler):
    cfg, params = model
    state = jax.jit(ddpm.make(cfg).init)(jax.random.key(0))._replace(params=params)
    options = {"n": 6, "sampler": sampler, "steps": 5}
    sample = jax.jit(partial(ddpm.make(cfg).sample, **options))
    got = sample(state, jax.random.key(1), context=3 * CONTEXT, w=2.0, negative=-CONTEXT)
    assert got.shape == (6, 4, 4, 2) and np.isfinite(got).all() and np.abs(got).max() > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": (0, 5)}, "model.context must be .L, E., both positive, got .0, 5."),
        ({"net": ddpm.NetConfig("mlp", (8,))}, "needs model.net.kind unet or dit"),
        ({"mirror": True}, "model.mirror is for images"),
        ({"levels": 1}, "model.levels must lie in 2..256, got 1"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CFG, **change)


@pytest.mark.slow
def test_contexts_that_do_not_fit_are_refused(model):
    cfg, params = model
    for bad in (CONTEXT[:, :2], CONTEXT[..., :4], CONTEXT[:5], CONTEXT[None]):
        with pytest.raises(ValueError, match=r"context must have the shape \(6, 3, 5\), got"):
            ddpm.predict(cfg, params, X, T, context=bad)
    with pytest.raises(ValueError, match="negative context acts through guidance"):
        ddpm.predict_fn_of(cfg, params, context=CONTEXT, negative=CONTEXT)
    with pytest.raises(ValueError, match="guidance .w. needs a label or a context"):
        ddpm.predict_fn_of(cfg, params, w=1.0)
    plain = dataclasses.replace(cfg, context=None)
    with pytest.raises(ValueError, match="takes no context"):
        ddpm.predict(plain, ddpm.make(plain).init(jax.random.key(0)).params, X, T, context=CONTEXT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": 1}, "model.classes is 0: it takes no labels"),
        ({"context": CONTEXT}, "model.context is None, leave context out"),
        ({"label": 1, "negative": CONTEXT, "classes": 3}, "None, leave negative out"),
    ],
)
def test_guidance_by_what_the_model_does_not_take_is_refused(options, words):
    classes = options.pop("classes", 0)
    cfg = ddpm.Config(shape=(2,), levels=None, classes=classes, net=ddpm.NetConfig("mlp", (4,)))
    params = ddpm.make(cfg).init(jax.random.key(0)).params
    with pytest.raises(ValueError, match=words):
        ddpm.predict_fn_of(cfg, params, w=1.0, **options)


def test_a_batch_of_another_shape_is_refused():
    cfg = ddpm.Config(shape=(2,), levels=None, net=ddpm.NetConfig("mlp", (4,)))
    with pytest.raises(ValueError, match=r"model.shape is \(2,\), the batch has points of shape"):
        ddpm.preprocess(cfg, {"points": jnp.zeros((4, 3))})


def test_whole_numbers_are_neither_inverted_nor_interpolated():
    pixels = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    schedule = ddpm.cosine_schedule(10)
    with pytest.raises(ValueError, match="x_0 must be floats"):
        ddpm.ddim_invert(schedule, lambda x, t: x, pixels, steps=2)
    with pytest.raises(ValueError, match="a must be floats"):
        ddpm.interpolate(
            schedule, lambda x, t: x, pixels, pixels, jax.random.key(0), t=2, shares=np.ones(1)
        )


@pytest.mark.slow
def test_the_latent_bound_and_the_decoder_give_the_known_likelihood():
    """Linear-Gaussian data x = W z + s e, its exact encoder and an exact denoiser of z ~ N(0, I).

    -log p(x) = E_q[-log p(x|z) + log q(z|x)] + (the bound on -log p(z)). For z ~ N(0, I) the steps
    of the reverse process are Gaussian with variance beta, so that the bound is tight.
    """
    rng = np.random.default_rng(0)
    d, k, s, n = 7, 4, 0.3, 3
    W = rng.normal(size=(d, k))
    x = rng.normal(size=(n, k)) @ W.T + s * rng.normal(size=(n, d))
    cov = W @ W.T + s**2 * np.eye(d)
    exact = 0.5 * (
        np.einsum("ni,ij,nj->n", x, np.linalg.inv(cov), x)
        + np.linalg.slogdet(cov)[1]
        + d * math.log(2 * math.pi)
    )
    # The encoder q(z|x) = N(mean, C) is the exact posterior.
    C = np.linalg.inv(np.eye(k) + W.T @ W / s**2)
    mean, root = x @ W @ C / s**2, np.linalg.cholesky(C)
    draws = 20_000
    u = rng.normal(size=(draws, n, k))
    z = mean + u @ root.T
    log_q = -0.5 * (u**2).sum(-1) - np.log(np.diag(root)).sum() - k / 2 * math.log(2 * math.pi)
    error = ((x - z @ W.T) ** 2).sum(-1)
    log_decoder = -0.5 * error / s**2 - d / 2 * math.log(2 * math.pi * s**2)

    schedule = ddpm.cosine_schedule(30)
    latents = jnp.asarray(z.reshape(-1, 2, 2, 1), jnp.float32)  # as [B, H, W, C]

    def eps_fn(x_t, t):  # of z ~ N(0, I): E[eps | x_t] = noise x_t
        return jnp.asarray(schedule.noise, jnp.float32)[t].reshape(-1, 1, 1, 1) * x_t

    bound = jax.jit(partial(ddpm.vlb, schedule, eps_fn, sigma2="beta"))
    nats = np.asarray(bound(latents, jax.random.key(0))).reshape(draws, n)
    estimate = nats - log_decoder + log_q
    error = estimate.std(0) / math.sqrt(draws)
    assert (np.abs(estimate.mean(0) - exact) < 4 * error + 1e-3).all()
    assert (error < 0.05).all()


def test_latents_and_contexts_are_a_data_set():
    arrays = {"points": np.asarray(X), "context": np.asarray(CONTEXT)}
    source = data.from_arrays(arrays)
    assert source.info.shape == (4, 4, 2)
    CFG.check(source.info)
    for other in (None, (2, 5)):
        with pytest.raises(ValueError, match=r"model.context is .*contexts \(3, 5\)"):
            dataclasses.replace(CFG, context=other).check(source.info)
    with pytest.raises(ValueError, match=r"model.context is \(3, 5\), there are none"):
        CFG.check(data.from_arrays({"points": arrays["points"]}).info)
    with pytest.raises(ValueError, match="model.levels is None for latents"):
        dataclasses.replace(CFG, levels=256).check(source.info)
    batch = source.batch(0, 0, 6)
    order = batch["index"]
    np.testing.assert_array_equal(batch["points"], arrays["points"][order])
    np.testing.assert_array_equal(batch["context"], arrays["context"][order])
    for bad in (CONTEXT[:5], CONTEXT[0], CONTEXT.astype(int), CONTEXT.at[0, 0, 0].set(jnp.nan)):
        with pytest.raises(ValueError, match="context"):
            data.from_arrays({**arrays, "context": np.asarray(bad)})
    with pytest.raises(ValueError, match="arrays may hold"):
        data.from_arrays({"image": np.zeros((6, 4, 4, 1), np.uint8), "context": arrays["context"]})


@pytest.mark.slow
def test_one_context_serves_all_samples_of_train_sample():
    family = ddpm.make(CFG)
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(family.init)(jax.random.key(0)).params)
    state = jax.jit(family.init)(jax.random.key(1))._replace(params=params)
    result = train.Result(
        family, state, CFG, data.from_arrays({"points": np.asarray(X)}).info, None
    )
    options = {"n": 5, "chunk": 2, "w": 1.0, "steps": 2, "sampler": "ddim"}
    all_the_same = np.repeat(np.asarray(CONTEXT[:1]), 5, 0)
    want = train.sample(result, jax.random.key(2), context=all_the_same, **options)
    for one in (CONTEXT[0], CONTEXT[:1]):
        got = train.sample(result, jax.random.key(2), context=np.asarray(one), **options)
        np.testing.assert_array_equal(got, want)
    with pytest.raises(train.Refused, match="context must have one entry for each of 5 samples"):
        train.sample(result, jax.random.key(2), context=np.asarray(CONTEXT), **options)
