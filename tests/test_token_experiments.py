"""The scripts of token diffusion and of early language models: exact parts, and both at scale smoke."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("script", [markov_text, language_models, text_diffusion, tang_poems])
def test_scripts_meet_their_invariants_at_scale_smoke(script, tmp_path):
    setup = script.SCALES["smoke"].setup
    setup = replace(setup, run=replace(setup.run, devices=1, folder=str(tmp_path)))
    with jax.numpy_rank_promotion("allow"):
        found, failed = _cli.measured(script, setup, tmp_path)
    assert failed is None
    verdicts = {row.quantity: _cli.verdict(row, script.INVARIANTS) for row in found}
    assert all(verdicts[name].startswith("met") for name in script.INVARIANTS), verdicts
    assert (tmp_path / f"{script.__name__.rpartition('.')[2]}.png").stat().st_size > 5000
