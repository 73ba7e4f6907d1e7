"""`python -m aigc_jax sample` with every family that writes text: titles, gaps, and what is refused."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from aigc_jax import __main__ as commands
from aigc_jax import data, ddpm, language, train, transformer
from aigc_jax.commands.text import _decode, _pieces
from aigc_jax.core import Optim
from aigc_jax.data import tang
from aigc_jax.data.text import Tokenizer

TINY = {"layers": 1, "heads": 2, "width": 8, "optim": Optim(lr=1e-2)}
TITLE, FIRST = "静夜思", "床前明月光，"
STORY = "the cat sat on the mat. the dog sat on the log. " * 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(kind) -> the folder of a run of one update."""
    root = tmp_path_factory.mktemp("text")
    poems = data.load("tang_poems", "test", form="5x4")
    (root / "story.txt").write_text(STORY)
    story = data.load(f"text:{root / 'story.txt'}", length=23)
    V, W = poems.info.levels, story.info.levels
    tokens = ddpm.TokenConfig(vocab=W, context=24, **TINY)
    kinds = {
        "poems": (transformer.make, transformer.Config(vocab=V, context=39, **TINY), poems),
        "masked": (
            ddpm.make_tokens,
            ddpm.TokenConfig(vocab=V, context=40, unlabelled=0.5, **TINY),
            poems,
        ),
        "story": (ddpm.make_tokens, tokens, story),
        "rounded": (ddpm.make_tokens, replace(tokens, vocab=500), story),
        "uniform": (ddpm.make_tokens, replace(tokens, process="uniform"), story),
        "noisy": (ddpm.make_tokens, replace(tokens, process="uniform", vocab=500), story),
        "lstm": (language.make, language.Config(vocab=W, embedding=4, width=8), story),
        "nplm": (language.make, language.Config("nplm", W, embedding=4, width=8), story),
    }

    def folder(kind):
        place = root / kind
        if not place.exists():
            make, cfg, training = kinds[kind]
            run = train.Run(folder=str(place), steps=1, batch_size=4, devices=1)
            train.fit(make, cfg, run, training)
        return place

    return folder


@pytest.fixture
def sample(monkeypatch, capsys):
    """sample(folder, *flags) -> (exit code, output, errors)."""

    def run(*words):
        capsys.readouterr()  # what training a fixture has printed
        monkeypatch.setattr(sys, "argv", ["aigc_jax", "sample", *map(str, words)])
        code = 0
        try:
            commands.main()
        except SystemExit as stopped:
            code = stopped.code
        return code or 0, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_poem_is_written_on_a_title(runs, sample):
    """It is the model's own: title and body as in training, up to the first padding."""
    folder = runs("poems")
    code, said, err = sample(folder, "--text.title", TITLE, "--text.prompt", FIRST)
    assert code == 0 and said.startswith(f"{TITLE}\n{FIRST}"), err
    body = said.removesuffix("\n").partition("\n")[2]
    result = train.load(folder)
    encode = Tokenizer(result.info.tokenizer).encode
    given = np.concatenate([encode(tang.place(TITLE, 16)), encode(FIRST)])
    key = jax.random.split(jax.random.split(jax.random.key(0), 4)[3], 1)[0]
    tokens = transformer.generate(
        result.config, result.state.params, given[None], key, max_new_tokens=24 - len(FIRST)
    )[0]
    wanted = FIRST + Tokenizer(result.info.tokenizer).decode(tokens)
    assert body == wanted.partition(tang.PAD)[0] and len(body) <= 24


@pytest.mark.slow
def test_gaps_of_a_poem_are_filled_and_the_rest_stays(runs, sample):
    folder = runs("masked")
    verse = "床前__光，疑是地上霜。举头望明月，低头思__。"
    code, said, err = sample(folder, "--text.title", TITLE, "--text.infill", verse, "--n", 2)
    assert code == 0, err
    bodies = [text.partition("\n")[2].removesuffix("\n") for text in said.split(" of 2\n")[1:]]
    for body in (bodies[0].removesuffix("\n--- 2"), bodies[1]):
        for i, char in enumerate(verse):
            if char != "_" and i < len(body):
                assert body[i] == char
        assert "_" not in body and len(body) >= verse.rindex("思") + 1
    assert bodies[0].removesuffix("\n--- 2") != bodies[1]  # each text has a key of its own


