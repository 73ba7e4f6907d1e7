"""Text: tokenizers, crops and windows, named sets, and what a run folder keeps of them."""

import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex

from aigc_jax import __main__ as commands
from aigc_jax import data, train, transformer
from aigc_jax.core import Optim
from aigc_jax.data import prepare, text
from aigc_jax.data.text import Tokenizer

from .trainee import fingerprint

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
STORY = "the cat sat on the mat.\n\nthe dog sat on the log;\n  and the cat: naïve €uro 🙂\n" * 40


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_characters_are_numbered_by_code_point():
    tokenizer = Tokenizer.characters("hello€\n")
    assert tokenizer.size == 6
    assert tokenizer.encode("\nhé"[:2]).tolist() == [0, 2] and tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(tokenizer.encode("hello€")) == "hello€"
    with pytest.raises(ValueError, match="the vocabulary has no 'x'"):
        tokenizer.encode("helxo")
    with pytest.raises(ValueError, match=r"tokens lie in 0..5, got 0..6"):
        tokenizer.decode([0, 6])


def byte_pairs(content: str, sentence: str) -> list[str]:
    """Byte-level BPE by the book: split by GPT-2's pattern, then merge the earliest learnt pair until none is left."""
    said = json.loads(content)["model"]
    ranks = {
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")): i
        for i, m in enumerate(said["merges"])
    }
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    shown = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    found = []
    for word in regex.findall(pattern, sentence):
        pieces = [shown[b] for b in word.encode()]
        while True:
            pairs = [
                (ranks.get(pair, math.inf), i)
                for i, pair in enumerate(zip(pieces, pieces[1:], strict=False))
            ]
            if not pairs or min(pairs)[0] == math.inf:
                break
            rank = min(pairs)[0]
            i = min(i for r, i in pairs if r == rank)
            pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
        found += pieces
    return found


def test_byte_pairs_are_merged_in_the_order_learnt():
    tokenizer = Tokenizer.bpe(STORY, 300)
    vocabulary = json.loads(tokenizer.content)["model"]["vocab"]
    for sentence in ("the cat\n\n\n sat", "it's  a  dog; 🙂 unseen Ωords 123\t", STORY[:300]):
        tokens = tokenizer.encode(sentence)
        assert tokenizer.decode(tokens) == sentence
        assert [
            vocabulary[piece] for piece in byte_pairs(tokenizer.content, sentence)
        ] == tokens.tolist()


def test_bpe_encodes_any_text_and_shortens_what_it_knows():
    tokenizer = Tokenizer.bpe(STORY, 290)
    assert tokenizer.size == 290 and tokenizer.encode("").dtype == np.int32
    assert len(tokenizer.encode(STORY)) < 0.5 * len(STORY.encode())
    other = "".join(map(chr, range(1, 500))) + "\r\n \n\n \u3042"
    assert tokenizer.decode(tokenizer.encode(other)) == other
    with pytest.raises(ValueError, match="at least 256, the bytes themselves, got 255"):
        Tokenizer.bpe(STORY, 255)


def test_gpt2s_files_are_a_tokenizer(tmp_path):
    made = Tokenizer.bpe(STORY, 300)
    model = json.loads(made.content)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    read = Tokenizer.gpt2(tmp_path)
    np.testing.assert_array_equal(read.encode(STORY), made.encode(STORY))
    (tmp_path / "merges.txt").write_text("nothing of the kind\n")
    with pytest.raises(ValueError, match="vocab.json and merges.txt are no tokenizer"):
        Tokenizer.gpt2(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json, and no merges.txt"):
        Tokenizer.gpt2(tmp_path)


@pytest.mark.parametrize(
    "made", [Tokenizer.characters(STORY), Tokenizer.bpe(STORY, 280)], ids=["char", "bpe"]
)
def test_a_tokenizer_is_saved_and_read(tmp_path, made):
    made.save(tmp_path / "tokenizer.json")
    read = Tokenizer.load(tmp_path / "tokenizer.json")
    assert read.size == made.size and read.content == made.content
    np.testing.assert_array_equal(read.encode(STORY), made.encode(STORY))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: this is no tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path / "nowhere.json")


