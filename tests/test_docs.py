"""The documents: short, plain, and naming only what exists."""

import importlib
import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

import aigc_jax
from experiments import __main__ as experiments
from experiments import _cli, _report

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("reproduction.md", "api.md")
WRITTEN = [ROOT / "CHANGELOG.md", *(path for path in DOCS if path.name not in GENERATED)]
FILES = (".py", ".md", ".json", ".jsonl", ".txt", ".safetensors")
FOLDERS = "aigc_jax|experiments|docs|tests|benchmarks|results"


def prose(text):
    """Paragraphs and list items as plain text: no code blocks, tables, headings or pictures."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    lines = ["" if re.match(r"\s*(\||#)", line) else line for line in text.splitlines()]
    lines = [
        "\n" + re.sub(r"^\s*([-*]|\d+\.) ", "", x) if re.match(r"\s*([-*]|\d+\.) ", x) else x
        for x in lines
    ]
    return [
        " ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(lines)) if block.strip()
    ]


def sentences(text):
    for block in prose(text):
        yield from re.split(r"(?<=[.!?])[)*]* (?=[A-Z`*(])", block)


def code(text):
    """What stands in backticks within prose."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def exists(name):
    """Whether a dotted name of aigc_jax, such as `vae.Config.shape`, is there."""
    thing = aigc_jax
    for part in name.split("."):
        fields = getattr(thing, "__dataclass_fields__", ())
        if part in fields:
            return True
        if not hasattr(thing, part):
            if not inspect.ismodule(thing):
                return False
            try:
                importlib.import_module(f"{thing.__name__}.{part}")
            except ImportError:
                return False
        thing = getattr(thing, part)
    return True


def test_lengths():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "docs" / "design.md").read_text().split()) <= 2000
    assert (ROOT / "README.md").read_text().count("![") <= 6


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_lines_are_wrapped(path):
    for line in re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "!", "[")), line


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_sentences_have_at_most_25_words(path):
    assert not [
        s for s in sentences(path.read_text()) if len(re.findall(r"[\w'.,/-]*\w[\w'.,/-]*", s)) > 25
    ]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if ":" in target:
            continue
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads
            ], target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_exist(path):
    """Files, names of aigc_jax and scripts in backticks; commands in code blocks."""
    text = path.read_text()
    new = re.findall(r"Save this as `(\S+)`", text)  # a file that the reader writes
    for said in code(text):
        if re.fullmatch(rf"({FOLDERS})/[\w./*-]*", said) and "NAME" not in said and said not in new:
            assert list(ROOT.glob(said.rstrip("/"))), said
        name = re.match(r"(?:aigc_jax\.)?((?:" + "|".join(aigc_jax.__all__) + r")(?:\.\w+)+)", said)
        if name and not name[0].endswith(FILES):
            assert exists(name[1]), said
    for module in re.findall(r"python -m experiments\.([a-z]\w*)", text):
        assert module in experiments.names() or f"experiments/{module}.py" in new, module
    for target in re.findall(r"\bmake ([a-z][\w-]*)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_experiment_is_listed_with_its_minutes():
    text = (ROOT / "docs" / "experiments.md").read_text()
    for name in experiments.names():
        row = re.search(rf"^\| `{name}` \|.*\| (.*?) \|$", text, re.MULTILINE)
        assert row and row[1] == experiments.minutes(name), name


def test_every_figure_is_shown():
    text = "".join(path.read_text() for path in DOCS)
    for image in (ROOT / "docs" / "images").iterdir():
        assert f"images/{image.name}" in text, image.name


def test_api_is_what_the_modules_say():
    page = runpy.run_path(str(ROOT / "docs" / "api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == page, "run: python docs/api.py"


def test_summaries_describe_what_was_recorded():
    """Each summary names rows of its record; README and the page agree on how many criteria are met."""
    judged, met = 0, 0
    for file in _cli.RESULTS.glob("*.json"):
        record = json.loads(file.read_text())
        verdicts = [_report.plain(row["verdict"]) for row in record["rows"] if row["verdict"]]
        judged, met = judged + len(verdicts), met + sum(v.startswith("met") for v in verdicts)
        summary = _report.SUMMARIES[record["name"]]
        if summary.commit == record["commit"]:
            assert set(summary.quantities) <= {row["quantity"] for row in record["rows"]}
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"{met} of {judged} criteria are met" in words
