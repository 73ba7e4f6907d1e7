"""The scripts of contrastive models: their exact parts, and both at scale smoke."""

import dataclasses
from math import log

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from aigc_jax import contrastive, data
from aigc_jax.data import captions, emoji
from experiments import _cli, contrastive_exact, emoji_clip


@pytest.mark.parametrize("information, dim", [(0.5, 1), (4.0, 20), (8.0, 3)])
def test_pairs_have_the_mutual_information_that_was_asked_for(information, dim):
    rho = contrastive_exact.correlation(information, dim)
    assert -dim / 2 * log(1 - rho**2) == pytest.approx(information)
    options = {"information": information, "dim": dim}
    points = contrastive_exact.draw(np.random.default_rng(0), 40_000, **options)
    x, y = np.split(points, 2, 1)
    np.testing.assert_allclose((x * y).mean(0), rho, atol=0.03)
    np.testing.assert_allclose(points.std(0), 1, atol=0.03)


def test_best_critic_is_the_ratio_of_densities():
    d, information = 3, 2.0
    rho = contrastive_exact.correlation(information, d)
    points = contrastive_exact.draw(np.random.default_rng(0), 6, information=information, dim=d)
    covariance = np.block([[np.eye(d), rho * np.eye(d)], [rho * np.eye(d), np.eye(d)]])
    both, alone = multivariate_normal(cov=covariance), multivariate_normal(cov=np.eye(d))
    with jax.enable_x64(True):
        critic = contrastive_exact.best_critic(jax.numpy.asarray(points), information)
    for i in range(6):
        for j in range(6):
            x, y = points[i, :d], points[j, d:]
            ratio = both.logpdf(np.concatenate([x, y])) - alone.logpdf(x) - alone.logpdf(y)
            assert float(critic[i, j]) == pytest.approx(ratio, abs=1e-9)


def test_classes_of_emoji_are_told_in_known_words():
    tones, train = emoji_clip.tone_captions(), emoji.examples("train")
    info = data.load("emoji").info
    assert len(tones) == 5 and len({len(names) for names in tones}) == 1
    for texts, tone in zip(tones, emoji.TONES, strict=True):
        assert len(set(texts)) == len(texts) > 100
        assert all(text.endswith(f", {tone} skin tone") for text in texts)
        captions.encode(info.tokenizer, texts, info.caption_length)  # raises for an unknown word
    assert [text.rpartition(",")[0] for text in tones[0]] == [
        t.rpartition(",")[0] for t in tones[4]
    ]
    categories = emoji_clip.category_captions()
    assert sum(map(len, categories)) == len(train) and min(map(len, categories)) > 0


@pytest.mark.slow
def test_text_of_a_class_is_the_mean_of_its_captions():
    cfg = emoji_clip.SMOKE.model
    params = jax.jit(contrastive.make(cfg).init)(jax.random.key(0)).params
    tokenizer = data.load("emoji").info.tokenizer
    classes = [["thumbs up", "waving hand", "grinning face"], ["thumbs up, dark skin tone"]]
    found = emoji_clip.class_texts(cfg, params, tokenizer, classes)
    for vector, texts in zip(found, classes, strict=True):
        tokens = captions.encode(tokenizer, texts, cfg.text.context)
        mean = np.asarray(contrastive.encode_text(cfg, params, tokens)).mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_the_exact_bounds_are_those_of_20_dimensions_alone(tmp_path, monkeypatch):
    """Other dimensions have another bound: they get neither the oracle nor the criterion."""
    monkeypatch.setattr(contrastive_exact, "bound_of_trained", lambda *_: 1.0)
    monkeypatch.setattr(contrastive_exact, "plot", lambda *_: None)
    setup = dataclasses.replace(contrastive_exact.SMOKE, batches=(16,), examples=1600)
    for dim in (20, 3):
        model = dataclasses.replace(setup.model, dim=dim)
        row = contrastive_exact.run(dataclasses.replace(setup, model=model), tmp_path)[0]
        assert row.oracle == (2.308 if dim == 20 else None)
        assert (row.quantity in contrastive_exact.CRITERIA) == (dim == 20)
        assert dim != 20 or abs(row.ours - 2.308) < 0.2


def test_losses_that_do_not_exist_are_refused():
    for wrong in ((), ("triplet",), ("sigmoid", "sigmoid")):
        with pytest.raises(ValueError, match="losses must hold one or more of info_nce, sigmoid"):
            dataclasses.replace(emoji_clip.SMOKE, losses=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("script", [contrastive_exact, emoji_clip])
def test_scripts_meet_their_invariants_at_scale_smoke(script, tmp_path):
    setup = script.SCALES["smoke"].setup
    run = dataclasses.replace(setup.run, devices=1, folder=str(tmp_path))
    found, failed = _cli.measured(script, dataclasses.replace(setup, run=run), tmp_path)
    assert failed is None
    verdicts = {row.quantity: _cli.verdict(row, script.INVARIANTS) for row in found}
    assert all(verdicts[name].startswith("met") for name in script.INVARIANTS), verdicts
    assert not [words for words in verdicts.values() if words.startswith("not measured")]
    assert (tmp_path / f"{script.__name__.rpartition('.')[2]}.png").stat().st_size > 5000
