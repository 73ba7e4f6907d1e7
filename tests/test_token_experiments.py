"""The scripts of token diffusion and of early language models: exact parts, and both at scale smoke."""

import collections
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import ddpm, train
from experiments import _cli, language_models, markov_text, tang_poems, text_diffusion


@pytest.mark.parametrize("process", markov_text.PROCESSES)
def test_messages_give_the_posterior(process):
    L, V = 4, markov_text.V
    texts, p = markov_text.all_texts(L)
    rng = np.random.default_rng(0)
    t = jnp.asarray(rng.uniform(0.1, 0.9, 20), jnp.float32)
    x_t = texts[rng.integers(0, len(texts), 20)]
    if process == "absorbing":
        x_t = np.where(rng.random(x_t.shape) < 0.5, V, x_t)
    with jax.numpy_rank_promotion("allow"):
        found = np.exp(markov_text.exact_logits(process, jnp.asarray(x_t), t))
    a = 1 - np.asarray(t)[:, None, None]
    same = x_t[:, None] == texts[None]
    q = same * a + (1 - a) / V if process == "uniform" else np.where(x_t[:, None] == V, 1, same)
    joint = p * q.prod(-1)
    wanted = np.einsum("bn,nlv->blv", joint / joint.sum(1, keepdims=True), np.eye(V)[texts])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_exact_bounds_of_a_chain_of_two():
    """One step: two marginal entropies. Two steps: the second symbol is half seen."""
    with jax.numpy_rank_promotion("allow"):
        (one, two), limit = markov_text.exact_bounds(2, (1, 2))
    _, p = markov_text.all_texts(2)
    joint = p.reshape(3, 3)
    first, second, both = map(markov_text.entropy, (joint.sum(1), joint.sum(0), p))
    np.testing.assert_allclose([one, limit], [first + second, both], rtol=1e-12)
    information = first + second - both
    np.testing.assert_allclose(two, first + second - information / 2, rtol=1e-12)


def test_distance_of_texts_from_their_own_law():
    setup = markov_text.SCALES["smoke"].setup
    far, p_value = markov_text.distance(markov_text.texts_of(setup, 0), 4)
    assert far < 10 and p_value > 1e-3
    far, p_value = markov_text.distance(np.zeros((4000, 4), int), 4)
    assert far > 80 and p_value < 1e-9


def costs_of_a_chain(L: int) -> np.ndarray:
    """The mean cross entropy per masked symbol with k masks, of the exact posterior."""
    texts, p = markov_text.all_texts(L)
    found = np.zeros(L)
    for k in range(1, L + 1):
        for places in itertools.combinations(range(L), k):
            left = [i for i in range(L) if i not in places]
            for i in places:  # H(symbol i | the symbols that are left)
                groups = texts[:, left] @ 3 ** np.arange(len(left))
                both = np.bincount(groups * 3 + texts[:, i], p)
                seen = np.bincount(groups, p)
                found[k - 1] += sum(
                    -(x[x > 0] * np.log(x[x > 0])).sum() * sign
                    for x, sign in ((both, 1), (seen, -1))
                )
        found[k - 1] /= k * math.comb(L, k)
    return found


def test_the_bound_follows_from_the_costs_of_masks():
    steps, cost = (1, 2, 5, 64), costs_of_a_chain(4)
    with jax.numpy_rank_promotion("allow"):
        exact, limit = markov_text.exact_bounds(4, steps)
    found = [text_diffusion.bound_of_masks(cost, T, "linear") for T in steps]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_allclose(text_diffusion.bound_of_masks(cost, None, "linear"), limit)
    for schedule in ("linear", "cosine"):
        one, many = (text_diffusion.bound_of_masks(cost, T, schedule) for T in (1, 20_000))
        np.testing.assert_allclose(one, exact[0], rtol=1e-6)
        np.testing.assert_allclose(many, limit, rtol=1e-4)


