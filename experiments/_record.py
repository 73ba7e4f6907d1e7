"""Records in results/, and docs/reproduction.md, which is made from them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from aigc_jax.train import folder as folders
from experiments import _report

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "results", ROOT / "docs" / "reproduction.md"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def without(flags: list[str], *names: str) -> list[str]:
    """Returns the flags without those named and their values."""
    kept, keep = [], True
    for flag in flags:
        if flag.startswith("--"):
            keep = flag.split("=")[0] not in names
        if keep:
            kept.append(flag)
    return kept


def command(name: str, scale: str, flags: list[str]) -> str:
    """Returns the command that repeats a run, without the folder it writes to."""
    scales = [] if scale == "cpu" else ["--scale", scale]
    return shlex.join(
        [
            "python",
            "-m",
            f"experiments.{name}",
            *scales,
            *without(flags, "--run.folder", "--folder"),
        ]
    )


def recordable(scale: str, flags: list[str]) -> str:
    """Returns the commit that a record will name. Raises ValueError where the run could not be
    repeated from it.
    """
    if scale == "smoke":
        raise ValueError("a smoke run is no result: record scale cpu or paper")
    if any(
        flag.startswith("--data.folder") or "images:" in flag or "pairs:" in flag or "text:" in flag
        for flag in flags
    ):
        raise ValueError(
            "a recorded command holds no path to data: use a named set, and AIGC_DATA instead of "
            "--data.folder"
        )
    try:
        dirty = _git("status", "--porcelain", "--", ".", ":!results", ":!docs/reproduction.md")
    except (OSError, subprocess.CalledProcessError) as e:
        raise ValueError("--record needs a git checkout: a row names its commit") from e
    if dirty:
        raise ValueError(
            "the tree has uncommitted changes: commit first, so that the row's commit is what ran"
        )
    return _git("rev-parse", "--short=12", "HEAD")


def check_began_at(commit: str, folder: Path) -> None:
    """Raises ValueError where a run below the folder was begun at another commit, or with changed
    files.
    """
    for path in folder.rglob("run.json"):
        if (began := folders.read(path.parent)["environment"].get("commit")) != commit:
            raise ValueError(
                f"{path.parent} began at commit {began or 'unknown'}, not {commit}: record from a "
                "new folder"
            )


def table() -> str:
    """Returns the text of docs/reproduction.md, made from results/*.json."""
    return _report.page(RESULTS)


def write_table() -> None:
    """Writes docs/reproduction.md."""
    new = TABLE.with_name(f"{TABLE.name}.new")
    new.write_text(table())
    new.replace(TABLE)
