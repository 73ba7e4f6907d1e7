"""The transformer against a plain float64 version of its equations, brute force, and the published GPT-2."""

import dataclasses
import itertools
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from aigc_jax import transformer
from aigc_jax.core import Optim
from aigc_jax.transformer import Config, Sampling

SMALL = Config(vocab=11, context=24, layers=2, heads=2, width=8)
LLAMA = dataclasses.replace(
    SMALL, positions="rotary", norm="rms", activation="swiglu", bias=False, tied=False, hidden=12
)
VARIANTS = {
    "gpt2": SMALL,
    "llama": LLAMA,
    "attention only": dataclasses.replace(SMALL, mlp=False),
    "relu": dataclasses.replace(SMALL, activation="relu", bias=False),
}
V = 50257


def key(i):
    return jax.random.key(i)


def parameters(cfg, seed=0, scale=0.3):
    """Parameters of every kind away from their initial values, so that no bias or scale is missed."""
    shapes = jax.eval_shape(partial(transformer.init, cfg), key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape) + 0.1, jnp.float32), shapes)


def tokens(B, T, seed=0, vocab=11):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (B, T)), jnp.int32)


@pytest.fixture(params=VARIANTS)
def model(request):
    cfg = VARIANTS[request.param]
    return cfg, parameters(cfg)


# ----------------------------------------------------------------------------------------------------------- the model


