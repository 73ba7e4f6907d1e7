"""run.json: which run a folder holds, in which environment it began, and who trains there now."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import typing
from pathlib import Path

import filelock
import jax
import numpy as np

from ..data import Info
from .checkpoints import say
from .record import Refused, build, config_of, model_of, one_line, short, value_of
from .weights import shipped

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _commit() -> str:
    """The commit of this checkout, marked if it has changes; "" outside of git.

    A package that is installed inside somebody else's repository is not part of it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    ours = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(ours, capture_output=True, check=True)
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ":/*.py"], capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + (" with changes" if changed else "")


def environment() -> dict:
    """The versions, device and flags on which the last bits of a run depend."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def home(path: str | Path) -> Path:
    """A path with its ~ expanded, as a shell would."""
    return Path(os.path.expanduser(path))


def _plain(value):
    """A value as JSON gives it back: tuples become lists, paths text, NumPy numbers Python's."""

    def other(x):
        if isinstance(x, np.generic):
            return x.item()
        return os.fspath(x)

    return json.loads(json.dumps(value, default=other))


def _write(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_json(path: Path, value) -> None:
    """Writes a value as JSON, whole or not at all."""
    _write(path, json.dumps(value, indent=1) + "\n")


def _described(info: Info) -> dict:
    return _plain({**dataclasses.asdict(info), "tokenizer": ""})  # it has a file of its own


def write(folder: Path, record: dict, info: Info) -> None:
    """Writes run.json with its checksums, and for text and captions tokenizer.json."""
    if info.tokenizer:
        _write(folder / "tokenizer.json", info.tokenizer)
    write_json(folder / "run.json", {**record, "sha256": _digests(record, info.tokenizer or None)})


def _digests(record: dict, tokenizer: str | None) -> dict:
    """sha256 of those parts of a record on which its checkpoints depend.

    The user may edit the rest: the length, how often it reports and saves, where its data lie.
    """
    parts = {
        "make": record["make"],
        "config": record["config"],
        "run": {name: record["run"].get(name) for name in ("seed", "batch_size", "init")}
        | _noise(record["run"]),
        "data": {name: value for name, value in record["data"].items() if name != "source"},
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in parts.items()
    }


def edited(folder: str | Path, record: dict) -> str | None:
    """Says what in a run folder was edited by hand; None where nothing was.

    Older versions wrote no sums; their runs pass.
    """
    folder, sums = Path(folder), record.get("sha256")
    if not isinstance(sums, dict):
        return None
    tokenizer = folder / "tokenizer.json"
    if "tokenizer" in sums and not tokenizer.is_file():
        return f"{tokenizer} is missing: put it back"
    now = _digests(
        record, tokenizer.read_bytes().decode(errors="replace") if "tokenizer" in sums else None
    )
    for name in now:
        if sums.get(name) != now[name]:
            what = tokenizer if name == "tokenizer" else f"{name} in {folder / 'run.json'}"
            return (
                f"{what} does not fit the sha256 that the run wrote: "
                "undo the edit, or train in a new folder"
            )
    return None


def unedited(folder: str | Path, record: dict) -> None:
    """Raises Refused if a run folder was edited by hand."""
    if words := edited(folder, record):
        raise Refused(words)


def _sha256(params) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8))  # numpy has no buffer of bfloat16
    return digest.hexdigest()


def describe(make, cfg, run, data: Info, valid: Info | None, params=None) -> dict:
    """Returns the content of run.json; refuses a make that another process could not import."""
    module, name = getattr(make, "__module__", "?"), getattr(make, "__qualname__", repr(make))
    if module == "__main__" or "." in name or "<" in name:
        raise Refused(
            f"fit records make by its name, and {module}.{name} cannot be imported: put it in a "
            "module"
        )
    if run.pmap:
        run = dataclasses.replace(run, devices=run.devices or len(jax.devices()))
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise Refused(f"the config of {module}.{name} must be a dataclass, got {short(cfg)}")
    record = {
        "make": [module, name],
        "config": config_of(cfg, type(cfg), "config", (module, type(cfg).__module__)),
        "run": _plain(dataclasses.asdict(run)),
        "data": _described(data),
        "valid": None if valid is None else _described(valid),
        "params": None if params is None else {"sha256": _sha256(params)},
        "environment": environment(),
    }
    found, back = model_of(record, run.folder)
    if found is not make or type(back) is not type(cfg):
        raise Refused(
            f"{module}.{name} does not come back from its record: annotate its config with its "
            "class"
        )
    for field in dataclasses.fields(cfg):
        given, kept = getattr(cfg, field.name), getattr(back, field.name)
        if given is not kept and given != kept:
            raise Refused(
                f"config.{field.name} is {short(given)} and would come back from run.json as "
                f"{short(kept)}"
            )
    return record


