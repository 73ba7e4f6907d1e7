"""`python -m experiments` lists the scripts; `list` says more, `table` writes docs/reproduction.md, `plan NAME` plans."""

from __future__ import annotations

import ast
import difflib
import sys

from aigc_jax.__main__ import quiet_pipe

from . import _cli, _plan
from ._catalog import FAMILIES, families, minutes, names, needs, parsed

USAGE = (
    "python -m experiments [list | table | plan NAME]; a script runs as python -m experiments.NAME"
)


def short_list() -> str:
    """Returns all scripts by family: name, minutes of the recorded run on 2 cores, needs, title."""
    groups: dict[str, list] = {
        family: [] for family in (*FAMILIES, "several families", "for the metrics")
    }
    for name in names():
        doc, found = ast.get_docstring(parsed(name)), families(name)
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
            "brackets: its scale, GPU",
            "python -m experiments.NAME runs one, with --help shows its flags, with --scale smoke "
            "tries it in a minute;",
            "python -m experiments list says more about each, table writes docs/reproduction.md,",
            "plan NAME --scale paper --topology v5e:4x4 says whether its models fit such devices",
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
            head = ast.get_docstring(parsed(name)).split("\n\n")[:2]
            print(f"{name}\n  " + "\n  ".join("\n".join(head).splitlines()) + "\n")
    elif command == ["table"]:
        _cli.write_table()
        print(f"wrote {_cli.TABLE.relative_to(_cli.ROOT)}")
    elif command[0] == "plan":
        _plan.main(command[1:])
    elif command[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{short_list()}")
    elif command[0] in names():
        print(f"error: a script runs as python -m experiments.{' '.join(command)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        near = difflib.get_close_matches(command[0], ["list", "plan", "table", *names()])
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"error: usage: {USAGE}; there is no {' '.join(command)}{meant}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
