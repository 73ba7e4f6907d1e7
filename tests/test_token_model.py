"""The network of `ddpm.token_model`, its given tokens and its guidance."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import ddpm
from aigc_jax.ddpm import token_model

V, L = 5, 6
CFG = ddpm.TokenConfig(vocab=V, context=L, layers=1, heads=2, width=8, unlabelled=0.3)
UNIFORM = replace(CFG, process="uniform")
TOKENS = np.random.default_rng(0).integers(0, V, (4, L)).astype(np.int32)
MASK = np.array([0, 0, 1, 1, 1], np.float32)  # of targets: the first three tokens are given


def shaken(cfg):
    """Parameters of which none is 0."""
    params = token_model.init_tokens(cfg, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, new)


def logits_at(cfg, time, x_t=TOKENS):
    fn = token_model.token_logits_fn(cfg, shaken(cfg))
    return fn(jnp.asarray(x_t), jnp.full(len(x_t), time, jnp.float32))


@pytest.mark.slow
def test_only_the_uniform_process_sees_the_time():
    """Beside the time's own layers, the nets of both processes have the same parameters."""
    np.testing.assert_array_equal(logits_at(CFG, 0.1), logits_at(CFG, 0.9))
    evidence = ddpm.tokens.log_evidence(TOKENS, jnp.full(4, 0.1), vocab=V)
    other = ddpm.tokens.log_evidence(TOKENS, jnp.full(4, 0.9), vocab=V)
    without = (logits_at(UNIFORM, 0.1) - evidence, logits_at(UNIFORM, 0.9) - other)
    assert np.abs(without[0] - without[1]).max() > 1e-3
    both = [shaken(cfg) for cfg in (CFG, UNIFORM)]
    assert set(both[1]) - set(both[0]) == {"time"}
    shapes = [jax.tree.map(jnp.shape, {n: p[n] for n in both[0]}) for p in both]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_every_token_sees_all_others():
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % V
    differs = np.abs(logits_at(CFG, 0.5) - logits_at(CFG, 0.5, changed)).max(-1)
    assert (differs > 1e-6).all()


