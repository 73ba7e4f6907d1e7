"""Text to image: its judge on exact pictures, the model as a file, and the script at scale smoke."""

import dataclasses
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from aigc_jax import contrastive, data, ddpm, train
from aigc_jax.data import captions, emoji
from aigc_jax.train import shipping, weights
from aigc_jax.vae import autoencoder
from experiments import _cli, text_to_image
from experiments._text_to_image import TextToImage, assembled, contexts, make_text_to_image

SETUP = text_to_image.SMOKE
MODEL = SETUP.model


def told_apart(monkeypatch, *, tones: bool):
    """Returns a Judge whose features are exact: the tone alone, or the tone and the picture.

    Pixel 0 is as red as the tone is dark.
    """

    def encode(cfg, params, image):
        return contrastive.unit(image.reshape(len(image), -1))

    monkeypatch.setattr(contrastive, "encode_image", encode)
    sets = {}
    for name, n in (("test", 10), ("train", 40), ("unseen", 5)):
        tone, first = 1 + np.arange(n) % 5, {"test": 0, "train": 10, "unseen": 50}[name]
        image = np.zeros((n, 1, 20, 3), np.uint8)
        image[:, 0, 0, 0] = 51 * tone
        if not tones:
            image.reshape(n, 60)[np.arange(n), 5 + first + np.arange(n)] = 255
        sets[name] = {"image": image, "tone": tone}
    names = {name: list("ab" * n)[:n] for name, n in (("test", 10), ("train", 40), ("unseen", 5))}
    facts = {k: [emoji.Emoji("", base, "", 0, "", 0) for base in v] for k, v in names.items()}
    monkeypatch.setattr(emoji, "examples", facts.__getitem__)
    return text_to_image.Judge(None, None, sets), sets


def test_judge_finds_every_true_picture(monkeypatch):
    judge, sets = told_apart(monkeypatch, tones=False)
    pictures = sets["test"]["image"] / 255
    true = judge.features(pictures)
    assert judge.rank(true, np.arange(10)) == 100
    assert judge.rank_of_base(true, np.arange(10)) == 100
    assert judge.tone(pictures, sets["test"]["tone"]) == 100
    assert judge.tone(pictures, 1 + sets["test"]["tone"] % 5) == 0
    assert judge.rank(true[::-1], np.arange(10)) == 0
    assert judge.rank_of_base(true[::-1], np.arange(10)) == 0  # a and b alternate
    assert judge.rank_of_base(np.roll(true, 2, 0), np.arange(10)) == 100


def test_judge_of_pictures_of_the_tone_alone_does_not_find_them(monkeypatch):
    judge, sets = told_apart(monkeypatch, tones=True)
    pictures = sets["test"]["image"] / 255
    true = judge.features(pictures)
    assert judge.tone(pictures, sets["test"]["tone"]) == 100
    assert judge.rank(true, np.arange(10)) < 100


def test_rows_of_true_pictures_are_perfect(monkeypatch):
    judge, sets = told_apart(monkeypatch, tones=False)
    pictures = {name: each["image"] / np.float32(255) for name, each in sets.items()}
    rows = text_to_image.rows_of_test(judge, pictures["test"], pictures["test"], sets, pictures)
    found = {row.quantity: row for row in rows}
    assert tuple(found) == text_to_image.TEST_ROWS
    assert found[text_to_image.RANK].ours == found[text_to_image.TONE].ours == 100
    assert found[text_to_image.RANK].oracle == pytest.approx(100 / 55)
    assert found[text_to_image.CHANCE].ours == pytest.approx(55)
    assert found[text_to_image.LESS].ours == found[text_to_image.ONE_OFF].ours == 0
    assert found[text_to_image.KEPT].ours == 100
    assert found[text_to_image.BASE].ours == found[text_to_image.ASKED].ours == 100
    assert found[text_to_image.NEAREST].ours == pytest.approx(1)
    assert found[text_to_image.FRECHET].ours == pytest.approx(0, abs=1e-6)
    copies = pictures["train"][:10]  # of training pictures
    white = np.ones_like(pictures["test"])
    rows = text_to_image.rows_of_test(judge, copies, white, sets, pictures)
    rows = {row.quantity: row for row in rows}
    assert rows[text_to_image.KEPT].ours < 100
    assert rows[text_to_image.ASKED].ours == rows[text_to_image.NEAREST].ours == 0


