"""The transformer against a plain float64 version of its equations, brute force, and the published GPT-2."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
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

from .golden import small_gpt2 as small

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
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s.shape) + 0.1, jnp.float32), shapes
    )


def tokens(B, T, seed=0, vocab=11):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (B, T)), jnp.int32)


@pytest.fixture(
    params=[
        "gpt2",
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("attention only", "relu")),
    ]
)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_position_sees_a_later_one(model):
    """Through gradients by the embeddings: exactly zero after t, not zero up to t."""
    cfg, params = model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 8)), jnp.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: transformer.backbone(cfg, params, x)[0]))(x)[:, :, 0]
    reach = np.abs(jacobian).max((1, 3))
    assert (reach[np.triu_indices(7, 1)] == 0).all() and (reach[np.tril_indices(7)] > 1e-6).all()


@pytest.mark.slow
def test_rows_do_not_see_each_other(model):
    cfg, params = model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    grad = jax.jit(jax.grad(lambda x: transformer.backbone(cfg, params, x)[0].sum()))(x)
    assert not grad[1].any() and grad[0].any()


@pytest.mark.slow
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
        q, k, _ = jnp.split(
            y @ b["qkv"]["kernel"] + b["qkv"].get("bias", jnp.zeros(24))[None, None], 3, -1
        )
        scores = jnp.where(
            jnp.tril(jnp.ones((1, 6, 6), bool)),
            q[..., 4:] @ k[..., 4:].swapaxes(1, 2) / 2,
            -jnp.inf,
        )
        np.testing.assert_allclose(weights[0, :, 1], jax.nn.softmax(scores), atol=1e-5)


@pytest.mark.slow
def test_initial_kernels_have_their_spread():
    cfg = Config(vocab=500, context=300, layers=3, heads=4, width=256)
    params = jax.jit(partial(transformer.init, cfg))(key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embedding" in name:
            writes = "['out']" in name or "['down']" in name
            np.testing.assert_allclose(
                x.std(), 0.02 / math.sqrt(6) if writes else 0.02, rtol=0.02, err_msg=name
            )
        else:
            assert (x == (1 if "scale" in name else 0)).all(), name
    logits = jax.jit(partial(transformer.apply, cfg))(params, tokens(4, 100, vocab=500))
    nll = -jax.nn.log_softmax(logits)[..., 7].mean()
    assert abs(nll - math.log(500)) < 0.1  # it begins as the uniform distribution


@pytest.mark.slow
def test_weight_decay_is_for_matrices_only():
    optim = Optim(weight_decay=1.0)
    params = parameters(SMALL)
    nothing = jax.tree.map(jnp.zeros_like, params)
    moves, _ = optim.chain().update(nothing, optim.chain().init(params), params)
    for path, x in jax.tree_util.tree_leaves_with_path(moves):
        assert bool(x.any()) == (x.ndim == 2), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_dropout_needs_a_key():
    cfg = dataclasses.replace(SMALL, dropout=0.2, layers=1)
    params, x = parameters(cfg, scale=0.05), tokens(1, 4)
    still = jax.jit(partial(transformer.apply, cfg))(params, x)
    without = jax.jit(partial(transformer.apply, dataclasses.replace(cfg, dropout=0.0)))(params, x)
    np.testing.assert_allclose(still, without, atol=1e-6)
    some = jax.jit(jax.vmap(lambda k: transformer.apply(cfg, params, x, k)))(
        jax.random.split(key(1), 64)
    )
    assert some.std(0).min() > 0
    h = jnp.zeros((1, 4, 8)) + 0.5
    first = jax.jit(jax.vmap(lambda k: transformer.backbone(cfg, params, h, k)))(
        jax.random.split(key(2), 64)
    )
    assert first.std(0).max() > 0


@pytest.mark.slow
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
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\), got 1.0"),
        ({"context": 0}, "model.context must be at least 1, got 0"),
        ({"vocab": -1}, "model.vocab must be at least 0, got -1"),
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
        (20, 6, "a prompt of 20 tokens and 6 new ones exceed the context of 24: .* at most 5"),
        (24, 2, "a prompt of 24 tokens and 2 new ones exceed the context of 24: .* at most 1"),
        (25, 1, "a prompt of 25 tokens and 1 new ones exceed the context of 24: cut the prompt$"),
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        found[tail] = math.exp(
            sum(special.log_softmax(l)[t] for l, t in zip(logits, tail, strict=True))
        )
    return found


@pytest.mark.slow
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


@pytest.mark.slow
def test_after_a_stop_token_come_only_stop_tokens():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params = parameters(cfg)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=10, n=40))
    free = np.asarray(generate(params, tokens(2, 3, vocab=4), key(0)))
    got = np.asarray(
        generate(params, tokens(2, 3, vocab=4), key(0), sampling=Sampling(stop=(2, 3)))
    )
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
        lambda: transformer.beam_search(
            SMALL, {}, prompt, beams=2, max_new_tokens=2, lengths=lengths
        ),
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


@pytest.mark.slow
def test_damaged_weights_give_no_plausible_token():
    params = jax.tree.map(lambda x: x.at[0].set(jnp.nan), parameters(SMALL))
    for sampling in (Sampling(), Sampling(0.0), Sampling(top_p=0.5)):
        generate = jax.jit(partial(transformer.generate, SMALL, max_new_tokens=3))
        assert (generate(params, tokens(2, 3), key(0), sampling=sampling) == -1).all()


@pytest.mark.slow
def test_another_temperature_does_not_compile_again():
    params, traces = parameters(SMALL), []

    @jax.jit
    def generate(params, key, sampling):
        traces.append(1)
        return transformer.generate(
            SMALL, params, tokens(1, 3), key, max_new_tokens=3, sampling=sampling
        )

    for sampling in (Sampling(), Sampling(0), Sampling(0.5, 3, 0.9, 0.1, 1.2), Sampling(top_k=7)):
        generate(params, key(0), sampling)
    assert len(traces) == 1


@pytest.mark.slow
def test_repetition_penalty_of_what_occurred():
    """Greedy with a huge penalty repeats nothing of the prompt or of itself where all logits are positive."""
    params = parameters(SMALL)
    params["norm"]["bias"] = jnp.full(8, 3.0)
    params["wte"]["embedding"] = jnp.abs(params["wte"]["embedding"]) + 0.5
    prompt = jnp.array([[1, 2, 1], [5, 7, 0]])
    generate = jax.jit(partial(transformer.generate, SMALL, max_new_tokens=8))
    got = generate(
        params, prompt, key(0), sampling=Sampling(0.0, repetition=1e3), lengths=jnp.array([3, 2])
    )
    assert len({*got[0].tolist(), 1, 2}) == 10
    assert len({*got[1].tolist(), 5, 7}) == 10
    logits = jnp.array([[2.0, -2.0, 4.0, -4.0]])
    used = jnp.array([[True, True, False, False]])
    assert transformer.penalise(logits, used, 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]


@pytest.mark.slow
def test_beam_search_with_all_beams_is_enumeration():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params = parameters(cfg)
    exact = probabilities(cfg, params, [1, 3], 2, 1.0)
    best = sorted(exact, key=exact.get, reverse=True)[:4]
    search = jax.jit(partial(transformer.beam_search, cfg, beams=4, max_new_tokens=2))
    for penalty in (0.0, 1.0, -2.0):
        got, scores = search(params, jnp.array([[0, 2], [1, 3]]), length_penalty=penalty)
        assert [tuple(t) for t in got[1].tolist()] == best
        np.testing.assert_allclose(
            scores[1], [math.log(exact[t]) / 2**penalty for t in best], rtol=1e-5
        )
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=5))
    greedy = generate(params, jnp.array([[1, 3]]), key(0), sampling=Sampling(0.0))
    [[one]], _ = jax.jit(partial(transformer.beam_search, cfg, beams=1, max_new_tokens=5))(
        params, jnp.array([[1, 3]])
    )
    assert one.tolist() == greedy[0].tolist()


@pytest.mark.slow
def test_beams_that_ended_keep_their_probability():
    """Against enumeration over all sequences, each cut after its first stop token."""
    cfg = dataclasses.replace(SMALL, vocab=3)
    params = parameters(cfg, seed=4)
    exact = {}
    for tail, p in probabilities(cfg, params, [1], 3, 1.0).items():
        at = tail.index(2) if 2 in tail else 2
        cut = tail[: at + 1] + (tail[at],) * (2 - at)
        exact[cut] = exact.get(cut, 0.0) + p
    search = jax.jit(
        partial(
            transformer.beam_search, cfg, beams=3, max_new_tokens=3, stop=(2,), length_penalty=0.0
        )
    )
    got, log_p = search(params, jnp.array([[1]]))
    for tail, value in zip(got[0].tolist(), log_p[0].tolist(), strict=True):
        np.testing.assert_allclose(value, math.log(exact[tuple(tail)]), atol=1e-5)
    assert log_p[0].tolist() == sorted(log_p[0].tolist(), reverse=True)
    assert any(2 in tail[:2] for tail in got[0].tolist())


# ----------------------------------------------------------------------------------------- transformers, token by token


RECORDED = json.loads(
    (Path(__file__).parent / "golden" / "generation.json").read_text()
)  # by make_generation.py


def from_seed(folder, seed, vocab):
    """(Config, params) of a model whose weights follow from a seed, through the files of Hugging Face's layout."""
    from safetensors.numpy import save_file

    save_file(small.tensors(seed, vocab), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(small.config(vocab, None)))
    return transformer.load_gpt2(folder)