def changed(made, **values):
    """A tokenizer.json with other settings, as `transformers` saves them."""
    return json.dumps({**json.loads(made.content), **values})


def test_no_setting_of_a_file_cuts_pads_or_varies_a_text(tmp_path):
    made = Tokenizer.bpe(STORY, 300)
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 4096},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    drops = {**json.loads(made.content)["model"], "dropout": 0.9}
    around = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "!", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
    }
    settings = (
        {"truncation": cut},
        {"padding": pad},
        {"truncation": cut, "padding": pad},
        {"model": drops},
        {"post_processor": around},
    )
    for i, values in enumerate(settings):
        (tmp_path / f"{i}.json").write_text(changed(made, **values))
        read = Tokenizer.load(tmp_path / f"{i}.json")
        np.testing.assert_array_equal(read.encode(STORY), made.encode(STORY), err_msg=str(values))
        said = json.loads(read.content)
        assert said["truncation"] is said["padding"] is said["model"]["dropout"] is None
        again = Tokenizer(read.content)  # as a run folder keeps it
        assert (
            again.content == read.content
            and again.encode(STORY).tolist() == made.encode(STORY).tolist()
        )
    untouched = changed(made)
    assert Tokenizer(untouched).content == untouched


def test_what_a_tokenizer_loses_is_said_in_one_line(capsys):
    import tokenizers as library

    def warned(made, sentence="The cät, 🙂 sat"):
        tokenizer = Tokenizer(made if isinstance(made, str) else made.to_str())
        tokenizer.encode(sentence)
        return capsys.readouterr().err

    gpt2 = Tokenizer.bpe(STORY, 300)
    assert warned(gpt2.content) == warned(Tokenizer.characters("The cät, 🙂 sat").content) == ""
    lower = warned(changed(gpt2, normalizer={"type": "Lowercase"}))
    assert lower.startswith("warning: the tokenizer changes the text (Lowercase): at character 0 ")
    assert (
        lower.endswith(" 'The cät, 🙂 s' comes back as 'the cät, 🙂 s'\n")
        and lower.count("\n") == 1
    )
    assert warned(changed(gpt2, normalizer={"type": "Lowercase"}), "the cat") == ""
    words = library.Tokenizer(library.models.WordLevel({"?": 0, "The": 1, "sat": 2}, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    assert (
        warned(words)
        == "warning: the tokenizer does not know all of the text: 3 of 5 tokens are '?'\n"
    )
    pieces = library.Tokenizer(
        library.models.Unigram([("<unk>", 0.0), ("T", -1.0), ("h", -1.0)], unk_id=0)
    )
    assert "tokens are '<unk>'" in warned(pieces)
    dropped = library.Tokenizer(library.models.BPE({"T": 0, "s": 1}, []))
    assert "changes the text: at character 1 'he cät, 🙂 sa' comes back as" in warned(dropped)
    added = library.Tokenizer.from_str(gpt2.content)
    added.add_special_tokens([library.AddedToken("cät", lstrip=True)])
    assert "changes the text: at character 3 " in warned(added)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 10**5, "maximum recursion depth"),
        ('{"a":' * 10**5, "maximum recursion depth"),
        ("[]", ""),
        ('{"characters": 5}', ""),
        (
            '{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}',
            "exceeds 32 bits",
        ),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', ""),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}}', ""),
        ('{"model": {"type": "BPE", "vocab": [], "merges": 3}}', ""),
        ('{"characters": "ab"', ""),
    ],
)
def test_what_is_no_tokenizer_is_one_line(content, words):
    with pytest.raises(ValueError, match=f"this is no tokenizer .*{words}") as refused:
        Tokenizer(content)
    assert "\n" not in str(refused.value)


