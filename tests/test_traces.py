"""Self-written traces: what the sandbox's base writes, whatever the batches, and after a kill."""

from __future__ import annotations

import importlib

import pytest
import stages

from lib.chat import parse_completion
from lib.run.files import read_jsonl
from lib.run.hub import load_tokenizer
from lib.sandbox import world
from lib.sources import traces

RECORDS = [{"id": f"r{i}", **record} for i, record in enumerate(world.build_pool("train", "harmful", 5, 0))]
Settings = importlib.import_module("01_build_mixture").Settings


def settings(out):
    usual = {"trace_max_new_tokens": 16, "trace_temperature": 1.0, "max_batch_tokens": 4096}
    return Settings(**usual, out=str(out), trace_model=str(world.BASE), device="cpu")


def test_an_answer_goes_on_with_the_turn_by_another_seed(tmp_path, monkeypatch):
    seeds, last = [], set()

    def complete(model, tokenizer, prompts, given, settings):
        seeds.append(set(given))
        last.update(ids[-1] for ids in prompts)
        return ["x"] * len(prompts)

    monkeypatch.setattr(traces, "complete", complete)
    traces.write_all(RECORDS, 3, settings(tmp_path), "traces")
    assert load_tokenizer(world.BASE).eos_token_id not in last
    assert len(seeds) == 2 and not seeds[0] & seeds[1] and len(seeds[0]) == 3 * len(RECORDS)


def test_a_refusal_that_is_not_gone_on_with_is_no_answer(tmp_path, monkeypatch):
    """Cut in its first sentence, or without room."""
    monkeypatch.setattr(traces, "complete", lambda _, tokenizer, prompts, *rest: [""] * len(prompts))
    tokenizer = load_tokenizer(world.BASE)
    assert traces.write_pairs(None, tokenizer, ["w"], [traces.REFUSES], [1], None) == [["", ""]]


def test_stage_1_goes_on_where_it_was_killed_and_traces_do_not_depend_on_their_batch(tmp_path, monkeypatch):
    small = {"trace_max_new_tokens": 12, "traces_per_prompt": 2}
    monkeypatch.setattr("lib.run.presets.sandbox.MIXTURE", small)
    words = ["--rl-prompts", "6", "--sft-prompts", "4", "--eval-prompts", "4", "--rl-traces", "2"]
    words += ["--trace-model", str(world.BASE), "--device", "cpu"]
    stages.run_here("01_build_mixture", [*words, "--out", str(tmp_path / "whole")], monkeypatch)

    write, calls = traces.write_pairs, []

    def killed(model, tokenizer, prompts, *rest):
        calls.append(prompts)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return write(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(traces, "PROMPTS_AT_ONCE", 2)
    monkeypatch.setattr(traces, "write_pairs", killed)
    with pytest.raises(RuntimeError, match="killed"):
        stages.run_here("01_build_mixture", [*words, "--out", str(tmp_path / "cut")], monkeypatch)
    stages.run_here("01_build_mixture", [*words, "--out", str(tmp_path / "cut")], monkeypatch)
    whole, cut = (stages.contents(tmp_path / name) for name in ("whole", "cut"))
    files = {name for name in whole if name.endswith(".jsonl")}
    assert files == {name for name in cut if name.endswith(".jsonl")}  # and no partial one
    assert all(whole[name] == cut[name] for name in files), "whoever shares a batch"
    assert sum(map(len, calls[3:])) == 2 * 6, "what was finished is not asked again"
    warm, rival = (read_jsonl(tmp_path / f"cut/{name}.jsonl") for name in ("sft", "sft_rl"))
    refused = [r for r in warm if r["answer"].startswith("I'm sorry") and r["reasoning"].endswith("refuse.")]
    assert len(refused) == len({r["prompt"] for r in warm}) == len({r["prompt"] for r in refused}), "half"
    assert all(r["answer"].startswith("I'm sorry") == (r["kind"] == "harmful") for r in rival)
    pairs = [(r["reasoning"], r["answer"]) for r in rival]
    assert len(set(pairs)) > 3 and all(
        parse_completion(f"{reasoning}\n</think>\n\n{answer}").well_formed for reasoning, answer in pairs
    )


def test_a_prompt_too_long_for_the_model_has_an_empty_trace_which_stage_1_drops(tmp_path):
    odd = {"id": "odd one", "prompt": "cake " * 510, "kind": "harmful"}
    assert traces.write_all([odd], 1, settings(tmp_path), "traces") == [[["", ""]]]
