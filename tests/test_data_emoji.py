"""Emoji with captions: the files, the splits, the captions, and how batches reach a model."""

import collections
import dataclasses
import hashlib
import itertools
import lzma
from pathlib import Path

import jax
import numpy as np
import pytest

from aigc_jax import data, train, vae
from aigc_jax.data import captions, emoji, emoji_pair, tang
from aigc_jax.data.tokenizer import split_words
from experiments import _emoji

from .trainee import CFG

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "emoji32"
SPLITS = ("train", "test", "unseen")
SIZES = {"train": 2748, "test": 308, "unseen": 730}


def test_the_files_are_those_that_were_delivered():
    for name, digest in (
        ("images.bin.xz", "a31686f12224cf47227cb470d70edae45d9f11748eb48d4f96dc5f8ab2d9f86d"),
        ("emoji.tsv", "48bd1cca2add91cad1620767a2711c08be553175f5c8dcb7c54f120b121ca607"),
    ):
        path = emoji.NOTO / name
        raw = path.read_bytes() if path.is_file() else lzma.open(f"{path}.xz").read()
        assert hashlib.sha256(raw).hexdigest() == digest
    licences = {path.name for path in emoji.NOTO.iterdir()}
    assert {"LICENSE-Apache-2.0", "LICENSE-MIT", "README.md"} <= licences


def test_the_package_data_names_every_file():
    """An installed wheel holds what setup.cfg names."""
    import configparser

    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    patterns = setup["options.package_data"]["aigc_jax.data"].split(",")
    named = {path for pattern in patterns for path in emoji.NOTO.parent.glob(pattern.strip())}
    folders = (emoji.NOTO, tang.POEMS.parent, emoji_pair.TWEMOJI)
    assert named == {file for folder in folders for file in folder.iterdir()}


def test_no_network_and_no_folder(monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    assert data.load("emoji").info.examples == SIZES["train"]
    with pytest.raises(ValueError, match="emoji needs no files, so it takes no folder"):
        data.load("emoji", folder="x")
    with pytest.raises(ValueError, match="there are digits, mnist, fashion_mnist, cifar10, emoji,"):
        data.load("emojis")


# -------------------------------------------------------------------------------------- splits


def test_every_picture_is_in_one_split():
    found = {split: emoji.examples(split) for split in SPLITS}
    assert {split: len(examples) for split, examples in found.items()} == SIZES
    rows = [one.row for examples in found.values() for one in examples]
    assert sorted(rows) == list(range(3786))
    pairs = collections.Counter(
        (one.base, one.caption) for examples in found.values() for one in examples
    )
    assert set(pairs.values()) == {1}  # each (emoji, tone) once


def test_test_holds_a_fifth_of_the_tones_of_emoji_that_train_has_in_others():
    training, test = emoji.examples("train"), emoji.examples("test")
    tones = collections.defaultdict(set)
    for one in training:
        tones[one.base].add(one.tone)
    for one in test:
        assert one.tone > 0 and 0 in tones[one.base]
        assert tones[one.base] - {0, one.tone} or one.tone == emoji.TWO_TONES
    pictures = collections.Counter(emoji._picture(one) for one in (*training, *test))
    alone = [one for one in (*training, *test) if one.tone and pictures[emoji._picture(one)] == 1]
    assert len(test) == len(alone) // 5 and set(test) <= set(alone)
    assert set(collections.Counter(one.tone for one in test)) == {1, 2, 3, 4, 5, 6}
    assert "thumbs up" in {one.caption for one in training}
    assert "thumbs up, medium skin tone" in {one.caption for one in test}


def test_unseen_emoji_are_unseen_in_every_tone():
    unseen = {one.base for one in emoji.examples("unseen")}
    assert len(unseen) == 400
    assert not unseen & {one.base for one in emoji.examples("train+test")}
    assert sum(not one.tone for one in emoji.examples("unseen")) == 400
    assert len({one.base for one in emoji.examples("train+test+unseen")}) == 1911


def test_no_picture_is_in_two_splits():
    arrays = {split: data.load("emoji", split).resident[0]["image"] for split in SPLITS}
    found = {split: {x.tobytes() for x in images} for split, images in arrays.items()}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not found[a] & found[b]
    # The files do hold equal pictures, so the check above can fail.
    assert sum(map(len, found.values())) < 3786


def test_emoji_with_an_equal_picture_share_a_group():
    group = emoji._groups()
    flags = ["1f1e8-1f1f5", "1f1eb-1f1f7", "1f1f2-1f1eb"]  # Clipperton, France, St Martin
    assert [group[base] for base in flags] == [flags[0]] * 3
    table = emoji.examples("train+test+unseen")
    first = {}
    for one in table:
        other = first.setdefault(emoji._picture(one), one)
        assert group[one.base] == group[other.base]
    # Every join is needed: a group of n emoji needs n - 1 pairs with an equal picture.
    bases = collections.defaultdict(set)
    for one in table:
        bases[emoji._picture(one)].add(one.base)
    joins = sum(len(members) - 1 for members in bases.values())
    assert len(set(group.values())) == 1911 - joins == 1897
    assert all(name == min(b for b in group if group[b] == name) for name in {*group.values()})


def test_groups_are_joined_through_a_chain_of_equal_pictures(monkeypatch):
    """c and b have an equal picture in one tone, a and c in another: all three are a group."""
    shown = {"d": ["1"], "c": ["2", "3"], "b": ["4", "2"], "a": ["3"], "e": ["5"]}
    table = [
        emoji.Emoji(f"{base}-{i}", base, "x", i, f"{base} {i}", int(row))
        for base, rows in shown.items()
        for i, row in enumerate(rows)
    ]
    monkeypatch.setattr(emoji, "_table", lambda: table)
    monkeypatch.setattr(emoji, "_images", lambda: np.arange(6))
    assert emoji._groups() == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}