def test_numbers_with_gaps_are_counted_to_the_last():
    said = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 900}, "unk_token": "a"},
    }
    tokenizer = Tokenizer(json.dumps(said))
    assert tokenizer.size == 901 and tokenizer.encode("b").tolist() == [900]
    no_unknown = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
    }
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text .*WordLevel"):
        Tokenizer(json.dumps(no_unknown)).encode("b")


# ---------------------------------------------------------------------------------------------------- crops and windows


def test_crops_are_pieces_of_the_text_from_everywhere():
    tokens = np.arange(50, dtype=np.int32)
    crops = text.from_tokens(tokens, length=7)
    assert crops.info.examples is None and crops.info.shape == (8,) and crops.info.levels == 50
    x = np.concatenate([crops.batch(3, i, 200)["tokens"] for i in range(10)])
    assert (np.diff(x, axis=1) == 1).all() and set(x[:, 0]) == set(range(43))
    np.testing.assert_array_equal(crops.batch(3, 4, 16)["tokens"], crops.batch(3, 4, 16)["tokens"])
    assert (crops.batch(4, 4, 16)["tokens"] != crops.batch(3, 4, 16)["tokens"]).any()
    arrays, rows, take = crops.resident
    on_device = jax.jit(take)(jax.tree.map(jnp.asarray, arrays), rows(3, 4, 16))["tokens"]
    np.testing.assert_array_equal(on_device, crops.batch(3, 4, 16)["tokens"])


@pytest.mark.parametrize(
    ("n", "length", "stride"),
    [(50, 7, 7), (50, 7, 3), (50, 7, 1), (8, 7, 7), (9, 7, 5), (43, 6, 6)],
)
def test_windows_count_every_token_but_the_first_once(n, length, stride):
    windows = text.from_tokens(np.arange(n), length=length, stride=stride)
    batch = windows.batch(0, 0, windows.info.examples)
    counted = batch["tokens"][:, 1:][batch["mask"] == 1]
    assert sorted(counted.tolist()) == list(range(1, n))
    # What counts has at least length - stride tokens before it, but for the first window.
    place = np.broadcast_to(np.arange(length), batch["mask"].shape)
    first = batch["tokens"][:, :1] == 0
    assert ((place >= length - stride) | first | (batch["mask"] == 0)).all()


