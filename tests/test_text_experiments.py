"""The transformer's scripts at their smallest: yardsticks against brute force, measures against what they must see."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import data, train, transformer
from aigc_jax.data import music
from experiments import (
    _cli,
    _text,
    decoding,
    finetune,
    gpt2,
    grokking,
    in_context_regression,
    induction_heads,
    jsb_chorales,
    shakespeare_char,
)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_counted(n):
    rng = np.random.default_rng(n)
    training, valid = rng.integers(0, 4, 300), rng.integers(0, 5, 60)
    whole = Counter(tuple(training[i : i + n]) for i in range(len(training) - n + 1))
    context = Counter()
    for gram, count in whole.items():
        context[gram[:-1]] += count

    def nats(alpha):
        places = range(n - 1, len(valid))
        grams = [tuple(valid[i - n + 1 : i + 1]) for i in places]
        return np.mean(
            [-math.log((whole[g] + alpha) / (context[g[:-1]] + 5 * alpha)) for g in grams]
        )

    assert abs(_text.ngram_nats(training, valid, n, 5) - min(map(nats, _text.ALPHAS))) < 1e-9


def test_repetition_is_a_phrase_said_again_at_the_end():
    assert decoding.repeats([1, 2, 3, 9, 4, 5, 6, 4, 5, 6]) and decoding.repeats(
        [7, 4, 5, 6, 4, 5, 6, 4, 5, 6]
    )
    assert not decoding.repeats([4, 5, 6, 4, 5, 6, 1]) and not decoding.repeats([1, 2, 3, 4, 5, 6])
    assert not decoding.repeats([5] * 2 + [1, 7, 7]) and decoding.repeats([1, 2] + [7] * 60)
    assert not decoding.repeats([1, 2, 3, 8, 4, 4])  # two of one token are no phrase
    assert not decoding.repeats([9, *[1, 2] * 3])  # nor three of two
    assert not decoding.repeats([9, *[4] * 50]) and decoding.repeats([9, *[4] * 51])
    assert not decoding.repeats(
        [9, *[1, 2, 2] * 2]
    )  # "2" and "1 2 2" are said twice: the shorter decides


def test_self_bleu_of_equal_and_of_different_texts():
    words = "a b c d e f g h".split()
    np.testing.assert_allclose(decoding.self_bleu([words, words, words]), 1.0)
    apart = decoding.self_bleu([words, [w.upper() for w in words]])
    np.testing.assert_allclose(apart, math.exp(sum(math.log(0.1 / n) for n in (8, 7, 6, 5)) / 4))
    # Clipped counts and the brevity penalty, by hand: "a a b" against "a b c c c".
    pair = [["a", "a", "b"], ["a", "b", "c", "c", "c"]]
    first = math.exp(
        (math.log(2 / 3) + math.log(1 / 2) + math.log(0.1 / 1) + math.log(0.1 / 1)) / 4 + 1 - 5 / 3
    )
    second = math.exp(
        (math.log(2 / 5) + math.log(1 / 4) + math.log(0.1 / 3) + math.log(0.1 / 2)) / 4
    )
    np.testing.assert_allclose(decoding.self_bleu(pair), (first + second) / 2)


def test_zipfs_exponent_of_a_power_law():
    words = [f"w{r}" for r in range(1, 40) for _ in range(round(10_000 / r**1.2))]
    np.testing.assert_allclose(decoding.zipf([words]), 1.2, atol=0.01)


def test_equations_are_right_and_split_without_overlap():
    seen, others = grokking.equations(0.3)
    both = [part.resident[0]["tokens"] for part in (seen, others)]
    assert len(both[0]) == round(0.3 * 97**2) and sum(map(len, both)) == 97**2
    assert len({tuple(row) for rows in both for row in rows.tolist()}) == 97**2
    rows = np.concatenate(both)
    np.testing.assert_array_equal((rows[:, 0] + rows[:, 2]) % 97, rows[:, 4])
    assert (rows[:, 1] == 97).all() and (rows[:, 3] == 98).all()
    batch = seen.batch(0, 0, 4)
    np.testing.assert_array_equal(batch["mask"], np.tile([0, 0, 0, 1], (4, 1)))


@pytest.mark.slow
def test_predictions_come_before_their_answers():
    """Through gradients: prediction k feels y_1 .. y_(k-1) and x_1 .. x_k, and nothing later."""
    cfg = in_context_regression.Config(
        replace(in_context_regression.NET, layers=1, width=8), dim=3, points=4
    )
    params = jax.jit(in_context_regression.make_regression(cfg).init)(jax.random.key(0)).params
    params = jax.tree.map(lambda p: p + 0.3, params)
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 4, 3), (1, 4)))
    by_x, by_y = jax.jit(
        jax.jacrev(lambda x, y: in_context_regression.predict(cfg, params, x, y)[0], (0, 1))
    )(x, y)
    reach_x, reach_y = np.abs(by_x[:, 0]).max(-1) > 0, np.asarray(by_y[:, 0]) != 0
    np.testing.assert_array_equal(reach_x, np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(reach_y, np.tril(np.ones((4, 4), bool), -1))


def test_baselines_of_regression_are_what_they_say():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4000, 11, 5)), rng.normal(size=(4000, 5))
    y = np.einsum("bnd,bd->bn", x, w)
    for k in (0, 2, 5, 8):
        risk = (
            (in_context_regression.least_squares(x[:, :k], y[:, :k], x[:, k]) - y[:, k]) ** 2
        ).mean() / 5
        assert abs(risk - max(5 - k, 0) / 5) < 0.06
    near = in_context_regression.neighbours(x[:, :6], y[:, :6], x[:, 6])
    best = np.argsort(np.linalg.norm(x[7, :6] - x[7, 6], axis=-1))[:3]
    np.testing.assert_allclose(near[7], y[7, best].mean())
    np.testing.assert_allclose(
        in_context_regression.averaging(x[:, :6], y[:, :6], x[:, 6])[7],
        np.mean(y[7, :6, None] * x[7, :6], 0) @ x[7, 6],
    )


@pytest.mark.slow
def test_induction_is_seen_where_it_is(monkeypatch):
    """A model whose only head looks where induction heads look scores 1, one that looks at itself 0."""
    cfg = induction_heads.MODEL
    state = jax.jit(transformer.make(cfg).init)(jax.random.key(0))
    T = 4 * induction_heads.SEGMENT + 1

    def weights(of):
        w = np.zeros((T, T), np.float32)
        for t in range(T):
            w[t, of(t)] = 1
        return lambda cfg, params, tokens: jnp.asarray(w)[None, None, None]

    for of, score in (
        (lambda t: t - induction_heads.SEGMENT + 1 if t > induction_heads.SEGMENT else 0, 1.0),
        (lambda t: t, 0.0),
        (lambda t: max(t - induction_heads.SEGMENT, 0), 0.0),
    ):
        monkeypatch.setattr(transformer, "attention", weights(of))
        found = induction_heads.scores(cfg)(None, state, 0)
        np.testing.assert_allclose(found["prefix_matching"], score)
        assert abs(float(found["first_copy_nats"]) - math.log(65)) < 0.2


def test_sequences_repeat_or_follow_the_chain():
    x = induction_heads.sequences().batch(0, 0, 64)["tokens"]
    assert x.shape == (64, induction_heads.LENGTH + 1) and (x[:, 0] == induction_heads.BEGIN).all()
    for row in x[:32, 1:]:
        assert any((row[n:] == row[:-n]).all() for n in range(20, 51))
    pairs = Counter(zip(x[32:, 1:-1].ravel().tolist(), x[32:, 2:].ravel().tolist(), strict=True))
    assert (
        sum(count for _, count in pairs.most_common(200)) > 0.5 * pairs.total()
    )  # few of 4,096 pairs carry most


# --------------------------------------------------------------------------------------------------------------- music


@pytest.fixture
def chorales(tmp_path, monkeypatch):
    """Nine short pieces in the official format, registered in place of the real file."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    from aigc_jax.data.builders.jsb_chorales.jsb_chorales_dataset_builder import Builder

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    rng = np.random.default_rng(0)
    pieces = {
        name: [
            [sorted({int(k) for k in rng.integers(43, 97, 4)}) for _ in range(rng.integers(5, 12))]
            for _ in range(n)
        ]
        for name, n in (("train", 5), ("valid", 2), ("test", 2))
    }
    content = json.dumps(pieces).encode()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "any").write_bytes(content)
    info = tfds.core.download.checksums.UrlInfo(
        size=len(content),
        checksum=hashlib.sha256(content).hexdigest(),
        filename="jsb-chorales-quarter.json",
    )
    monkeypatch.setattr(Builder, "url_infos", {"https://example.invalid/chorales.json": info})
    music._pieces.cache_clear()
    yield tmp_path / "files", pieces
    music._pieces.cache_clear()