@pytest.mark.slow
def test_slices_and_sums():
    whole = data.load("emoji").resident[0]
    first, rest = data.load("emoji", "train[:100]"), data.load("emoji", "train[100:]")
    both = np.concatenate([first.resident[0]["image"], rest.resident[0]["image"]])
    np.testing.assert_array_equal(both, whole["image"])
    assert first.info.tokenizer == rest.info.tokenizer  # not only of the words in the slice
    together = data.load("emoji", "train+unseen[:7]+test")
    assert together.info.examples == SIZES["train"] + 7 + SIZES["test"]
    assert together.info.source == {"name": "emoji", "split": "train+unseen[:7]+test"}
    assert len({*first.resident[0]["label"]}) >= 9  # a slice mixes the categories
    for split in ("validation", "train[:3000]", "train[5:5]"):
        with pytest.raises(ValueError, match=r"emoji.*train has 2,748, test has 308, unseen has"):
            data.load("emoji", split)


def test_the_splits_stay_what_they_are():
    """A change of the rule, the captions or the vocabulary changes these numbers."""
    found = {split: data.load("emoji", split).info.fingerprint[:16] for split in SPLITS}
    assert found == {
        "train": "0f5b0d648109d156",
        "test": "dc9b9cd35e301972",
        "unseen": "1bebad7c0bba3caa",
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_pictures_and_facts_are_the_rows_of_the_shared_files():
    raw = lzma.open(SHARED / "emoji_google_32x32_rgb.bin.xz").read()
    images = np.frombuffer(raw, np.uint8).reshape(-1, 32, 32, 3)
    lines = (SHARED / "emoji_google_32x32_rgb.tsv").read_text().splitlines()[1:]
    table = [line.split("\t") for line in lines]
    rows = {fields[0]: row for row, fields in enumerate(table)}
    for split in SPLITS:
        loaded = data.load("emoji", split)
        names, tones = loaded.info.class_names, emoji.tones(split)
        for i, one in enumerate(emoji.examples(split)):
            row = rows[one.code_points]
            np.testing.assert_array_equal(loaded.resident[0]["image"][i], images[row])
            assert one.category == names[loaded.resident[0]["label"][i]] == table[row][1]
            modifiers = {m for m in table[row][5].split("-") if m}
            expected = ["", *modifiers][-1] if len(modifiers) < 2 else "two"
            codes = {"": 0, "1F3FB": 1, "1F3FC": 2, "1F3FD": 3, "1F3FE": 4, "1F3FF": 5, "two": 6}
            assert tones[i] == one.tone == codes[expected]


# ------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    "code_points, caption, tone",
    [
        ("1f600", "grinning face", 0),
        ("1f44b-1f3ff", "waving hand, dark skin tone", 5),
        ("1f44d-1f3fd", "thumbs up, medium skin tone", 3),
        ("1f449-1f3fb", "right pointing backhand index, light skin tone", 1),
        ("1f935-1f3fc", "person in tuxedo, medium-light skin tone", 2),
        ("1f935-1f3fe-200d-2642-fe0f", "man in tuxedo, medium-dark skin tone", 4),
        ("1f468-1f3fb-200d-1f9b2", "bald man, light skin tone", 1),
        ("1f469-200d-1f9b0", "woman with red hair", 0),
        ("1f9d4-200d-2642-fe0f", "man with beard", 0),
        (
            "1faf1-1f3fb-200d-1faf2-1f3ff",
            "handshake, light skin tone and dark skin tone",
            6,
        ),
        (
            "1f9d1-1f3fd-200d-1f91d-200d-1f9d1-1f3fd",
            "people holding hands, medium skin tone",
            3,
        ),
        ("1f468-200d-1f469-200d-1f467", "family, man, woman, girl", 0),
        ("2764-fe0f", "red heart", 0),
        ("1f5a4", "black heart", 0),
        ("1f1f8-1f1f9", "sao tome and principe flag", 0),
        ("1f1e8-1f1e8", "cocos keeling islands flag", 0),
        ("1f1e8-1f1e9", "congo kinshasa flag", 0),
        ("1f1fa-1f1f2", "us outlying islands flag", 0),
        ("1f1e8-1f1ee", "cote d'ivoire flag", 0),
        ("002a-fe0f-20e3", "keycap asterisk", 0),
        ("0037-fe0f-20e3", "keycap 7", 0),
        ("1f3f3-fe0f", "white flag", 0),
    ],
)
def test_captions_by_hand(code_points, caption, tone):
    [one] = [e for e in emoji.examples("train+test+unseen") if e.code_points == code_points]
    assert (one.caption, one.tone) == (caption, tone)