def _differences(old, new, at: str = ""):
    if isinstance(old, dict) and isinstance(new, dict) and ("object" in old) == ("object" in new):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _noise(run: dict) -> dict:
    """With pmap every device draws its own noise: the number of devices is part of the identity."""
    return {
        "pmap": run.get("pmap", False),
        "devices": run.get("devices") if run.get("pmap") else None,
    }


def _identity(record: dict) -> dict:
    """What must be equal for a run to continue."""
    return {
        "make": ".".join(record["make"]),
        "model": record["config"],
        "data": {"fingerprint": record["data"]["fingerprint"]},
        "run": {key: record["run"][key] for key in ("seed", "batch_size", "init")}
        | _noise(record["run"]),
        "params": record.get("params"),
    }


def _without_none(value):
    """Drops fields that are None, so that a new field does not change the sha256 of old records."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value


def whose(record: dict) -> str:
    """sha256 of the identity of a run; each of its checkpoints holds it."""
    one = _without_none(_identity(record))
    one["run"].pop("init", None)  # a path: the folder may be moved
    return hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()


def vacant(folder: Path) -> None:
    """Refuses a folder without run.json, unless it holds only what a killed start leaves."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"run.folder {folder} is a file")
    if not folder.exists():
        return
    saved, ours = (
        folder / "checkpoints",
        (".lock", "run.json.new", "tokenizer.json", "tokenizer.json.new"),
    )
    names = os.listdir(folder)
    kept = os.listdir(saved) if saved.is_dir() else [""] if saved.exists() else []
    # Checked after the listings: another process that begins here writes run.json first.
    if (folder / "run.json").exists():
        return
    if any(name not in (*ours, "checkpoints") for name in names):
        raise Refused(f"{folder} holds other files and no run.json: choose a new folder")
    if any(not name.startswith("saving-") for name in kept):
        raise Refused(
            f"{folder} holds checkpoints and no run.json, which says whose: put it back, or "
            "choose a new folder"
        )


def identify(folder: Path, record: dict) -> dict:
    """Refuses a folder that holds another run and names both values; warns of another environment.

    Returns the record to keep, with the environment in which the run began.
    """
    vacant(folder)
    if not (folder / "run.json").exists():
        return record
    old = read(folder)
    unedited(folder, old)

    def identity(r):
        # The lowest value is comparable only on one validation set.
        valid = (
            {"fingerprint": (r["valid"] or {}).get("fingerprint")}
            if record["run"]["best"]
            else None
        )
        return {**_identity(r), "valid": valid}

    for name, was, now in _differences(identity(old), identity(record)):
        if name.endswith("fingerprint"):
            sets = [
                (r[name.split(".")[0]] or {}).get("source") or "other arrays" for r in (old, record)
            ]
            was, now = (
                f"{source} ({str(f)[:8]})" for source, f in zip(sets, (was, now), strict=True)
            )
        raise Refused(
            f"{folder} holds another run: {name} was {was!r} there and is {now!r} here; choose a "
            "new folder"
        )
    warn_of_environment(old, record["environment"])
    return {**record, "environment": old["environment"]}


def warn_of_environment(record: dict, here: dict) -> None:
    """Prints one line for each difference from the environment in which a run began."""
    for name, was, now in _differences(record["environment"], here):
        say(
            f"warning: {name} was {was} when this run began and is {now}: last bits may differ "
            "from an unbroken run"
        )


def _models() -> str:
    """Names the models that come with the package, as the end of a message."""
    names = ", ".join(shipped())
    return f"; models that come with the package: {names}" if names else ""


