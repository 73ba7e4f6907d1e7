"""metrics.jsonl and TensorBoard events: how a run went."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

from .folder import home


def finite(values: dict) -> dict:
    """Replaces numbers that are not finite by None, because JSON cannot write them."""
    return {name: v if math.isfinite(v) else None for name, v in values.items()}


class Log:
    """metrics.jsonl and TensorBoard events. Both drop the lines after the step of the resume."""

    def __init__(self, folder: Path, step: int, lead: bool):
        # tensorboardX's SummaryWriter writes in a thread. On a full disk the thread dies, and the
        # training blocks.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        path = folder / "metrics.jsonl"
        self.lines = [line for line in metrics(folder) if line["step"] <= step]
        self._lead = lead  # other processes keep the lines in memory only
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
        if step:  # TensorBoard then drops later steps of an earlier process
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, kind: str, values: dict) -> None:
        """Writes {"step": step, kind: values}; kind is train or valid. NaN and infinity: null."""
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
        """Closes the files. A full disk has been reported by then."""
        for file in (self._file, self._events) if self._lead else ():
            with contextlib.suppress(OSError):
                file.close()


def metrics(folder: str | Path) -> list[dict]:
    """Reads the lines of metrics.jsonl.

    Each is {"step": 100, "train": {...}} or {"step": 100, "valid": {...}}. Skips damaged lines.
    """
    path = home(folder) / "metrics.jsonl"
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # a crash cut this line
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int) and _numbers(value):
            lines.append(value)
    return lines


def ranked(lines: list[dict], name: str, among) -> list[int]:
    """Those steps of `among` at which this validation value was reported, lowest value first."""
    seen = [line for line in lines if isinstance(line.get("valid"), dict) and line["step"] in among]
    at = {line["step"]: line["valid"].get(name) for line in seen}
    at = {step: value for step, value in at.items() if _number(value) and math.isfinite(value)}
    return sorted(at, key=lambda step: (at[step], step))


def _number(value) -> bool:
    """Whether a value is a float, or an integer that fits 64 bits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _numbers(line: dict) -> bool:
    parts = [part for kind, part in line.items() if kind != "step"]
    known = all(
        isinstance(p, dict) and all(v is None or _number(v) for v in p.values()) for p in parts
    )
    return known and _number(line["step"])