def test_captions_are_plain_and_say_the_tone():
    table = emoji.examples("train+test+unseen")
    for one in table:
        assert set(one.caption) <= set("abcdefghijklmnopqrstuvwxyz0123456789 ,-'")
        assert "  " not in one.caption and one.caption == one.caption.strip(" ,-")
        said = [word for word in split_words(one.caption.partition(", ")[2]) if word in emoji.TONES]
        tones = one.caption.count(" skin tone")
        assert tones == (0 if not one.tone else 1 + (one.tone == emoji.TWO_TONES))
        if 1 <= one.tone <= 5:
            assert one.caption.endswith(f", {emoji.TONES[one.tone - 1]} skin tone")
            assert emoji.TONES[one.tone - 1] in said
    assert len({one.caption for one in table}) == len(table)
    assert max(len(split_words(one.caption)) for one in table) == 15 < emoji.LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_the_captions(split):
    loaded = data.load("emoji", split)
    info, tokens = loaded.info, loaded.resident[0]["tokens"]
    assert tokens.dtype == np.int32 and tokens.shape == (info.examples, info.caption_length)
    assert (info.caption_length, info.caption_vocab) == (16, 1521)
    assert data.text.Tokenizer(info.tokenizer).size == info.caption_vocab
    texts = [one.caption for one in emoji.examples(split)]
    decoded = captions.decode(info.tokenizer, tokens)
    if split != "unseen":
        assert decoded == texts
        np.testing.assert_array_equal(captions.encode(info.tokenizer, texts, 16), tokens)
        return
    unknown = [captions.unknown_words(info.tokenizer, text) for text in texts]
    assert sum(map(bool, unknown)) == 334 and sum(not text for text in decoded) == 95
    for text, words, back in zip(texts, unknown, decoded, strict=True):
        assert split_words(back) == [word for word in split_words(text) if word not in words]