def test_costs_of_masks_are_those_of_the_network(monkeypatch):
    """With the exact posterior they add up to the entropy of a text whose first symbol is given."""

    def exact(cfg, params):
        return lambda x_t, t: markov_text.exact_logits("absorbing", x_t, t)

    monkeypatch.setattr(text_diffusion, "token_logits_fn", exact)
    monkeypatch.setattr(text_diffusion._cli, "weights", lambda result: None)
    L = 5
    every, p = markov_text.all_texts(L)
    texts = every[np.random.default_rng(0).choice(len(p), 20_000, p=p)].astype(np.int32)
    cfg = ddpm.TokenConfig(vocab=3, context=L)
    with jax.numpy_rank_promotion("allow"):
        cost = text_diffusion.cost_of_masks(train.Result(None, None, cfg, None, None), texts)
    wanted = markov_text.entropy(p) - markov_text.entropy(markov_text.START)
    assert len(cost) == L - 1 and abs(cost.sum() - wanted) < 0.03
    assert (np.diff(cost) > 0).all()  # the more masks, the less is known


def test_gaps_are_scored_with_and_without_what_follows(monkeypatch):
    seen = []

    def zeros(cfg, params):
        def fn(x_t, t):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t)
            return jnp.zeros((*x_t.shape, 4))

        return fn

    monkeypatch.setattr(text_diffusion, "token_logits_fn", zeros)
    monkeypatch.setattr(text_diffusion._cli, "weights", lambda result: None)
    setup = replace(text_diffusion.SCALES["smoke"].setup, gap=3)
    texts = np.random.default_rng(0).integers(0, 4, (500, 10)).astype(np.int32)
    gap = text_diffusion.gap_of(setup, texts)
    np.testing.assert_array_equal(gap[0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    result = train.Result(None, None, ddpm.TokenConfig(vocab=4, context=10), None, None)
    for right in (True, False):
        seen.clear()
        bits = text_diffusion.gap_bits(result, texts, gap, right)
        jax.effects_barrier()
        assert abs(bits - 2) < 0.1  # four equally probable characters
        x_t = np.stack(seen)
        np.testing.assert_array_equal(
            x_t[..., :3], np.broadcast_to(texts[:, :3], x_t[..., :3].shape)
        )
        after = x_t[..., 6:]
        assert (after == texts[:, 6:]).all() if right else (after == 4).all()


def test_poems_are_judged_beside_poems_of_the_same_forms():
    long, short = "一二三四五，" * 4, "一二三四五六七，" * 4
    forms = collections.Counter({"5x4": 3, "7x4": 1})
    found = tang_poems.share_in_forms(lambda body: body == long, [long, short, short], forms)
    assert found == 75
    assert tang_poems.share_in_forms(lambda body: True, [long], forms) is None  # no 7x4
    assert tang_poems.share_in_forms(lambda body: True, [long], collections.Counter()) is None


def test_a_copy_is_found_by_its_phrases():
    poem, other = "一二三四五，六七八九十。", "甲乙丙丁戊，子丑寅卯辰。"
    mixed = "一二三四五，子丑寅卯辰。"  # half of it from each
    one_new = "一二三四土，六七八九十。"
    found = tang_poems.from_one_poem([poem, mixed, one_new, "天地玄黄", ""], [poem, other])
    assert found == [100, 50, 75, 0, 0]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(markov_text, marks=pytest.mark.slow),
        pytest.param(language_models, marks=pytest.mark.soak),
        pytest.param(text_diffusion, marks=pytest.mark.soak),
        pytest.param(tang_poems, marks=pytest.mark.slow),
    ],
)
def test_scripts_meet_their_invariants_at_scale_smoke(script, tmp_path):
    setup = script.SCALES["smoke"].setup
    setup = replace(setup, run=replace(setup.run, devices=1, folder=str(tmp_path)))
    with jax.numpy_rank_promotion("allow"):
        found, failed = _cli.measured(script, setup, tmp_path)
    assert failed is None
    verdicts = {row.quantity: _cli.verdict(row, script.INVARIANTS) for row in found}
    assert all(verdicts[name].startswith("met") for name in script.INVARIANTS), verdicts
    assert (tmp_path / f"{script.__name__.rpartition('.')[2]}.png").stat().st_size > 5000
