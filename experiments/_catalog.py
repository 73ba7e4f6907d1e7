"""The scripts of this folder: their names, families, needs and recorded minutes."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FAMILIES = ("vae", "gan", "ddpm", "transformer", "language", "contrastive")


def names() -> list[str]:
    """Returns the names of all experiment scripts."""
    return sorted(p.stem for p in (ROOT / "experiments").glob("[a-z]*.py"))


def parsed(name: str) -> ast.Module:
    """Returns the syntax tree of a script."""
    return ast.parse((ROOT / "experiments" / f"{name}.py").read_text())


def families(name: str) -> set[str]:
    """Returns the families that a script imports, itself or through a module that it shares with
    others.
    """
    found, shared = set(), []
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.ImportFrom) and node.module == "aigc_jax":
            found |= {alias.name for alias in node.names} & {*FAMILIES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments._"):
            shared.append(node.module.removeprefix("experiments."))
    return found or set().union(*map(families, shared))


def needs(name: str, doc: str) -> str:
    """Returns what a script needs beside Python, read from the line of its docstring that shows its
    command.
    """
    command = re.search(rf"python -m experiments\.{name}\b(.*)", doc)
    if not command:
        rule = f"the docstring must show the command, python -m experiments.{name}"
        raise ValueError(f"experiments/{name}.py: {rule}")
    flags, _, after = command[1].partition(";")
    given = re.search(r"--\w+ [A-Z]+", flags)
    return after.replace("downloads nothing", "nothing").strip() or (given[0] if given else "")


def minutes(name: str) -> str:
    """Returns the minutes of the recorded run.

    "+" marks a run that continued an earlier one, "-" one that only measured it. In brackets: its
    scale where that is not cpu, and GPU where it ran on one.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return "-"
    record = json.loads(file.read_text())
    taken = record["seconds"] / 60
    marks = [] if record["scale"] == "cpu" else [record["scale"]]
    if "cpu" not in record["environment"]["device"].lower():
        marks.append("GPU")
    plus, marked = "+" if record["continued"] else "", f" ({', '.join(marks)})" if marks else ""
    if record["continued"] and taken < 1:  # what it continued took all the time
        return f"-{marked}"
    return f"{'under 1' if taken < 1 else round(taken)}{plus}{marked}"