def test_chorales_are_rolls_with_their_lengths(chorales):
    folder, pieces = chorales
    longest = max(len(piece) for found in pieces.values() for piece in found)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        arrays = data.load("jsb_chorales", split, folder=str(folder)).resident[0]
        assert arrays["roll"].shape == (len(pieces[name]), longest, 88)
        for roll, mask, piece in zip(arrays["roll"], arrays["mask"], pieces[name], strict=True):
            assert mask.tolist() == [1] * len(piece) + [0] * (longest - len(piece))
            assert [(np.flatnonzero(frame) + 21).tolist() for frame in roll[: len(piece)]] == piece
            assert not roll[len(piece) :].any()


@pytest.mark.slow
def test_chorales_are_learnt_scored_and_written(chorales, tmp_path):
    """The score is a mean over all frames but the first of every piece, whatever they are padded with."""
    import mido

    folder, pieces = chorales
    small = jsb_chorales.SCALES["smoke"].setup
    run = replace(
        small.run, folder=str(tmp_path / "run"), steps=20, eval_every=10, batch_size=2, devices=1
    )
    setup = replace(small, run=run, data=_cli.Source("jsb_chorales", str(folder)), seeds=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").rmdir()
    found = {row.quantity: row.ours for row in jsb_chorales.run(setup, tmp_path / "run")}
    result = train.load(tmp_path / "run")
    logits = jax.jit(lambda roll: jsb_chorales.logits(result.config, result.state.params, roll))
    total, frames = 0.0, 0
    for piece in pieces["test"]:
        roll = np.zeros((1, len(piece), 88), np.float32)
        for t, notes in enumerate(piece):
            roll[0, t, np.array(notes) - 21] = 1
        p = 1 / (1 + np.exp(-np.asarray(logits(roll), np.float64)))[0, :-1]
        y = roll[0, 1:]
        total -= (y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
        frames += len(y)
    np.testing.assert_allclose(found[jsb_chorales.TEST], total / frames, rtol=1e-4)
    assert (tmp_path / "run" / "jsb_chorales.png").exists()
    assert mido.MidiFile(tmp_path / "run" / "chorale.mid").length > 1


def test_a_roll_comes_back_from_its_midi_file(tmp_path):
    import mido

    roll = np.zeros((6, 88), np.uint8)
    roll[0:3, 40] = roll[1, 44] = roll[4:6, 40] = roll[5, 50] = 1
    jsb_chorales.write_midi(tmp_path / "a.mid", roll)
    file = mido.MidiFile(tmp_path / "a.mid")
    back, now, on = np.zeros_like(roll), 0, {}
    for message in file.tracks[0]:
        now += message.time
        if message.type == "note_on":
            on[message.note] = now
        elif message.type == "note_off":
            back[on.pop(message.note) // 480 : now // 480, message.note - 21] = 1
    np.testing.assert_array_equal(back, roll)
    assert not on


def test_pieces_that_do_not_fit_are_refused():
    rolls = data.from_arrays({"roll": np.zeros((2, 161, 88), np.uint8)})
    with pytest.raises(
        ValueError, match=r"takes rolls \[T, 88\] with T <= 160, not roll of shape \(161, 88\)"
    ):
        jsb_chorales.Config().check(rolls.info)
    for arrays, words in (
        ({"roll": np.full((2, 3, 4), 2)}, "roll must be 0 or 1"),
        ({"roll": np.zeros((2, 3, 4)), "mask": np.zeros((2, 4))}, r"mask must be 0 or 1 \[2, 3\]"),
        (
            {"tokens": np.zeros((2, 3), int), "mask": np.zeros((2, 3))},
            r"mask must be 0 or 1 \[2, 2\]",
        ),
        (
            {"tokens": np.full((2, 3), 256)},
            r"tokens must lie in 0..255 \(levels=256\), got 256..256",
        ),
        ({"tokens": np.zeros((2, 1), int)}, r"tokens must be whole numbers \[N, T\+1\]"),
        (
            {"points": np.zeros((2, 3)), "mask": np.zeros((2, 3))},
            "with points, arrays may hold label and context only, got mask",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            data.from_arrays(arrays)


# ----------------------------------------------------------------------------------------------------- whole scripts


def test_the_nanogpt_configuration_is_nanogpts():
    """0.80 million parameters, as its log says of n_layer=4, n_head=4, n_embd=128 without biases and positions."""
    cfg = shakespeare_char.NANO
    shapes = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    counted = sum(x.size for x in jax.tree.leaves(shapes)) - shapes["wpe"]["embedding"].size
    assert (
        counted == 4 * (12 * 128**2 + 2 * 128) + 65 * 128 + 128 and round(counted / 1e6, 2) == 0.80
    )
    assert float(cfg.optim.rate(100)) == pytest.approx(1e-3) and float(
        cfg.optim.rate(2000)
    ) == pytest.approx(1e-4)


@pytest.mark.slow
def test_gpt2_and_finetune_run_on_a_small_model(tmp_path):
    setup = replace(gpt2.SCALES["smoke"].setup, folder=str(tmp_path / "gpt2"))
    found = {row.quantity: row.ours for row in gpt2.run(setup, tmp_path / "gpt2")}
    assert found["gpt2: parameters"] == 124_439_808 and 0 < found[gpt2.BITS] < 20
    small = finetune.SCALES["smoke"].setup
    run = replace(small.run, folder=str(tmp_path / "run"), devices=1)
    found = {
        row.quantity: row.ours for row in finetune.run(replace(small, run=run), tmp_path / "run")
    }
    assert found[finetune.GAIN] > 0
    cfg, params = transformer.load_gpt2(tmp_path / "run" / "gpt2")  # what it wrote is what it takes
    again = replace(
        small,
        weights=str(tmp_path / "run" / "gpt2"),
        run=replace(run, folder=str(tmp_path / "b"), steps=20),
    )
    more = {row.quantity: row.ours for row in finetune.run(again, tmp_path / "b")}
    np.testing.assert_allclose(more[finetune.BEFORE], found[finetune.AFTER], rtol=1e-4)


@pytest.mark.slow
def test_scripts_refuse_what_they_could_not_do(tmp_path):
    for script, change, words in (
        (decoding, {"new": 300}, "prompt \\+ new = 340 must not exceed the length"),
        (
            induction_heads,
            {"model": replace(induction_heads.MODEL, layers=3)},
            "model.layers cannot be chosen",
        ),
        (gpt2, {"new": 0}, "new must be at least 1"),
        (gpt2, {"temperature": -1.0}, "sampling.temperature must be at least 0"),
        (grokking, {"fractions": (0.5, 1.0)}, "fractions must lie between 0 and 1"),
        (
            induction_heads,
            {"run": replace(induction_heads.RUN, eval_every=0)},
            "run.eval_every must be at least 1",
        ),
        (in_context_regression, {"prompts": 1}, "prompts must be at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(script.SCALES["cpu"].setup, **change)
    for of in (in_context_regression, jsb_chorales):
        with pytest.raises(ValueError, match="micro"):
            replace(of.Config(), net=replace(of.NET, micro=2))
    small = finetune.SCALES["smoke"].setup
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for setup in (finetune.Setup(), replace(small, length=100), replace(small, prompt="")):
            with pytest.raises(ValueError):
                finetune.run(setup, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    small = decoding.SCALES["smoke"].setup
    with pytest.raises(train.Refused, match="beams must lie in 1.."):
        decoding.run(replace(small, beams=1000), tmp_path / "none")