def _no_run(folder: Path) -> str:
    """Says why a folder is no run folder, and names the runs inside it."""
    if not folder.exists() and str(folder) in shipped():
        return (
            f"{folder} is a model that comes with the package, and no run folder: only sample, "
            "info and train.load take its name"
        )
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "there is no such folder"
        return f"{folder} is no run folder: {why}{_models()}"
    inside = []
    for at, below, files in os.walk(folder):
        depth = len(Path(at).relative_to(folder).parts)
        run = "run.json" in files
        if run:
            inside.append(str(Path(at).relative_to(folder)))
        # A run holds no other runs. An experiment puts its runs at most four folders deep.
        below[:] = (
            [] if run or depth == 4 else sorted(name for name in below if not name.startswith("."))
        )
    if not inside:
        return f"{folder} is no run folder: it has no run.json"
    more = f" and {len(inside) - 20} more" if len(inside) > 20 else ""
    names = ", ".join(inside[:20])
    return f"{folder} is no run folder, but there are runs inside; name one of them: {names}{more}"


def read(folder: str | Path) -> dict:
    """Reads run.json of a run folder; raises Refused if it is missing or broken."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise Refused(_no_run(Path(folder)))
    try:
        record = json.loads(path.read_text())
        _well_formed(record)
        module, name = record["make"]
        for part, keys in (
            ("run", ("seed", "batch_size", "init", "steps")),
            ("data", ("fingerprint", "source")),
        ):
            for key in keys:
                record[part][key]
        if not all(
            isinstance(record[part], dict) for part in ("config", "run", "data", "environment")
        ):
            raise TypeError("config, run, data and environment must hold named values")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("make must hold two names")
        record["valid"] and record["valid"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise Refused(f"{path} is damaged ({type(e).__name__}: {str(e)[:300]})") from e
    return record


_SET = {"fingerprint": str, "source": dict[str, typing.Any] | None}
_RECORD = {  # the fields that every record must hold, and their kinds
    "make": tuple[str, str],
    "config": dict,
    "run": {"seed": int, "batch_size": int, "init": str, "steps": int},
    "data": _SET,
    "valid": _SET | {"": None},
    "params": {"sha256": str, "": None},
    "environment": dict,
}


def _well_formed(values, wanted=_RECORD, at: str = "run.json") -> None:
    """Raises TypeError or KeyError where a value of a record is missing or of a wrong kind."""
    if values is None and "" in wanted:  # optional as a whole
        return
    if not isinstance(values, dict):
        raise TypeError(f"{at} must hold named values, got {short(values)}")
    for name, kind in wanted.items():
        within = name if at == "run.json" else f"{at}.{name}"
        if isinstance(kind, dict):
            _well_formed(values.get(name) if "" in kind else values[name], kind, within)
        elif name:
            value_of(kind, values[name], within)


def rebuild(folder: str | Path, trust=()) -> tuple:
    """Returns (make, cfg, run, data info, record) of a run folder.

    Calls only the class of the config, which must accept the recorded fields. `trust`: as for
    `train.load`.
    """
    from .config import Run

    folder = home(folder)
    record = read(folder)
    make, cfg = model_of(record, folder, trust)
    tokenizer = folder / "tokenizer.json"
    with one_line(f"{folder}/run.json does not describe a run of this version"):
        info = build(Info, record["data"])
        if (info.kind == "text" or info.caption_length) and tokenizer.is_file():
            info = dataclasses.replace(info, tokenizer=tokenizer.read_bytes().decode())
        return make, cfg, build(Run, record["run"]), info, record


def lock(folder: Path) -> filelock.BaseFileLock:
    """Makes the folder if needed and locks it against other processes.

    The lock ends with the process, however that ends.
    """
    vacant(folder)  # a folder that is refused gets no file from us
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock")
        held.acquire(blocking=False)
    except filelock.Timeout as e:
        raise Refused(f"another process is training in {folder}") from e
    except (OSError, NotImplementedError) as e:
        raise Refused(f"run.folder {folder} cannot be written or locked: {e}") from e
    return held
