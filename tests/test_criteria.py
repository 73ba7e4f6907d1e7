"""Criteria in words: what they mean at their boundaries, and what is refused. And the page on one's own experiment."""

import importlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__ as experiments
from experiments import _cli, _criteria, _report, _rows

ROOT = Path(__file__).parent.parent
BELOW, ABOVE = math.nextafter(2.39, 0), math.nextafter(2.39, 3)


@pytest.mark.parametrize(
    ("criterion", "met", "not_met"),
    [
        ("< 2.39", [BELOW, -math.inf], [2.39, ABOVE, math.inf]),
        ("<= 2.39", [BELOW, 2.39], [ABOVE]),
        ("> 2.39", [ABOVE, math.inf], [2.39, BELOW]),
        (">= 2.39", [2.39, ABOVE], [BELOW]),
        ("= 10", [10, 10.0], [9, 11, math.nextafter(10, 11)]),
        ("= 124439808", [124_439_808], [124_439_807]),
        ("> -0.5", [-0.49], [-0.5]),
        ("< 1e-4", [9e-5], [1e-4]),
        ("within 0.5 .. 2", [0.5, 1, 2], [math.nextafter(0.5, 0), math.nextafter(2, 3)]),
        ("within -2 .. -1", [-2, -1], [0, -3]),
        ("within 3 of 242", [239, 242, 245], [238.9, 245.1]),
        ("within 0.03 of 0", [-0.03, 0.03], [0.031, -0.031]),
    ],
)
@pytest.mark.parametrize("note", ["", ", log2 of 17 levels", " (first: >= 2)"])
def test_a_criterion_means_what_it_says(criterion, met, not_met, note):
    holds = _criteria.parse(criterion + note)
    assert all(holds(value) is True for value in met)
    assert all(holds(value) is False for value in [*not_met, math.nan])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "good",
        "> ",
        "> .5",
        ">0",
        "== 3",
        "=> 3",
        "> nan",
        "< inf",
        "> 0 nats",
        "> 0,",
        "within 2 .. 1",
        "within 1",
        "within 1 to 2",
        "within -1 of 2",
        "> 1e",
        "0.5 .. 2",
        "> 1 > 0",
    ],
)
def test_what_cannot_be_read_is_refused(words):
    with pytest.raises(ValueError, match=re.escape(repr(words))):
        _criteria.parse(words)


def test_a_function_serves_where_words_cannot_say_it():
    criterion = ("nucleus .95", lambda ours: ours == "nucleus .95")
    assert _criteria.words(criterion) == "nucleus .95" and _criteria.parse(criterion)("nucleus .95")
    row = _cli.Row("closest", "pure")
    assert _cli.verdict(row, {"closest": criterion}) == "not met: nucleus .95"


@pytest.mark.parametrize("name", experiments.names())
def test_every_scripts_criteria_can_be_read(name):
    script = importlib.import_module(f"experiments.{name}")
    for criterion in [*script.CRITERIA.values(), *script.INVARIANTS.values()]:
        assert callable(_criteria.parse(criterion))


@pytest.mark.parametrize("name", experiments.names())
def test_recorded_verdicts_are_those_of_the_criteria(name):
    file = _cli.RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip("not recorded")
    criteria = importlib.import_module(f"experiments.{name}").CRITERIA
    for row in json.loads(file.read_text())["rows"]:
        then = _report.plain(row["verdict"])
        if not then.startswith(("met", "not met")):
            continue
        now = _cli.verdict(_cli.Row(row["quantity"], row["ours"]), criteria)
        words = [verdict.partition(": ")[2] for verdict in (now, then)]
        if words[0] != words[1] and "(first: " in now:  # reset after this run
            continue
        assert now.partition(":")[0] == then.partition(":")[0], row


def test_no_script_imports_another():
    for name in experiments.names():
        text = (ROOT / "experiments" / f"{name}.py").read_text()
        for line in re.findall(r"^from experiments\b.*(?:\n    .*)*", text, re.MULTILINE):
            assert not set(re.findall(r"\w+", line)) & set(experiments.names()), (name, line)


@pytest.mark.slow
def test_the_page_on_ones_own_experiment_runs(tmp_path, monkeypatch, capfd):
    """Its script as it stands there, at scale smoke: the rows, the figure, the invariant."""
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "your_own_experiment.md").read_text(), re.DOTALL
    )
    (tmp_path / "kl_weight.py").write_text(code)
    spec = importlib.util.spec_from_file_location(
        "experiments.kl_weight", tmp_path / "kl_weight.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments.kl_weight", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["kl_weight", "--scale", "smoke", "--run.devices", "1", "--run.folder", "run"]
    )
    _cli.main("kl_weight")
    record = json.loads((tmp_path / "run" / "rows.json").read_text())
    rows = {row["quantity"]: row for row in record["rows"]}
    assert len(rows) == 6 and rows[module.FALLS]["verdict"] == "met: > 0"
    assert (tmp_path / "run" / "kl_weight.png").stat().st_size > 5000
    assert module.FALLS in capfd.readouterr().out


@pytest.mark.parametrize("name", experiments.names())
def test_every_scripts_flags_can_be_read(name):
    """FIRST is a convention of the command line: a script that used the name otherwise could not start."""
    script = importlib.import_module(f"experiments.{name}")
    assert _cli.parse(name, script, []).scale == "cpu"
    assert _cli.parse(name, script, ["--scale", "smoke"]).setup == script.SCALES["smoke"].setup


def test_numbers_of_numpy_are_kept_as_json():
    row = _rows.Row("a (nats)", np.float32(0.5), oracle=np.int64(3))
    assert json.loads(json.dumps(_rows.as_json(row, "")))["oracle"] == 3
