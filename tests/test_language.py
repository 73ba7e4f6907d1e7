"""n-grams against a count by definition; windows and states against their equations."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import language
from aigc_jax.language import ngrams

V = 4
TEXT = np.random.default_rng(0).choice(V, 300, p=[0.4, 0.3, 0.2, 0.1])


def by_definition(text, order, context, word):
    """Kneser-Ney from the formula, on tuples."""
    grams = {
        k: collections.Counter(tuple(text[i : i + k]) for i in range(len(text) - k + 1))
        for k in range(1, order + 1)
    }
    counts = {order: grams[order]}
    for k in range(1, order):
        counts[k] = collections.Counter(gram[1:] for gram in grams[k + 1])

    def p(k, context, word):
        if k == 0:
            return 1 / V
        lower = p(k - 1, context[1:], word)
        c = counts[k]
        following = [c[(*context, w)] for w in range(V)]
        if not sum(following):
            return lower
        once, twice = (sum(v == r for v in c.values()) for r in (1, 2))
        D = once / (once + 2 * twice) if once and twice else 0.5
        kinds = sum(v > 0 for v in following)
        return (max(c[(*context, word)] - D, 0) + D * kinds * lower) / sum(following)

    return p(order, tuple(context), word)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_formula(order):
    model = ngrams.kneser_ney(TEXT, order=order, vocab=V)
    contexts = np.array(list(itertools.product(range(V), repeat=order - 1)), int)
    contexts = contexts.reshape(V ** (order - 1), order - 1)
    found = ngrams.probabilities(model, contexts)
    wanted = [[by_definition(TEXT, order, c, w) for w in range(V)] for c in contexts]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    assert (found > 0).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("text", [[0, 0, 1, 1, 0], [0, 1, 0, 2]])
def test_a_token_that_was_never_seen_is_possible(text, order):
    """No 1-gram occurs once in the first text, and none of two tokens twice in the second."""
    p = ngrams.probabilities(
        ngrams.kneser_ney(np.array(text), order=order, vocab=4), np.zeros((1, order - 1), int)
    )
    assert (p > 0).all() and (p[0, 3] < p[0, :2]).all()


@pytest.mark.parametrize("order", [1, 3])
def test_log_probs_are_those_of_the_contexts(order):
    model = ngrams.kneser_ney(TEXT, order=order, vocab=V)
    new = np.random.default_rng(1).integers(0, V, 40)
    found = ngrams.log_probs(model, new)
    for i in range(len(new)):
        context = new[max(0, i - order + 1) : i]
        p = ngrams.probabilities(model, context[None])[0, new[i]]
        np.testing.assert_allclose(found[i], np.log(p), rtol=1e-10)


def test_log_probs_of_contexts_that_were_never_seen():
    model = ngrams.kneser_ney(np.array([0, 1, 0, 1, 2, 0]), order=3, vocab=V)
    found = np.exp(ngrams.log_probs(model, np.array([3, 3, 0, 1])))
    assert (found > 0).all()
    np.testing.assert_allclose(found[2], ngrams.probabilities(model, np.zeros((1, 0), int))[0, 0])


def test_samples_have_the_models_rates():
    model = ngrams.kneser_ney(TEXT, order=2, vocab=V)
    drawn = ngrams.sample_ngrams(model, np.random.default_rng(0), n=20_000, length=2, prompt=[1])
    first = ngrams.probabilities(model, np.array([[1]]))[0]
    share = np.bincount(drawn[:, 0], minlength=V) / len(drawn)
    np.testing.assert_allclose(share, first, atol=4 * 0.5 / np.sqrt(len(drawn)))
    after = drawn[drawn[:, 0] == 2, 1]
    second = ngrams.probabilities(model, np.array([[2]]))[0]
    share = np.bincount(after, minlength=V) / len(after)
    np.testing.assert_allclose(share, second, atol=4 * 0.5 / np.sqrt(len(after)))


def test_ngrams_refuse_what_they_cannot_count():
    for tokens, order, words in (
        (np.zeros(3), 2, "tokens must be whole numbers"),
        (np.zeros((3, 2), int), 2, "tokens must be whole numbers"),
        (np.array([0, 1]), 3, "order must lie in 1..2, the length of the text, got 3"),
        (np.array([0, 9]), 2, "tokens must lie in 0..3, got 0..9"),
    ):
        with pytest.raises(ValueError, match=words):
            ngrams.kneser_ney(tokens, order=order, vocab=V)


# --------------------------------------------------------------------------------- networks


def model(kind, **options):
    cfg = language.Config(kind=kind, vocab=V, embedding=3, width=5, **options)
    params = language.init(cfg, jax.random.key(0))
    return cfg, params


@pytest.mark.slow
def test_nplm_is_its_equation():
    cfg, params = model("nplm", order=3)
    tokens = np.array([[2, 0, 1, 3]])
    logits, memory = language.apply(cfg, params, tokens)
    C = np.asarray(params["wte"]["embedding"])
    for t in range(4):
        seen = ([V, V, *tokens[0]])[t + 1 : t + 3]  # V: nothing
        x = np.concatenate([C[i] for i in seen])
        d, H = (np.asarray(params["layer0"][name]) for name in ("bias", "kernel"))
        b, U = (np.asarray(params["head"][name]) for name in ("bias", "kernel"))
        W = np.asarray(params["straight"]["kernel"])
        np.testing.assert_allclose(logits[0, t], b + x @ W + np.tanh(d + x @ H) @ U, atol=1e-5)
    np.testing.assert_array_equal(memory, [[1, 3]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lstm_is_its_equations():
    cfg, params = model("lstm")
    tokens = np.array([[2, 0, 1, 3]])
    logits, [(c_T, h_T)] = language.apply(cfg, params, tokens)
    p = jax.tree.map(np.asarray, params)
    cell = p["layer0"]
    c = h = np.zeros(5)
    for t, x in enumerate(p["wte"]["embedding"][tokens[0]]):
        gates = {
            g: x @ cell[f"i{g}"]["kernel"] + h @ cell[f"h{g}"]["kernel"] + cell[f"h{g}"]["bias"]
            for g in "ifgo"
        }
        c = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
        h = sigmoid(gates["o"]) * np.tanh(c)
        np.testing.assert_allclose(
            logits[0, t], h @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5
        )
    np.testing.assert_allclose(c_T[0], c, atol=1e-5)
    np.testing.assert_allclose(h_T[0], h, atol=1e-5)


def test_forget_gates_begin_open():
    _, params = model("lstm", layers=2)
    for layer in ("layer0", "layer1"):
        for gate in "ifgo":
            np.testing.assert_array_equal(params[layer][f"h{gate}"]["bias"], float(gate == "f"))


def test_gru_is_its_equations():
    cfg, params = model("gru")
    params = jax.tree.map(lambda x: x + 0.1, params)
    tokens = np.array([[2, 0, 1, 3]])
    logits, [h_T] = language.apply(cfg, params, tokens)
    p = jax.tree.map(np.asarray, params)
    cell, h = p["layer0"], np.zeros(5)
    for t, x in enumerate(p["wte"]["embedding"][tokens[0]]):
        new = {g: x @ cell[f"i{g}"]["kernel"] + cell[f"i{g}"]["bias"] for g in "rzn"}
        old = {g: h @ cell[f"h{g}"]["kernel"] for g in "rzn"}
        r, z = (sigmoid(new[g] + old[g]) for g in "rz")
        n = np.tanh(new["n"] + r * (old["n"] + cell["hn"]["bias"]))
        h = (1 - z) * n + z * h
        np.testing.assert_allclose(
            logits[0, t], h @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5
        )
    np.testing.assert_allclose(h_T[0], h, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nplm", "lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_memory_carries_a_text_on(kind, layers):
    cfg, params = model(kind, layers=layers)
    tokens = jnp.array([[2, 0, 1, 3, 3, 0], [1, 1, 2, 0, 3, 2]])
    whole, _ = language.apply(cfg, params, tokens)
    first, memory = language.apply(cfg, params, tokens[:, :2])
    rest, _ = language.apply(cfg, params, tokens[:, 2:], memory)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nplm", "lstm", "gru"])
def test_samples_have_the_models_rates_and_continue_a_prompt(kind):
    cfg, params = model(kind)
    family = language.make(cfg)
    state = family.init(jax.random.key(1))
    state = state._replace(params=jax.tree.map(lambda x: 3 * x, state.params))
    n = 20_000
    drawn = jax.jit(lambda key: family.sample(state, key, n=n, prompt=[2, 1], max_new_tokens=2))(
        jax.random.key(0)
    )
    assert drawn.shape == (n, 2) and drawn.dtype == jnp.int32
    for token in range(V):
        rows = drawn[drawn[:, 0] == token]
        text = jnp.array([[2, 1, token]])
        p = jax.nn.softmax(language.apply(cfg, state.params, text)[0][0])
        share = np.bincount(rows[:, 1], minlength=V) / max(1, len(rows))
        if len(rows):
            np.testing.assert_allclose(share, p[2], atol=4 * 0.5 / np.sqrt(len(rows)))
        np.testing.assert_allclose(len(rows) / n, p[1, token], atol=4 * 0.5 / np.sqrt(n))
    greedy = family.sample(state, jax.random.key(0), n=2, max_new_tokens=3, temperature=0.0)
    assert (greedy[0] == greedy[1]).all()
    with pytest.raises(ValueError, match="a prompt is tokens"):
        family.sample(state, jax.random.key(0), n=2, prompt=jnp.zeros((3, 1), jnp.int32))


def test_configs_refuse():
    for options, words in (
        ({"order": 1}, "model.order must be at least 2"),
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            language.Config(**options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nplm", "lstm", "gru"])
def test_bfloat16_is_float32_up_to_rounding(kind):
    """Parameters, memory and logits are float32; the gradient points the same way."""
    whole = language.Config(kind, vocab=7, embedding=8, width=16, layers=2)
    half = language.Config(kind, vocab=7, embedding=8, width=16, layers=2, dtype="bfloat16")
    params = language.init(whole, jax.random.key(0))
    same = jax.tree.map(
        lambda a, b: a.shape == b.shape and b.dtype == jnp.float32,
        params,
        language.init(half, jax.random.key(0)),
    )
    assert all(jax.tree.leaves(same))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 7)
    (a, _), (b, memory) = (language.apply(cfg, params, tokens) for cfg in (whole, half))
    assert b.dtype == jnp.float32 and 0 < float(jnp.abs(a - b).max()) < 0.02
    floats = [x for x in jax.tree.leaves(memory) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)
    grads = [
        jnp.concatenate(
            [
                g.ravel()
                for g in jax.tree.leaves(
                    jax.grad(lambda p, c=cfg: language.nll(c, p, tokens).mean())(params)
                )
            ]
        )
        for cfg in (whole, half)
    ]
    cosine = grads[0] @ grads[1] / (jnp.linalg.norm(grads[0]) * jnp.linalg.norm(grads[1]))
    assert float(cosine) > 0.999
    state = language.make(half).init(jax.random.key(0))
    drawn = language.sample(half, state, jax.random.key(2), n=2, max_new_tokens=4)
    assert drawn.shape == (2, 4)
