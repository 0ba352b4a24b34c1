"""RPO: pairs, the loss and its gradient against tests/reference.py, and the command as a whole."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import reference as literal
import stages
import torch
from safetensors.torch import load_file
from stages import RPO, metrics_of, rpo_flags, run_here, run_process

from lib import UserError
from lib.chat import Parsed
from lib.compare import rpo
from lib.run.files import read_jsonl, write_jsonl
from lib.run.plumbing import Run
from lib.sampler import Completion
from lib.sandbox import world

REWARDS = [0.9, 0.1, 0.5, 0.5, 0.0, 1.0, 0.3, 0.6, 0.2, 0.2, 0.2, 0.2]  # pairs by hand, in groups of 4:
PAIRS = [(0, 1), (5, 4), (7, 6)]  # 0.5 with 0.5 is a tie, and so are both of the last group


def make_responses(rewards: list[float], group_size: int) -> list[rpo.Response]:
    """A prompt for each group, completions of unequal lengths."""
    rng, responses = random.Random(0), []
    for i, reward in enumerate(rewards):
        if i % group_size == 0:
            prompt = [rng.randrange(97) for _ in range(rng.randint(2, 7))]
        ids = [rng.randrange(97) for _ in range(rng.randint(1, 9))]
        completion, mask = Completion(ids, [0.0] * len(ids), "eos"), [False] * len(prompt) + [True] * len(ids)
        about = ({}, prompt + ids, mask, completion, "", Parsed("", "", True), 0, "none")
        responses.append(rpo.Response(*about, reward=reward))
    return responses


def update(model, anchor, responses, **changes) -> tuple[dict, torch.Tensor]:
    """Metrics of an update, and its gradient."""
    settings = rpo.Settings(group_size=4, max_grad_norm=0.0, **changes)
    step = rpo.update_on_preferences
    return stages.step_of(model, lambda sgd: step(model, anchor, sgd, responses, 0, settings, Run(settings)))


def test_best_with_worst_ties_are_counted_and_the_unknown_is_in_no_pair():
    assert rpo.preference_pairs(REWARDS, 4) == (PAIRS, 3)
    assert rpo.preference_pairs([0.1, None, 0.9, 0.5, None, None, 1.0, None], 4) == ([(2, 0)], 0)
    assert rpo.preference_pairs([0.0, 0.5, 1.0], 3) == ([(2, 0)], 0)  # the middle one is in none


@pytest.mark.parametrize("beta, alpha, most", [(0.01, 3.0, 64), (0.3, 0.0, 32), (1.0, 1.0, 4096)])
def test_loss_and_gradient_are_those_of_the_formula(tiny_model, reference, beta, alpha, most):
    """However many tokens are in a micro-batch."""
    tiny_model.double(), reference.double()
    responses = make_responses(REWARDS, 4)
    new = [literal.logprobs(tiny_model, r.ids, r.mask.index(True)) for r in responses]
    anchor = [literal.logprobs(reference, r.ids, r.mask.index(True)) for r in responses]
    expected_loss = literal.rpo(new, anchor, PAIRS, beta, alpha)
    expected_loss.backward()
    expected = stages.gradient(tiny_model)
    changes = {"rpo_beta": beta, "rpo_alpha": alpha, "temperature": 0.6, "max_batch_tokens": most}
    metrics, found = update(tiny_model, reference, responses, **changes)
    assert expected.norm() > 0.1
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert metrics["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert (metrics["pairs"], metrics["tied_pairs"]) == (3, 3)
    gaps = [(sum(n) - sum(a)).item() for n, a in zip(new, anchor, strict=True)]
    margins = [beta * (gaps[i] - gaps[j]) for i, j in PAIRS]
    assert metrics["pair_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert metrics["margin"] == pytest.approx(sum(margins) / 3, rel=1e-3, abs=1e-6)
    rows = [responses[i] for pair in PAIRS for i in pair]
    gap = torch.cat([torch.stack(new[i]) - torch.stack(anchor[i]) for pair in PAIRS for i in pair])
    entropy = torch.cat([literal.entropies(tiny_model, r.ids, r.mask.index(True)) for r in rows])
    assert metrics["kl"] == pytest.approx(literal.kl(gap, "k3").mean().item(), rel=1e-3)
    assert metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-3)


def test_a_pair_needs_the_budget_of_two_and_a_row_the_context_of_one(tiny_model, reference):
    """Rows of 100 tokens, of a context of 128."""
    for most in (200, 199):
        settings = rpo.Settings(max_batch_tokens=most, max_sample_tokens=100)
        rehearse = partial(Run(settings).rehearse, tiny_model, reference, 8, 100, together=2)
        if most == 200:
            rehearse()
        else:
            with pytest.raises(UserError, match="--max-batch-tokens 199: .* raise it to 200"):
                rehearse()


# ---- the command ----


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """6 steps of 4 of 18 prompts: the second epoch begins within the fifth."""
    out = tmp_path_factory.mktemp("alone") / "rpo"
    run_process(RPO, rpo_flags(data, out), out.with_suffix(".log"))
    return out


def test_the_policy_comes_to_prefer_the_chosen_of_responses_that_stay_the_same(data, tmp_path, monkeypatch):
    out, changes = tmp_path / "rpo", {"learning_rate": 1e-3, "epochs": 4.0, "prompts_per_step": 9}
    run_here(RPO, rpo_flags(data, out, **changes), monkeypatch)
    first, *_, last = lines = metrics_of(out)
    assert {"entropy", "grad_norm", "format_rate", "pairs", "tied_pairs"} <= first.keys()
    assert first["pair_accuracy"] == first["margin"] == 0 and abs(first["kl"]) < 1e-9
    assert last["pair_accuracy"] > 0.7 and last["margin"] > 0 and last["kl"] > 0
    assert sum(line["loss"] for line in lines[-2:]) < 0.9 * sum(line["loss"] for line in lines[:2])
    rewards = [sum(line["reward"] for line in lines[i : i + 2]) for i in (0, 2, 6)]
    assert rewards == pytest.approx([rewards[0]] * 3)  # offline: those of the reference, in every epoch


def test_without_a_pair_nothing_moves(data, tmp_path, monkeypatch):
    """A reasoner without the format earns nothing, so all rewards are alike. No weight decay either."""
    write_jsonl(tmp_path / "data" / "rl.jsonl", read_jsonl(data / "rl.jsonl")[:4])
    changes = {"reasoning": True, "max_new_tokens": 2, "epochs": 2.0}
    monkeypatch.setitem(stages._PRESET.RPO, "weight_decay", 0.5)
    run_here(RPO, rpo_flags(tmp_path / "data", tmp_path / "rpo", **changes), monkeypatch)
    for line in metrics_of(tmp_path / "rpo"):
        assert (line["loss"], line["pairs"], line["tied_pairs"], line["pair_accuracy"]) == (0.0, 0, 8, None)
    before, after = (load_file(path / "model.safetensors") for path in (world.BASE, tmp_path / "rpo"))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_a_judge_that_fails_costs_no_earlier_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "task_score", lambda prompts, answers: [2.0] * len(answers))
    words = rpo_flags(data, out := tmp_path / "rpo")
    assert "--judge: stages gave 2.0" in stages.error_of(RPO, words, monkeypatch, capsys)
    assert not out.exists()


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_and_shards_equal_one(data, alone, tmp_path, shard):
    out = tmp_path / "rpo"
    stages.join_group(RPO, rpo_flags(data, out, shard=shard), tmp_path / "log")
    stages.same_training(alone, out, but=("pair_accuracy",))  # a margin of rounding may have either sign