@pytest.mark.slow
def test_given_tokens_neither_count_nor_change():
    """One step masks all that is not given: the bound is that many times log V at zero logits."""
    cfg = replace(CFG, steps=1)
    params = jax.tree.map(jnp.zeros_like, shaken(cfg))
    state = ddpm.make_tokens(cfg).init(jax.random.key(0))._replace(params=params)
    batch = {"tokens": TOKENS, "mask": np.tile(MASK, (4, 1))}
    found = token_model.evaluate_tokens(cfg, state, batch, jax.random.key(0))
    np.testing.assert_array_equal(found["tokens"], 3)
    np.testing.assert_allclose(found["nll_nats"], 3 * np.log(V), rtol=1e-6)
    no_mask = token_model.evaluate_tokens(cfg, state, {"tokens": TOKENS}, jax.random.key(0))
    np.testing.assert_array_equal(no_mask["tokens"], L - 1)  # the first token is given
    nats, (_, metrics) = token_model.token_loss(cfg, params, state, batch, jax.random.key(0))
    np.testing.assert_allclose(nats, np.log(V), rtol=1e-6)
    assert metrics["weight"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_flat_weights_count_each_masked_token_once(schedule):
    """The loss of one draw is the sum of -log_softmax, by hand, over the masked tokens, per counted token."""
    cfg = replace(CFG, weighting="flat", schedule=schedule, unlabelled=0.0)
    batch = {"tokens": TOKENS, "mask": np.tile(MASK, (4, 1))}
    params, state = shaken(cfg), ddpm.make_tokens(cfg).init(jax.random.key(0))
    loss, (_, metrics) = token_model.token_loss(cfg, params, state, batch, jax.random.key(7))
    nats = ddpm.tokens.masked_cross_entropy(
        token_model.token_logits_fn(cfg, params),
        TOKENS,
        jax.random.split(jax.random.key(7), 3)[0],
        mask=token_model.counted(batch),
        schedule=schedule,
    )
    masked = np.asarray(nats) > 0
    assert not masked[:, :3].any() and masked.any()
    logits = logits_at(cfg, 0.5, np.where(masked, V, TOKENS))
    own = -np.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, np.where(masked, own, 0.0), rtol=1e-5)
    np.testing.assert_allclose(loss, own[masked].sum() / 12, rtol=1e-5)
    assert metrics["weight"] == 12


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_flat_weights_in_the_mean(schedule):
    """A net whose cost per token is k nats among k masks: the mean of k^2 is known in closed form."""
    t = np.linspace(0, 1, 200_001)
    share = t if schedule == "linear" else np.sin(np.pi / 2 * t)
    expected = np.trapezoid(L * share * (1 - share) + (L * share) ** 2, t)

    def logits_fn(x_t, t):  # token 0 has probability exp(-k), the others share the rest
        k = (x_t == V).sum(-1)[:, None, None].astype(jnp.float32)
        rest = jnp.log(-jnp.expm1(-k) / (V - 1))
        return jnp.broadcast_to(jnp.where(jnp.arange(V) == 0, -k, rest), (*x_t.shape, V))

    zeros = jnp.zeros((40_000, L), jnp.int32)
    one = partial(ddpm.tokens.masked_cross_entropy, logits_fn, schedule=schedule)
    nats = jax.jit(one)(zeros, jax.random.key(0))
    np.testing.assert_allclose(nats.sum(-1).mean(), expected, rtol=0.01)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"process": "uniform"}, "needs process absorbing, steps None; got process 'uniform'"),
        ({"steps": 4}, "needs process absorbing, .*; got process 'absorbing' and steps 4"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
    ],
)
def test_what_a_config_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        replace(CFG, weighting="flat", **change)


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [0.0, 0.3])
def test_a_share_of_texts_trains_without_what_is_given(monkeypatch, unlabelled):
    cfg, seen = replace(CFG, steps=2, unlabelled=unlabelled), []

    def recorded(cfg, params, key=None):
        def fn(x_t, t):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t)
            return jnp.zeros((*x_t.shape, V))

        return fn

    monkeypatch.setattr(token_model, "token_logits_fn", recorded)
    n = 4000
    tokens = np.random.default_rng(1).integers(0, V, (n, L)).astype(np.int32)
    batch = {"tokens": tokens, "mask": np.tile(MASK, (n, 1))}
    token_model.token_loss(cfg, None, ddpm.make_tokens(cfg).init(jax.random.key(0)), batch, key())
    jax.effects_barrier()
    [x_t] = seen
    hidden = x_t[:, :3] == V
    assert (hidden.all(1) | ~hidden.any(1)).all()  # all of a text's given tokens, or none
    np.testing.assert_array_equal(x_t[:, :3][~hidden], tokens[:, :3][~hidden])
    assert abs(hidden.all(1).mean() - unlabelled) < 4 * np.sqrt(0.25 / n)
    half = x_t[:, 3:] == V  # in two steps, t is 1/2 or 1
    assert abs(half.mean() - 0.75) < 0.03
    if unlabelled:  # whether a text is blind does not depend on its time
        assert abs(np.corrcoef(hidden[:, 0], half.mean(1))[0, 1]) < 0.07


def key():
    return jax.random.key(7)


@pytest.mark.slow
@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("cfg", [CFG, UNIFORM])
def test_guidance_is_its_formula(cfg, w):
    params, t = shaken(cfg), jnp.full(4, 0.4)
    x_t, given = jnp.asarray(TOKENS), np.array([[True, True, False, False, False, False]])
    plain = token_model.token_logits_fn(cfg, params)
    found = token_model.token_logits_fn(cfg, params, w=w, given=given)(x_t, t)
    blind = jnp.where(jnp.asarray(given), V, x_t)
    with_them, without = (jax.nn.log_softmax(plain(x, t)) for x in (x_t, blind))
    wanted = jax.nn.log_softmax((1 + w) * with_them - w * without)
    np.testing.assert_allclose(jax.nn.log_softmax(found), wanted, atol=1e-5)
