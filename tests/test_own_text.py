"""Texts of one's own: any script, any size, any encoding; memory; slices; yardsticks, prompts and fonts."""

import json
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aigc_jax import data, figures
from aigc_jax.data import text, tokenizer
from aigc_jax.data.prepare import cuts
from aigc_jax.data.text import Tokenizer
from experiments import _cli, _text, decoding, finetune, gpt2, shakespeare_char, transformer_text

ROOT = Path(__file__).parent.parent
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n"
STORY = "The cat's mat; 12 dogs, don't!  \r\n\r\n\tnaïve €uro 🙂 (x² = 4)... ①, 'll'" + POEM


@pytest.fixture
def own(tmp_path):
    """Writes a text (or bytes) and gives its name."""

    def write(content, name="own.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"text:{path}"

    return write


# -------------------------------------------------------------------------------------------------------------- blocks


def shuffled(n: int) -> str:
    """A long text of all sorts of neighbours: words, spaces, punctuation, several scripts."""
    rng = np.random.default_rng(0)
    parts = [
        *STORY,
        " ",
        "\n",
        "the",
        "don't",
        "'s",
        "  ",
        "，",
        "1,2",
        "\u3000",
        "\x1c",
        "x.",
        "²",
        "_",
    ]
    return "".join(rng.choice(parts, n))


@pytest.mark.parametrize("block", [1, 60])
def test_blocks_change_no_token(block, monkeypatch):
    """Beside the library, given everything at once; also where a tokenizer has tokens of its own between the words."""
    whole = shuffled(2500)
    monkeypatch.setattr(tokenizer, "BLOCK", block)
    made = Tokenizer.bpe(whole, 320)
    import tokenizers

    library = tokenizer._byte_level(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([whole], trainer)
    assert made.content == library.to_str()
    np.testing.assert_array_equal(made.encode(whole), library.encode(whole).ids)
    for special in ("<|endoftext|>", "a, b", "x.y", " cat"):
        library.add_special_tokens([special])
        with_own = Tokenizer(library.to_str())
        mixed = special.join(whole[i : i + 37] for i in range(0, len(whole), 37))
        np.testing.assert_array_equal(with_own.encode(mixed), library.encode(mixed).ids)
    characters = Tokenizer.characters(whole)
    assert json.loads(characters.content) == {"characters": "".join(sorted(set(whole)))}
    assert characters.encode(whole).tolist() == [sorted(set(whole)).index(c) for c in whole]


def test_blocks_are_cut_at_words_and_lose_nothing():
    pieces = list(tokenizer._cut_at_words(tokenizer._split_blocks(shuffled(60_000))))
    assert "".join(pieces) == shuffled(60_000) and len(pieces) > 1
    assert max(map(len, pieces)) < 2 * tokenizer.BLOCK
    assert list(tokenizer._cut_at_words(["a" * 9] * 3)) == ["a" * 27]  # a word is never cut


def test_words_without_end_are_learnt_from_in_parts():
    """The library's time grows with the square of a word: a quarter of an hour for a million letters."""
    genome = "".join(np.random.default_rng(0).choice([*"ACGT"], 30_000))
    for whole in (genome, "\n" * 9000, "a word, " + "b" * 2001):
        pieces = list(tokenizer._split_long_words([whole]))
        assert "".join(pieces) == whole and max(map(len, pieces)) == tokenizer.MAX_WORD
    assert list(tokenizer._split_long_words(["a word " * 9000, "", "b" * 1999])) == [
        "a word " * 9000,
        "b" * 1999,
    ]
    made = Tokenizer.bpe(genome, 300)
    assert made.size == 300 and made.decode(made.encode(genome)) == genome


def test_tokenizers_of_other_kinds_get_the_text_whole(monkeypatch):
    """Without words a merge may reach across any place."""
    import tokenizers

    vocabulary = {c: i for i, c in enumerate(["a", " ", "a ", " a", "a a"])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("a", " "), ("a ", "a")])
    monkeypatch.setattr(tokenizer, "BLOCK", 5)
    library = tokenizers.Tokenizer(model)
    made = Tokenizer(library.to_str())
    np.testing.assert_array_equal(made.encode("a a a a a a a"), library.encode("a a a a a a a").ids)


def test_reading_takes_at_most_eight_bytes_per_byte(own):
    """Of text in Latin letters, of Chinese, and of Latin letters with one emoji, which a str holds in 4 bytes each."""
    for line in (
        "the cat sat on the mat, and a dog on the log\n",
        POEM,
        "plain letters, but for one\n",
    ):
        content = line.encode() * (1_500_000 // len(line.encode())) + "🙂\n".encode()
        name = own(content)
        tracemalloc.start()
        try:
            data.load(name, length=64)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * len(content)


@pytest.mark.slow
def test_byte_pairs_are_learnt_in_little_memory(own):
    """In a process of its own, because the library's memory is not Python's. Whole, 1 MB of text took 150 MB."""
    rng = np.random.default_rng(0)
    words = np.array(["cat", "mat", "dog", "log", "naive", "sat", "upon", "the"])[
        rng.integers(0, 8, 225_000)
    ]
    name = own(" ".join(words.tolist()))
    code = f"""
import resource
from aigc_jax import data
from aigc_jax.data.text import Tokenizer
Tokenizer.bpe("a few words " * 99, 270)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = data.load({name!r}, length=64, tokenizer="bpe:300")
print(found.info.levels, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    levels, kilobytes = map(int, out.stdout.split())
    assert levels > 256 and kilobytes < 60_000


def test_a_text_beyond_int32_is_refused():
    endless = np.broadcast_to(np.int32(0), 2**31 - 8)
    with pytest.raises(
        ValueError, match=r"a text of 2,147,483,640 tokens is too long: positions are int32"
    ):
        text.from_tokens(endless, length=8, vocab=1)


# -------------------------------------------------------------------------------------------------------- odd contents


@pytest.mark.parametrize(
    "content",
    [
        POEM * 9,
        "a" * 200,
        " \n" * 90,
        "\0" * 200,
        "ab\0c\x07\x1b" * 40,
        "01" * 99,
        "שלום مرحبا \n" * 20,
        "👍🏽👨‍👩‍👧\r\n" * 40,
        "x" * 70_000 + " y" * 40_000,
        "\r\n" * 35_000,
    ],
    ids=["chinese", "one", "blank", "nul", "control", "two", "rtl", "emoji", "long", "crlf"],
)
def test_any_text_comes_back(own, content):
    name = own(content)
    border = len(content) * 9 // 10
    assert text.sizes(name) == {"train": border, "validation": len(content) - border}
    for split, part in (
        ("train", content[:border]),
        ("validation[5:]+train[:3]", content[border:][5:] + content[:3]),
    ):
        found = data.load(name, split, length=4)
        assert Tokenizer(found.info.tokenizer).decode(found.resident[0]["text"]) == part
        assert found.info.levels == len(set(content)) and found.info.bytes_per_token == len(
            part.encode()
        ) / len(part)
    pairs = (
        data.load(name, "train", length=1, tokenizer="bpe:258") if len(set(content)) > 1 else found
    )
    assert Tokenizer(pairs.info.tokenizer).decode(pairs.resident[0]["text"]) in (
        content[:border],
        part,
    )


def test_a_byte_order_mark_is_no_character(own):
    plain, marked = (
        data.load(own(mark + POEM.encode() * 9, f"{len(mark)}.txt"), length=8).info
        for mark in (b"", b"\xef\xbb\xbf")
    )
    assert plain.fingerprint == marked.fingerprint


WESTERN = "Les élèves étaient déjà là; où êtes-vous allés à Noël? Très bien.\n" * 20
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 20
RUSSIAN = (
    "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
    * 9
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "own.txt is empty"),
        (b"\xef\xbb\xbf", "own.txt is empty"),
        (b"a", "'train' is empty (in characters: train has 0, validation has 1)"),
        (b"ab", "train: the text has 1 tokens, a length of 8 needs at least 9"),
        ((POEM * 20).encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ((POEM * 20).encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        (WESTERN.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        (
            ("plain letters\n" * 20).encode("utf-16-le"),
            "iconv -f UTF-16LE -t UTF-8",
        ),  # this is UTF-8 as well
        (WESTERN.encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
        ((POEM * 20).encode("gb18030"), "iconv -f GB18030 -t UTF-8"),
        (
            ("人人生而自由，在尊嚴和權利上一律平等。\n" * 20).encode("big5"),
            "iconv -f BIG5 -t UTF-8",
        ),
        (JAPANESE.encode("euc_jp"), "iconv -f EUC-JP -t UTF-8"),
        (RUSSIAN.encode("koi8_r"), "iconv -f KOI8-R -t UTF-8"),
        (RUSSIAN.encode("cp1251"), "iconv -f CP1251 -t UTF-8"),
        (WESTERN.encode("latin-1"), "(byte 4); it looks like CP1252"),
        (
            b"plain\n" * 30_000 + "un café\n".encode("latin-1"),
            "(byte 180006); it looks like CP1252",
        ),
        (
            (POEM * 20).encode()[:-2],
            "a few bytes are damaged. Drop them: iconv -c -f UTF-8 -t UTF-8",
        ),
        (b"abc\xed\xa0\x80" * 30, "a few bytes are damaged"),  # half of a surrogate pair
        (bytes(range(256)) * 20, "does not look like text: name a text file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:20],
)
def test_what_cannot_be_read_says_what_it_is(own, content, words):
    for which in ("char", "bpe:300"):
        with pytest.raises(ValueError) as refused:
            data.load(own(content), length=8, tokenizer=which)
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_half_a_surrogate_pair_is_one_line():
    """They come from a command line that is not UTF-8."""
    for call in (
        Tokenizer.characters,
        lambda t: Tokenizer.bpe(t, 260),
        Tokenizer.bpe(STORY, 260).encode,
    ):
        with pytest.raises(ValueError, match=r"the text holds '\\udcff', half of a surrogate pair"):
            call("ab\udcff")
    with pytest.raises(ValueError, match=r"the vocabulary has no '\\udcff'"):
        Tokenizer.characters("ab").encode("ab\udcff")


def test_a_vocabulary_beyond_all_memory_is_refused(own):
    for n in ("1000001", "9" * 30):
        with pytest.raises(ValueError, match="takes a vocabulary of at most 1,000,000, got"):
            data.load(own(POEM * 9), length=8, tokenizer=f"bpe:{n}")


# -------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("train[90%:]", [("train", 162, 180)]),
        ("train[-5:]", [("train", 175, 180)]),
        ("train[:-5]", [("train", 0, 175)]),
        ("train[50:20]+train[:5]", [("train", 50, 20), ("train", 0, 5)]),
        ("validation+train[1_0:20]", [("validation", 0, 20), ("train", 10, 20)]),
    ],
)
def test_slices_are_those_of_tfds(split, found):
    assert cuts("a", split, {"train": 180, "validation": 20}) == found


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (
            "validation[:21]",
            "than there is {there}: take a smaller slice, or a share like validation[:50%]",
        ),
        ("validation[-21:]", "asks for more than there is {there}"),
        ("validation[30:40]+train", "asks for more than there is {there}"),
        ("train[181:]", "asks for more than there is {there}"),
        ("train[:0]", "is empty {there}"),
        ("train[9:9]", "is empty {there}"),
        ("train[50:20]", "is empty {there}"),
        (
            "train[::2]",
            "has no split 'train[::2]'; it has train, validation, and slices such as train[:50%]",
        ),
        ("test[:5]", "has no split 'test[:5]'; it has train, validation, and slices such as"),
        ("train[:200%]", "has no split"),
        ("", "has no split ''"),
    ],
)
def test_slices_that_are_not_there_name_the_sizes(split, words):
    with pytest.raises(ValueError) as refused:
        cuts("a", split, {"train": 180, "validation": 20}, unit="characters")
    said = str(refused.value)
    assert (
        words.format(there="(in characters: train has 180, validation has 20)") in said
        and "\n" not in said
    )


def test_a_default_slice_takes_what_there_is_and_a_typed_one_is_refused(own, capsys):
    source = _cli.Source(own("ab" * 2500))
    defaults = {scale.setup.valid for scale in transformer_text.SCALES.values()}
    for split, taken in (
        ("validation[:20000]", "validation"),
        ("validation[:100000]", "validation"),
    ):
        assert _text.part(source, split, "--valid", defaults) == taken
        assert "validation has 500 characters, all of them are taken" in capsys.readouterr().err
    assert _text.part(source, "validation[:100]", "--valid", defaults) == "validation[:100]"
    with pytest.raises(ValueError, match=r"train has 4,500, validation has 500.*\(--valid\)"):
        _text.part(source, "validation[:501]", "--valid", defaults)
    for split in defaults:  # what was recorded stays what it was
        assert _text.part(_cli.Source("python_source"), split, "--valid", defaults) == split
    with pytest.raises(
        ValueError, match=r"digits is no text: python_source, tiny_shakespeare or text:FILE"
    ):
        _text.part(_cli.Source("digits"), "validation", "--valid", defaults)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_is_chosen_and_recorded(own, tmp_path):
    name = own(POEM * 30)
    Tokenizer.bpe(POEM, 270).save(tmp_path / "tokenizer.json")
    for which, recorded, levels in (
        ("", "char", len(set(POEM))),
        ("char", "char", len(set(POEM))),
        ("characters", "char", len(set(POEM))),
        ("bpe:300", "bpe:300", 300),
        ("BPE:300", "bpe:300", 300),
        (str(tmp_path), str(tmp_path), 270),
        (str(tmp_path / "tokenizer.json"), str(tmp_path / "tokenizer.json"), 270),
    ):
        info = _cli.Source(name, tokenizer=which).load("train", length=8).info
        assert (info.source["tokenizer"], info.levels) == (recorded, levels)
    for which, words in (
        ("bpe:", r"tokenizer must be char \(or characters\), bpe:N"),
        ("bpe:99", "at least 256"),
        ("gpt9", "'gpt9'"),
    ):
        with pytest.raises(ValueError, match=words):
            _cli.Source(name, tokenizer=which).load("train", length=8)
    with pytest.raises(
        ValueError,
        match="digits has no option 'tokenizer'; it takes none: --data.tokenizer is for text:",
    ):
        _cli.Source("digits", tokenizer="char").load("train")
    with pytest.raises(
        ValueError,
        match="digits has no option 'size'; it takes none: --data.size is for images:FOL",
    ):
        data.load("digits", size=32)
    with pytest.raises(ValueError, match="text: name a file, as in text:FILE"):
        data.load("text:", length=8)
    for script in (finetune, gpt2):
        with pytest.raises(
            ValueError, match="the weights come with their tokenizer: leave --data.tokenizer out"
        ):
            replace(script.SCALES["smoke"].setup, data=_cli.Source(name, tokenizer="char"))


def test_a_changed_tokenizer_file_is_read_anew(own, tmp_path):
    name, file = own(POEM * 30), tmp_path / "t.json"
    for vocab in (260, 270):
        Tokenizer.bpe(POEM, vocab).save(file)
        assert data.load(name, length=8, tokenizer=str(file)).info.levels == vocab


def test_nats_per_character_compare_between_tokenizers(own):
    """By characters and by pairs of them: how many tokens stand for a character of the scored text."""
    name = own("abcd" * 500)
    one, two = (data.load(name, "validation", length=8, tokenizer=t) for t in ("char", "bpe:258"))
    assert _text.tokens_per_character(one) == 1.0
    np.testing.assert_allclose(_text.tokens_per_character(two), len(two.resident[0]["text"]) / 200)
    assert _text.tokens_per_character(two) < 0.6


def words_of(known, file):
    """A tokenizer.json of whole words, in which others are [UNK] or, without it, nothing."""
    import tokenizers

    unknown = {"unk_token": "[UNK]"} if "[UNK]" in known else {}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, **unknown)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(file))
    return str(file)


def test_characters_that_a_tokenizer_loses_count(own, tmp_path):
    name = own("night and morning come\n" * 100)
    lossy = words_of(["[UNK]", "night", "and"], tmp_path / "words.json")
    for split, characters in (
        ("validation", 230),
        ("validation[:115]", 115),
        ("validation[50%:]", 115),
    ):
        scored = data.load(name, split, length=4, stride=4, tokenizer=lossy)
        assert _text.tokens_per_character(scored) == len(scored.resident[0]["text"]) / characters
    moved = (tmp_path / "own.txt").rename(tmp_path / "moved.txt")
    assert _text.tokens_per_character(scored, str(moved)) == len(scored.resident[0]["text"]) / 115


# ----------------------------------------------------------------------------------------------- yardsticks and prompts


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_ngrams_of_a_large_vocabulary_are_those_of_a_small_one(n):
    """Counts do not depend on the numbers of the tokens: 6-grams of 2^40 do not fit 64 bits."""
    rng = np.random.default_rng(n)
    training, valid = rng.integers(0, 3, 400), rng.integers(0, 4, 90)
    far = np.array([0, 7, 2**39, 2**40 - 1])
    for length in (n - 1, n):
        counts = [
            _text._counts(*parts, n, length, vocab)
            for parts, vocab in (((training, valid), 4), ((far[training], far[valid]), 2**40))
        ]
        by_hand = [
            sum((training[i : i + length] == valid[j : j + length]).all() for i in range(401 - n))
            for j in range(91 - n)
        ]
        np.testing.assert_array_equal(counts[0], by_hand)
        np.testing.assert_array_equal(counts[1], by_hand)


def test_ngrams_stop_where_a_text_ends():
    training, valid = (text.from_tokens(np.arange(n) % 3, length=1, vocab=3) for n in (9, 4))
    assert list(_text.ngrams(training, valid, str)) == [1, 2, 3, 4]
    assert list(_text.ngrams(valid, training, str)) == [1, 2, 3, 4]


def test_a_prompt_is_of_the_texts_own_characters(own):
    poem, code = (
        data.load(own(t * 30, "t.txt"), "validation", length=8) for t in (POEM, "def f():\n")
    )
    asked = Tokenizer(code.info.tokenizer).encode("def ")
    np.testing.assert_array_equal(_text.prompt("def ", code, 64), asked)
    np.testing.assert_array_equal(_text.prompt("def ", code, 3), asked[:2])
    np.testing.assert_array_equal(_text.prompt("def ", code, 1), asked[:1])
    np.testing.assert_array_equal(_text.prompt("def ", poem, 64), poem.resident[0]["text"][:4])
    np.testing.assert_array_equal(
        _text.prompt("", code, 64), code.resident[0]["text"][:4]
    )  # no tokens


def test_words_are_split_at_spaces_and_chinese_at_characters():
    code = "def f(x):\n\treturn  x + 1.5\r\n"
    assert decoding.WORDS.findall(code) == code.split()
    assert decoding.WORDS.findall("ab 春眠，x y") == ["ab", "春", "眠", "，x", "y"]


# --------------------------------------------------------------------------------------------------------------- fonts


def drawn(tmp_path, content, caption="a caption"):
    fig, ((ax,),) = figures.figure(1, 1, size=(4, 3))
    figures.page(ax, content, title="a title: $x_")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save(fig, tmp_path / "page.png", caption)
    return fig, ax.texts[0]


def test_characters_without_a_font_are_boxes_and_said_so(tmp_path, caplog):
    """U+10380 .. of Ugaritic; not a word of it on standard error, where each missing one was a line."""
    fig, page = drawn(
        tmp_path, "abc \U0001039f\U0001039e\U0001039f\x00$\\frac{$ \\bad$", "text:\U0001039e_$x$"
    )
    fonts = page.get_fontfamily()
    if figures._fonts(fonts, "\U0001039e")[1]:
        assert page.get_text() == "abc \u25a1\u25a1\u25a1·$\\frac{$ \\bad$"
        said = "text:\u25a1_$x$\nno font on this machine has 2 of these characters, shown as \u25a1"
        assert fig._supxlabel.get_text() == said
    assert not caplog.records
    fig, page = drawn(tmp_path, "plain é −1", "plain")
    assert page.get_fontfamily() == ["monospace"] and fig._supxlabel.get_text() == "plain"


def test_a_font_that_has_the_characters_is_found(tmp_path, monkeypatch):
    """One of two glyphs, made here, which no other font of a machine is likely to have."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    pen = TTGlyphPen(None)
    for move, *at in (
        ("moveTo", 0, 0),
        ("lineTo", 0, 700),
        ("lineTo", 700, 700),
        ("lineTo", 700, 0),
    ):
        getattr(pen, move)(tuple(at))
    pen.closePath()
    square = pen.glyph()
    made = FontBuilder(1000, isTTF=True)
    names = [".notdef", "one", "two"]
    made.setupGlyphOrder(names)
    made.setupCharacterMap({0x10FF00: "one", 0x10FF01: "two"})
    made.setupGlyf(dict.fromkeys(names, square))
    made.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    made.setupHorizontalHeader(ascent=800, descent=-200)
    made.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    made.setupOS2(usWeightClass=400)
    made.setupPost()
    made.save(tmp_path / "squares.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(str(tmp_path / "squares.ttf"))
    fig, page = drawn(tmp_path, "abc \U0010ff00\U0010ff01")
    assert (
        page.get_fontfamily() == ["monospace", "Squares"]
        and page.get_text() == "abc \U0010ff00\U0010ff01"
    )
    assert fig._supxlabel.get_text() == "a caption"


def test_pages_are_as_wide_as_they_are_said_to_be():
    from rich.cells import cell_len

    _, ((ax,),) = figures.figure(1, 1, size=(4, 3))
    figures.page(ax, POEM * 2 + "word " * 30 + "\n\nend", columns=20, rows=50)
    lines = ax.texts[0].get_text().split("\n")
    assert max(map(cell_len, lines)) <= 20 and lines[-2:] == ["", "end"]
    assert "".join(lines).replace(" ", "") == (POEM * 2 + "word " * 30 + "end").replace(
        " ", ""
    ).replace("\n", "")


# ------------------------------------------------------------------------------------------------------- whole scripts

TINY = {"layers": 1, "width": 8, "heads": 1}


def small(script, source, folder, **change):
    setup = script.SCALES["smoke"].setup
    run = replace(setup.run, folder=str(folder), steps=2, eval_every=0, batch_size=2, devices=1)
    return replace(setup, model=replace(setup.model, **TINY), run=run, data=source, **change)


@pytest.mark.slow
def test_chinese_works_through_to_the_figure(own, tmp_path):
    """5,000 characters without a d, and with formulas that are none, by characters: a figure, a sample, all rows."""
    rng = np.random.default_rng(0)
    letters = np.array([*map(chr, range(0x4E00, 0x4E00 + 1500)), "$", "\\", "_", "\n"])
    content = "".join(letters[rng.integers(0, len(letters), 5000)])
    setup = small(transformer_text, _cli.Source(own(content)), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = {row.quantity: row.ours for row in transformer_text.run(setup, tmp_path / "run")}
    assert len(rows) == 10 and all(np.isfinite(list(rows.values())))
    assert set((tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")) <= set(content)
    assert (tmp_path / "run" / "transformer_text.png").stat().st_size > 10_000


def test_a_run_is_scored_again_with_the_tokenizer_that_it_keeps(own, tmp_path):
    """Its file may be gone, and a vocabulary of pairs is not learnt a second time."""
    from aigc_jax import train, transformer
    from aigc_jax.commands import runs
    from aigc_jax.train import folder as folders

    file = tmp_path / "mine.json"
    Tokenizer.bpe(POEM, 262).save(file)
    training, valid = (
        data.load(own(POEM * 30), split, length=8, stride=stride, tokenizer=str(file))
        for split, stride in (("train", 0), ("validation", 8))
    )
    cfg = transformer.Config(vocab=262, context=8, **TINY)
    record = folders.describe(
        transformer.make, cfg, train.Run(folder=str(tmp_path)), training.info, valid.info
    )
    folders.write(tmp_path, record, training.info)
    file.unlink()
    for which, source in (("data", training), ("valid", valid)):
        assert runs.load_source(tmp_path, which, None).info.fingerprint == source.info.fingerprint


@pytest.mark.soak
@pytest.mark.parametrize("script", [transformer_text, shakespeare_char, decoding])
@pytest.mark.parametrize("which", ["", "bpe:270"])
@pytest.mark.parametrize(
    "content", [POEM * 200, "ab" * 2500, "$x_0 \\y{ " * 600, "שלום 👍🏽\0\r\n" * 400], ids=range(4)
)
def test_every_script_takes_any_text(own, tmp_path, script, which, content):
    source, folder = _cli.Source(own(content), tokenizer=which), tmp_path / "run"
    change = {}
    if script is shakespeare_char:
        ours = script.SCALES["smoke"].setup
        run = replace(ours.ours_run, steps=2, eval_every=0, batch_size=2, devices=1)
        change = {"ours": replace(ours.ours, **TINY), "ours_run": run, "batches": 2}
    if script is decoding:
        change = {"texts": 2}
    try:
        rows = script.run(small(script, source, folder, **change), folder)
    except (
        ValueError
    ):  # pairs of a text that repeats itself are few: refused before anything is written
        assert which and not folder.exists()
        return
    assert rows and all(isinstance(row.ours, str) or np.isfinite(row.ours) for row in rows)
    assert len(list(folder.glob("*.png"))) == 1
