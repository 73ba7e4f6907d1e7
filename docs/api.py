"""Writes docs/api.md: every public name of aigc_jax with the first sentence of its docstring.

    python docs/api.py

The names are those of a module's `__all__`; a module without one shows what it defines itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from pkgutil import resolve_name

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # this checkout, not an installed one

import aigc_jax

DEEPER = {"data": ["text.Tokenizer"]}  # public names of submodules
HEAD = """\
# Public names

This page is made by `python docs/api.py` from the modules' `__all__` and docstrings. Do not edit it.

These names are stable: tests and users rely on them. In Python, `help(aigc_jax.vae.elbo)` shows shapes, units,
errors and equations of a function. [The design](design.md) explains the conventions that they share.
"""


def names(module) -> list[str]:
    """The public names of a module, in the order of the alphabet."""
    public = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and str(getattr(value, "__module__", "")).startswith(module.__name__)
    ]
    public = [*public, *DEEPER.get(module.__name__.removeprefix("aigc_jax."), ())]
    return sorted(public, key=lambda name: (name.lower(), name))


def sentence(thing) -> str:
    """The first sentence of a docstring, or nothing where there is none of its own."""
    doc = inspect.getdoc(thing) if callable(thing) or inspect.ismodule(thing) else ""
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    if paragraph.startswith(
        f"{getattr(thing, '__name__', '')}("
    ):  # written by dataclass or NamedTuple
        return ""
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])", paragraph)[0]


def page() -> str:
    """The whole of docs/api.md."""
    lines = [HEAD]
    for name in aigc_jax.__all__:
        module = importlib.import_module(f"aigc_jax.{name}")
        lines += [f"## `aigc_jax.{name}`", "", sentence(module), ""]
        for public in names(module):
            thing = resolve_name(f"{module.__name__}.{public}")
            current, text = getattr(thing, "__name__", public), sentence(thing)
            if current != public and current in names(module):
                text = f"the old name of `{name}.{current}`."
            lines.append(f"- `{name}.{public}`" + (f": {text}" if text else ""))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