def plain(cfg, params, row):
    """Logits [T, V] of one row, in float64, head by head and position by position."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        if cfg.norm == "rms":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * p["scale"] + p.get("bias", 0.0)

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def turned(x, t):
        """Complex numbers, one for each pair of channels, times e^(i angle)."""
        half = len(x) // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    x = p["wte"]["embedding"][row]
    if cfg.positions == "learned":
        x = x + p["wpe"]["embedding"][: len(row)]
    K = cfg.width // cfg.heads
    for i in range(cfg.layers):
        b = p[f"blocks_{i}"]
        q, k, v = np.split(dense(norm(x, b["norm_attention"]), b["qkv"]), 3, -1)
        y = np.zeros_like(x)
        for h in range(cfg.heads):
            own = slice(h * K, (h + 1) * K)
            for t in range(len(row)):
                at = turned if cfg.positions == "rotary" else (lambda x, t: x)
                scores = [at(q[t, own], t) @ at(k[s, own], s) / math.sqrt(K) for s in range(t + 1)]
                y[t, own] = special.softmax(scores) @ v[: t + 1, own]
        x = x + dense(y, b["out"])
        if not cfg.mlp:
            continue
        h = dense(norm(x, b["norm_mlp"]), b["up"])
        if cfg.activation == "swiglu":
            gate, up = np.split(h, 2, -1)
            h = gate * special.expit(gate) * up
        elif cfg.activation == "relu":
            h = np.maximum(h, 0)
        else:
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, b["down"])
    h = norm(x, p["norm"])
    return h @ (p["wte"]["embedding"].T if cfg.tied else p["head"]["kernel"])


def test_logits_are_those_of_the_equations(model):
    cfg, params = model
    x = tokens(2, 9)
    got = jax.jit(partial(transformer.apply, cfg))(params, x)
    for row, logits in zip(np.asarray(x), got, strict=True):
        np.testing.assert_allclose(logits, plain(cfg, params, row), atol=2e-5)


@pytest.mark.parametrize(
    ("layers", "heads", "width", "count"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_has_its_number_of_parameters(layers, heads, width, count):
    cfg = Config(layers=layers, heads=heads, width=width)
    shapes = jax.eval_shape(partial(transformer.init, cfg), key(0))
    assert (
        sum(x.size for x in jax.tree.leaves(shapes))
        == count
        == 12 * layers * width**2 + width * (13 * layers + V + 1024 + 2)
    )


def test_no_position_sees_a_later_one(model):
    """Through gradients by the embeddings: exactly zero after t, not zero up to t."""
    cfg, params = model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 8)), jnp.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: transformer.backbone(cfg, params, x)[0]))(x)[:, :, 0]
    reach = np.abs(jacobian).max((1, 3))
    assert (reach[np.triu_indices(7, 1)] == 0).all() and (reach[np.tril_indices(7)] > 1e-6).all()


def test_rows_do_not_see_each_other(model):
    cfg, params = model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    grad = jax.jit(jax.grad(lambda x: transformer.backbone(cfg, params, x)[0].sum()))(x)
    assert not grad[1].any() and grad[0].any()


def test_attention_weights_are_rows_of_probabilities_over_the_past(model):
    cfg, params = model
    weights = jax.jit(partial(transformer.attention, cfg))(params, tokens(3, 6))
    assert weights.shape == (cfg.layers, 3, cfg.heads, 6, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not np.triu(weights, 1).any()
    # The first layer's, by hand from its queries and keys.
    if cfg.positions == "learned":
        b = params["blocks_0"]
        x = params["wte"]["embedding"][tokens(3, 6)] + params["wpe"]["embedding"][None, :6]
        norm = b["norm_attention"]
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        y = y * norm["scale"][None, None] + norm.get("bias", jnp.zeros(8))[None, None]
        q, k, _ = jnp.split(y @ b["qkv"]["kernel"] + b["qkv"].get("bias", jnp.zeros(24))[None, None], 3, -1)
        scores = jnp.where(jnp.tril(jnp.ones((1, 6, 6), bool)), q[..., 4:] @ k[..., 4:].swapaxes(1, 2) / 2, -jnp.inf)
        np.testing.assert_allclose(weights[0, :, 1], jax.nn.softmax(scores), atol=1e-5)


def test_initial_kernels_have_their_spread():
    cfg = Config(vocab=500, context=300, layers=3, heads=4, width=256)
    params = jax.jit(partial(transformer.init, cfg))(key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embedding" in name:
            writes = "['out']" in name or "['down']" in name
            np.testing.assert_allclose(x.std(), 0.02 / math.sqrt(6) if writes else 0.02, rtol=0.02, err_msg=name)
        else:
            assert (x == (1 if "scale" in name else 0)).all(), name
    logits = jax.jit(partial(transformer.apply, cfg))(params, tokens(4, 100, vocab=500))
    nll = -jax.nn.log_softmax(logits)[..., 7].mean()
    assert abs(nll - math.log(500)) < 0.1  # it begins as the uniform distribution


def test_weight_decay_is_for_matrices_only():
    optim = Optim(weight_decay=1.0)
    params = parameters(SMALL)
    nothing = jax.tree.map(jnp.zeros_like, params)
    moves, _ = optim.chain().update(nothing, optim.chain().init(params), params)
    for path, x in jax.tree_util.tree_leaves_with_path(moves):
        assert bool(x.any()) == (x.ndim == 2), jax.tree_util.keystr(path)


def test_dropout_needs_a_key():
    cfg = dataclasses.replace(SMALL, dropout=0.2, layers=1)
    params, x = parameters(cfg, scale=0.05), tokens(1, 4)
    still = jax.jit(partial(transformer.apply, cfg))(params, x)
    without = jax.jit(partial(transformer.apply, dataclasses.replace(cfg, dropout=0.0)))(params, x)
    np.testing.assert_allclose(still, without, atol=1e-6)
    some = jax.jit(jax.vmap(lambda k: transformer.apply(cfg, params, x, k)))(jax.random.split(key(1), 64))
    assert some.std(0).min() > 0
    h = jnp.zeros((1, 4, 8)) + 0.5
    first = jax.jit(jax.vmap(lambda k: transformer.backbone(cfg, params, h, k)))(jax.random.split(key(2), 64))
    assert first.std(0).max() > 0


def test_remat_changes_no_gradient(model):
    cfg, params = model

    def gradient(cfg):
        return jax.jit(jax.grad(lambda p: transformer.nll(cfg, p, tokens(2, 6)).sum()))(params)

    saved, again = gradient(cfg), gradient(dataclasses.replace(cfg, remat=True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), saved, again)
    remat = dataclasses.replace(cfg, remat=True)
    text = str(jax.make_jaxpr(lambda p: transformer.nll(remat, p, tokens(2, 6)))(params))
    assert "remat" in text or "checkpoint" in text


def test_bfloat16_is_near_float32():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    params = parameters(SMALL)
    a, b = (jax.jit(partial(transformer.apply, cfg))(params, tokens(2, 9)) for cfg in (SMALL, half))
    assert b.dtype == jnp.float32 and (a != b).any()
    np.testing.assert_allclose(a, b, atol=0.15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "model.width 8 does not divide into 3 heads"),
        ({"heads": 8, "positions": "rotary"}, "rotary positions need heads of even width, got 1"),
        ({"positions": "sine"}, "model.positions must be one of learned, rotary, not 'sine'"),
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\), got 1.0"),
        ({"context": 0}, "model.context must be at least 1, got 0"),
        ({"vocab": -1}, "model.vocab must not be negative, got -1"),
        ({"std": 0.0}, "model.std must be positive, got 0.0"),
    ],
)
def test_bad_values_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_sequences_beyond_the_context_are_refused():
    params = parameters(SMALL)
    with pytest.raises(ValueError, match=r"must have 1 to 24 positions \(model.context\), got 25"):
        transformer.apply(SMALL, params, tokens(1, 25))
    for T, new, words in (
        (0, 5, "the prompt is empty"),
        (20, 5, "a prompt of 20 tokens and 5 new ones exceed the context of 24: .* at most 4"),
        (5, 0, "max_new_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            transformer.generate(SMALL, params, tokens(1, T), key(0), max_new_tokens=new)
        with pytest.raises(ValueError, match=words):
            transformer.beam_search(SMALL, params, tokens(1, T), beams=2, max_new_tokens=new)
    with pytest.raises(ValueError, match="a prompt is tokens .B, T., as Tokenizer.encode"):
        transformer.generate.__wrapped__(SMALL, params, "the", key(0), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"beams must lie in 1..11, got 12"):
        transformer.beam_search(SMALL, params, tokens(1, 3), beams=12, max_new_tokens=2)
    with pytest.raises(ValueError, match="a cache of 4 slots does not hold a prompt of 5 tokens"):
        transformer.prefill(SMALL, params, tokens(1, 5), slots=4)


# ------------------------------------------------------------------------------------------------------------ decoding


def test_cached_logits_are_those_without_a_cache_at_every_position(model):
    """Prompts of unequal lengths side by side, in a cache larger than needed."""
    cfg, params = model
    x, lengths = tokens(4, 20), jnp.array([6, 1, 4, 3])
    full, rows = jax.jit(partial(transformer.apply, cfg))(params, x), jnp.arange(4)
    # What stands behind a short prompt must not matter.
    prompt = jnp.where(jnp.arange(6)[None] < lengths[:, None], x[:, :6], 9)
    logits, cache = jax.jit(partial(transformer.prefill, cfg, slots=23))(params, prompt, lengths)
    step = jax.jit(partial(transformer.decode, cfg))
    for i in range(14):
        np.testing.assert_allclose(logits, full[rows, lengths - 1 + i], atol=2e-5)
        logits, cache = step(params, x[rows, lengths + i], cache)
    assert cache.lengths.tolist() == [20, 15, 18, 17]


def greedy_without_cache(cfg, params, row, new):
    row = list(row)
    for _ in range(new):
        row.append(int(np.argmax(plain(cfg, params, np.array(row))[-1])))
    return row[-new:]


def test_temperature_zero_takes_the_most_likely_token(model):
    cfg, params = model
    x, lengths = tokens(3, 5), jnp.array([5, 2, 3])
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=8, n=2))
    got = generate(params, x, key(0), sampling=Sampling(0.0), lengths=lengths)
    for i in range(3):
        expected = greedy_without_cache(cfg, params, np.asarray(x[i, : lengths[i]]), 8)
        assert got[2 * i].tolist() == got[2 * i + 1].tolist() == expected


def probabilities(cfg, params, prompt, new, temperature):
    """{continuation: probability}, by enumeration."""
    found = {}
    for tail in itertools.product(range(cfg.vocab), repeat=new):
        logits = plain(cfg, params, np.array([*prompt, *tail]))[len(prompt) - 1 : -1] / temperature
        found[tail] = math.exp(sum(special.log_softmax(l)[t] for l, t in zip(logits, tail, strict=True)))
    return found


def test_samples_have_the_models_distribution():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params, n = parameters(cfg), 4000
    exact = probabilities(cfg, params, [1, 3], 2, 0.7)
    assert abs(sum(exact.values()) - 1) < 1e-9
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=2, n=n))
    got = generate(params, jnp.array([[1, 3]]), key(3), sampling=Sampling(0.7))
    counts = {tail: 0 for tail in exact}
    for tail in map(tuple, got.tolist()):
        counts[tail] += 1
    likely = [tail for tail in exact if exact[tail] * n >= 5]
    seen, due = [counts[t] for t in likely], [n * exact[t] for t in likely]
    assert stats.chisquare([*seen, n - sum(seen) + 1e-9], [*due, n - sum(due) + 1e-9]).pvalue > 1e-3


def test_after_a_stop_token_come_only_stop_tokens():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params = parameters(cfg)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=10, n=40))
    free = np.asarray(generate(params, tokens(2, 3, vocab=4), key(0)))
    got = np.asarray(generate(params, tokens(2, 3, vocab=4), key(0), sampling=Sampling(stop=(2, 3))))
    for row, unstopped in zip(got, free, strict=True):
        at = next((i for i, t in enumerate(unstopped) if t in (2, 3)), 9)
        assert row[: at + 1].tolist() == unstopped[: at + 1].tolist()
        assert (row[at:] == row[at]).all()
    assert len({tuple(row) for row in got}) > 5


@pytest.mark.parametrize(
    ("prompt", "lengths", "words"),
    [
        ([[3, 11]], None, r"tokens of a prompt lie in 0..10, got 3..11"),
        ([[-1, 2]], None, r"tokens of a prompt lie in 0..10, got -1..2"),
        ([[1, 2]], [3], r"lengths of a prompt lie in 1..2, got 3..3"),
        ([[1, 2]], [0], r"lengths of a prompt lie in 1..2, got 0..0"),
        ([[]], None, "the prompt is empty"),
    ],
)
def test_prompts_that_the_model_has_not_are_refused(prompt, lengths, words):
    prompt = jnp.asarray(prompt, jnp.int32)
    lengths = None if lengths is None else jnp.asarray(lengths)
    for ask in (
        lambda: transformer.generate(SMALL, {}, prompt, key(0), max_new_tokens=2, lengths=lengths),
        lambda: transformer.beam_search(SMALL, {}, prompt, beams=2, max_new_tokens=2, lengths=lengths),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    for ask in (
        lambda cfg: transformer.apply(cfg, {}, tokens(1, 3)),
        lambda cfg: transformer.prefill(cfg, {}, tokens(1, 3)),
        lambda cfg: transformer.generate(cfg, {}, tokens(1, 3), key(0), max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="model.vocab is 0"):
            ask(dataclasses.replace(SMALL, vocab=0))


def test_damaged_weights_give_no_plausible_token():
    params = jax.tree.map(lambda x: x.at[0].set(jnp.nan), parameters(SMALL))
    for sampling in (Sampling(), Sampling(0.0), Sampling(top_p=0.5)):
        generate = jax.jit(partial(transformer.generate, SMALL, max_new_tokens=3))
        assert (generate(params, tokens(2, 3), key(0), sampling=sampling) == -1).all()


def test_another_temperature_does_not_compile_again():
    params, traces = parameters(SMALL), []

    @jax.jit
    def generate(params, key, sampling):
        traces.append(1)
        return transformer.generate(SMALL, params, tokens(1, 3), key, max_new_tokens=3, sampling=sampling)

    for sampling in (Sampling(), Sampling(0), Sampling(0.5, 3, 0.9, 0.1, 1.2), Sampling(top_k=7)):
        generate(params, key(0), sampling)
    assert len(traces) == 1


def test_repetition_penalty_of_what_occurred():
    """Greedy with a huge penalty repeats nothing of the prompt or of itself where all logits are positive."""
    params = parameters(SMALL)
    params["norm"]["bias"] = jnp.full(8, 3.0)
    params["wte"]["embedding"] = jnp.abs(params["wte"]["embedding"]) + 0.5
    prompt = jnp.array([[1, 2, 1], [5, 7, 0]])
    generate = jax.jit(partial(transformer.generate, SMALL, max_new_tokens=8))
    got = generate(params, prompt, key(0), sampling=Sampling(0.0, repetition=1e3), lengths=jnp.array([3, 2]))
    assert len({*got[0].tolist(), 1, 2}) == 10
    assert len({*got[1].tolist(), 5, 7}) == 10
    logits = jnp.array([[2.0, -2.0, 4.0, -4.0]])
    used = jnp.array([[True, True, False, False]])
    assert transformer.penalise(logits, used, 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]


def test_beam_search_with_all_beams_is_enumeration():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params = parameters(cfg)
    exact = probabilities(cfg, params, [1, 3], 2, 1.0)
    best = sorted(exact, key=exact.get, reverse=True)[:4]
    search = jax.jit(partial(transformer.beam_search, cfg, beams=4, max_new_tokens=2))
    got, log_p = search(params, jnp.array([[0, 2], [1, 3]]))
    assert [tuple(t) for t in got[1].tolist()] == best
    np.testing.assert_allclose(log_p[1], [math.log(exact[t]) for t in best], atol=1e-5)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=5))
    greedy = generate(params, jnp.array([[1, 3]]), key(0), sampling=Sampling(0.0))
    [[one]], _ = jax.jit(partial(transformer.beam_search, cfg, beams=1, max_new_tokens=5))(params, jnp.array([[1, 3]]))
    assert one.tolist() == greedy[0].tolist()


def test_beams_that_ended_keep_their_probability():
    """Against enumeration over all sequences, each cut after its first stop token."""
    cfg = dataclasses.replace(SMALL, vocab=3)
    params = parameters(cfg, seed=4)
    exact = {}
    for tail, p in probabilities(cfg, params, [1], 3, 1.0).items():
        at = tail.index(2) if 2 in tail else 2
        cut = tail[: at + 1] + (tail[at],) * (2 - at)
        exact[cut] = exact.get(cut, 0.0) + p
    search = jax.jit(partial(transformer.beam_search, cfg, beams=3, max_new_tokens=3, stop=(2,)))
    got, log_p = search(params, jnp.array([[1]]))
    for tail, value in zip(got[0].tolist(), log_p[0].tolist(), strict=True):
        np.testing.assert_allclose(value, math.log(exact[tuple(tail)]), atol=1e-5)
    assert log_p[0].tolist() == sorted(log_p[0].tolist(), reverse=True)
    assert any(2 in tail[:2] for tail in got[0].tolist())


# ------------------------------------------------------------------------------------------------------------ sampling


def nucleus(logits, p):
    """Whom top-p keeps: {logit >= the smallest in the nucleus}, the nucleus by a sort in float64."""
    q = special.softmax(np.asarray(logits, np.float64))
    order = np.argsort(-q, kind="stable")
    last = np.searchsorted(np.cumsum(q[order]), p)
    return np.asarray(logits) >= np.asarray(logits)[order[min(last, len(q) - 1)]]


def shapes(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "flat": np.zeros(V),
        "nearly flat": 1e-2 * rng.normal(size=V),
        "broad": rng.normal(size=V),
        "peaked": np.where(np.arange(V) == 777, 30.0, rng.normal(size=V)),
        "steep": 8 * rng.normal(size=V),
        "tied": rng.integers(-3, 4, V),
        "tied and peaked": 2.5 * rng.integers(-6, 7, V),
        "negative": -50 + rng.normal(size=V),
        "signed zeros": np.where(rng.random(V) < 0.5, 0.0, -0.0) - 3.0 * (np.arange(V) > 40),
    }


FILTER = jax.jit(transformer.filter_logits)


@pytest.mark.parametrize("shape", shapes())
def test_top_p_is_exact_for_every_distribution(shape):
    logits = np.float32(shapes()[shape])
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        got = np.asarray(FILTER(jnp.asarray(logits)[None], Sampling(top_p=p)))[0]
        kept = nucleus(logits, p)
        np.testing.assert_array_equal(np.isfinite(got), kept, err_msg=f"{shape} {p}")
        np.testing.assert_array_equal(got[kept], logits[kept])


@pytest.mark.parametrize("k", [1, 2, 40, 1000, V - 1, V, V + 5])
def test_top_k_keeps_k_and_ties(k):
    for shape, logits in shapes(1).items():
        logits = np.float32(logits)
        got = np.asarray(FILTER(jnp.asarray(logits)[None], Sampling(top_k=k)))[0]
        np.testing.assert_array_equal(np.isfinite(got), logits >= np.sort(logits)[-min(k, V)], err_msg=shape)


def test_filters_act_in_turn_and_row_by_row():
    rng = np.random.default_rng(2)
    logits = np.float32(3 * rng.normal(size=(5, 60)))
    got = np.asarray(FILTER(jnp.asarray(logits), Sampling(0.5, top_k=12, top_p=0.8, min_p=0.05)))
    for row, x in zip(got, logits, strict=True):
        x = x / np.float32(0.5)
        kept = x >= np.sort(x)[-12]
        within = nucleus(np.where(kept, x, -np.inf), 0.8) & kept
        q = special.softmax(np.where(within, x.astype(np.float64), -np.inf))
        np.testing.assert_array_equal(np.isfinite(row), within & (q >= 0.05 * q.max()))
    same = FILTER(jnp.asarray(logits), Sampling())
    np.testing.assert_array_equal(same, logits)
    only = np.isfinite(FILTER(jnp.asarray(logits), Sampling(0.0)))
    np.testing.assert_array_equal(only, logits == logits.max(-1, keepdims=True))


@pytest.mark.parametrize("vocab", [3, 256, 257, 5000])
def test_draws_have_their_probabilities_and_never_what_was_filtered(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.float32(2 * rng.normal(size=vocab))
    logits[rng.permutation(vocab)[: vocab // 3]] = -np.inf
    n = 20_000
    got = jax.jit(transformer.sampling.categorical)(jnp.broadcast_to(logits[None], (n, vocab)), key(1))
    counts = np.bincount(got, minlength=vocab)
    assert len(counts) == vocab and not counts[np.isinf(logits)].any()
    due = n * special.softmax(logits.astype(np.float64))
    common = due >= 5
    rest = (counts[~common].sum() + 1e-9, due[~common].sum() + 1e-9)
    assert stats.chisquare([*counts[common], rest[0]], [*due[common], rest[1]]).pvalue > 1e-3


def test_a_draw_survives_the_largest_uniform_number(monkeypatch):
    """u < 1, but u times a sum may round up to the sum: tokens of probability 0 stay out all the same."""
    for u in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape, u=u: jnp.full(shape, u, jnp.float32))
        for logits in ([-jnp.inf, 0.0, 1.0, -jnp.inf], [0.3, 0.1, 0.7, -jnp.inf]):
            [token] = transformer.sampling.categorical(jnp.array([logits]), key(0))
            assert np.isfinite(logits[int(token)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1.0}, "sampling.temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, "sampling.temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, "sampling.top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "sampling.top_p must be above 0 and at most 1, got 1.1"),
        ({"top_k": -1}, "sampling.top_k must be a whole number, at least 0, got -1"),
        ({"top_k": 1.5}, "sampling.top_k must be a whole number, at least 0, got 1.5"),
        ({"min_p": 2.0}, "sampling.min_p must be from 0 to 1, got 2.0"),
        ({"repetition": 0.0}, "sampling.repetition must be positive, got 0.0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**change)


# ---------------------------------------------------------------------------------------------------------- the family


def test_masked_positions_do_not_count():
    family = transformer.make(SMALL)
    state = jax.jit(family.init)(key(0))
    x = tokens(3, 9)
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 8)), jnp.float32)
    each = jax.jit(partial(transformer.nll, SMALL))(state.params, x)
    values = jax.jit(family.evaluate)(state, {"tokens": x, "mask": mask}, key(1))
    np.testing.assert_allclose(values["nll_nats"], (each * mask).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(values["tokens"], mask.sum(-1))
    _, metrics = jax.jit(family.step)(state, {"tokens": x, "mask": mask}, key(1))
    np.testing.assert_allclose(metrics["loss"], (each * mask).sum() / mask.sum(), rtol=1e-5)
    logits = plain(SMALL, state.params, np.asarray(x[0]))
    np.testing.assert_allclose(each[0, 3], -special.log_softmax(logits[3])[x[0, 4]], rtol=1e-4)


def test_a_small_model_learns_a_repeating_text():
    """Every third token is the one three before: the loss falls to nothing but for the first three."""
    cfg = dataclasses.replace(SMALL, optim=Optim(lr=1e-2))
    family = transformer.make(cfg)
    rng, state, step = np.random.default_rng(0), jax.jit(family.init)(key(0)), jax.jit(family.step)
    for i in range(150):
        batch = {"tokens": jnp.asarray(np.tile(rng.integers(0, 11, (64, 3)), 5), jnp.int32)}
        state, _ = step(state, batch, key(i))
    each = jax.jit(partial(transformer.nll, cfg))(state.params, batch["tokens"]).mean(0)
    assert each[:2].min() > 2 and each[2:].max() < 0.1
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=6))
    got = generate(state.params, jnp.array([[4, 9, 1, 4, 9, 1]]), key(0), sampling=Sampling(0.0))
    assert got[0].tolist() == [4, 9, 1, 4, 9, 1]


# ---------------------------------------------------------------------------------------------------------------- GPT-2


GOLDEN = Path(__file__).parent / "golden" / "gpt2"  # written by tests/golden/make_gpt2.py, with transformers


def test_gpt2_gives_the_logits_of_transformers():
    cfg, params = transformer.load_gpt2(GOLDEN)
    golden = np.load(GOLDEN / "golden.npz")
    logits = jax.jit(partial(transformer.apply, cfg))(params, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=golden["greedy"].shape[1]))
    got = generate(params, jnp.asarray(golden["tokens"][:, :4]), key(0), sampling=Sampling(0.0))
    np.testing.assert_array_equal(got, golden["greedy"])


def test_gpt2_is_written_as_it_was_read(tmp_path):
    cfg, params = transformer.load_gpt2(GOLDEN)
    transformer.save_gpt2(tmp_path / "copy", cfg, params)
    again, copied = transformer.load_gpt2(tmp_path / "copy")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, copied)
    from safetensors import safe_open

    with (
        safe_open(GOLDEN / "model.safetensors", "numpy") as ours,
        safe_open(tmp_path / "copy" / "model.safetensors", "numpy") as theirs,
    ):
        assert set(ours.keys()) - {"lm_head.weight"} == set(theirs.keys())
        assert theirs.metadata() == {"format": "pt"}  # without it transformers refuses the file
    with pytest.raises(ValueError, match="a GPT-2 has positions = 'learned', this model 'rotary'"):
        transformer.save_gpt2(tmp_path / "other", LLAMA, params)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    return tmp_path


def change(folder, **values):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **values}))


def test_pieces_named_by_an_index_are_one_model(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, params = transformer.load_gpt2(folder)
    jax.tree.map(np.testing.assert_array_equal, params, transformer.load_gpt2(GOLDEN)[1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: change(f, model_type="llama"), "describes a llama; only gpt2 can be loaded"),
        (lambda f: change(f, activation_function="gelu"), "says activation_function = 'gelu'; only 'gelu_new'"),
        (lambda f: change(f, vocab_size=70), r"wte.weight is \(\d+, 8\), config.json asks for \(70, 8\)"),
        (lambda f: change(f, n_layer=3), "has no tensor h.2"),
        (lambda f: change(f, n_layer=1), "holds h.1.*, which a GPT-2 of 1 layers has not"),
        (lambda f: change(f, n_head=3), "does not describe a GPT-2 .*8 does not divide into 3 heads"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors$"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which is never opened",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            r"model.safetensors cannot be read \(.*\): copy or download it again",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    ],
)
def test_a_folder_that_is_no_gpt2_is_refused_in_one_line(folder, spoil, words):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        transformer.load_gpt2(folder)
    assert "\n" not in str(refused.value)