def filled(rows):
    """Prompts side by side, filled up on the right with what must not matter."""
    longest = max(map(len, rows))
    return jnp.array([row + [7] * (longest - len(row)) for row in rows]), jnp.array(
        [len(row) for row in rows]
    )


def cut(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


@partial(jax.jit, static_argnums=0, static_argnames="size")
def greedy(cfg, params, prompt, lengths, stop, repetition, *, size):
    sampling = Sampling(0.0, repetition=repetition, stop=stop)
    return transformer.generate(
        cfg,
        params,
        prompt,
        key(0),
        max_length=50,
        lengths=lengths,
        sampling=sampling,
        no_repeat_ngram_size=size,
    )


@partial(jax.jit, static_argnums=0, static_argnames=("beams", "early", "size"))
def search(cfg, params, prompt, lengths, stop, penalty, *, beams, early, size):
    return transformer.beam_search(
        cfg,
        params,
        prompt,
        beams=beams,
        max_length=50,
        lengths=lengths,
        stop=stop,
        length_penalty=penalty,
        early_stopping=early,
        no_repeat_ngram_size=size,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(small.SEEDS)))
def test_greedy_tokens_are_those_of_transformers(tmp_path, seed):
    recorded = RECORDED["deterministic"][seed]
    cfg, params = from_seed(tmp_path, recorded["seed"], small.VOCAB)
    prompt, lengths = filled(small.prompts(recorded["seed"], small.VOCAB, small.LENGTHS))
    for case in recorded["cases"]:
        for how, expected in zip(small.GREEDY, case["greedy"], strict=True):
            got = greedy(
                cfg,
                params,
                prompt,
                lengths,
                (case["eos"],),
                how["repetition_penalty"],
                size=how["no_repeat_ngram_size"],
            )
            assert [cut(row, case["eos"]) for row in got.tolist()] == expected, how


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(small.SEEDS)))
def test_beams_and_scores_are_those_of_transformers(tmp_path, seed):
    """Several texts of each prompt, all of them compared: num_return_sequences takes the first of them."""
    recorded = RECORDED["deterministic"][seed]
    cfg, params = from_seed(tmp_path, recorded["seed"], small.VOCAB)
    prompt, lengths = filled(small.prompts(recorded["seed"], small.VOCAB, small.LENGTHS))
    for case in recorded["cases"]:
        for how, (expected, scores) in zip(small.BEAMS, case["beams"], strict=True):
            got, value = search(
                cfg,
                params,
                prompt,
                lengths,
                (case["eos"],),
                how["length_penalty"],
                beams=how["num_beams"],
                early=how["early_stopping"],
                size=how["no_repeat_ngram_size"],
            )
            assert [
                cut(row, case["eos"]) for row in got.reshape(-1, got.shape[-1]).tolist()
            ] == expected, how
            np.testing.assert_allclose(value.reshape(-1), scores, rtol=1e-4, err_msg=str(how))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(small.SAMPLES)))
