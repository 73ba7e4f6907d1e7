"""Tang poems: what the package holds, how a poem becomes tokens, and what is refused."""

import collections

import numpy as np
import pytest

from aigc_jax import data
from aigc_jax.data import tang
from aigc_jax.data.text import Tokenizer

SIZES = {"5x4": 3781, "7x4": 10345, "5x8": 14360, "7x8": 7944}


def everything(form="all"):
    return [p for split in ("train", "validation", "test") for p in tang.poems(split, form=form)]


@pytest.mark.slow
def test_every_poem_is_in_one_split():
    found = everything()
    assert len(found) == len({poem.body for poem in found}) == 36_430
    share = len(tang.poems("test")) / len(found)
    assert 0.09 < share < 0.11
    assert {form: len(everything(form)) for form in SIZES} == SIZES


def test_variants_share_half_of_their_phrases():
    """The second poem shares a line with the first, the third with the second: one group."""
    a, b, c, d, e = "一二三四五，", "六七八九十，", "甲乙丙丁戊，", "子丑寅卯辰，", "天地玄黄宇，"
    bodies = [a + b, d + e, b + c, c + e, "一二三四。" + d + a.replace("五", "戊") + c]
    assert tang.first_variants(bodies) == [0, 0, 0, 0, 0]
    assert tang.first_variants(bodies[:3]) == [0, 1, 0]
    assert tang.first_variants([a + b + c, d + e + a]) == [0, 1]  # two phrases of six
    assert tang.first_variants([a + b + c, a]) == [0, 0]  # all of the shorter one
    assert tang.first_variants(["", "一二。", a]) == [0, 1, 2]


@pytest.mark.slow
def test_no_variant_of_a_training_poem_is_held_out():
    having = collections.defaultdict(set)
    training = [set(tang.phrases(poem.body)) for poem in tang.poems("train")]
    for i, phrases in enumerate(training):
        for phrase in phrases:
            having[phrase].add(i)
    for split in ("validation", "test"):
        for poem in tang.poems(split):
            own = set(tang.phrases(poem.body))
            found = collections.Counter(i for phrase in own for i in having.get(phrase, ()))
            for i, shared in found.items():
                assert 2 * shared < min(len(own), len(training[i])), poem


@pytest.mark.slow
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


REGULATED = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def test_rules_of_regulated_verse():
    assert tang.is_level("ten") and tang.is_level("liou")  # 天, 流
    assert not any(map(tang.is_level, ("dzhǐn", "dhì", "miuk", "njip", "njit")))
    assert tang.tones("更") == {True, False} and tang.tones("x") == set()
    assert tang.rhymes("流") == tang.rhymes("楼") == {"ou"} and tang.rhymes("月") == set()
    assert tang.rhymes("天") == tang.rhymes("然") != tang.rhymes("山")
    assert tang.rhyme_holds(REGULATED) and tang.tones_hold(REGULATED)
    assert not tang.tones_hold("床前明月光，疑是地上霜。举头望明月，低头思故乡。")
    assert not tang.rhyme_holds(REGULATED.replace("楼", "天"))
    assert tang.rhyme_holds(REGULATED.replace("楼", "x")) is None
    for i, other in ((1, "天"), (7, "目"), (16, "天"), (22, "目")):  # each breaks one rule
        assert not tang.tones_hold(REGULATED[:i] + other + REGULATED[i + 1 :]), i


@pytest.mark.slow
def test_poets_keep_the_rules_and_shuffled_poems_do_not():
    found = tang.poems("train", form="7x4")[:300]
    letters = np.array([char for poem in found for char in poem.body if char not in tang.MARKS])
    np.random.default_rng(0).shuffle(letters)
    rest = iter(letters)
    shuffled = ["".join(c if c in tang.MARKS else next(rest) for c in p.body) for p in found]
    real = [poem.body for poem in found]
    for holds, least in ((tang.rhyme_holds, 0.8), (tang.tones_hold, 0.7)):
        assert np.mean([bool(holds(body)) for body in real]) > least
        assert np.mean([bool(holds(body)) for body in shuffled]) < 0.05


def test_every_character_with_a_level_reading_has_a_rhyme():
    for char in tang._readings():
        assert bool(tang.rhymes(char)) == (True in tang.tones(char)), char


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="form must be one of 5x4, 7x4, 5x8, 7x8 and all, got '6x4'"
    ):
        data.load("tang_poems", form="6x4")
    with pytest.raises(ValueError, match="tang_poems"):
        data.load("tang_poems", "unseen")
    with pytest.raises(ValueError, match="needs no files"):
        data.load("tang_poems", folder="somewhere")
