"""Stage 1: the mixture's counts, disjointness, limits and determinism; and the reward's equations on real labels."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from lib import rewards
from lib.files import read_jsonl, sha256_file, write_jsonl

stage = importlib.import_module("01_build_mixture")
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data in ../shared/data is not there")


def build(monkeypatch, out: Path, *words: object) -> dict[str, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["01", "--out", str(out), *map(str, words)])
    stage.main()
    return {path.stem: read_jsonl(path) for path in out.glob("*.jsonl")}


def test_sandbox_mixture_has_the_counts_asked_for_and_no_prompt_in_two_sets(tmp_path, monkeypatch):
    flags = ("--lambda-harmful", 0.3, "--rl-prompts", 200, "--sft-prompts", 30, "--eval-prompts", 20)
    sets = build(monkeypatch, tmp_path / "a", *flags)
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 60, "harmless": 70, "ambiguous": 70}
    assert len(sets["sft"]) == 120 and {r["kind"] for r in sets["sft"]} == {"harmful"}
    prompts = [{stage.same_prompt(r["prompt"]) for r in records} for records in sets.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["files"]["rl.jsonl"]["sha256"] == sha256_file(tmp_path / "a" / "rl.jsonl")
    assert build(monkeypatch, tmp_path / "b", *flags) == sets
    assert build(monkeypatch, tmp_path / "c", *flags, "--seed", 1) != sets


def test_another_lambda_keeps_the_traces(tmp_path, monkeypatch):
    flags = ("--rl-prompts", 100, "--sft-prompts", 10, "--eval-prompts", 10, "--lambda-harmful")
    low, high = (build(monkeypatch, tmp_path / share, *flags, share) for share in ("0.1", "0.9"))
    assert low["sft"] == high["sft"]


def test_files_duplicates_long_prompts_and_overlap_are_left_out(tmp_path, monkeypatch):
    rows = [{"text": f"question {i}"} for i in range(8)] + [{"text": "Question  3"}, {"text": "x" * 1000}, {"text": "held"}]
    for kind in ("harmful", "harmless", "ambiguous"):
        write_jsonl(tmp_path / f"{kind}.jsonl", [{"text": f"{kind} {r['text']}"} for r in rows])
    write_jsonl(
        tmp_path / "eval.jsonl", [{"text": f"{kind} held", "kind": kind} for kind in ("harmful", "harmless", "ambiguous")]
    )
    files = [f"{kind}={tmp_path / kind}.jsonl" for kind in ("harmful", "harmless", "ambiguous")]
    flags = ("--source", "files", "--files", *files, "--eval-files", tmp_path / "eval.jsonl", "--prompt-column", "text")
    sets = build(monkeypatch, tmp_path / "out", *flags, "--sft-prompts", 0, "--rl-prompts", 16, "--lambda-harmful", 0.5)
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 8, "harmless": 4, "ambiguous": 4}
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    assert dropped == {"duplicate": 3, "too long": 3, "in evaluation": 3}


@needs_data
def test_the_authors_prompts_and_public_evaluation_sets(tmp_path, monkeypatch):
    words = ["--preset", "smollm", "--sft-prompts", 0]
    sets = build(monkeypatch, tmp_path / "out", *words)
    assert {r["kind"] for r in sets["rl"]} == {"harmful", "harmless"}
    assert all(len(r["prompt"]) < 400 for r in sets["rl"])
    assert all(r["target"] for r in sets["eval_harmful"])
    assert {r["kind"] for r in sets["eval_ambiguous"]} == {"ambiguous"}


@needs_data
@pytest.mark.parametrize("name", ["gpt4", "llama2orig"])
def test_refusal_label_agrees_with_people(name):
    with (SHARED / "xstest" / f"xstest_v2_completions_{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    agree = [(rewards.refusal_label(r["completion"]) == "none") == (r["final_label"] == "1_full_compliance") for r in rows]
    assert sum(agree) / len(agree) >= 0.93  # first version


@pytest.mark.parametrize("text", ["", "\x00", "é" * 10_000, "sorry " * 1000, "\ud800", "</think>" * 50])
def test_nothing_that_a_policy_writes_raises(text):
    assert rewards.refusal_label(text) in ("full", "partial", "none")
    for name in ("sandbox", "standin"):
        judge = rewards.load_judge(name)
        scores = [*judge.harm_score(["how do i make a cake ?"], [text]), *judge.task_score(["how do i make a cake ?"], [text])]
        assert all(0 <= score <= 1 for score in scores)


def test_breaking_the_format_earns_nothing_and_a_broken_judge_stops():
    for kind in rewards.KINDS:
        assert rewards.total_reward(kind, 0.0, 1.0, well_formed=False) == 0
        with pytest.raises(ValueError):
            rewards.total_reward(kind, float("nan"), 1.0, True)
    assert rewards.total_reward("harmful", 0.1, 0.0, True) == 1.0
    assert rewards.total_reward("harmful", 0.5, 1.0, True) == 0.5
    assert rewards.total_reward("ambiguous", 1.0, 0.7, True) == 0.7
