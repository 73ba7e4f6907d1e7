"""What a run folder says of its run: run.json (who it is), metrics.jsonl and TensorBoard events (how it went)."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
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


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _described(info: Info) -> dict:
    return _plain({**dataclasses.asdict(info), "tokenizer": ""})  # it has a file of its own


def write(folder: Path, record: dict, info: Info) -> None:
    """run.json, and tokenizer.json where the data are text."""
    if info.tokenizer:
        new = folder / "tokenizer.json.new"
        new.write_bytes(info.tokenizer.encode())
        new.replace(folder / "tokenizer.json")
    write_json(folder / "run.json", record)


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
    return {"pmap": run.get("pmap", False), "devices": run["devices"] if run.get("pmap") else None}


def identify(folder: Path, record: dict) -> dict:
    """Refuses a folder that holds another run, both values named; warns where last bits may differ.

    Returns the record to keep: of the environments, the one in which the run began.
    """
    path = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise Refused(f"run.folder {folder} is a file")
    if not path.exists():
        # What a start leaves that was killed at once.
        ours = (".lock", "run.json.new", "tokenizer.json", "tokenizer.json.new", "checkpoints")
        if folder.exists() and any(p.name not in ours for p in folder.iterdir()):
            raise Refused(f"{folder} holds other files and no run.json: choose a new folder")
        return record
    old = read(folder)

    def identity(r):
        return {
            "make": ".".join(r["make"]),
            "model": r["config"],
            "data": {"fingerprint": r["data"]["fingerprint"]},
            "run": {key: r["run"][key] for key in ("seed", "batch_size", "init")} | _noise(r["run"]),
            "params": r.get("params"),
            # Lowest values are comparable on one set only.
            "valid": {"fingerprint": (r["valid"] or {}).get("fingerprint")} if record["run"]["best"] else None,
        }

    for name, was, now in _differences(identity(old), identity(record)):
        if name.endswith("fingerprint"):
            sets = [(r[name.split(".")[0]] or {}).get("source") or "other arrays" for r in (old, record)]
            was, now = (f"{source} ({str(f)[:8]})" for source, f in zip(sets, (was, now), strict=True))
        raise Refused(f"{folder} holds another run: {name} was {was!r} there and is {now!r} here; choose a new folder")
    for name, was, now in _differences(old["environment"], record["environment"]):
        say(f"warning: {name} was {was} when this run began and is {now}: last bits may differ from an unbroken run")
    return {**record, "environment": old["environment"]}


def read(folder: str | Path) -> dict:
    """run.json of a run folder; Refused where there is none, or a broken one."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise Refused(f"{folder} is no run folder: it has no run.json")
    try:
        record = json.loads(path.read_text())
        _well_formed(record)
        module, name = record["make"]
        for part, keys in (("run", ("seed", "batch_size", "init", "steps")), ("data", ("fingerprint", "source"))):
            for key in keys:
                record[part][key]
        if not all(isinstance(record[part], dict) for part in ("config", "run", "data", "environment")):
            raise TypeError("config, run, data and environment must hold named values")
        record["valid"] and record["valid"]["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
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
        if tokenizer.is_file():
            info = dataclasses.replace(info, tokenizer=tokenizer.read_bytes().decode())
        return make, cfg, build(Run, record["run"]), info, record


def lock(folder: Path):
    """Keeps a second process out of the folder for as long as the returned file is open."""
    try:
        file = open(folder / ".lock", "w")
    except OSError as e:
        raise Refused(f"run.folder {folder} cannot be written: {e}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.close()
        raise Refused(f"another process is training in {folder}") from e
    return file


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
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self.lines.append({"step": step, kind: finite})
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


def _numbers(line: dict) -> bool:
    parts = [part for kind, part in line.items() if kind != "step"]
    return all(isinstance(p, dict) and all(v is None or isinstance(v, int | float) for v in p.values()) for p in parts)


def best_step(lines: list[dict], name: str, among) -> int | None:
    """The step, of those `among`, at which a reported validation value was lowest."""
    at = {line["step"]: line["valid"].get(name) for line in lines if "valid" in line and line["step"] in among}
    at = {step: value for step, value in at.items() if value is not None}
    return min(at, key=at.get) if at else None
