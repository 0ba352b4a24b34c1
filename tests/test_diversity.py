"""How much samples differ, and how long twins are thought about: by hand, and in the sandbox."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import reference as literal
import torch
from stages import write_data

from lib.chat import parse_completion
from lib.compare import diversity
from lib.compare.rpo import Response
from lib.run.files import write_json
from lib.run.hub import load_policy
from lib.sampler import Completion
from lib.sandbox import world


def response(thought: str, answer: str = "", refusal: str = "none", reward: float | None = 1.0, closed=True):
    text = f"{thought} </think> {answer}" if closed else thought
    parsed, tokens = parse_completion(text), len(thought.split())
    written = Completion([1], [0.0], "eos")
    return Response({}, [0, 1], [False, True], written, text, parsed, tokens, refusal, reward=reward)


def means(figures: dict) -> dict[str, float]:
    return {name: ci["mean"] for name, ci in figures.items()}


def test_what_differs_in_a_group_is_counted():
    same = [response("hm", "yes")] * 3
    mixed = [response("hm", "yes"), response("so", "no", "full", 0.0), response("hm", "no", "partial", None)]
    unknown = [response("a", letter, reward=None) for letter in "bcd"]
    found = diversity.diversity([same, mixed, unknown], [0.5, 1.0, 1.5], seed=0)
    third = pytest.approx(1 / 3, abs=1e-3)
    expected = {"distinct_reasonings": pytest.approx(4 / 3, abs=1e-3), "distinct_answers": 2.0}
    expected |= {"entropy": 1.0, "two_rewards": third, "two_verdicts": third}
    expected |= {"reward": 0.75, "best_reward": 1.0}  # of the two groups of which one is known
    assert means(found) == expected and found["reward"]["n"] == 2


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
    assert diversity.twins([group(0)] * 3, seed=0) == {}


def test_a_run_measures_each_model_once_with_the_entropy_of_what_is_sampled(tmp_path, monkeypatch, capsys):
    """Of the base model, as a reasoner and as one that answers at once. The entropy is compared with plain
    passes over what was sampled, at the sampling temperature."""
    write_data(tmp_path / "data")
    for name in ("thinker", "direct"):
        shutil.copytree(world.BASE, tmp_path / name)
        write_json(tmp_path / name / "settings.json", {"reasoning": name == "thinker"})
    words = f"--data {tmp_path}/data --models t={tmp_path}/thinker d={tmp_path}/direct --out {tmp_path}/out"
    words += " --prompts 3 --group-size 2 --max-new-tokens 8 --temperature 0.5 --device cpu"
    monkeypatch.setattr(sys, "argv", ["diversity", *words.split()])
    seen: list[Response] = []
    collect = diversity.collect_responses
    monkeypatch.setattr(diversity, "collect_responses", lambda *a: seen.extend(x := collect(*a)) or x)
    diversity.main()
    written = (tmp_path / "out/results.json").read_text()
    thinker, direct = json.loads(written)["models"].values()
    assert [*thinker] == ["diversity", "twins"] and direct["twins"] == {}
    assert direct["diversity"]["distinct_reasonings"]["mean"] == 1.0  # none at all
    assert "| two_rewards | 0.00 [0.00, 0.56] |" in capsys.readouterr().out

    model, each = load_policy(world.BASE, device="cpu"), []
    for group in (seen[-6:][i : i + 2] for i in (0, 2, 4)):
        each.append(
            torch.cat([literal.entropies(model, r.ids, r.mask.index(True), 0.5) for r in group]).mean()
        )
    entropy = direct["diversity"]["entropy"]
    assert (entropy["mean"], entropy["n"]) == (pytest.approx(sum(each).item() / 3, abs=1e-3), 3)

    monkeypatch.setattr(diversity, "load_policy", pytest.fail)
    diversity.main()
    assert (tmp_path / "out/results.json").read_text() == written