def test_the_law_of_a_drawn_token_is_that_of_transformers(tmp_path, case):
    """Along texts that it drew: which tokens can be drawn, and how likely each is."""
    how, recorded = small.SAMPLES[case], RECORDED["drawn"][case]
    cfg, params = from_seed(tmp_path, 7, small.SAMPLES_VOCAB)
    [prompt] = small.prompts(7, small.SAMPLES_VOCAB, [5])
    sampling = Sampling(how["temperature"], how["top_k"], how["top_p"], how.get("min_p", 0.0))

    @jax.jit
    def law(params, texts, at):
        logits = jnp.take(transformer.apply(cfg, params, texts), at - 1, axis=1)
        written = jnp.where(jnp.arange(texts.shape[1])[None] < at, texts, -1)
        logits = transformer.penalise(
            logits,
            transformer.sampling.occurred(written, cfg.vocab),
            how.get("repetition_penalty", 1.0),
        )
        padded = jnp.pad(written, ((0, 0), (1, 0)), constant_values=-1)
        logits = transformer.ban_repeats(logits, padded, at + 1, how.get("no_repeat_ngram_size", 0))
        return jax.nn.softmax(transformer.filter_logits(logits, sampling))

    texts = jnp.array([prompt + text for text in recorded["texts"]])
    for step, rows in enumerate(recorded["steps"]):
        for got, expected in zip(law(params, texts, len(prompt) + step), rows, strict=True):
            assert np.flatnonzero(got).tolist() == sorted(map(int, expected))
            np.testing.assert_allclose(
                got[np.flatnonzero(got)],
                [expected[k] for k in sorted(expected, key=int)],
                atol=1e-5,
            )


@pytest.mark.soak
def test_transformers_itself_agrees_on_new_models(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from .golden import make_generation

    for seed in (100, 101):
        vocab = 50 + seed
        cfg, params = from_seed(tmp_path, seed, vocab)
        net, rows = make_generation.model(seed, vocab), small.prompts(seed, vocab, [2, 5, 4])
        prompt, lengths = filled(rows)
        for beams, early in ((1, False), (2, True), (4, False), (3, "never")):
            how = {"max_length": 50, "do_sample": False, "no_repeat_ngram_size": 2}
            if beams > 1:
                how |= {"num_beams": beams, "num_return_sequences": beams, "early_stopping": early}
            expected, scores, _ = make_generation.ask(net, rows, 3, **how)
            if beams == 1:
                got = greedy(cfg, params, prompt, lengths, (3,), 1.0, size=2)
            else:
                got, value = search(
                    cfg, params, prompt, lengths, (3,), 1.0, beams=beams, early=early, size=2
                )
                np.testing.assert_allclose(value.reshape(-1), scores, rtol=1e-4)
            assert [cut(row, 3) for row in got.reshape(-1, got.shape[-1]).tolist()] == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 2, 3, 9, 40])
def test_an_ngram_is_banned_where_it_would_occur_again(size):
    rng = np.random.default_rng(size)
    for length in (1, 2, 5, 12):
        rows = [rng.integers(0, 4, rng.integers(1, length + 1)).tolist() for _ in range(6)]
        pad, new = max(0, size - 1), 3
        text = np.full((6, pad + length + new), -1, np.int32)
        for row, tokens in zip(text, rows, strict=True):
            row[pad + length - len(tokens) : pad + length] = tokens
        got = transformer.ban_repeats(jnp.zeros((6, 5)), jnp.asarray(text), pad + length, size)
        for logits, tokens in zip(got, rows, strict=True):
            seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
            ends = tuple(tokens[len(tokens) - size + 1 :])
            banned = [
                size > 0 and len(ends) == size - 1 and (*ends, token) in seen for token in range(5)
            ]
            np.testing.assert_array_equal(np.isinf(logits), banned)


def check_law(counts, exact, n):
    """Chi-square of counts {outcome: how often} against {outcome: probability}; nothing of probability 0 occurs."""
    assert abs(sum(exact.values()) - 1) < 1e-6 and set(counts) <= {x for x in exact if exact[x] > 0}
    common = [x for x in exact if exact[x] * n >= 5]
    seen, due = [counts.get(x, 0) for x in common], [exact[x] * n for x in common]
    assert len(common) > 3
    assert stats.chisquare([*seen, n - sum(seen) + 1e-9], [*due, n - sum(due) + 1e-9]).pvalue > 1e-3


