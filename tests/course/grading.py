"""What the tests of the exercises share: a comparison that says what is wrong, and never what is right.

A test of an exercise needs no other exercise: what a solution calls of them is replaced by stored numbers.
What stands between the marks BEGIN HIDDEN and END HIDDEN is graded, and not handed out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import pytest


def wrong(hint: str) -> NoReturn:
    pytest.fail(hint, pytrace=False)


def ensure(holds: object, hint: str) -> None:
    if not holds:
        wrong(hint)


def flat(value: Any) -> list[Any]:
    """The numbers of a tensor, of lists within lists, of a dict; of a single number that one."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [number for part in value for number in flat(part)]
    return [value]


def same(found: Any, other: Any, tolerance: float = 1e-4) -> bool:
    return flat(found) == pytest.approx(flat(other), abs=tolerance)


def near(found: Any, right: Any, hint: str, slips: dict[str, Any] | None = None) -> None:
    """Fails with the hint of the slip that gives what was found, else with `hint`. slips: {hint: result}."""
    if same(found, right):
        return
    for slip, result in (slips or {}).items():
        if same(found, result):
            wrong(slip)
    strange = any(isinstance(x, float) and not math.isfinite(x) for x in flat(found))
    wrong(f"{hint} (it is not finite)" if strange else hint)
