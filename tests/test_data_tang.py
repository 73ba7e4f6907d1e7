"""Tang poems: what the package holds, how a poem becomes tokens, and what is refused."""

import numpy as np
import pytest

from aigc_jax import data
from aigc_jax.data import tang
from aigc_jax.data.text import Tokenizer

SIZES = {"5x4": 3781, "7x4": 10345, "5x8": 14360, "7x8": 7944}


def everything(form="all"):
    return [p for split in ("train", "validation", "test") for p in tang.poems(split, form=form)]


def test_every_poem_is_in_one_split():
    found = everything()
    assert len(found) == len({poem.body for poem in found}) == 36_430
    share = len(tang.poems("test")) / len(found)
    assert 0.09 < share < 0.11
    assert {form: len(everything(form)) for form in SIZES} == SIZES


@pytest.mark.parametrize("form", [*SIZES, "all"])
def test_tokens_are_title_and_body(form):
    found, poems = (
        data.load("tang_poems", "test[:40]", form=form),
        tang.poems("test[:40]", form=form),
    )
    tokenizer = Tokenizer(found.info.tokenizer)
    tokens, mask = (found.resident[0][name] for name in ("tokens", "mask"))
    assert found.info.kind == "text" and found.info.levels == tokenizer.size == 6882
    for row, counted, poem in zip(tokens, mask, poems, strict=True):
        text = tokenizer.decode(row)
        assert text[:16].rstrip("\n") == poem.title[:16]
        assert text[16:].rstrip("\n") == poem.body
        np.testing.assert_array_equal(counted, np.arange(1, len(row)) >= 16)
    assert form == "all" or 0 not in tokens[:, 16:]


def test_two_forms_have_two_fingerprints():
    prints = {data.load("tang_poems", "test[:5]", form=form).info.fingerprint for form in SIZES}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "body, form",
    [
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", "5x4"),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡", None),
        ("床前明月光，疑是地上霜。举头望明，低头思故乡。", None),
        ("床前明月光，疑是地 霜。举头望明月，低头思故乡。", None),
        ("床前明月光疑，是地上霜。举头望明月，低头思故乡。", None),
        ("床前明月光，疑是地上霜。", None),
        ("，，，，", None),
        ("", None),
    ],
)
def test_form_of(body, form):
    assert tang.form_of(body) == form


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="form must be one of 5x4, 7x4, 5x8, 7x8 and all, got '6x4'"
    ):
        data.load("tang_poems", form="6x4")
    with pytest.raises(ValueError, match="tang_poems"):
        data.load("tang_poems", "unseen")
    with pytest.raises(ValueError, match="needs no files"):
        data.load("tang_poems", folder="somewhere")
