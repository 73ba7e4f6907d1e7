"""`python -m experiments list` names the scripts; `python -m experiments table` writes docs/reproduction.md anew."""

from __future__ import annotations

import ast
import sys

from . import _cli


def names() -> list[str]:
    """All experiment scripts."""
    return sorted(p.stem for p in (_cli.ROOT / "experiments").glob("[a-z]*.py"))


def main() -> None:
    """The command line."""
    command = sys.argv[1:]
    if command == ["list"]:
        for name in names():
            source = (_cli.ROOT / "experiments" / f"{name}.py").read_text()
            head = ast.get_docstring(ast.parse(source)).split("\n\n")[:2]
            print(f"{name}\n  " + "\n  ".join("\n".join(head).splitlines()) + "\n")
    elif command == ["table"]:
        _cli.write_table()
        print(f"wrote {_cli.TABLE.relative_to(_cli.ROOT)}")
    else:
        print(
            "error: usage: python -m experiments list | table; a script runs as python -m experiments.NAME",
            file=sys.stderr,
        )
        raise SystemExit(2)


if __name__ == "__main__":
    main()