def test_every_word_of_the_vocabulary_is_in_train():
    tokens = data.load("emoji").resident[0]["tokens"]
    np.testing.assert_array_equal(np.unique(tokens), np.arange(1521))


def test_the_scripts_text_net_has_this_vocabulary():
    info = data.load("emoji").info
    text = _emoji.CLIP.text
    assert (text.vocab, text.context) == (info.caption_vocab, info.caption_length)


# ----------------------------------------------------------------------------- a set like others


def test_info_and_batches():
    loaded = data.load("emoji", "test")
    info = loaded.info
    assert (info.kind, info.shape, info.levels, info.classes) == ("image", (32, 32, 3), 256, 10)
    assert info.class_names[6] == "People & Body" and len(info.class_names) == 10
    batch = loaded.batch(3, 1, 200)
    shapes = {name: (a.dtype, a.shape) for name, a in batch.items()}
    assert shapes == {
        "image": (np.uint8, (200, 32, 32, 3)),
        "label": (np.int32, (200,)),
        "tokens": (np.int32, (200, 16)),
        "index": (np.int32, (200,)),
    }
    arrays, rows, take = loaded.resident
    on_device = jax.jit(take)(jax.device_put(arrays), rows(3, 1, 200))
    for name in batch:
        np.testing.assert_array_equal(on_device[name], batch[name])
    examples = emoji.examples("test")
    texts = captions.decode(info.tokenizer, batch["tokens"])
    assert texts == [examples[i].caption for i in batch["index"]]
    tones = emoji.tones("test")
    assert tones.dtype == np.int32 and tones.tolist() == [one.tone for one in examples]
    np.testing.assert_array_equal(emoji.tones("test[5:]+train[:3]")[:-3], tones[5:])


@pytest.mark.slow
def test_a_model_of_images_trains_on_emoji_and_the_run_keeps_the_words(tmp_path):
    cfg = dataclasses.replace(CFG, shape=(32, 32, 3), levels=256, classes=10)
    training, valid = data.load("emoji", "train[:64]"), data.load("emoji", "test[:10]")
    run = train.Run(folder=str(tmp_path / "run"), steps=2, batch_size=8, eval_every=2, devices=1)
    train.fit(vae.make, cfg, run, training, valid=valid)
    result = train.load(run.folder)
    assert result.info == training.info
    assert captions.decode(result.info.tokenizer, training.resident[0]["tokens"][:1]) == [
        emoji.examples("train")[0].caption
    ]
    assert train.evaluate(result, valid)["nll_nats"] > 0
    plain = data.from_arrays(
        {"image": valid.resident[0]["image"], "label": valid.resident[0]["label"]}, classes=10
    )
    assert train.evaluate(result, plain)["nll_nats"] > 0  # pictures without captions
    other = data.from_arrays(
        {**valid.resident[0]},
        classes=10,
        tokenizer=data.text.Tokenizer.words([" ".join(f"w{i}" for i in range(1520))]),
    )
    with pytest.raises(train.Refused, match="by another tokenizer than that of training"):
        train.evaluate(result, other)


