"""Rows of the results table: what was measured, what must hold of it, and what happens when a measurement fails."""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from aigc_jax import train
from experiments import _criteria

NOT_REACHED = "not reached"  # the value of a row whose event never came; its criterion is not met


class DataError(ValueError):
    """Data that a script cannot use, or cannot find. `main` prints it as one line, with exit code
    2.
    """


class Row(NamedTuple):
    """One line of the results table; the quantity names its unit."""

    quantity: str
    ours: float | str | None
    paper: float | str | None = None
    error: float | None = None  # a standard error; the quantity says over what
    oracle: float | str | None = None  # the exact value, where mathematics gives one
    reason: str | Exception | None = None  # why there is no number of ours


# The lists of rows that the script under `main` has made so far; None outside of main.
_made: contextvars.ContextVar[list[list[Row]] | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[list[Row]]]:
    """Collects the lists of rows that `kept` and `costs` make inside."""
    made: list[list[Row]] = []
    token = _made.set(made)
    try:
        yield made
    finally:
        _made.reset(token)


def kept() -> list[Row]:
    """Returns a new list for rows. If the script fails later, its rows are still written to
    rows.json.
    """
    rows: list[Row] = []
    if (made := _made.get()) is not None:
        made.append(rows)
    return rows


@contextlib.contextmanager
def costs(*quantities: str) -> Iterator[None]:
    """Limits a failure to these rows or figures: each is listed with the reason, and the run goes
    on.

    For everything after the training: measurements, samples, figures. It also decorates functions
    that return nothing. Errors that end a training (NonFinite, SaveFailed, ReadFailed) pass
    through. Outside of `main` all errors do.
    """
    try:
        yield
    except (train.NonFinite, train.SaveFailed, train.ReadFailed, BrokenPipeError):
        raise
    except Exception as e:
        if (made := _made.get()) is None:
            raise
        made.append([Row(quantity, None, reason=e) for quantity in quantities])


def why(reason: str | BaseException) -> str:
    """Returns a reason as one line; for an unexpected exception the type is named too."""
    meant = isinstance(reason, str | ValueError | OSError | train.NonFinite) and str(reason)
    words = str(reason) if meant else f"{type(reason).__name__}: {reason}"
    return " ".join(words.split()) if len(words) <= 500 else " ".join(words[:500].split()) + " ..."


def is_bug(reason) -> bool:
    """Returns whether a failure is a fault of the program, whose traceback should be kept."""
    return isinstance(reason, BaseException) and not isinstance(
        reason, ValueError | OSError | train.NonFinite
    )


def verdict(row: Row, criteria: Mapping[str, _criteria.Criterion]) -> str:
    """Returns whether a row meets its criterion, with its words; "" where it has none."""
    if row.ours is None and row.reason is not None:
        return f"not measured: {why(row.reason)}"
    if row.quantity not in criteria:
        return ""
    criterion = criteria[row.quantity]
    words = _criteria.words(criterion)
    if row.ours is None:
        return f"not measured: {words}"
    met = row.ours != NOT_REACHED and _criteria.parse(criterion)(row.ours)
    return f"{'met' if met else 'not met'}: {words}"


def mean_and_error(values) -> tuple[float, float | None]:
    """Returns mean and standard error over seeds; one seed has no error."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def number(value: Any) -> str:
    """Returns a number as a table shows it: four digits, whole numbers in full, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"


PLAIN = (  # records are not rewritten; tables show these words instead
    (r"(?<![\w.])\.(?=\d)", "0."),
    (r"\bless\b", "minus"),
    (r"\bbits a (?=sequence|point)", "bits per "),
    (r"\bnorm a layer\b", "norm per layer"),
    (r"^holds: ", "met: "),
    (r"^FAILS: ", "not met: "),
)


def plain(words: str) -> str:
    """Returns the words of a row as tables show them."""
    for old, new in PLAIN:
        words = re.sub(old, new, words)
    return words


def as_json(row: Row, words: str) -> dict:
    """Returns a row as rows.json keeps it, with its verdict; it has a reason only where there is
    one.
    """
    reason = {} if row.reason is None else {"reason": why(row.reason)}
    values = {
        name: value.item() if hasattr(value, "item") else value  # scalars of NumPy and JAX
        for name, value in row._asdict().items()
        if name != "reason"
    }
    return {**values, "verdict": words, **reason}