@pytest.mark.slow
def test_samples_without_repeats_have_their_law():
    cfg = dataclasses.replace(SMALL, vocab=4)
    params, n, exact = parameters(cfg), 4000, {}
    for tail in itertools.product(range(4), repeat=3):
        p, text = 1.0, [1, 3]
        for token in tail:
            logits = plain(cfg, params, np.array(text))[-1] / 0.9
            banned = [b for a, b in zip(text, text[1:], strict=False) if a == text[-1]]
            logits[banned] = -np.inf
            p *= special.softmax(logits)[token]
            text.append(token)
        exact[tail] = p
    generate = jax.jit(
        partial(transformer.generate, cfg, max_new_tokens=3, n=n, no_repeat_ngram_size=2)
    )
    got = generate(params, [[1, 3, 0]], key(4), sampling=Sampling(0.9), lengths=[2]).tolist()
    check_law({tail: got.count(list(tail)) for tail in set(map(tuple, got))}, exact, n)


@pytest.mark.slow
def test_drawn_beams_have_their_law():
    """Four of six tokens drawn one after another without replacement, the two likeliest of them kept."""
    cfg = dataclasses.replace(SMALL, vocab=6)
    params, n, exact = parameters(cfg), 4000, {}
    log_p = special.log_softmax(plain(cfg, params, np.array([1, 3]))[-1]) / 0.7
    p = special.softmax(log_p)
    for four in itertools.permutations(range(6), 4):
        chance = np.prod([p[t] / (1 - sum(p[list(four[:i])])) for i, t in enumerate(four)])
        best = tuple(sorted(four, key=lambda t: -log_p[t])[:2])
        exact[best] = exact.get(best, 0.0) + chance
    how = {"beams": 2, "max_new_tokens": 1, "sampling": Sampling(0.7), "length_penalty": 0.0}
    draw = jax.jit(
        jax.vmap(lambda k: transformer.beam_search(cfg, params, jnp.array([[1, 3]]), k, **how))
    )
    tokens, scores = draw(jax.random.split(key(5), n))
    got = list(map(tuple, tokens[:, 0, :, 0].tolist()))
    check_law({pair: got.count(pair) for pair in set(got)}, exact, n)
    np.testing.assert_allclose(
        scores[:, 0], log_p[np.array(got)], atol=1e-5
    )  # of filtered log p, as there
    # Filters leave as many tokens as must be drawn.
    greedily = transformer.filter_logits(
        jnp.asarray(log_p, jnp.float32)[None], Sampling(top_k=1, top_p=0.1, min_p=1.0), least=3
    )
    assert np.flatnonzero(np.isfinite(greedily[0])).tolist() == sorted(
        np.argsort(-log_p)[:3].tolist()
    )


@pytest.mark.soak
def test_prompts_are_taken_in_every_context():
    """jit, scan, lax.map and vmap, with prompts of JAX, of numpy and lists, closed over or passed in."""
    params, rows, lengths = parameters(SMALL), [[1, 2, 3], [4, 5, 0]], [3, 2]
    how = {"max_new_tokens": 2}

    @jax.jit
    def passed(prompt, lengths):
        return transformer.generate(SMALL, params, prompt, key(0), lengths=lengths, **how)

    expected = passed(jnp.array(rows), jnp.array(lengths))
    np.testing.assert_array_equal(passed(rows, lengths), expected)
    concrete, beyond = jnp.array(rows), jnp.array([[1, 11]])
    for prompt, long in (
        (concrete, jnp.array(lengths)),
        (rows, lengths),
        (np.array(rows, np.uint8), np.array(lengths)),
    ):

        def ask(k, prompt=prompt, long=long):
            return transformer.generate(SMALL, params, prompt, k, lengths=long, **how)

        got = jax.jit(lambda: jax.lax.map(ask, key(0)[None]))()  # noqa: B023
        np.testing.assert_array_equal(got[0], expected)
    write = partial(transformer.generate, SMALL, params, **how)
    scanned = jax.jit(
        lambda: jax.lax.scan(
            lambda c, k: (c, write(concrete, k, lengths=lengths)), 0, key(0)[None]
        )[1]
    )
    mapped = jax.jit(jax.vmap(lambda p: write(p, key(0), lengths=lengths)))
    for got in (scanned(), mapped(concrete[None])):
        np.testing.assert_array_equal(got[0], expected)
    search = partial(transformer.beam_search, SMALL, params, beams=2, lengths=lengths, **how)
    np.testing.assert_array_equal(
        jax.jit(lambda: search(concrete))()[0], jax.jit(search)(concrete)[0]
    )
    with pytest.raises(ValueError, match="tokens of a prompt lie in 0..10, got 1..11"):
        jax.jit(lambda: write(beyond, key(0)))()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say either max_new_tokens or max_length"),
        ({"max_new_tokens": 2, "max_length": 9}, "say either max_new_tokens or max_length"),
        ({"max_length": 3}, "max_length 3 leaves no new token after a prompt of 3"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, got 2.0"),
        ({"max_length": 30}, "a prompt of 3 tokens and 27 new ones exceed the context of 24"),
        (
            {"max_new_tokens": 2, "no_repeat_ngram_size": -1},
            "no_repeat_ngram_size must be at least 0, got -1",
        ),
        ({"max_new_tokens": 2, "lengths": [3]}, "lengths are one number for each of 2 prompts"),
        (
            {"max_new_tokens": 2, "lengths": [3.0, 2.0]},
            "lengths of a prompt are whole numbers, got float64",
        ),
        (
            {"max_new_tokens": 2, "prompt": [[1.0]]},
            "tokens of a prompt are whole numbers, got float64",
        ),
        (
            {"max_new_tokens": 2, "prompt": [[True]]},
            "tokens of a prompt are whole numbers, got bool",
        ),
        ({"max_new_tokens": 2, "prompt": [[1], [1, 2]]}, "a prompt is tokens .B, T."),
        ({"max_new_tokens": 2, "prompt": [1, 2]}, "a prompt is tokens .B, T."),
        ({"max_new_tokens": 2, "n": 0}, "n must be at least 1, got 0"),
        ({"max_new_tokens": 2, "beams": 0}, "beams must be at least 1, got 0"),
        (
            {"max_new_tokens": 2, "early_stopping": "always"},
            "early_stopping must be True, False or .never., got 'always'",
        ),
        (
            {"max_new_tokens": 2, "length_penalty": math.inf},
            "length_penalty must be finite, got inf",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(options, words):
    prompt = options.pop("prompt", [[1, 2, 3], [1, 2, 3]])
    own = {
        "n": transformer.generate,
        "beams": transformer.beam_search,
        "early_stopping": transformer.beam_search,
        "length_penalty": transformer.beam_search,
    }
    for ask in {own[name] for name in options if name in own} or {
        transformer.generate,
        transformer.beam_search,
    }:
        rest = {"beams": 2, **options} if ask is transformer.beam_search else options
        with pytest.raises(ValueError, match=words) as refused:
            ask.__wrapped__(SMALL, {}, prompt, key(0), **rest)
        assert "\n" not in str(refused.value)


@pytest.mark.soak
def test_the_last_token_of_a_full_context_needs_no_position():
    params, x = parameters(SMALL), tokens(1, 24)
    [[one]] = transformer.generate(
        SMALL, params, x, key(0), max_new_tokens=1, sampling=Sampling(0.0)
    )
    assert one == np.argmax(plain(SMALL, params, np.asarray(x[0]))[-1])
    [two] = transformer.generate(
        SMALL, params, x[:, :23], key(0), max_length=25, sampling=Sampling(0.0)
    )
    assert two.tolist() == greedy_without_cache(SMALL, params, np.asarray(x[0, :23]), 1) + [
        int(np.argmax(plain(SMALL, params, np.array([*x[0, :23].tolist(), int(two[0])]))[-1]))
    ]
    best, score = transformer.beam_search(SMALL, params, x, beams=1, max_new_tokens=1)
    assert best[0, 0, 0] == one
    np.testing.assert_allclose(
        score[0, 0], special.log_softmax(plain(SMALL, params, np.asarray(x[0]))[-1])[one], atol=1e-4
    )


@pytest.mark.slow
def test_stop_tokens_are_the_configs_where_none_are_named():
    cfg = dataclasses.replace(
        SMALL, vocab=4, eos=(2, 99)
    )  # what the vocabulary has not never occurs
    params, x = parameters(cfg), tokens(2, 3, vocab=4)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=9, n=4))
    named = generate(params, x, key(0), sampling=Sampling(stop=(2,)))
    np.testing.assert_array_equal(generate(params, x, key(0)), named)
    free = generate(params, x, key(0), sampling=Sampling(stop=()))
    assert (free != named).any()
    np.testing.assert_array_equal(
        generate(params, x, key(0), sampling=Sampling(stop=3)),
        generate(params, x, key(0), sampling=Sampling(stop=np.array([3, 3]))),
    )
    search = jax.jit(partial(transformer.beam_search, cfg, beams=2, max_new_tokens=6))
    np.testing.assert_array_equal(search(params, x)[0], search(params, x, stop=(2, 99))[0])
    with pytest.raises(ValueError, match="model.eos and model.bos must not be negative, got -1"):
        dataclasses.replace(SMALL, eos=(3, -1))