@pytest.mark.slow
def test_captions_of_the_figure():
    train_captions = {one.caption for one in emoji.examples("train")}
    assert {caption for pair in text_to_image.PAIRS for caption in pair} <= train_captions
    everything = {c.caption for name in ("train", "test", "unseen") for c in emoji.examples(name)}
    assert not everything & set(text_to_image.NEVER_SEEN)
    info = data.load("emoji").info
    captions.encode(info.tokenizer, text_to_image.NEVER_SEEN, info.caption_length)  # all known


# ------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def parts():
    """Untrained CLIP, autoencoder and diffusion model."""
    info = data.load("emoji").info

    def result(make, cfg, seed):
        family = make(cfg)
        return train.Result(family, jax.jit(family.init)(jax.random.key(seed)), cfg, info, None)

    clip = result(contrastive.make, MODEL.text, 0)
    params = autoencoder.init(MODEL.autoencoder, jax.random.key(1))
    diffusion = result(ddpm.make, MODEL.diffusion, 2)
    noise = iter(jax.random.split(jax.random.key(3), 1000))  # some outputs begin at 0

    def moved(leaf):
        return leaf + 0.05 * jax.random.normal(next(noise), leaf.shape)

    ema = jax.tree.map(moved, diffusion.state.ema)
    state = diffusion.state._replace(ema=ema)
    return clip, params, diffusion._replace(state=state)


def asked(system, *texts):
    return captions.encode(system.info.tokenizer, list(texts), 16)


@pytest.mark.slow
def test_context_of_an_empty_caption_is_zero(parts):
    system = assembled(MODEL, *parts)
    tokens = np.concatenate([asked(system, "thumbs up"), np.zeros((1, 16), np.int32)])
    found = np.asarray(contexts(MODEL, system.state.params["text"], tokens))
    assert found.shape == (2, 17, 32) and np.abs(found[0]).max() > 0.1 and not found[1].any()
    text = {"text": system.state.params["text"]}
    raw = contrastive.encode_text_sequence(MODEL.text, text, tokens).features
    assert np.abs(raw[1, 0]).max() > 0.1 and not raw[1, 1:].any()  # the start token has a vector
    np.testing.assert_array_equal(found[0], raw[0])


@pytest.mark.slow
def test_a_shipped_model_draws_from_captions(parts, tmp_path):
    system = assembled(MODEL, *parts)
    file = train.ship(system, make_text_to_image, tmp_path / "tiny.safetensors", command="a test")
    loaded = shipping.load_shipped(file)
    assert loaded.config == MODEL and loaded.info.tokenizer == system.info.tokenizer
    for a, b in zip(*map(jax.tree.leaves, (system.state.params, loaded.state.params)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float16), np.asarray(b))

    def draw(*, n=3, **options):
        return np.asarray(train.sample(loaded, jax.random.key(0), n=n, steps=2, **options))

    prompt = asked(loaded, "thumbs up", "red heart", "cat face")
    images, none = draw(prompt=prompt), draw()
    assert images.shape == (3, 32, 32, 3) and 0 <= images.min() <= images.max() <= 1
    np.testing.assert_array_equal(draw(prompt=np.zeros_like(prompt)), none)
    assert np.abs(images - none).max() > 1e-4
    negative = draw(prompt=prompt, negative=prompt[::-1].copy())
    assert np.abs(images - negative).max() > 1e-5
    same = draw(prompt=prompt, negative=prompt)  # guidance from a text to itself
    np.testing.assert_allclose(same, draw(prompt=prompt, w=0.0), atol=1e-4)


# ------------------------------------------------------------------------------------ the script


@pytest.mark.slow
def test_the_model_of_the_package_draws_what_was_recorded():
    """Its samples for captions of test have the recorded emoji, and mostly the recorded tone."""
    assert "text_to_image" in train.shipped()
    system = train.load("text_to_image")
    assert weights.file_of("text_to_image").stat().st_size <= 8_000_000
    test = data.load("emoji", "test")
    tokens, image = (test.resident[0][name][:64] for name in ("tokens", "image"))
    with jax.numpy_rank_promotion("allow"):
        x = train.sample(system, jax.random.key(0), n=64, chunk=32, prompt=tokens)
    true = image / np.float32(255)
    off = ((x[:, None] - true[None]) ** 2).sum((2, 3, 4))
    assert (off.argmin(1) == np.arange(64)).mean() > 0.9  # nearest, in pixels, to their own
    assert np.sqrt((np.diag(off) / true[0].size).mean()) < 0.15