@pytest.mark.slow
def test_strided_evaluation_is_a_loop_over_the_tokens():
    cfg = transformer.Config(vocab=9, context=6, layers=1, heads=2, width=8)
    tokens = np.random.default_rng(0).integers(0, 9, 40).astype(np.int32)
    windows = text.from_tokens(tokens, length=6, stride=2, vocab=9, bytes_per_token=1.5)
    family = transformer.make(cfg)
    state = family.init(jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda x: 5 * x, state.params))
    got = train.evaluate(
        train.Result(family, state, cfg, windows.info, None), windows, batch_size=4
    )
    apply = jax.jit(lambda x: jax.nn.log_softmax(transformer.apply(cfg, state.params, x)))
    total = 0.0
    for t in range(1, 40):
        # Token t is counted in the first window that reaches it; the last window ends with the text.
        start = min(0 if t <= 6 else 2 * -(-(t - 6) // 2), 40 - 7)
        total -= float(apply(tokens[None, start : start + 6])[0, t - 1 - start, tokens[t]])
    np.testing.assert_allclose(got["nll_nats_per_token"], total / 39, rtol=1e-5)
    np.testing.assert_allclose(got["nll_bits_per_byte"], total / 39 / math.log(2) / 1.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 50}, "the text has 50 tokens, a length of 50 needs at least 51"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 5, "stride": 6}, r"stride must lie in 0..length = 5, got 6"),
        ({"length": 5, "vocab": 49}, r"tokens must lie in 0..48, got 0..49"),
        ({"length": 5, "tokens": np.arange(-1, 9)}, r"tokens must lie in 0..8, got -1..8"),
        (
            {"length": 5, "tokens": np.arange(9.0)},
            r"tokens must be whole numbers \[N\], got float64 \[9\]",
        ),
        (
            {"length": 5, "tokens": np.zeros((3, 9), int)},
            r"tokens must be whole numbers \[N\], got int64 \[3, 9\]",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        text.from_tokens(**{"tokens": np.arange(50), **options})


def test_fingerprint_sees_tokens_cut_and_vocabulary():
    def of(tokens=range(50), **options):
        return text.from_tokens(
            np.array(tokens), **{"length": 5, "vocab": 60, **options}
        ).info.fingerprint

    found = [of(), of(range(1, 51)), of(length=6), of(stride=5), of(vocab=61)]
    assert len(set(found)) == 5 and of() == found[0]


# ---------------------------------------------------------------------------------------------------------- named sets


def test_python_source_is_there_for_everyone():
    training = data.load("python_source", length=32)
    valid = data.load("python_source", "validation", length=32, stride=32)
    assert training.info.kind == "text" and training.info.levels == valid.info.levels < 128
    whole = Tokenizer(training.info.tokenizer).decode(training.resident[0]["text"])
    tail = Tokenizer(valid.info.tokenizer).decode(valid.resident[0]["text"])
    assert "import" in whole and "def " in tail and len(whole) == 9 * (len(whole) + len(tail)) // 10
    assert training.info.source == {
        "name": "python_source",
        "split": "train",
        "length": 32,
        "stride": 0,
        "tokenizer": "char",
    }


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    name = f"text:{tmp_path / 'story.txt'}"
    training, valid = data.load(name, length=8), data.load(name, "validation", length=8, stride=8)
    both = [Tokenizer(s.info.tokenizer).decode(s.resident[0]["text"]) for s in (training, valid)]
    assert "".join(both) == STORY and len(both[0]) == len(STORY) * 9 // 10
    part = data.load(name, "train[:50%]", length=8)
    assert (
        Tokenizer(part.info.tokenizer).decode(part.resident[0]["text"])
        == both[0][: len(both[0]) // 2]
    )
    pairs = data.load(name, "validation", length=8, stride=8, tokenizer="bpe:280")
    tokenizer = Tokenizer(pairs.info.tokenizer)
    assert tokenizer.content == Tokenizer.bpe(both[0], 280).content  # of the training part alone
    assert tokenizer.decode(pairs.resident[0]["text"]) == both[1]
    np.testing.assert_allclose(
        pairs.info.bytes_per_token, len(both[1].encode()) / len(pairs.resident[0]["text"])
    )
    tokenizer.save(tmp_path / "mine.json")
    again = data.load(name, "validation", length=8, stride=8, tokenizer=str(tmp_path / "mine.json"))
    np.testing.assert_array_equal(again.resident[0]["text"], pairs.resident[0]["text"])


def test_line_ends_are_characters(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n" * 5)
    found = data.load(f"text:{tmp_path / 'dos.txt'}", length=8)
    tokenizer = Tokenizer(found.info.tokenizer)
    assert tokenizer.decode(found.resident[0]["text"]).startswith("one\r\ntwo\rthree\n")
    tokenizer.save(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes((tmp_path / "t.json").read_bytes() + b"\r\n")
    loaded = Tokenizer.load(tmp_path / "t.json")
    loaded.save(tmp_path / "u.json")
    assert (
        Tokenizer.load(tmp_path / "u.json").content == loaded.content
        and loaded.size == tokenizer.size
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("text:nowhere.txt", {}, "text: there is no file nowhere.txt"),
        ("text:latin.txt", {}, "latin.txt is not UTF-8 .byte 3."),
        ("text:short.txt", {}, "train: the text has 9 tokens, a length of 256 needs at least 257"),
        (
            "text:short.txt",
            {"length": 2, "tokenizer": "words"},
            r"tokenizer must be char \(or characters\), bpe:N, a tokenizer.json or",
        ),
        (
            "text:short.txt",
            {"length": 2, "tokenizer": "none.json"},
            "there is no tokenizer none.json",
        ),
        (
            "text:short.txt",
            {"length": 2, "lengths": 3},
            "has no option 'lengths'; it takes length, stride, tokenizer",
        ),
        ("python_source", {"folder": "."}, "python_source needs no files, so it takes no folder"),
    ],
)
def test_mistakes_with_text_are_one_line(tmp_path, monkeypatch, name, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "short.txt").write_text("0123456789")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        data.load(name, **options)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        data.load("text:short.txt", "test", length=2)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A short text registered in place of the official file."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    from aigc_jax.data.builders.tiny_shakespeare.tiny_shakespeare_dataset_builder import Builder

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("AIGC_DATA", raising=False)
    content = "".join(f"line {i}\n" for i in range(100)).encode()
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "any-name").write_bytes(content)
    info = tfds.core.download.checksums.UrlInfo(
        size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename="input.txt"
    )
    monkeypatch.setattr(Builder, "url_infos", {"https://example.invalid/input.txt": info})
    yield folder, content.decode()
    text._official_text.cache_clear()


def test_tiny_shakespeare_is_cut_at_nine_tenths(official, monkeypatch):
    def no_network(*args, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    with pytest.raises(
        FileNotFoundError,
        match="tiny_shakespeare is not on this machine, and .* copy input.txt into",
    ):
        data.load("tiny_shakespeare", length=8)
    folder, content = official
    parts = [
        data.load("tiny_shakespeare", s, folder=str(folder), length=8)
        for s in ("train", "validation")
    ]
    both = [Tokenizer(p.info.tokenizer).decode(p.resident[0]["text"]) for p in parts]
    assert "".join(both) == content and len(both[0]) == len(content) * 9 // 10


@pytest.mark.skipif(
    not (SHARED / "tiny_shakespeare").is_dir(), reason="shared/data/tiny_shakespeare is not here"
)
def test_tiny_shakespeare_itself(tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("AIGC_DATA", str(SHARED))
    text._official_text.cache_clear()
    training, valid = (data.load("tiny_shakespeare", s, length=64) for s in ("train", "validation"))
    text._official_text.cache_clear()
    assert (len(training.resident[0]["text"]), len(valid.resident[0]["text"])) == (
        1_003_854,
        111_540,
    )
    assert training.info.levels == 65


# -------------------------------------------------------------------------------------------------------------- a run

CFG = transformer.Config(
    vocab=len(set(STORY)), context=16, layers=1, heads=2, width=16, optim=Optim(lr=3e-3)
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "story.txt").write_text(STORY, encoding="utf-8")
    name = f"text:{folder / 'story.txt'}"
    run = train.Run(
        folder=str(folder / "run"),
        steps=60,
        batch_size=16,
        eval_every=30,
        steps_per_call=10,
        best="nll_bits_per_byte",
        devices=1,
    )
    valid = data.load(name, "validation", length=16, stride=16)
    train.fit(transformer.make, CFG, run, data.load(name, length=16), valid=valid)
    return folder / "run"


def call(*words):
    out = subprocess.run(
        [sys.executable, "-m", "aigc_jax", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return out.returncode, out.stdout, out.stderr


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer_and_reports_bits(run_folder):
    tokenizer = Tokenizer.load(run_folder / "tokenizer.json")
    assert (
        tokenizer.content
        == Tokenizer.characters(STORY).content
        == train.load(run_folder).info.tokenizer
    )
    last = [line["valid"] for line in train.metrics(run_folder) if "valid" in line][-1]
    per_byte = last["nll_nats_per_token"] / math.log(2) * len(STORY) / len(STORY.encode())
    np.testing.assert_allclose(last["nll_bits_per_byte"], per_byte, rtol=0.05)
    assert last["nll_nats_per_token"] < math.log(tokenizer.size)
    said = json.loads((run_folder / "run.json").read_text())
    assert said["data"]["tokenizer"] == ""  # it has a file of its own


@pytest.mark.slow
def test_text_is_written_to_the_terminal(run_folder):
    code, said, err = call(
        "sample", run_folder, "--text.prompt", "the cat", "--text.new", 9, "--n", 2
    )
    assert code == 0, err
    result = train.load(run_folder)
    tokenizer = Tokenizer(result.info.tokenizer)
    assert said.startswith("--- 1 of 2\nthe cat") and "\n--- 2 of 2\nthe cat" in said
    # The same tokens as generate's, with the key of the first.
    key = jax.random.split(jax.random.split(jax.random.key(0), 4)[3], 2)[0]
    prompt = jnp.asarray(tokenizer.encode("the cat"))[None]
    tokens = transformer.generate(result.config, result.state.params, prompt, key, max_new_tokens=9)
    assert said.startswith("--- 1 of 2\nthe cat" + tokenizer.decode(tokens[0]) + "\n--- 2 of 2\n")
    code, greedy, _ = call(
        "sample", run_folder, "--text.prompt", "the", "--text.new", 300, "--text.temperature", 0
    )
    assert code == 0 and len(greedy) == 17 + 1  # the context ends; the last token has no position
    code, stopped, _ = call(
        "sample", run_folder, "--text.prompt", "the", "--text.stop", " ", "--text.temperature", 0
    )
    assert code == 0 and stopped == greedy[: 3 + greedy[3:].index(" ") + 1] + "\n"


@pytest.mark.slow
def test_the_command_line_ends_where_the_model_does_and_repeats_nothing(run_folder, capsys):
    from aigc_jax.commands.sample import DiffusionOptions, TextOptions, write_text

    result = train.load(run_folder)
    tokenizer = Tokenizer(result.info.tokenizer)

    def write(result=result, **how):
        write_text(result, TextOptions(temperature=0.0, **how), DiffusionOptions(), 1, 0)
        return capsys.readouterr().out.removesuffix("\n")

    free = write(prompt="the")
    assert len(free) == len(write(prompt=free[:16])) == 17  # a full context has room for one more
    end = tokenizer.encode(free[8])[0].item()
    ends = result._replace(config=dataclasses.replace(result.config, eos=(end,)))
    assert write(ends, prompt="the") == free[: 3 + free[3:].index(free[8])]
    assert write(ends, prompt="the", stop=free[8]) == free[: 4 + free[3:].index(free[8])]
    prompt = jnp.asarray(tokenizer.encode("the the "))[None]
    tokens = transformer.generate(
        result.config,
        result.state.params,
        prompt,
        jax.random.key(0),
        max_length=17,
        sampling=transformer.Sampling(0.0),
        no_repeat_ngram_size=2,
    )
    assert write(prompt="the the ", no_repeat_ngram_size=2) == "the the " + tokenizer.decode(
        tokens[0]
    )


def test_a_vocabulary_without_line_breaks_has_a_default_prompt():
    from aigc_jax.commands.text import TextOptions, encode_prompt

    assert encode_prompt(Tokenizer.characters("ab"), TextOptions.prompt).tolist() == [0]
    assert encode_prompt(Tokenizer.characters("a\n"), TextOptions.prompt).tolist() == [0]
    with pytest.raises(ValueError, match="the vocabulary has no 'z'"):
        encode_prompt(Tokenizer.characters("ab"), "z")


@pytest.mark.slow
def test_tokens_that_the_tokenizer_has_not_are_never_written(tmp_path):
    """A vocabulary is often rounded up: the rest is no token of any text."""
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    cfg = dataclasses.replace(CFG, vocab=500)
    crops = data.load(f"text:{tmp_path / 'story.txt'}", length=16)
    train.fit(
        transformer.make,
        cfg,
        train.Run(folder=str(tmp_path / "run"), steps=1, batch_size=8, devices=1),
        crops,
    )
    code, said, err = call("sample", tmp_path / "run", "--text.prompt", "the")
    assert code == 0 and len(said) == 18, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text.prompt", "x" * 3], "the vocabulary has no 'x'"),
        (["--text.prompt", ""], "the prompt has 0 tokens; it must have 1 to 16"),
        (["--text.prompt", "t" * 17], "the prompt has 17 tokens; it must have 1 to 16"),
        (
            ["--text.no-repeat-ngram-size", "-1"],
            "text.no_repeat_ngram_size must be at least 0, got -1",
        ),
        (["--text.top-p", "0"], "sampling.top_p must be above 0 and at most 1, got 0.0"),
        (["--text.top-p", "1.5"], "sampling.top_p must be above 0 and at most 1, got 1.5"),
        (["--text.stop", "the"], "text.stop must be one token, 'the' is 3"),
        (["--out", "a.png"], "must name a .txt or .npy file"),
        (["--n", "0"], "n and chunk must be at least 1"),
    ],
)
def test_mistakes_of_sampling_text_are_one_line(run_folder, flags, words, capsys, monkeypatch):
    from aigc_jax import __main__

    monkeypatch.setattr(sys, "argv", ["aigc_jax", "sample", str(run_folder), *flags])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err and len(said.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_training_starts_from_parameters_that_are_given(tmp_path):
    crops = text.from_tokens(np.random.default_rng(0).integers(0, 9, 200), length=8, vocab=9)
    cfg = transformer.Config(vocab=9, context=8, layers=1, heads=2, width=8, ema=0.5)
    params = jax.jit(lambda: transformer.init(cfg, jax.random.key(7)))()
    run = train.Run(folder=str(tmp_path / "a"), steps=4, batch_size=8, save_every=2, devices=1)
    one = train.fit(transformer.make, cfg, run, crops, params=params)
    assert (tmp_path / "a" / "checkpoints" / "0").is_dir()
    state = transformer.make(cfg).init(jax.random.key(0))._replace(params=params, ema=params)
    keys = jax.random.split(jax.random.key(0), 4)[1]
    step = jax.jit(transformer.make(cfg).step)
    for i in range(4):
        state, _ = step(state, crops.batch(0, i, 8), jax.random.fold_in(keys, i))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.state.params, state.params
    )
    again = train.fit(transformer.make, cfg, run, crops, params=params)
    assert fingerprint(again.state) == fingerprint(one.state)
    for other in (None, jax.tree.map(lambda x: x + 1, params)):
        with pytest.raises(train.Refused, match="holds another run: params"):
            train.fit(transformer.make, cfg, run, crops, params=other)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # as some weights are published
    two = train.fit(
        transformer.make,
        cfg,
        dataclasses.replace(run, folder=str(tmp_path / "b")),
        crops,
        params=half,
    )
    assert {x.dtype for x in jax.tree.leaves(two.state.params)} == {jnp.dtype("float32")}
    values, _ = train.replay(tmp_path / "a", crops, step=1)
    assert np.isfinite(values["loss"])
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "0")
    with pytest.raises(
        train.Refused, match="began with parameters that were given and has no intact checkpoint"
    ):
        train.replay(tmp_path / "a", crops, step=1)
    with pytest.raises(train.Refused, match="params do not fit this model"):
        train.fit(
            transformer.make,
            cfg,
            train.Run(steps=1, batch_size=8),
            crops,
            params={"wte": params["wte"]},
        )


def test_another_tokenizer_than_trainings_is_refused(run_folder, tmp_path):
    """Its numbers mean other characters, and a loss in them would mean nothing."""
    (tmp_path / "other.txt").write_text("the cat " * 60)
    name = f"text:{tmp_path / 'other.txt'}"
    other = data.load(name, length=16, stride=16)
    result = train.load(run_folder)
    with pytest.raises(
        train.Refused, match="another tokenizer than that of training: load it with tokenizer="
    ):
        train.evaluate(result, other)
    training = data.load(f"text:{run_folder.parent / 'story.txt'}", length=16)
    with pytest.raises(train.Refused, match="another tokenizer than that of training"):
        train.fit(transformer.make, CFG, train.Run(steps=1, batch_size=8), training, valid=other)
    fits = data.load(name, length=16, stride=16, tokenizer=str(run_folder / "tokenizer.json"))
    assert np.isfinite(train.evaluate(result, fits)["nll_nats_per_token"])


@pytest.mark.slow
def test_tokens_without_a_tokenizer_are_not_written(tmp_path, capsys, monkeypatch):
    from aigc_jax import __main__

    crops = text.from_tokens(np.arange(200) % 9, length=8)
    cfg = transformer.Config(vocab=9, context=8, layers=1, heads=2, width=8)
    train.fit(
        transformer.make,
        cfg,
        train.Run(folder=str(tmp_path / "a"), steps=1, batch_size=8, devices=1),
        crops,
    )
    monkeypatch.setattr(sys, "argv", ["aigc_jax", "sample", str(tmp_path / "a")])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "was trained on tokens without a tokenizer: use train.sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab": 10}, "model.vocab is 10, the tokenizer has 12 tokens"),
        ({"context": 7}, "model.context is 7, the data's length is 8"),
    ],
)
def test_a_vocabulary_or_length_that_does_not_fit_is_refused_before_compiling(change, words):
    crops = text.from_tokens(np.random.default_rng(0).integers(0, 12, 200), length=8)
    cfg = transformer.Config(
        **{"vocab": 12, "context": 8, "layers": 1, "heads": 2, "width": 8, **change}
    )
    with pytest.raises(train.Refused, match=words):
        train.fit(transformer.make, cfg, train.Run(steps=1, batch_size=8), crops)


