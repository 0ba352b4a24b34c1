"""How much samples differ, and how long twins are thought about: by hand, and in the sandbox."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from stages import write_data

from lib.chat import Parsed
from lib.compare import diversity
from lib.compare.rpo import Response
from lib.run.files import write_json
from lib.run.hub import load_policy
from lib.sampler import Completion
from lib.sandbox import world


def response(thought: str, answer: str = "", refusal: str = "none", reward: float | None = 1.0, closed=True):
    text = f"{thought} </think> {answer}" if closed else thought
    parsed = Parsed(thought if closed else "", answer if closed else thought, closed)
    written = Completion([1], [0.0], "eos")
    tokens = len(parsed.reasoning.split())
    return Response({}, [0, 1], [False, True], written, text, parsed, tokens, refusal, reward=reward)


def means(figures: dict) -> dict[str, float]:
    return {name: ci["mean"] for name, ci in figures.items()}


def test_what_differs_in_a_group_is_counted():
    same = [response("hm", "yes")] * 3
    mixed = [response("hm", "yes"), response("so", "no", "full", 0.0), response("hm", "no", "partial", None)]
    unknown = [response("a", "b", reward=None), response("a", "c", reward=None), response("d", reward=None)]
    found = diversity.diversity([same, mixed, unknown], [0.5, 1.0, 1.5], seed=0)
    assert means(found) == {
        "distinct_reasonings": pytest.approx(5 / 3, abs=1e-3),
        "distinct_answers": 2.0,
        "entropy": 1.0,
        "reward": 0.75,  # of the two groups of which one is known
        "best_reward": 1.0,
        "two_rewards": pytest.approx(1 / 3, abs=1e-3),
        "two_verdicts": pytest.approx(1 / 3, abs=1e-3),
    }
    assert found["reward"]["n"] == 2 and found["two_rewards"]["n"] == found["entropy"]["n"] == 3


def test_twins_are_compared_by_disguise_and_what_is_never_closed_is_left_out():
    def group(*lengths: int):
        return [response(" ".join(["hm"] * n), closed=n > 0) for n in lengths]  # 0: never closed

    groups = [group(4, 6), group(2, 2), group(5, 0), group(20, 20), group(17, 19), group(21, 21)]
    groups += [group(9, 9), group(0, 0), group(9, 9)]  # its decoy is never closed
    expected = {"harmful": 12.5, "decoy": 10.0, "toy": 13.0}
    expected |= {"decoy_minus_harmful": -2.5, "toy_minus_harmful": 0.5}
    found = diversity.twins(groups, seed=0)
    assert means(found) == expected and {ci["n"] for ci in found.values()} == {2}
    assert (found["decoy_minus_harmful"]["low"], found["decoy_minus_harmful"]["high"]) == (-3.0, -2.0)
    assert diversity.twins([group(0)] * 3, seed=0) == diversity.twins([], seed=0) == {}


def measured(folder, monkeypatch, *flags: str) -> dict:
    """Of the base model as a reasoner and as one that answers at once."""
    if not (folder / "data").exists():
        write_data(folder / "data")
        for name in ("thinker", "direct"):
            shutil.copytree(world.BASE, folder / name)
            write_json(folder / name / "settings.json", {"reasoning": name == "thinker"})
    words = (
        f"--data {folder}/data --models t={folder}/thinker d={folder}/direct --out {folder}/out --device cpu"
    )
    words += " --prompts 3 --group-size 2 --max-new-tokens 8 --temperature 0.5"
    monkeypatch.setattr(sys, "argv", ["diversity", *words.split(), *flags])
    diversity.main()
    return json.loads((folder / "out/results.json").read_text())["models"]


def test_a_run_measures_each_model_once_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    found, drawn = measured(tmp_path, monkeypatch), []
    assert [*found["t"]] == ["diversity", "twins"] and found["d"]["twins"] == {}
    assert found["d"]["diversity"]["distinct_reasonings"]["mean"] == 1.0  # none at all
    assert found["t"]["diversity"]["entropy"]["n"] == 3
    tables = capsys.readouterr().out
    assert "|  | t | d |" in tables and "| two_rewards | 0.00 [0.00, 0.56] |" in tables

    monkeypatch.setattr(diversity, "load_policy", lambda *args, **how: drawn.append(args))
    assert measured(tmp_path, monkeypatch) == found and not drawn


def test_entropy_is_that_of_the_distribution_that_is_sampled(tmp_path, monkeypatch):
    """Against plain passes over what was sampled, at the sampling temperature."""
    seen: list[Response] = []
    collect = diversity.collect_responses
    monkeypatch.setattr(diversity, "collect_responses", lambda *a: seen.extend(x := collect(*a)) or x)
    entropy = measured(tmp_path, monkeypatch)["d"]["diversity"]["entropy"]["mean"]
    model, groups = load_policy(world.BASE, device="cpu"), [seen[-6:][i : i + 2] for i in (0, 2, 4)]
    each = []
    for group in groups:
        nats = []
        for r in group:
            with torch.no_grad():
                logprobs = (model(input_ids=torch.tensor([r.ids])).logits[0] / 0.5).log_softmax(-1)
            nats += (-(logprobs.exp() * logprobs).sum(-1))[-len(r.completion.token_ids) - 1 : -1].tolist()
        each.append(sum(nats) / len(nats))
    assert entropy == pytest.approx(sum(each) / 3, abs=1e-3)
