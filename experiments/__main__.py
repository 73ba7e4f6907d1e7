"""`python -m experiments` lists the scripts in short, `list` in full; `table` writes docs/reproduction.md anew."""

from __future__ import annotations

import ast
import difflib
import json
import re
import sys

from aigc_jax.__main__ import quiet_pipe

from . import _cli

FAMILIES = ("vae", "gan", "ddpm", "transformer")
USAGE = "python -m experiments [list | table]; a script runs as python -m experiments.NAME"


def names() -> list[str]:
    """Returns the names of all experiment scripts."""
    return sorted(p.stem for p in (_cli.ROOT / "experiments").glob("[a-z]*.py"))


def _parsed(name: str) -> ast.Module:
    return ast.parse((_cli.ROOT / "experiments" / f"{name}.py").read_text())


def families(name: str) -> set[str]:
    """Returns the families that a script imports, itself or through a module that it shares with
    others.
    """
    found, shared = set(), []
    for node in ast.walk(_parsed(name)):
        if isinstance(node, ast.ImportFrom) and node.module == "aigc_jax":
            found |= {alias.name for alias in node.names} & {*FAMILIES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments._"):
            shared.append(node.module.removeprefix("experiments."))
    return found or set().union(*map(families, shared))


def needs(name: str, doc: str) -> str:
    """Returns what a script needs beside Python, read from the line of its docstring that shows its
    command.
    """
    flags, _, after = re.search(rf"python -m experiments\.{name}\b(.*)", doc)[1].partition(";")
    given = re.search(r"--\w+ [A-Z]+", flags)
    return after.replace("downloads nothing", "nothing").strip() or (given[0] if given else "")


def minutes(name: str) -> str:
    """Returns the minutes of the recorded run, with its scale where that is not cpu.

    "+" marks a run that continued an earlier one.
    """
    file = _cli.RESULTS / f"{name}.json"
    if not file.is_file():
        return "-"
    record = json.loads(file.read_text())
    taken = record["seconds"] / 60
    scale = "" if record["scale"] == "cpu" else f" ({record['scale']})"
    return f"{'under 1' if taken < 1 else round(taken)}{'+' if record['continued'] else ''}{scale}"


def short_list() -> str:
    """Returns all scripts by family: name, minutes of the recorded run on 2 cores, needs, title."""
    groups: dict[str, list] = {
        family: [] for family in (*FAMILIES, "several families", "for the metrics")
    }
    for name in names():
        doc, found = ast.get_docstring(_parsed(name)), families(name)
        group = "several families" if len(found) > 1 else next(iter(found), "for the metrics")
        groups[group].append((name, minutes(name), needs(name, doc), doc.splitlines()[0]))
    rows = [row for group in groups.values() for row in group]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    heads = ("name", "minutes", "downloads, needs", "what it reproduces")
    widths = [max(width, len(head)) for width, head in zip(widths, heads, strict=False)]

    def line(cells) -> str:
        return (
            "  "
            + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
            + f"  {cells[3]}"
        )

    lines = [line(heads)]
    for group, members in groups.items():
        if members:
            lines += ["", group, *map(line, members)]
    return "\n".join(
        [
            *lines,
            "",
            "minutes: of the run in results/, on its machine; +: it continued an earlier run; in "
            "brackets: its scale",
            "python -m experiments.NAME runs one, with --help shows its flags, with --scale smoke "
            "tries it in a minute;",
            "python -m experiments list says more about each, table writes docs/reproduction.md",
        ]
    )


@quiet_pipe()
def main() -> None:
    """The command line."""
    command = sys.argv[1:]
    if not command:
        print(short_list())
    elif command == ["list"]:
        for name in names():
            head = ast.get_docstring(_parsed(name)).split("\n\n")[:2]
            print(f"{name}\n  " + "\n  ".join("\n".join(head).splitlines()) + "\n")
    elif command == ["table"]:
        _cli.write_table()
        print(f"wrote {_cli.TABLE.relative_to(_cli.ROOT)}")
    elif command[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{short_list()}")
    elif command[0] in names():
        print(f"error: a script runs as python -m experiments.{' '.join(command)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        near = difflib.get_close_matches(command[0], ["list", "table", *names()])
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"error: usage: {USAGE}; there is no {' '.join(command)}{meant}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
