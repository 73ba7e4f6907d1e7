"""Criteria as words: what must hold of a number, written so that people and the program read the same.

    "< 2.39"   "<= 3"   "> 0"   ">= 90"   "= 10"        a comparison with a number
    "within 0.5 .. 2"                                   both ends included
    "within 0.3 of 86.76"                               a distance, its end included

A note for the reader may follow: after a comma, or in brackets. Where words cannot say it, a
criterion is a pair (words, function of the value).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

Criterion = str | tuple[str, Callable[[Any], bool]]

NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
NOTE = r"(?:, \S.*| \(.+\))?"
COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}


def words(criterion: Criterion) -> str:
    """Returns the words of a criterion."""
    return criterion if isinstance(criterion, str) else criterion[0]


def parse(criterion: Criterion) -> Callable[[Any], bool]:
    """Returns the criterion as a function of the value. Nothing holds of nan.

    Raises ValueError for words that are not one of the forms above.
    """
    if not isinstance(criterion, str):
        return criterion[1]
    if found := re.fullmatch(rf"(<=|>=|<|>|=) {NUMBER}{NOTE}", criterion):
        compare, bound = COMPARISONS[found[1]], float(found[2])
        return lambda value: bool(compare(value, bound))
    if found := re.fullmatch(rf"within {NUMBER} \.\. {NUMBER}{NOTE}", criterion):
        low, high = float(found[1]), float(found[2])
        if low <= high:
            return lambda value: bool(low <= value <= high)
    if found := re.fullmatch(rf"within {NUMBER} of {NUMBER}{NOTE}", criterion):
        distance, centre = float(found[1]), float(found[2])
        if distance >= 0:
            return lambda value: bool(abs(value - centre) <= distance)
    raise ValueError(
        f"cannot read the criterion {criterion!r}: write it as '>= 30', 'within 0.5 .. 2' or "
        "'within 0.3 of 86.76', "
        "a note after a comma; else give a pair (words, function)"
    )