@pytest.mark.slow
def test_new_says_how_much_follows_a_given_beginning(runs, sample):
    """--text.new 0 ends a poem where the given text ends; a story is exactly as long as asked."""
    short = "床前__光，"
    flags = ("--text.title", TITLE, "--text.infill", short)
    code, said, err = sample(runs("masked"), *flags, "--text.new", 0)
    assert code == 0 and len(said) == len(f"{TITLE}\n{short}\n"), err
    lengths = [
        len(sample(runs("story"), *flags)[1]) - 1
        for flags in (
            ("--text.prompt", "the "),  # to the end of the context
            ("--text.prompt", "the ", "--text.new", 3),
            ("--text.infill", "the ___ sat"),
            ("--text.infill", "the ___ sat", "--text.new", 3),
        )
    ]
    assert lengths == [24, 7, 11, 14]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--diffusion.steps", 2),
        ("--diffusion.order", "confidence", "--text.temperature", 0),
        ("--diffusion.order", "ancestral"),
        ("--diffusion.block", 6, "--diffusion.steps", 8),
    ],
)
def test_text_diffusion_draws_what_the_family_draws(runs, sample, flags):
    folder = runs("story")
    code, said, err = sample(folder, *flags)
    assert code == 0, err
    result, key = train.load(folder), jax.random.split(jax.random.key(0), 4)[3]
    names = {"--diffusion.steps": "steps", "--diffusion.order": "order"}
    names |= {"--diffusion.block": "block", "--text.temperature": "temperature"}
    options = {names[name]: value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    wanted = result.family.sample(result.state, jax.random.split(key, 1)[0], n=1, **options)[0]
    assert said == Tokenizer(result.info.tokenizer).decode(wanted) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "lstm", "nplm", "rounded"])
def test_every_family_of_texts_writes(runs, sample, kind):
    """ "rounded" has 500 tokens, and its tokenizer 15: the others are never written."""
    code, said, err = sample(runs(kind), "--text.prompt", "the c", "--text.new", 12)
    assert code == 0 and said.startswith("the c") and len(said) == 18, err
    assert set(said) <= set(STORY + "\n")


@pytest.mark.slow
def test_a_recurrent_net_carries_its_state_from_token_to_token(runs, sample):
    """The greedy text is that of the whole text at once."""
    folder = runs("lstm")
    result = train.load(folder)
    _, said, _ = sample(folder, "--text.prompt", "the", "--text.new", 60, "--text.temperature", 0)
    tokens = Tokenizer(result.info.tokenizer).encode(said.removesuffix("\n"))
    logits, _ = language.apply(result.config, result.state.params, tokens[None, :-1])
    np.testing.assert_array_equal(logits[0].argmax(-1)[2:], tokens[3:])


@pytest.mark.slow
def test_texts_become_numbers_and_blocks_have_steps_by_themselves(runs, sample, tmp_path):
    out, folder = tmp_path / "x.npy", runs("story")
    flags = ("--n", 3, "--diffusion.order", "confidence", "--diffusion.steps", 6)
    assert sample(folder, *flags, "--out", out)[0] == 0
    result, key = train.load(folder), jax.random.split(jax.random.key(0), 4)[3]
    wanted = train.sample(result, key, n=3, order="confidence", steps=6)
    np.testing.assert_array_equal(np.load(out), wanted)
    code, said, err = sample(
        runs("masked"), "--text.title", TITLE, "--diffusion.block", 8, "--text.infill", "床_"
    )
    assert code == 0 and said.startswith(f"{TITLE}\n床"), err


def test_blanks_are_tokens_of_their_own():
    tokenizer = Tokenizer.characters("ab")
    tokens = np.concatenate(list(_pieces(tokenizer, "a??b?", "?")))
    assert tokens.tolist() == [0, -1, -1, 1, -1]
    for beyond in (2, 3):  # the mask, or noise that is no token of the text
        assert _decode(tokenizer, np.where(tokens < 0, beyond, tokens), "?") == "a??b?"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["story", "noisy"])