@pytest.mark.soak
def test_searches_at_the_edge():
    """One token in all, weights that are NaN, fewer texts than beams, all tokens forbidden."""
    one = dataclasses.replace(SMALL, vocab=1)
    for stop in ((), (0,)):
        got, score = transformer.beam_search(
            one, parameters(one), [[0]], beams=1, max_new_tokens=3, stop=stop
        )
        assert got.tolist() == [[[0, 0, 0]]] and score.tolist() == [[0.0]]
    assert (
        transformer.generate(
            one, parameters(one), [[0]], key(0), max_new_tokens=3, no_repeat_ngram_size=1
        )
        == 0
    ).all()
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), parameters(SMALL))
    got, score = transformer.beam_search(SMALL, broken, [[1, 2]], beams=2, max_new_tokens=3)
    assert (got == -1).all() and jnp.isnan(score).all()
    two = dataclasses.replace(SMALL, vocab=2)  # of two tokens one may follow, and nothing after it
    got, score = transformer.beam_search(
        two, parameters(two), [[1]], beams=2, max_new_tokens=1, no_repeat_ngram_size=1
    )
    assert got.tolist() == [[[0], [-1]]] and np.isfinite(score[0, 0]) and score[0, 1] == -jnp.inf


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_with_64_bits_is_that_with_32(dtype):
    cfg = dataclasses.replace(SMALL, dtype=dtype)
    params, x = parameters(cfg), np.asarray(tokens(2, 3))
    how = {"max_new_tokens": 3, "no_repeat_ngram_size": 2}

    def ask(x):
        drawn = transformer.generate(
            cfg, params, x, key(0), sampling=Sampling(0.0), lengths=[3, 2], **how
        )
        return drawn, *transformer.beam_search(
            cfg, params, x, beams=2, stop=(5,), lengths=[3, 2], **how
        )

    narrow = jax.jit(ask)(x)
    with jax.enable_x64(True):
        wide = jax.jit(ask)(x.astype(np.int64))
        assert (
            transformer.generate(cfg, params, x, key(0), sampling=Sampling(0.7, 5, 0.9), **how) >= 0
        ).all()
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 if dtype == "float32" else 0.02)


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
        np.testing.assert_array_equal(
            np.isfinite(got), logits >= np.sort(logits)[-min(k, V)], err_msg=shape
        )


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


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [3, 256, 257, 5000])
def test_draws_have_their_probabilities_and_never_what_was_filtered(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.float32(2 * rng.normal(size=vocab))
    logits[rng.permutation(vocab)[: vocab // 3]] = -np.inf
    n = 20_000
    got = jax.jit(transformer.sampling.categorical)(
        jnp.broadcast_to(logits[None], (n, vocab)), key(1)
    )
    counts = np.bincount(got, minlength=vocab)
    assert len(counts) == vocab and not counts[np.isinf(logits)].any()
    due = n * special.softmax(logits.astype(np.float64))
    common = due >= 5
    rest = (counts[~common].sum() + 1e-9, due[~common].sum() + 1e-9)
    assert stats.chisquare([*counts[common], rest[0]], [*due[common], rest[1]]).pvalue > 1e-3


def test_a_draw_survives_the_largest_uniform_number(monkeypatch):
    """u < 1, but u times a sum may round up to the sum: tokens of probability 0 stay out all the same."""
    for u in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        monkeypatch.setattr(
            jax.random, "uniform", lambda key, shape, u=u: jnp.full(shape, u, jnp.float32)
        )
        for logits in ([-jnp.inf, 0.0, 1.0, -jnp.inf], [0.3, 0.1, 0.7, -jnp.inf]):
            [token] = transformer.sampling.categorical(jnp.array([logits]), key(0))
            assert np.isfinite(logits[int(token)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(1e-6), [2]),
        (Sampling(1e-37), [2]),
        (Sampling(1e-45), [2]),  # zero to the processor
        (Sampling(1e-300), [2]),
        (Sampling(1e300), [0, 1, 2, 4]),
        (Sampling(top_p=1e-50), [2]),
        (Sampling(top_p=1e-300, top_k=3), [2]),
        (Sampling(min_p=1.0), [2]),
        (Sampling(min_p=1e-300), [0, 1, 2, 4]),
        (Sampling(top_k=2**40), [0, 1, 2, 4]),
        (Sampling(np.float32(1e-6), np.int64(3), np.float32(0.9)), [2]),
    ],
)
def test_extreme_numbers_keep_a_distribution(sampling, left):
    for shift in (0.0, -900.0, 900.0):
        logits = jnp.array([[1.0, 0.0, 3.0, -jnp.inf, -2.0]]) + shift
        got = jax.jit(transformer.filter_logits)(logits, sampling)
        p = jax.nn.softmax(got)[0]
        assert np.flatnonzero(p).tolist() == left and not jnp.isnan(p).any()
        drawn = jax.jit(transformer.sample_token)(jnp.repeat(logits, 50, 0), key(0), sampling)
        assert set(drawn.tolist()) <= set(left)
    only = jnp.array([[-jnp.inf, -jnp.inf, 5.0]])
    assert transformer.sample_token(only, key(0), sampling).tolist() == [2]
    assert transformer.sample_token(only.astype(jnp.float16), key(0), sampling).tolist() == [2]
    huge = transformer.penalise(
        jnp.array([[0.0, 2.0, -2.0]]), jnp.ones((1, 3), bool), Sampling(repetition=1e300).repetition
    )
    assert not jnp.isnan(huge).any()


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_family_samples_n_rows_whatever_the_prompt():
    family = transformer.make(SMALL)
    state = jax.jit(family.init)(key(0))
    one, three = np.array([1, 2, 3]), tokens(3, 3)

    def shape(**options):
        return jax.eval_shape(partial(family.sample, **options), state, key(1)).shape

    for prompt in (one, one[None], one.tolist(), jnp.asarray(one), three):
        assert shape(n=3, prompt=prompt, max_new_tokens=4) == (3, 4)
    each = jax.jit(partial(family.sample, n=3, prompt=three, max_new_tokens=4))(
        state, key(1), sampling=Sampling(0.0)
    )
    generate = jax.jit(partial(transformer.generate, SMALL, max_new_tokens=4))
    np.testing.assert_array_equal(
        each, generate(state.params, three, key(1), sampling=Sampling(0.0))
    )
    assert shape(n=2) == (2, 23)
    assert shape(n=2, prompt=np.zeros(24, int)) == (2, 1)  # a full context
    assert shape(n=2, prompt=[1], max_length=5, no_repeat_ngram_size=1) == (2, 4)
    with pytest.raises(
        ValueError, match=r"a prompt is tokens .T., .1, T. or .n, T. with n = 2, got .3, 3."
    ):
        family.sample(state, key(1), n=2, prompt=three)


@pytest.mark.slow
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


GOLDEN = (
    Path(__file__).parent / "golden" / "gpt2"
)  # written by tests/golden/make_gpt2.py, with transformers


@pytest.mark.slow
def test_gpt2_gives_the_logits_of_transformers():
    cfg, params = transformer.load_gpt2(GOLDEN)
    golden = np.load(GOLDEN / "golden.npz")
    logits = jax.jit(partial(transformer.apply, cfg))(params, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=golden["greedy"].shape[1]))
    prompt = jnp.asarray(golden["tokens"][:, :4])
    got = generate(params, prompt, key(0), sampling=Sampling(0.0, stop=()))
    np.testing.assert_array_equal(got, golden["greedy"])
    assert cfg.eos == (60,) and 60 in golden["greedy"][1]  # by default it ends a text
    stopped = generate(params, prompt, key(0), sampling=Sampling(0.0))
    np.testing.assert_array_equal(
        stopped, np.where(np.arange(3)[:, None] == 1, 60, golden["greedy"])
    )


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
        (
            lambda f: change(f, activation_function="gelu"),
            "says activation_function = 'gelu'; only 'gelu_new'",
        ),
        (
            lambda f: change(f, vocab_size=70),
            r"wte.weight is \(\d+, 8\), config.json asks for \(70, 8\)",
        ),
        (lambda f: change(f, n_layer=3), "has no tensor h.2"),
        (lambda f: change(f, n_layer=1), "holds h.1.*, which a GPT-2 of 1 layers has not"),
        (
            lambda f: change(f, n_head=3),
            "does not describe a GPT-2 .*8 does not divide into 3 heads",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors$"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which is never opened",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
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


def rewrite(folder, change, **metadata):
    """The tensors of a folder after `change(tensors)`."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def renamed(name):
    return lambda tensors: {name(n): x for n, x in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        renamed(lambda n: f"_orig_mod.{n}"),
        renamed(lambda n: f"module._orig_mod.{n}"),
        renamed(lambda n: n.replace(".h.", ".h._orig_mod.").replace("transformer.", "gpt.", 1)),
        renamed(lambda n: n.removeprefix("transformer.")),
        renamed(lambda n: n.replace("transformer.wte.weight", "lm_head.weight")),
        renamed(lambda n: f"module.{n}".replace("transformer.wte.weight", "lm_head.weight")),
        lambda t: {
            **t,
            "lm_head.weight": t["transformer.wte.weight"],
            "transformer.h.0.attn.bias": np.ones(3, bool),
        },
        lambda t: {n: x.astype(np.float64) for n, x in t.items()},
    ],
)
def test_weights_are_read_under_the_names_that_pytorch_gives(folder, change):
    rewrite(folder, lambda t: change({n: x for n, x in t.items() if n != "lm_head.weight"}))
    cfg, params = transformer.load_gpt2(folder)
    jax.tree.map(np.testing.assert_array_equal, params, transformer.load_gpt2(GOLDEN)[1])
    shapes = jax.eval_shape(partial(transformer.init, cfg), key(0))
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read(folder, dtype):
    rewrite(folder, lambda t: {n: x.astype(jnp.dtype(dtype)) for n, x in t.items()})
    _, params = transformer.load_gpt2(folder)
    whole = transformer.load_gpt2(GOLDEN)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype).astype(jnp.float32)),
        params,
        whole,
    )


def as_dtype(folder, dtype, size):
    """A file of zeros, of `size` bytes each, whose header says another type."""
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    end = 0
    for tensor in header.values():
        begin, end = end, end + math.prod(tensor["shape"]) * size
        tensor |= {"dtype": dtype, "data_offsets": [begin, end]}
    said = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(said).to_bytes(8, "little") + said + bytes(end))


def index(folder, piece):
    (folder / "model.safetensors").rename(folder / "piece.safetensors")
    places = piece if isinstance(piece, dict) else {"weight_map": {"transformer.wte.weight": piece}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def generation(folder, said):
    (folder / "generation_config.json").write_text(said)


def without(folder, name):
    said = json.loads((folder / "config.json").read_text())
    del said[name]
    (folder / "config.json").write_text(json.dumps(said))


def nan(tensors):
    tensors["transformer.h.1.ln_1.bias"][0] = np.nan


def large(tensors):
    return {
        n: np.full(x.shape, 1e300) if n.endswith("ln_f.bias") else x for n, x in tensors.items()
    }


def other_head(tensors):
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: change(f, n_embd=8.0),
            "config.json says n_embd = 8.0; it must be a whole number from 1 to",
        ),
        (lambda f: change(f, n_layer="2"), "says n_layer = '2'; it must be a whole number"),
        (lambda f: change(f, n_layer=-2), "says n_layer = -2; it must be a whole number"),
        (lambda f: change(f, n_head=True), "says n_head = True; it must be a whole number"),
        (lambda f: change(f, n_inner=[4]), r"says n_inner = \[4\]; it must be a whole number"),
        (
            lambda f: change(f, vocab_size=10**13),
            "says vocab_size = 10000000000000; it must be a whole number",
        ),
        (
            lambda f: change(f, vocab_size=1e13),
            "says vocab_size = 10000000000000.0; it must be a whole number",
        ),
        (lambda f: change(f, vocab_size=2**31 - 1), "config.json asks for .2147483647, 8"),
        (lambda f: change(f, n_layer=10**9), "model.layers must be at most 1000, got 1000000000"),
        (lambda f: change(f, n_layer=900), "has no tensor h.2.ln_1.weight"),
        (
            lambda f: change(f, n_inner=10**9),
            r"h.0.mlp.c_fc.weight is \(8, 32\), config.json asks for \(8, 1000000000",
        ),
        (
            lambda f: change(f, layer_norm_epsilon=[1e-5]),
            "says layer_norm_epsilon = .1e-05.; only 1e-05",
        ),
        (lambda f: change(f, model_type=["x\ny" * 999]), "describes a .*; only gpt2"),
        (
            lambda f: change(f, eos_token_id="<|endoftext|>"),
            "eos_token_id = '<.endoftext.>'; it must be a whole",
        ),
        (
            lambda f: generation(f, '{"eos_token_id": -1}'),
            "generation_config.json says eos_token_id = -1",
        ),
        (lambda f: generation(f, "{"), "generation_config.json is damaged"),
        (
            lambda f: without(f, "n_positions"),
            "config.json does not describe a GPT-2: it has no n_positions",
        ),
        (lambda f: without(f, "model_type"), "describes a None; only gpt2"),
        (
            lambda f: (f / "config.json").write_text("[" * 10**5),
            "config.json is damaged .RecursionError",
        ),
        (
            lambda f: (f / "config.json").write_text('{"a":' * 10**5),
            "config.json is damaged .RecursionError",
        ),
        (
            lambda f: (f / "config.json").write_text("[]"),
            "config.json is damaged .*holds no named values but a",
        ),
        (
            lambda f: (f / "config.json").write_bytes(b'{"model_type": "gpt2\xff"}'),
            "config.json is damaged .Unicode",
        ),
        (lambda f: (f / "config.json").write_bytes(bytes(100)), "config.json is damaged"),
        (
            lambda f: as_dtype(f, "F8_E4M3", 1),
            ": transformer.*is F8_E4M3, where F32, F16, BF16, F64 are read",
        ),
        (lambda f: as_dtype(f, "F8_E5M2", 1), "is F8_E5M2, where F32"),
        (lambda f: as_dtype(f, "I8", 1), "is I8, where F32"),
        (lambda f: as_dtype(f, "BOOL", 1), "is BOOL, where F32"),
        (lambda f: as_dtype(f, "Q4_K", 1), "model.safetensors cannot be read"),
        (lambda f: rewrite(f, nan), "transformer.h.1.ln_1.bias holds NaN or infinity"),
        (lambda f: rewrite(f, large), "transformer.ln_f.bias holds NaN or infinity"),
        (lambda f: rewrite(f, other_head), "lm_head.weight is not wte.weight; only tied weights"),
        (
            lambda f: rewrite(f, lambda t: {**t, **renamed(lambda n: f"module.{n}")(t)}),
            "two tensors for",
        ),
        (
            lambda f: rewrite(f, lambda t: {**t, **renamed(lambda n: f"b.{n}")(t)}),
            "which a GPT-2 of 2|two tensors",
        ),
        (
            lambda f: index(f, "../piece.safetensors"),
            "index.json names '../piece.safetensors': pieces lie in",
        ),
        (
            lambda f: index(f, "/etc/passwd"),
            "index.json names '/etc/passwd': pieces lie in the folder itself",
        ),
        (
            lambda f: index(f, "gone.safetensors"),
            "has no 'gone.safetensors', which model.safetensors.index.json names",
        ),
        (
            lambda f: index(f, 3),
            "index.json is damaged: its weight_map must name a file for each tensor",
        ),
        (
            lambda f: index(f, {"weight_map": [1]}),
            "index.json is damaged: its weight_map must name a file",
        ),
        (lambda f: index(f, {}), "index.json is damaged: its weight_map must name a file"),
    ],
)
def test_malformed_weights_are_refused_in_one_line(folder, spoil, words):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        transformer.load_gpt2(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_every_bit_of_a_header_may_be_wrong(folder):
    """Whatever a byte of the files' first part becomes: the model, or one line."""
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(60):
            spoilt = bytearray(whole)
            spoilt[rng.integers(min(len(whole), 3000))] = rng.integers(256)
            (folder / name).write_bytes(spoilt)
            try:
                transformer.load_gpt2(folder)
            except (ValueError, FileNotFoundError) as e:
                assert "\n" not in str(e)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("config", "generation_config", "eos", "bos"),
    [
        ({"eos_token_id": 5, "bos_token_id": 4}, None, (5,), 4),
        ({"eos_token_id": [5, 6], "bos_token_id": None}, None, (5, 6), None),
        ({"eos_token_id": None, "bos_token_id": None}, None, None, None),
        ({"eos_token_id": 5}, {"eos_token_id": 7, "bos_token_id": 8}, (7,), 8),
        ({"eos_token_id": 5}, {}, None, None),  # as transformers: the file decides alone
        ({"eos_token_id": 50256}, None, (50256,), 60),
    ],
)
def test_eos_and_bos_are_read_and_written(folder, config, generation_config, eos, bos):
    change(folder, **config)
    if generation_config is not None:
        generation(folder, json.dumps(generation_config))
    cfg, params = transformer.load_gpt2(folder)
    assert (cfg.eos, cfg.bos) == (eos, bos)
    transformer.save_gpt2(folder / "copy", cfg, params)
    assert transformer.load_gpt2(folder / "copy")[0] == cfg
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / "copy" / name).read_text())["eos_token_id"]
        assert said == (eos[0] if eos and len(eos) == 1 else eos and list(eos))


