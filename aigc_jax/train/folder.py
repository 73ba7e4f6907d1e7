"""What a run folder says of its run: run.json (who it is), metrics.jsonl and TensorBoard events (how it went)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
import typing
from pathlib import Path

import filelock
import jax
import numpy as np

from ..data import Info
from .checkpoints import say
from .record import Refused, build, config_of, model_of, one_line, short, value_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _commit() -> str:
    """The commit of the checkout that this code lies in, marked where it was changed since; "" outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + (" with changes" if changed else "")


def environment() -> dict:
    """What the last bits of a run depend on."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def home(path: str | Path) -> Path:
    """A path with its ~ expanded, as a shell would."""
    return Path(os.path.expanduser(path))


def _plain(value):
    """A value as JSON gives it back: tuples are lists, numbers of numpy are Python's, paths are text."""

    def other(x):
        if isinstance(x, np.generic):
            return x.item()
        return os.fspath(x)

    return json.loads(json.dumps(value, default=other))


def _write(path: Path, content: str) -> None:
    """Whole or not at all."""
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
    """Writes run.json with the sums of what nobody may edit, and tokenizer.json where the data are text."""
    if info.tokenizer:
        _write(folder / "tokenizer.json", info.tokenizer)
    write_json(folder / "run.json", {**record, "sha256": _digests(record, info.tokenizer or None)})


def _digests(record: dict, tokenizer: str | None) -> dict:
    """sha256 of those parts of a record that its checkpoints depend on.

    How long a run is, how often it looks up, what it keeps and where its data lie may be changed by hand.
    """
    parts = {
        "make": record["make"],
        "config": record["config"],
        "run": {name: record["run"].get(name) for name in ("seed", "batch_size", "init")} | _noise(record["run"]),
        "data": {name: value for name, value in record["data"].items() if name != "source"},
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in parts.items()
    }


def edited(folder: str | Path, record: dict) -> str | None:
    """What of a run folder is not what the run wrote, in words; None where nothing is.

    Runs of versions before these sums are taken as they are.
    """
    folder, sums = Path(folder), record.get("sha256")
    if not isinstance(sums, dict):
        return None
    tokenizer = folder / "tokenizer.json"
    if "tokenizer" in sums and not tokenizer.is_file():
        return f"{tokenizer} is missing: put it back"
    now = _digests(record, tokenizer.read_bytes().decode(errors="replace") if "tokenizer" in sums else None)
    for name in now:
        if sums.get(name) != now[name]:
            what = tokenizer if name == "tokenizer" else f"{name} in {folder / 'run.json'}"
            return f"{what} does not fit the sha256 that the run wrote: undo the edit, or train in a new folder"
    return None


def unedited(folder: str | Path, record: dict) -> None:
    """Raises Refused where a run folder was edited by hand."""
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
    """The content of run.json. Refuses a make that another process could not import."""
    module, name = getattr(make, "__module__", "?"), getattr(make, "__qualname__", repr(make))
    if module == "__main__" or "." in name or "<" in name:
        raise Refused(f"fit records make by its name, and {module}.{name} cannot be imported: put it in a module")
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
        raise Refused(f"{module}.{name} does not come back from its record: annotate its config with its class")
    for field in dataclasses.fields(cfg):
        given, kept = getattr(cfg, field.name), getattr(back, field.name)
        if given is not kept and given != kept:
            raise Refused(f"config.{field.name} is {short(given)} and would come back from run.json as {short(kept)}")
    return record


def _differences(old, new, at: str = ""):
    if isinstance(old, dict) and isinstance(new, dict) and ("object" in old) == ("object" in new):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _noise(run: dict) -> dict:
    """Under pmap every device draws its own noise, so their number belongs to what a run is."""
    return {"pmap": run.get("pmap", False), "devices": run.get("devices") if run.get("pmap") else None}


def _identity(record: dict) -> dict:
    """What must be the same where a run goes on."""
    return {
        "make": ".".join(record["make"]),
        "model": record["config"],
        "data": {"fingerprint": record["data"]["fingerprint"]},
        "run": {key: record["run"][key] for key in ("seed", "batch_size", "init")} | _noise(record["run"]),
        "params": record.get("params"),
    }