def test_text_grows_on_a_terminal(runs, sample, monkeypatch, kind):
    """Each step is shown: the blanks become fewer, one by one. Noise beyond the tokens is blank."""
    from aigc_jax.commands import text

    shown = []

    class Screen:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, words, refresh):
            shown.append(str(words))

    monkeypatch.setattr(text, "Live", Screen)
    monkeypatch.setattr(text, "Console", lambda file: type("Terminal", (), {"is_terminal": True}))
    assert sample(runs(kind), "--text.infill", "the ___ sat")[0] == 0
    blanks = [words.count("_") for words in shown]
    assert blanks == [2, 1, 0] if kind == "story" else len(blanks) == 3 and blanks[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("poems", (), "writes on a title: give one with --text.title"),
        ("poems", ("--text.title", " "), "writes on a title: give one with --text.title"),
        ("poems", ("--text.title", "月" * 17), "--text.title has 17 tokens, the model takes 16"),
        ("poems", ("--text.title", "Q"), "the vocabulary has no 'Q'"),
        ("poems", ("--text.title", "月", "--text.infill", "月_"), "--text.infill is for text diff"),
        ("poems", ("--text.title", "月", "--diffusion.steps", 3), "holds no diffusion model"),
        ("story", ("--text.title", "the"), "writes texts without titles"),
        ("story", ("--text.infill", "the"), "nothing is left to write"),
        ("story", ("--text.infill", "_" * 25), "--text.infill has 25 tokens, the model takes 24"),
        ("story", ("--text.prompt", "a" * 25), "--text.prompt has 25 tokens, the model takes 24"),
        ("story", ("--text.infill", "X_"), "the vocabulary has no 'X'"),
        ("story", ("--text.infill", "a_", "--text.prompt", "a"), "--text.infill, not both"),
        ("story", ("--text.infill", "a_", "--text.blank", "__"), "must be one character, got '__'"),
        ("story", ("--text.top-k", 3), "text diffusion takes no --text.top-k, only prompt"),
        ("story", ("--text.temperature", -1), "temperature must not be negative, got -1.0"),
        ("story", ("--diffusion.eta", 1), "text diffusion takes no --diffusion.eta, only steps"),
        ("story", ("--diffusion.steps", 25), "steps must lie in 1..24"),
        ("story", ("--diffusion.steps", 0), "--diffusion.steps must be at least 1, got 0"),
        ("story", ("--diffusion.block", 7), "block must divide the 24 tokens"),
        ("story", ("--diffusion.w", 1), "needs a model with model.unlabelled > 0"),
        ("uniform", ("--diffusion.order", "confidence"), "order and block belong to the process"),
        ("masked", ("--text.title", "月", "--text.infill", "月" * 25), "the model takes 24"),
        (
            "masked",
            ("--text.title", "月", "--diffusion.block", 7),
            "block must divide the 40 tokens",
        ),
        ("masked", ("--text.title", "月", "--diffusion.steps", 41), "steps must lie in 1..40"),
        ("masked", ("--out", "a.npy"), "writes on titles: --out must name a .txt file"),
        ("poems", ("--out", "a.npy"), "writes on titles: --out must name a .txt file"),
        ("story", ("--out", "a.npy", "--diffusion.w", 1), "takes no --diffusion.w, only steps"),
        ("story", ("--out", "a.npy", "--text.prompt", "a"), "makes numbers of tokens into this f"),
        ("story", ("--text.temperature", "nan"), "temperature must not be negative, got nan"),
        ("lstm", ("--text.prompt", ""), "the prompt has 0 tokens; it must have at least 1"),
        ("lstm", ("--text.new", 0), "text.new must be at least 1, got 0"),
        ("lstm", ("--text.new", -1), "text.new at least 0, got 1, -1"),
    ],
)
def test_mistakes_are_one_line(runs, sample, kind, flags, words):
    code, out, err = sample(runs(kind), *flags)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err


@pytest.mark.slow
def test_guidance_by_the_title_draws_and_is_not_without(runs, sample):
    flags = (runs("masked"), "--text.title", TITLE, "--text.temperature", 0)
    plain, guided = (sample(*flags, *more) for more in ((), ("--diffusion.w", 30)))
    assert plain[0] == guided[0] == 0 and plain[1] != guided[1]
