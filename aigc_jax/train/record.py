"""A model as data: how run.json records `make` and its config, and which code it may name.

Anyone can have written a record. So it brings back only values of the annotated kinds, and
functions and objects of modules that the user trusts. Nothing else runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import reprlib
import sys
import traceback
import types
import typing
from functools import partial
from pathlib import Path

import numpy as np

from ..core import Optim, is_optimizer


class Refused(ValueError):
    """A run cannot start or continue as asked; one line says why and what to do."""


@contextlib.contextmanager
def one_line(what: str):
    """Turns whatever the code of a record raises, even SystemExit, into one line of Refused."""
    try:
        yield
    except (Refused, KeyboardInterrupt):
        raise
    except BaseException as e:
        cause = " ".join("".join(traceback.format_exception_only(e)).split())
        raise Refused(f"{what}: {cause[:300]}") from e


# ---------------------------------------------------------------------------------- values to JSON


def _name_of(value, near: tuple[str, ...]) -> str | None:
    """The "module.name" that holds this very object, modules `near` first; None if none does."""
    names = [
        (module not in near, len(module), f"{module}.{name}")
        for module, holder in list(sys.modules.items())
        if module not in ("__main__", "__mp_main__") and getattr(holder, "__spec__", None)
        for name, held in list(getattr(holder, "__dict__", {}).items())
        if held is value and name.isidentifier()
    ]
    return min(names)[2] if names else None


def config_of(value, kind, at: str, near: tuple[str, ...]):
    """A value of a config as JSON keeps it.

    kind: its annotation. at: its name in messages. near: the modules in which names are sought
        first.

    A dataclass other than the annotated one becomes {"object": class, "fields": ...}. An object
    without fields, such as a chain of optax, becomes {"object": name}, the name in its module.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: config_of(item, None, f"{at}.{key}", near) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [config_of(item, None, at, near) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kinds = typing.get_type_hints(cls := type(value), include_extras=True)
        fields = {
            field.name: config_of(
                getattr(value, field.name), kinds.get(field.name), f"{at}.{field.name}", near
            )
            for field in dataclasses.fields(value)
            if field.init
        }
        if cls in _members(kind):
            return fields
        home = sys.modules.get(cls.__module__)
        if (
            cls.__module__ != "__main__"
            and getattr(home, "__dict__", {}).get(cls.__qualname__) is cls
        ):
            return {"object": f"{cls.__module__}.{cls.__qualname__}", "fields": fields}
    if name := _name_of(value, near):
        return {"object": name}
    raise Refused(
        f"{at} is a {type(value).__name__} that no module holds under a name: put it into a "
        "module (OPTIM = ...) and take it from there, so that run.json can name it"
    )


# -------------------------------------------------------------------------------- values from JSON


def short(value) -> str:
    """A value, shortened for an error message."""
    return reprlib.repr(value)


def _members(kind) -> tuple:
    """The types that an annotation allows: the members of a union; T of Annotated[Any, T]."""
    if typing.get_origin(kind) is typing.Annotated:
        return _members(
            next((m for m in kind.__metadata__ if dataclasses.is_dataclass(m)), kind.__origin__)
        )
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(member for each in typing.get_args(kind) for member in _members(each))
    return (kind,)


def _in_words(kind) -> str:
    """Returns the name of a type, or the values that a Literal allows."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return getattr(kind, "__name__", str(kind))


_PLAIN = {bool: bool, int: int, float: int | float, str: str, type(None): type(None), dict: dict}


def value_of(kind, value, at: str, find=None):
    """A field's value from JSON; raises TypeError where the annotation does not allow it."""
    members = _members(kind)
    if (
        isinstance(value, dict)
        and "object" in value
        and set(value) <= {"object", "fields"}
        and find
    ):
        return find(value, members, at)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise TypeError(f"{at} has no such large values, got {short(value)}")
    allowed = " or ".join(map(_in_words, members))
    wrong = TypeError(f"{at} must be {allowed}, got {short(value)}")
    for member in members:
        origin, args = typing.get_origin(member) or member, typing.get_args(member)
        if dataclasses.is_dataclass(member):
            if isinstance(value, dict):
                return build(member, value, at, find)
        elif origin is typing.Literal:
            if any(value == arg and type(value) is type(arg) for arg in args):
                return value
        elif origin in (tuple, list):
            if isinstance(value, list):
                several = origin is list or len(args) == 2 and args[1] is ...
                kinds = [args[0] if args else None] * len(value) if several or not args else args
                if len(kinds) != len(value):
                    raise wrong
                return origin(
                    value_of(kinds[i], each, f"{at}[{i}]", find) for i, each in enumerate(value)
                )
        elif origin in _PLAIN:
            if isinstance(value, _PLAIN[origin]) and isinstance(value, bool) <= (origin is bool):
                return value
        elif isinstance(value, list):  # the annotation says nothing, such as Any
            return tuple(value_of(None, v, f"{at}[{i}]", find) for i, v in enumerate(value))
        else:
            return value
    raise wrong


def build(cls, values, at: str = "", find=None):
    """A (nested) frozen dataclass from JSON; raises TypeError or ValueError for a misfit.

    find: `find(value, kinds, at)` gives the object of {"object": name}. None: objects are refused.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{at or cls.__name__} needs named fields, got {short(values)}")
    kinds = typing.get_type_hints(cls, include_extras=True)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := set(values) - known:
        raise TypeError(f"{at or cls.__name__} has no field {short(min(unknown))}")
    within = f"{at}." if at else ""
    return cls(
        **{
            name: value_of(kinds.get(name), value, f"{within}{name}", find)
            for name, value in values.items()
        }
    )


def _found(value: dict, kinds: tuple, at: str, folder: str | Path, trust):
    """The object of {"object": "module.name"}; with "fields", an instance of that dataclass."""
    module, _, name = (
        value["object"].rpartition(".") if isinstance(value["object"], str) else ("", "", "")
    )
    found = vars(_imported(module, folder, trust)).get(name)
    if "fields" in value:
        allowed = isinstance(found, type) and dataclasses.is_dataclass(found)
        if allowed and not (hasattr(found, "chain") and hasattr(found, "rate")):
            allowed = any(isinstance(kind, type) and issubclass(found, kind) for kind in kinds)
        if not allowed:
            raise TypeError(f"{at} cannot be a {short(value['object'])}")
        return build(found, value["fields"], at, partial(_found, folder=folder, trust=trust))
    if found is None or not any(_takes(kind, found) for kind in kinds):
        raise TypeError(f"{at} cannot be {short(value['object'])}, a {type(found).__name__}")
    return found


def _takes(kind, found) -> bool:
    """Whether an annotation allows this object."""
    kind = typing.get_origin(kind) or kind
    if kind is Optim:
        return is_optimizer(found)
    if kind in (None, typing.Any) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(kind, type) and kind not in (*_PLAIN, tuple, list) and isinstance(found, kind)


# -------------------------------------------------------------------------------------- whose code


def _inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a file lies in a folder, by its name or by the target of its links."""
    ways = (os.path.abspath, os.path.realpath)
    return any(Path(way(path)).is_relative_to(other(folder)) for way in ways for other in ways)


# Where trusted modules may lie besides sys.path: the current folder of the command line.
BESIDE: list[str] = []


@contextlib.contextmanager
def _path_outside(folder: str | Path, more=()):
    """Sets sys.path plus `more`, without this folder and all below it."""
    before = list(sys.path)
    kept = [entry for entry in (*before, *more) if not _inside(entry or ".", folder)]
    if kept == before:
        yield
        return
    sys.path[:] = kept
    try:
        yield
    finally:
        sys.path[:] = before + [
            entry for entry in sys.path if entry not in before and entry not in more
        ]


EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"  # beside aigc_jax, in a checkout


def _spec(name: str, trusted: bool):
    """Where a module would come from; `experiments` always from this checkout."""
    if name == "experiments" and not trusted:
        if not (EXPERIMENTS / "_cli.py").is_file():
            raise ModuleNotFoundError(
                f"experiments lie in a checkout of aigc_jax, and {EXPERIMENTS.parent} is none"
            )
        return importlib.machinery.PathFinder.find_spec(name, [str(EXPERIMENTS.parent)])
    return importlib.util.find_spec(name)


def _imported(name: str, folder: str | Path, trust) -> types.ModuleType:
    """Imports the module that a run folder names, if that is allowed.

    Modules of aigc_jax and of the experiments beside it are allowed. Others are allowed if the
    program has imported them, or if `trust` names them or a package above them. A file inside the
    run folder is never imported.
    """
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    parts = name.split(".")
    if len(name) > 200 or not all(part.isidentifier() for part in parts) or parts[0] == "__main__":
        raise Refused(
            f"{folder}/run.json names the module {short(name)}, and there is no such module"
        )
    trusted = any(name == t or name.startswith(f"{t}.") for t in trust)
    if not (trusted or parts[0] in ("aigc_jax", "experiments") or sys.modules.get(name)):
        raise Refused(
            f"{folder} was made by {name}, a module that is not of aigc_jax: where you trust it, "
            f"import it before, or say so (--import {name} on the command line, "
            f"trust={name!r} in Python)"
        )
    steps = [".".join(parts[: i + 1]) for i in range(len(parts))]
    with (
        one_line(f"{folder} was made by {name}, which cannot be imported"),
        _path_outside(folder, BESIDE if trusted else ()),
    ):
        for part in steps[-1:] if sys.modules.get(name) else steps:
            module = sys.modules.get(part)
            spec = getattr(module, "__spec__", None) if module else _spec(part, trusted)
            if not (module or spec):
                raise ModuleNotFoundError(f"no module named {part}")
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            places += [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
            if any(_inside(place, folder) for place in places if place):
                raise Refused(
                    f"{folder} was made by {name}, and {part} lies inside it: no code of a run "
                    "folder is run"
                )
            if module is None and part == "experiments":
                module = sys.modules[part] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            elif module is None:
                module = importlib.import_module(part)
            if (
                part == "experiments"
                and not trusted
                and str(EXPERIMENTS) not in map(os.path.realpath, module.__path__)
            ):
                raise ModuleNotFoundError(
                    f"experiments is another package here, at {module.__path__[0]}"
                )
    return module


def model_of(record: dict, folder: str | Path, trust=()) -> tuple:
    """Returns (make, cfg) as a record names them."""
    module, name = record["make"]
    if not (name.isidentifier() and (name == "make" or name.startswith("make_"))):
        raise Refused(
            f"{folder} was made by {short(name)}: only functions named make or make_* are loaded"
        )
    make = vars(_imported(module, folder, trust)).get(name)
    own = (getattr(make, "__module__", None), getattr(make, "__qualname__", None)) == (module, name)
    if not (own and callable(make)) or isinstance(make, type):
        raise Refused(f"{folder} was made by {module}.{name}, and there is no such function")
    with one_line(f"{folder}/run.json does not describe a model that this version can build"):
        [first, *_] = inspect.signature(make).parameters
        annotated = typing.get_type_hints(make).get(first)
        if not dataclasses.is_dataclass(annotated):
            raise TypeError(f"the config of {module}.{name} is not annotated with its dataclass")
        return make, build(
            annotated, record["config"], "", partial(_found, folder=folder, trust=trust)
        )