def _said(value):
    """A value without what is None: a field that a later version adds is None in an old record."""
    if isinstance(value, dict):
        return {name: _said(inner) for name, inner in value.items() if inner is not None}
    return [_said(inner) for inner in value] if isinstance(value, list | tuple) else value


def whose(record: dict) -> str:
    """sha256 of what makes a run this run and no other; each of its checkpoints holds it."""
    one = _said(_identity(record))
    one["run"].pop("init", None)  # a path: the folder may be moved
    return hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()


def vacant(folder: Path) -> None:
    """Refuses a folder without run.json that holds more than what a start leaves which was killed at once."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"run.folder {folder} is a file")
    if not folder.exists():
        return
    saved, ours = folder / "checkpoints", (".lock", "run.json.new", "tokenizer.json", "tokenizer.json.new")
    names = os.listdir(folder)
    kept = os.listdir(saved) if saved.is_dir() else [""] if saved.exists() else []
    # After the lists: another process that begins here meanwhile writes run.json before anything else.
    if (folder / "run.json").exists():
        return
    if any(name not in (*ours, "checkpoints") for name in names):
        raise Refused(f"{folder} holds other files and no run.json: choose a new folder")
    if any(not name.startswith("saving-") for name in kept):
        raise Refused(
            f"{folder} holds checkpoints and no run.json, which says whose: put it back, or choose a new folder"
        )


def identify(folder: Path, record: dict) -> dict:
    """Refuses a folder that holds another run, both values named; warns where last bits may differ.

    Returns the record to keep: of the environments, the one in which the run began.
    """
    vacant(folder)
    if not (folder / "run.json").exists():
        return record
    old = read(folder)
    unedited(folder, old)

    def identity(r):
        # Lowest values are comparable on one set only.
        valid = {"fingerprint": (r["valid"] or {}).get("fingerprint")} if record["run"]["best"] else None
        return {**_identity(r), "valid": valid}

    for name, was, now in _differences(identity(old), identity(record)):
        if name.endswith("fingerprint"):
            sets = [(r[name.split(".")[0]] or {}).get("source") or "other arrays" for r in (old, record)]
            was, now = (f"{source} ({str(f)[:8]})" for source, f in zip(sets, (was, now), strict=True))
        raise Refused(f"{folder} holds another run: {name} was {was!r} there and is {now!r} here; choose a new folder")
    warn_of_environment(old, record["environment"])
    return {**record, "environment": old["environment"]}


def warn_of_environment(record: dict, here: dict) -> None:
    """Says in a line each what differs from the environment in which a run began."""
    for name, was, now in _differences(record["environment"], here):
        say(f"warning: {name} was {was} when this run began and is {now}: last bits may differ from an unbroken run")


def _no_run(folder: Path) -> str:
    """Why a folder is no run folder; names the runs inside, where there are any."""
    if not folder.is_dir():
        return f"{folder} is no run folder: {'it is a file' if folder.exists() else 'there is no such folder'}"
    inside = []
    for at, below, files in os.walk(folder):
        depth = len(Path(at).relative_to(folder).parts)
        run = "run.json" in files
        if run:
            inside.append(str(Path(at).relative_to(folder)))
        # A run holds no other runs, and a run of an experiment lies at most four folders deep.
        below[:] = [] if run or depth == 4 else sorted(name for name in below if not name.startswith("."))
    if not inside:
        return f"{folder} is no run folder: it has no run.json"
    more = f" and {len(inside) - 20} more" if len(inside) > 20 else ""
    return f"{folder} is no run folder, but there are runs inside; name one of them: {', '.join(inside[:20])}{more}"


def read(folder: str | Path) -> dict:
    """run.json of a run folder; Refused where there is none, or a broken one."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise Refused(_no_run(Path(folder)))
    try:
        record = json.loads(path.read_text())
        _well_formed(record)
        module, name = record["make"]
        for part, keys in (("run", ("seed", "batch_size", "init", "steps")), ("data", ("fingerprint", "source"))):
            for key in keys:
                record[part][key]
        if not all(isinstance(record[part], dict) for part in ("config", "run", "data", "environment")):
            raise TypeError("config, run, data and environment must hold named values")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("make must hold two names")
        record["valid"] and record["valid"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise Refused(f"{path} is damaged ({type(e).__name__}: {str(e)[:300]})") from e
    return record


_SET = {"fingerprint": str, "source": dict[str, typing.Any] | None}
_RECORD = {  # what a record holds at least, whoever wrote it
    "make": tuple[str, str],
    "config": dict,
    "run": {"seed": int, "batch_size": int, "init": str, "steps": int},
    "data": _SET,
    "valid": _SET | {"": None},
    "params": {"sha256": str, "": None},
    "environment": dict,
}


def _well_formed(values, wanted=_RECORD, at: str = "run.json") -> None:
    """TypeError or KeyError where a record's values are of other kinds than they must be."""
    if values is None and "" in wanted:  # may be missing as a whole
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
    """(make, cfg, run, data info, record) of a run folder.

    Calls nothing but the class of the config, which must take the recorded fields. `trust` as for `train.load`.
    """
    from . import Run

    folder = home(folder)
    record = read(folder)
    make, cfg = model_of(record, folder, trust)
    tokenizer = folder / "tokenizer.json"
    with one_line(f"{folder}/run.json does not describe a run of this version"):
        info = build(Info, record["data"])
        if info.kind == "text" and tokenizer.is_file():
            info = dataclasses.replace(info, tokenizer=tokenizer.read_bytes().decode())
        return make, cfg, build(Run, record["run"]), info, record


def lock(folder: Path) -> filelock.BaseFileLock:
    """Keeps a second process out of the folder, which is made where it is missing, until the lock is released.

    It goes with the process, however that ends.
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


def finite(values: dict) -> dict:
    """The same numbers, None in place of those that are not finite: JSON has no word for them."""
    return {name: v if math.isfinite(v) else None for name, v in values.items()}


class Log:
    """metrics.jsonl and TensorBoard events; both forget what lies past the step that a run resumes from."""

    def __init__(self, folder: Path, step: int, lead: bool):
        # tensorboardX's own SummaryWriter writes in a thread that dies of a full disk and then blocks the training.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        path = folder / "metrics.jsonl"
        self.lines = [line for line in metrics(folder) if line["step"] <= step]
        self._lead = lead  # other processes keep the lines in mind and write none
        if not lead:
            return
        new = path.with_name("metrics.jsonl.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        new.replace(path)
        self._file = open(path, "a")
        (folder / "events").mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events" / "events"), f".{step}")
        self._event = lambda step, **content: self._events.write_event(
            Event(wall_time=time.time(), step=step, **content)
        )
        self._scalar = scalar
        if step:  # TensorBoard then drops what an earlier process wrote beyond this step
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, kind: str, values: dict) -> None:
        """One line {"step", kind: values}; kind is train or valid. Values that are not finite are written as null."""
        self.lines.append({"step": step, kind: finite(values)})
        if not self._lead:
            return
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._event(step, summary=self._scalar(f"{kind}/{name}", value))
        if kind == "valid":
            self._events.flush()

    def close(self) -> None:
        """Frees the files; a disk that is full has been reported by then."""
        for file in (self._file, self._events) if self._lead else ():
            with contextlib.suppress(OSError):
                file.close()


def metrics(folder: str | Path) -> list[dict]:
    """The lines of metrics.jsonl: {"step": 100, "train": {...}} or {"step": 100, "valid": {...}}."""
    path = home(folder) / "metrics.jsonl"
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # the line that a crash tore
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int) and _numbers(value):
            lines.append(value)
    return lines


def ranked(lines: list[dict], name: str, among) -> list[int]:
    """The steps, of those `among`, for which a validation value was reported, the lowest value first."""
    seen = [line for line in lines if isinstance(line.get("valid"), dict) and line["step"] in among]
    at = {line["step"]: line["valid"].get(name) for line in seen}
    at = {step: value for step, value in at.items() if _number(value) and math.isfinite(value)}
    return sorted(at, key=lambda step: (at[step], step))


def _number(value) -> bool:
    """Whether a value is a number, and no whole one that exceeds every float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _numbers(line: dict) -> bool:
    parts = [part for kind, part in line.items() if kind != "step"]
    known = all(isinstance(p, dict) and all(v is None or _number(v) for v in p.values()) for p in parts)
    return known and _number(line["step"])