def test_models_that_do_not_fit_are_refused_before_any_training(monkeypatch, tmp_path):
    info = data.load("emoji").info
    clip = train.Result(None, None, MODEL.text, info, None)
    monkeypatch.setattr(train, "load", {"clip": clip}.__getitem__)
    setup = dataclasses.replace(SETUP, clip="clip")
    assert text_to_image.given(setup, info)[1] is clip
    other = dataclasses.replace(info, tokenizer=info.tokenizer.replace("thumbs", "thumb"))
    with pytest.raises(ValueError, match="clip was trained on other words than emoji's"):
        text_to_image.given(setup, other)
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/none; make it first"):
        ship = dataclasses.replace(SETUP, ship=str(tmp_path / "none" / "a.safetensors"))
        text_to_image.given(ship, info)
    wide = dataclasses.replace(
        MODEL.text, text=dataclasses.replace(MODEL.text.text, width=64, heads=4)
    )
    monkeypatch.setattr(train, "load", lambda _: clip._replace(config=wide))
    with pytest.raises(ValueError, match=r"diffusion.context must be \(17, 64\), as text has it"):
        text_to_image.given(setup, info)
    with pytest.raises(ValueError, match="model.w must be"):
        TextToImage(w="2")
    with pytest.raises(ValueError, match="data.name must be emoji"):
        dataclasses.replace(SETUP, data=_cli.Source("digits"))


@pytest.mark.slow
def test_latents_are_identified_by_what_they_are_made_from(parts):
    clip, params, _ = parts
    some, text = data.load("emoji", "train[:8]"), clip.state.params["text"]
    first = text_to_image.latent_data(MODEL, text, params, params, some).info
    measured = jax.tree.map(lambda leaf: leaf, params)
    measured["latents"] = jax.tree.map(lambda leaf: leaf + 1e-6, params["latents"])
    assert text_to_image.latent_data(MODEL, text, params, measured, some).info == first
    assert first.source == {"name": "latents of emoji", "split": "train[:8]"}
    moved = jax.tree.map(lambda leaf: leaf + 1e-6, text)
    other = text_to_image.latent_data(MODEL, moved, params, params, some).info
    assert other.fingerprint != first.fingerprint
    others = text_to_image.latent_data(MODEL, text, measured, params, some).info
    assert others.fingerprint != first.fingerprint


def terminate_when(file):
    """Sends SIGTERM to this process as soon as a run has written training metrics to this file."""

    def watch():
        for _ in range(6000):  # ten minutes
            if file.exists() and '"train"' in file.read_text():
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()


def steps(folder):
    """Returns the steps whose training metrics a run has written."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "train" in row]


@pytest.mark.soak
def test_script_resumes_at_the_stage_that_was_stopped_and_meets_its_invariants(tmp_path):
    run = dataclasses.replace(SETUP.run, devices=1, folder=str(tmp_path), log_every=5)
    file = tmp_path / "model.safetensors"
    setup = dataclasses.replace(SETUP, run=run, ship=str(file))
    terminate_when(tmp_path / "autoencoder" / "metrics.jsonl")
    with pytest.raises(SystemExit, match="stopped by SIGTERM at step"):
        text_to_image.run(setup, tmp_path)
    before = (tmp_path / "clip" / "metrics.jsonl").read_bytes()
    assert steps(tmp_path / "clip")[-1] == 40 and steps(tmp_path / "autoencoder")[-1] < 40
    assert not (tmp_path / "diffusion").exists()

    found, failed = _cli.measured(text_to_image, setup, tmp_path)
    assert failed is None
    assert (tmp_path / "clip" / "metrics.jsonl").read_bytes() == before  # not trained again
    assert steps(tmp_path / "autoencoder") == list(range(5, 41, 5))
    assert steps(tmp_path / "diffusion")[-1] == 60
    rows = {row.quantity: row for row in found}
    assert _cli.verdict(rows[text_to_image.VARIANCE], text_to_image.INVARIANTS).startswith("met")
    assert {*text_to_image.TEST_ROWS, text_to_image.CHOSEN} <= set(rows)
    assert all(row.ours is not None for row in found)
    assert rows[text_to_image.CHOSEN].ours in SETUP.w
    assert (tmp_path / "text_to_image.png").stat().st_size > 5000
    assert shipping.load_shipped(file).config.w == rows[text_to_image.CHOSEN].ours