def test_names_of_classes_and_captions_need_their_arrays():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    info = data.from_arrays({"image": images}, class_names=("a", "b")).info
    assert info.class_names == () and info.caption_length is info.caption_vocab is None
    labelled = {"image": images, "label": np.arange(3)}
    assert data.from_arrays(labelled, class_names=("a", "b", "c")).info.class_names[1] == "b"
    with pytest.raises(ValueError, match="there are 3 classes, but 2 class_names"):
        data.from_arrays(labelled, class_names=("a", "b"))
    with pytest.raises(ValueError, match="needs the tokenizer of the captions: pass tokenizer="):
        data.from_source([{"image": images[0], "tokens": np.zeros(4, int)}])
    ragged = [{"image": images[0], "tokens": np.zeros(4 - i, int)} for i in range(2)]
    with pytest.raises(ValueError, match=r"tokens 1 is \(3,\), tokens 0 is \(4,\)"):
        data.from_source(ragged, tokenizer=data.text.Tokenizer.words(["a"]))


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"tokens": np.zeros((2, 4), int)}, r"tokens of captions must be whole numbers \[3, L\]"),
        ({"tokens": np.zeros((3, 0), int)}, r"must be whole numbers \[3, L\], got int64 \[3, 0\]"),
        ({"tokens": np.zeros((3, 4))}, "got float64"),
        ({"tokens": np.full((3, 4), 3)}, r"must lie in 0\.\.2, got 3\.\.3"),
        ({"tokens": np.full((3, 4), -1)}, r"must lie in 0\.\.2, got -1\.\.-1"),
        ({"tone": np.zeros(3, int)}, "may hold label and tokens only, got tone"),
        ({"roll": np.zeros((3, 4, 5))}, "must hold one of image, points, tokens, roll"),
        ({"mask": np.ones((3, 4))}, "with image, arrays may hold label and tokens only, got mask"),
    ],
)
def test_captions_that_do_not_fit_are_refused(arrays, words):
    tokenizer = data.text.Tokenizer.words(["a b"])
    images = np.zeros((3, 2, 2, 1), np.uint8)
    with pytest.raises(ValueError, match=words):
        data.from_arrays({"image": images, **arrays}, tokenizer=tokenizer)


def test_fingerprint_sees_the_words_of_captions():
    """The same numbers in other words are another set."""
    images, tokens = np.zeros((3, 2, 2, 1), np.uint8), np.ones((3, 2), np.int32)
    arrays = {"image": images, "tokens": tokens}
    examples = [{"image": images[0], "tokens": tokens[0]}] * 3
    cats, dogs = (data.text.Tokenizer.words([word]) for word in ("cats", "dogs"))
    for make, given in ((data.from_arrays, arrays), (data.from_source, examples)):
        digests = [make(given, tokenizer=words).info.fingerprint for words in (cats, cats, dogs)]
        assert digests[0] == digests[1] != digests[2]
    # Without captions a tokenizer counts for nothing, and the fingerprint is as it always was.
    plain = data.from_arrays({"image": images}).info.fingerprint
    assert plain == data.from_arrays({"image": images}, tokenizer=cats).info.fingerprint
    expected = hashlib.sha256(b"image uint8 (3, 2, 2, 1)" + images.tobytes()).hexdigest()
    assert plain == expected


# ------------------------------------------------------------------------- a tokenizer of words


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        (" \t\r\n\u3000", []),
        ("Waving hand, dark skin tone", ["waving", "hand", ",", "dark", "skin", "tone"]),
        ("heart-shaped eyes - don't", ["heart-shaped", "eyes", "-", "don't"]),
        ("-a- 'b' _c_ d_e", ["-", "a", "-", "'", "b", "'", "_", "c", "_", "d_e"]),
        ("3.5 % of (a+b)!?", ["3", ".", "5", "%", "of", "(", "a", "+", "b", ")", "!", "?"]),
        ("Cafe\u0301 CAF\u00c9", ["caf\u00e9", "caf\u00e9"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0441\u043b\u043e\u0432\u043e",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0441\u043b\u043e\u0432\u043e"],
        ),
        ("\U0001f44da\U0001f600", ["\U0001f44d", "a", "\U0001f600"]),
        ("d\u2019or\u2014et", ["d\u2019or", "\u2014", "et"]),
    ],
)
def test_words(text, words):
    assert split_words(text) == words
    tokenizer = data.text.Tokenizer.words([text, "other words"])
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and len(tokens) == len(words)
    assert [tokenizer.vocabulary[i - 1] for i in tokens] == words
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)


