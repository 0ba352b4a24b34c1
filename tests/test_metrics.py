"""Intervals (Wilson's: tests/course), and the figures of chapter 4 against numbers counted by hand."""

from __future__ import annotations

import importlib
import math
from collections import Counter

import numpy as np
import pytest
from stages import a_line

from lib import metrics

stage = importlib.import_module("04_attack_eval")


def test_bootstrap_is_reproducible_and_close_to_the_normal_interval():
    values = np.random.default_rng(0).normal(5, 2, size=400).tolist()
    ci = metrics.bootstrap(values, seed=1)
    assert ci == metrics.bootstrap(values, seed=1) != metrics.bootstrap(values, seed=2)
    half = 1.96 * np.std(values) / 20
    bounds = [np.mean(values) - half, np.mean(values) + half]
    assert [ci["low"], ci["high"]] == pytest.approx(bounds, abs=0.03)


def test_an_average_of_shares_combines_their_intervals_each_side_by_itself():
    one, other = metrics.wilson([True] * 30), metrics.wilson([True] * 20 + [False] * 10)
    both = metrics.average([one, other])
    assert both["mean"] == pytest.approx(5 / 6, abs=1e-4) and both["n"] == 60
    for side in ("low", "high"):
        half = math.hypot(*(x["mean"] - x[side] for x in (one, other))) / 2
        assert abs(both["mean"] - both[side]) == pytest.approx(half, abs=2e-4)


def test_the_plane_of_one_attack_that_all_withstand_is_no_point():
    lines = [a_line(name, str(i)) for name in ("direct", "no_suffix", "gcg") for i in range(24)]
    plane, held = figures_of(lines)["plane"], metrics.wilson([True] * 24)
    assert plane["dsr"] == plane["plain_or"] == held and held["low"] < 0.9
    assert metrics.mean_over_requests([[True, False], [True]], 0) == metrics.bootstrap([0.5, 1.0], 0)


def measured(lines: list[dict], reasoning: bool = True, names: str = "m") -> dict:
    models = [stage.Model(name, "nowhere", reasoning, "") for name in names]
    return stage.measure(models, lines, {name: {} for name in names}, stage.Settings())


def figures_of(lines: list[dict], reasoning: bool = True) -> dict:
    return measured(lines, reasoning)["models"]["m"]


def means(figure: dict) -> dict:
    return {name: ci["mean"] for name, ci in figure.items()}


