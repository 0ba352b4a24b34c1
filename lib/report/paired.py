"""Two models on the same prompts: paired differences, of results.json and the report."""

from __future__ import annotations

import itertools
from typing import Any

from lib.metrics import BENIGN, Lines, bootstrap


def served_by_prompt(lines: Lines) -> dict[str, dict[str, float]]:
    """{figure: {prompt's id: value}} of one model, of requests that deserve an answer."""
    values: dict[str, dict[str, float]] = {}
    for kind in BENIGN:
        group = [x for x in lines if x["set"] == kind]
        labelled = [x for x in group if x["refusal"] is not None]
        values[f"compliance, {kind}"] = {x["id"]: float(x["refusal"] == "none") for x in labelled}
        values[f"task score, {kind}"] = {x["id"]: x["task"] for x in group if x["task"] is not None}
    return values


def differences(values: dict[str, dict[str, dict[str, float]]], seed: int) -> list[dict[str, Any]]:
    """Paired differences a - b of every two models, over the prompts that both met: figure, a, b, ci.

    values: {model: {figure: {prompt's id: value}}}.
    """
    found = []
    for a, b in itertools.combinations(values, 2):
        for figure in [f for f in values[a] if f in values[b]]:
            mine, theirs = values[a][figure], values[b][figure]
            if gaps := [mine[i] - theirs[i] for i in mine if i in theirs]:
                found.append({"figure": figure, "a": a, "b": b, "ci": bootstrap(gaps, seed)})
    return found