def test_a_model_of_gpt2s_vocabulary_ends_with_its_token(tmp_path):
    cfg = Config(context=2, layers=1, heads=1, width=1)
    params = jax.tree.map(
        lambda s: np.zeros(s.shape, np.float32),
        jax.eval_shape(partial(transformer.init, cfg), key(0)),
    )
    transformer.save_gpt2(tmp_path, cfg, params)
    assert transformer.load_gpt2(tmp_path)[0].eos == (50256,)
    transformer.save_gpt2(tmp_path, dataclasses.replace(cfg, eos=(3,), bos=2), params)
    cfg, _ = transformer.load_gpt2(tmp_path)
    assert (cfg.eos, cfg.bos) == ((3,), 2)


def test_parameters_of_another_model_are_not_written(tmp_path):
    for change, words in (
        (
            {"layers": 3},
            "params do not fit this Config: blocks_2.norm_attention.scale is missing, not .8,.",
        ),
        ({"layers": 1}, "params do not fit this Config: it has no blocks_1"),
        (
            {"vocab": 12},
            r"params do not fit this Config: wte.embedding is \(11, 8\), not \(12, 8\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            transformer.save_gpt2(
                tmp_path / "a", dataclasses.replace(SMALL, **change), parameters(SMALL)
            )
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 900, 30_000])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, room):
    """In a process whose files may not grow past `room` bytes: a new folder is not made, an old one stays whole."""
    code = (
        "import resource, signal, sys\n"
        "from aigc_jax import transformer\n"
        "cfg, params = transformer.load_gpt2(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "for folder in sys.argv[2:3] + [sys.argv[1]]:\n"
        "    try:\n"
        "        transformer.save_gpt2(folder, cfg, params)\n"
        "        print('wrote')\n"
        "    except OSError as e:\n"
        "        print(e)\n"
    )
    old = tmp_path / "old"
    transformer.save_gpt2(old, *transformer.load_gpt2(GOLDEN))
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(old), str(tmp_path / "new"), str(room)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    if room < 30_000:
        assert all(
            "cannot be written" in line and "nothing was changed" in line for line in lines
        ), lines
        assert not (tmp_path / "new").exists()
    else:
        assert lines == ["wrote", "wrote"] and transformer.load_gpt2(tmp_path / "new")
