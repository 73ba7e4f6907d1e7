"""`make` finds a Python that works."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
ROOT = Path(__file__).parents[1]
BROKEN = 'echo "pyenv: command not found" >&2\nexit 127'
WORKS = 'case "$2" in *version_info*) echo {};; esac'  # what the Makefile asks: modules, and its version


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(tmp_path, *arguments):
    """Runs make in a copy of what it needs, with the Pythons of tmp_path alone."""
    for name in ("sh", "make", "ls", "sort", "test", "rm"):
        if not (tmp_path / "bin" / name).exists():
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name in (
        "Makefile",
        "setup.cfg",
        "pyproject.toml",
        *(p.name for p in ROOT.glob("constr*")),
    ):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    env = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}
    done = subprocess.run(
        [tmp_path / "bin" / "make", "-C", tmp_path, *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_newest_python_that_runs_is_taken(tmp_path):
    script(tmp_path / "bin/python3.13", BROKEN)  # a shim of pyenv
    script(tmp_path / "bin/python3.12", BROKEN)
    script(tmp_path / "bin/python3.11", WORKS.format("3.11"))
    assert "python3.11 -m venv .venv\n" in make(tmp_path, "-n", "lint")[1]
    for version in ("3.12.9", "3.12.10", "3.13.0t"):  # 3.13.0t has no wheels
        script(tmp_path / f"pyenv/versions/{version}/bin/python3", WORKS.format("3.12"))
    assert "versions/3.12.10/bin/python3 -m venv .venv\n" in make(tmp_path, "-n", "lint")[1]
    said = make(tmp_path, "-n", "test-oldest")[1]
    assert "python3.11 -m venv .venv-oldest\n" in said and "constraints-3.11.txt" in said
    assert "python3.11 -m venv .venv\n" in make(tmp_path, "-n", "lint", "PYTHON=python3.11")[1]


def test_an_environment_of_another_version_is_made_again(tmp_path):
    script(tmp_path / "bin/python3.13", WORKS.format("3.13"))
    script(tmp_path / ".venv/bin/python", "exit 0")
    stamp = tmp_path / ".venv/installed-3.12"
    stamp.touch()
    assert "rm -rf .venv\n" in make(tmp_path, "-n", "lint")[1]
    stamp.rename(tmp_path / ".venv/installed-3.13")
    os.utime(tmp_path / ".venv/installed-3.13", (2**33, 2**33))
    assert "rm -rf" not in make(tmp_path, "-n", "lint")[1]


def test_an_environment_of_ones_own_is_not_deleted(tmp_path):
    script(tmp_path / "bin/python3.13", WORKS.format("3.13"))
    script(tmp_path / ".venv/bin/python", "exit 0")
    code, said = make(tmp_path, "lint")
    assert code and "make did not set up .venv, and will not delete it" in said
    assert (tmp_path / ".venv/bin/python").is_file()


@pytest.mark.parametrize(
    "python, body, message",
    [
        (None, None, r"None of Python 3.13 3.12 3.11 works, on the PATH or in .*/pyenv/versions."),
        ("python3.13", BROKEN, "None of Python"),
        ("mine", BROKEN, "mine is no Python that runs."),
        ("mine", WORKS.format("3.10"), "tested on Python 3.13 3.12 3.11; mine is 3.10."),
    ],
    ids=["none", "shim", "broken", "too old"],
)
def test_without_a_python_make_says_what_to_do(tmp_path, python, body, message):
    arguments = ["PYTHON=mine"] if python == "mine" else []
    if python:
        script(tmp_path / "bin" / python, body)
    (tmp_path / ".venv").mkdir()
    code, said = make(tmp_path, "lint", *arguments)
    assert code == 2 and re.search(message, said) and "make PYTHON=/path/to/python3.13" in said
    assert (tmp_path / ".venv").exists()  # nothing was deleted