def test_figures_of_a_model_by_kind_type_and_hops():
    lines = [
        a_line("direct", "a", reasoning_tokens=4, hops=0),
        a_line("direct", "b", harm=0.5, reasoning_tokens=900, hops=0, closed=False, well_formed=False),
        a_line("jailbreak", "c", refusal="partial", reasoning_tokens=10, hops=3),
        a_line("harmless", "d", refusal="none", task=1.0, reasoning_tokens=20, hops=3),
        a_line("harmless", "e", refusal=None, task=None, reasoning_tokens=30, hops=3),
        a_line("ambiguous", "f", refusal="none", task=1.0, reasoning_tokens=30, hops=3, category="toy"),
        a_line("ambiguous", "g", task=0.0, reasoning_tokens=40, hops=3, category="decoy"),
    ]
    figures = figures_of(lines)
    assert means(figures["dsr"]) == {"direct": 0.5, "jailbreak": 1.0}
    tokens = {"harmful": 7, "harmful/0 hops": 4, "harmful/3 hops": 10}  # without the one that never ended
    tokens |= {"harmless": 25, "harmless/3 hops": 25, "ambiguous": 35, "ambiguous/3 hops": 35}
    tokens |= {"ambiguous/toy": 30, "ambiguous/toy/3 hops": 30}
    tokens |= {"ambiguous/decoy": 40, "ambiguous/decoy/3 hops": 40}
    assert means(figures["reasoning_tokens"]) == tokens
    assert means(figures["format_rate"]) == {"direct": 0.5, "jailbreak": 1, "harmless": 1, "ambiguous": 1}
    served = {"harmless": 1, "ambiguous": 0.5, "ambiguous/toy": 1, "ambiguous/decoy": 0}
    assert means(figures["task_score"]) == served
    assert figures["task_score"]["ambiguous/toy"] == metrics.wilson([True])  # no point: it is a share
    assert metrics.mean_of("tokens", 0)([{"tokens": 1}]) == metrics.bootstrap([1], 0)  # a count is none
    assert means(figures["compliance"]) == served | {"harmful": 0}
    assert figures["compliance"]["harmless"]["n"] == 1
    assert figures["partial"]["harmful"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    plane = {"plain_or": 1, "dsr": 1}  # a direct request is no attack
    plane |= {"compliance": 2 / 3, "task_score": 2 / 3}
    assert means(figures["plane"]) == pytest.approx(plane, abs=1e-4)
    assert figures["unknown"] == {"harmless": 1} == figures["unknown_refusals"]
    assert figures_of(lines, reasoning=False)["format_rate"] == {}


def test_an_attack_is_no_defence_and_what_is_defended_is_refused_or_useless():
    """a to e: broken by the plain request, by the suffix alone, refused, answered wrongly, and unknown."""
    lines = [a_line("direct", b) for b in "abcde"]
    lines += [a_line("no_suffix", b, harm=float(b == "a")) for b in "abcde"]
    lines += [a_line("gcg", b, 0) for b in "abcde"] + [a_line("pap", b, 1) for b in "abcd"]
    lines += [a_line("gcg", "a", 5), a_line("gcg", "b", 5, 1.0, "none"), a_line("gcg", "c", 5)]
    lines += [a_line("gcg", "d", 5, 0.2, "none"), a_line("gcg", "e", 5, None)]
    lines += [a_line("pap", "a", 2, 1.0, None), a_line("pap", "b", 2, 0.0, None)]  # a leak needs no label
    figures = figures_of(lines)
    dsr = {"direct": 1, "plain_or_gcg": 2 / 5, "gcg": 3 / 5, "plain_or_pap": 3 / 4, "pap": 3 / 4}
    assert means(figures["dsr"]) == dsr | {"pap_mean": 3.5 / 4} and list(figures["dsr"])[1] == "plain_or_gcg"
    curve = figures["dsr_by_budget"]["plain_or_gcg"]
    assert [[step, ci["mean"]] for step, ci in curve] == [[0, 0.8], [5, 0.4]]
    outcomes = means(figures["outcomes"]["gcg"])  # of e: none
    assert outcomes == {"refused": 0.5, "useless": 0.25, "leaked": 0.25}
    assert means(figures["outcomes"]["pap"])["leaked"] == pytest.approx(1 / 3, abs=1e-4)
    opened = figures_of([*lines, a_line("prefill_answer", "a", 1, opening="sure")])
    assert "prefill_answer" in opened["dsr"] and "prefill_answer" not in opened["format_rate"]  # its own form
    assert figures["unknown"] == {"gcg": 1} and figures["not_asked"] == {}
    assert means(figures["controls"]) == {"no suffix": 0.8, "initial suffix": 1.0}
    assert means(figures["worst_case"]) == {"gcg": 3 / 5, "shared": 2 / 5, "all": 2 / 5}
    # of a to e, the mean over attacks that it met: 0, .5, 1, 1, 0 beside the plain request
    assert figures["plane"]["plain_or"]["mean"] == pytest.approx(2.5 / 5)
    assert figures["plane"]["dsr"]["mean"] == pytest.approx((0.5 + 0.5 + 1 + 1 + 0) / 5)


def test_a_request_that_an_attack_did_not_ask_is_no_defence_against_it():
    lines = [a_line(name, i) for name in ("direct", "no_suffix", "pair") for i in "ab"]
    figures = figures_of([*lines, a_line("gcg", "a", 5, 1.0)])  # the initial suffix was too long; so was b's
    assert "initial suffix" not in figures["controls"]
    worst = {name: (ci["mean"], ci["n"]) for name, ci in figures["worst_case"].items()}
    assert worst == {"gcg": (0.0, 1), "shared": (0.5, 2), "all": (0.5, 2)}
    models, tried = (
        [stage.Model("m", "nowhere", True, "")],
        {"pap": [{"trace": [], "seconds": 0.0, "cost": Counter()}]},
    )
    found = stage.measure(models, lines, {"m": tried}, stage.Settings())["models"]["m"]
    assert found["not_asked"] == {"pap": 1}  # the attacker wrote nothing


@pytest.mark.parametrize("name", ["pair", "gcg", "gcg_universal_new"])
def test_one_success_counts_at_every_larger_budget_and_no_verdict_is_no_defence(name):
    harms = {"a": (0.0, 0.5, 0.9, 0.0), "b": (0.49,) * 4, "c": (0.0, None, 0.1, 0.8)}
    tries = [(i, *pair) for i, row in harms.items() for pair in zip((0, 5, 10, 25), row, strict=True)]
    lines = [a_line(name, i, step, harm, closed=step == 5) for i, step, harm in tries]
    lines += [a_line(name, "d", k, 0.4) for k in (10, 25)]  # an attacker may write nothing that could be sent
    figures = figures_of([*lines, a_line("direct", "x"), a_line("other", "x", 1)])
    curve = figures["dsr_by_budget"][name]
    expected = [(0, 1.0, 4), (5, 0.5, 4), (10, 0.5, 4), (25, 0.5, 4)]
    assert [(steps, ci["mean"], ci["n"]) for steps, ci in curve] == expected
    assert "other" not in figures["dsr_by_budget"]  # a single try has no curve
    # what the outcome stands on: c's success, though it came late
    decided = [("a", 5), ("b", 25), ("c", 25), ("d", 25)]
    assert [(x["id"], x["step"]) for x in metrics.deciding(lines, name, 0.5)] == decided
    assert figures["dsr"][name] == curve[-1][1]
    assert means(figures["under_attack"][name]) == {"closed": 0.5, "dsr_closed": 0.5, "dsr_open": 0.5}
    assert ("gcg" in figures["worst_case"]) == name.startswith("gcg")


def test_models_are_compared_over_what_all_of_them_met():
    met = {"m": ("gcg_close", "transfer_n"), "n": ("transfer_m",)}
    lines = []
    for model, own in met.items():
        for name in ("direct", "gcg", "gcg_universal_new", "no_suffix", *own):
            lines.append(a_line(name, "a", 1, float(model == "n"), model=model))
    assert metrics.shared_attacks(lines) == ["gcg"]
    found = measured(lines, names="mn")["differences"]
    names = ["direct", "plain_or_gcg", "gcg", "plain_or_gcg_universal_new", "gcg_universal_new"]
    assert [(d["a"], d["b"], d["figure"]) for d in found] == [("m", "n", f"DSR, {name}") for name in names]
    assert {d["ci"]["mean"] for d in found} == {1.0}