@pytest.mark.slow
def test_a_run_on_crops_is_evaluated_on_windows(tmp_path, monkeypatch, capsys):
    """Crops have no end. The command scores each token of a split but the first once instead."""
    crops = data.load("python_source", "train", length=32)
    cfg = transformer.Config(vocab=crops.info.levels, context=32, layers=1, heads=1, width=8)
    result = train.fit(transformer.make, cfg, train.Run(str(tmp_path / "run"), 1, 8), crops)
    monkeypatch.setattr(
        sys, "argv", ["aigc_jax", "evaluate", str(tmp_path / "run"), "--split", "validation"]
    )
    commands.main()
    windows = data.load("python_source", "validation", length=32, stride=32)
    wanted = train.evaluate(result, windows)["nll_nats_per_token"]
    assert f"{wanted:.6g}" in capsys.readouterr().out
    with pytest.raises(train.Refused, match="endless: load text with stride=LENGTH"):
        train.evaluate(result, crops)


@pytest.mark.slow
def test_a_run_is_evaluated_on_another_text_with_its_own_tokenizer(tmp_path, monkeypatch, capsys):
    """The other text lacks some characters of the first, so it would have another tokenizer."""
    (tmp_path / "a.txt").write_text("abcdefgh \n" * 200)
    (tmp_path / "b.txt").write_text("hgfa\n" * 400)
    ours = data.load(f"text:{tmp_path}/a.txt", "train", length=16)
    cfg = transformer.Config(vocab=ours.info.levels, context=16, layers=1, heads=1, width=8)
    result = train.fit(transformer.make, cfg, train.Run(str(tmp_path / "run"), 1, 8), ours)
    flags = ["--data.folder", f"{tmp_path}/b.txt", "--split", "validation"]
    monkeypatch.setattr(sys, "argv", ["aigc_jax", "evaluate", str(tmp_path / "run"), *flags])
    commands.main()
    kept = str(tmp_path / "run" / "tokenizer.json")
    theirs = data.load(f"text:{tmp_path}/b.txt", "validation", length=16, stride=16, tokenizer=kept)
    wanted = train.evaluate(result, theirs)["nll_nats_per_token"]
    assert f"{wanted:.6g}" in capsys.readouterr().out