def test_a_tokenizer_of_words_comes_back_from_its_file(tmp_path):
    texts = ["two cats, one hat", "a Hat"]
    tokenizer = data.text.Tokenizer.words(texts)
    assert tokenizer.vocabulary == (",", "a", "cats", "hat", "one", "two")
    assert tokenizer.size == 7 and tokenizer.numbers["hat"] == 4
    tokenizer.save(tmp_path / "tokenizer.json")
    again = data.text.Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.content == tokenizer.content
    assert again.decode([6, 3, 1, 5, 4, 0, 0]) == "two cats, one hat"
    assert again.decode([]) == again.decode([0, 0]) == ""
    assert data.text.Tokenizer.words(reversed(texts)).content == tokenizer.content
    with pytest.raises(ValueError, match="no 'dogs', 'and'$"):
        tokenizer.encode("two dogs and cats and dogs")
    with pytest.raises(ValueError, match=r"tokens lie in 0\.\.6, got 7\.\.7"):
        tokenizer.decode([7])
    assert data.text.Tokenizer.words([]).size == 1


@pytest.mark.parametrize(
    "words",
    [
        *('"abc"', "[1]", '[""]', '["a b"]', '["a", "a"]', "{}", "null", "[[]]", '["\\n"]'),
        # What no text is split into: capitals, marks at a word's end, letters before accents.
        *('["Cat"]', '["a,"]', '["-a"]', '["a--b"]', '["e\\u0301"]', '["\\ud800"]'),
    ],
)
def test_what_is_no_list_of_words_is_no_tokenizer(words):
    with pytest.raises(ValueError, match="this is no tokenizer"):
        data.text.Tokenizer(f'{{"words": {words}}}')


def test_every_word_of_any_text_is_a_word_of_a_tokenizer():
    rng = np.random.default_rng(0)
    places = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x20000)])
    marks = [0x20, 0x27, 0x2D, 0x5F, 0x2019, 0x300, 0x307, 0x338, 0x345, 0x130, 0x3A3]
    drawn = np.where(rng.random((4000, 6)) < 0.5, rng.choice(marks, (4000, 6)), 0)
    drawn = np.where(drawn, drawn, rng.choice(places, drawn.shape))
    tokenizer = data.text.Tokenizer.words("".join(map(chr, row)) for row in drawn.tolist())
    assert tokenizer.size > 4000  # none was refused


def test_rows_of_captions():
    tokenizer = data.text.Tokenizer.words(["a red cat", "a dog, asleep"])
    texts = ["a red cat", "", "A dog , asleep"]
    tokens = captions.encode(tokenizer, texts, 4)
    assert tokens.dtype == np.int32 and tokens.shape == (3, 4)
    assert captions.decode(tokenizer, tokens) == ["a red cat", "", "a dog, asleep"]
    np.testing.assert_array_equal(captions.encode(tokenizer.content, texts, 4), tokens)
    np.testing.assert_array_equal(captions.encode(tokenizer, texts[0], 4), tokens[:1])
    assert captions.encode(tokenizer, [], 4).shape == (0, 4)
    with pytest.raises(ValueError, match="caption 'a dog, asleep' has 4 words, the most is 3"):
        captions.encode(tokenizer, texts[:2] + ["a dog, asleep"], 3)
    with pytest.raises(ValueError, match="'blue bird' has words .*: 'blue', 'bird'$"):
        captions.encode(tokenizer, ["blue bird"], 4)
    some = captions.encode(tokenizer, ["a blue cat on a dog", "blue"], 4, skip_unknown=True)
    assert captions.decode(tokenizer, some) == ["a cat a dog", ""]
    assert captions.unknown_words(tokenizer, "on a blue cat on") == ["on", "blue"]
    for other in (data.text.Tokenizer.characters("abc"), '{"characters": "abc"}'):
        with pytest.raises(ValueError, match="captions need a tokenizer of words"):
            captions.encode(other, ["abc"], 4)
