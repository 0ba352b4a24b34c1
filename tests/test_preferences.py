"""RPO: pairs, the loss and its gradient against the formula written out, and the stage with `--objective rpo`."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path

import pytest
import stages
import torch
from safetensors.torch import load_file
from stages import (
    RL,
    kill_9,
    launch,
    metrics_of,
    rl_flags,
    run_group,
    run_here,
    run_process,
    same_run,
    wait_for_lines,
)

from lib.chat import Parsed
from lib.compare import rpo as preferences
from lib.compare.rpo import preference_pairs, response_seeds, rpo_loss, update_on_preferences
from lib.run import shards as sharding
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.processes import Processes
from lib.run.settings import parse_settings
from lib.sampler import Completion
from lib.sandbox import world

stage = importlib.import_module(RL)
ALONE = Processes(0, 1, 0)
RATE = 3e-5  # at which rounding stays rounding, see test_rl


def make_rollouts(rewards: list[float], group_size: int) -> list:
    """A prompt for each group, completions of unequal lengths."""
    rng, rollouts = random.Random(0), []
    for i, reward in enumerate(rewards):
        if i % group_size == 0:
            prompt = [rng.randrange(97) for _ in range(rng.randint(2, 7))]
        ids = [rng.randrange(97) for _ in range(rng.randint(1, 9))]
        rollouts.append(
            stage.Rollout({}, prompt, Completion(ids, [0.0] * len(ids), "eos"), "", Parsed("", "", True), 0)
        )
        rollouts[-1].reward = reward
    return rollouts


REWARDS = [0.9, 0.1, 0.5, 0.5, 0.0, 1.0, 0.3, 0.6, 0.2, 0.2, 0.2, 0.2]  # pairs by hand, in groups of 4:
PAIRS = [(0, 1), (5, 4), (7, 6)]  # 0.5 with 0.5 is a tie, and so are both of the last group


def literal_logprob(model, rollout) -> torch.Tensor:
    """log pi(y | x) at temperature 1: one plain forward pass, all its logits."""
    ids, start = rollout.prompt_ids + rollout.completion.token_ids, len(rollout.prompt_ids)
    logits = model(torch.tensor([ids])).logits[0].double()
    return sum(
        (torch.log(torch.softmax(logits[t - 1], -1)[ids[t]]) for t in range(start, len(ids))), torch.zeros(())
    )


def literal_loss(policy, reference, rollouts, pairs, beta: float, alpha: float) -> torch.Tensor:
    """Pang et al. eq. 1, word by word, mean over the pairs."""
    losses = []
    for w, other in ((rollouts[i], rollouts[j]) for i, j in pairs):
        with torch.no_grad():
            ref_w, ref_l = literal_logprob(reference, w), literal_logprob(reference, other)
        lp_w, lp_l = literal_logprob(policy, w), literal_logprob(policy, other)
        dpo = -torch.log(1 / (1 + torch.exp(-(beta * (lp_w - ref_w) - beta * (lp_l - ref_l)))))
        losses.append(dpo - alpha * lp_w / len(w.completion.token_ids))
    return sum(losses) / len(losses)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def settings_of(**changes):
    return stage.Settings(
        **{"group_size": 4, "max_grad_norm": 0.0, "max_batch_tokens": 64, "rpo_beta": 0.3} | changes
    )


def update(model, reference, rollouts, settings, processes=ALONE) -> dict:
    return update_on_preferences(
        model, reference, torch.optim.SGD(model.parameters()), rollouts, 0, settings, processes
    )


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_best_with_worst_and_ties_are_counted():
    assert preference_pairs(REWARDS, 4) == (PAIRS, 3)
    assert preference_pairs([0.1, 0.2, 0.3], 3) == ([(2, 0)], 0)  # an odd group: the middle one is in none
    assert preference_pairs([None, 0.2, 1.0, 0.0, 0.7, None, None, 0.5, 0.1], 3) == (
        [(2, 1), (4, 3), (7, 8)],
        0,
    )  # unknown
    assert preference_pairs([0.5, 0.5 + 5e-7], 2) == ([], 1) and preference_pairs([0.5, 0.5 + 2e-6], 2) == (
        [(1, 0)],
        0,
    )
    assert preference_pairs([1, 0, 1, 0, 1, 0, 1, 0], 8) == (
        [(0, 7), (2, 5), (4, 3), (6, 1)],
        0,
    )  # four of eight, the paper's


def test_seeds_depend_on_the_prompt_and_not_on_its_company():
    many = response_seeds([4, 7, 9], 8, seed=0)
    assert torch.equal(response_seeds([9], 8, seed=0)[0], many[2]) and len(set(many.flatten().tolist())) == 24
    assert not torch.equal(response_seeds([9], 8, seed=1)[0], many[2])


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_of_a_pair_by_hand_and_without_overflow():
    one = [torch.tensor([x], dtype=torch.double) for x in (-4.0, -6.0, -5.0, -5.5)]
    loss, margin = rpo_loss(*one, torch.tensor([8]), beta=0.5, alpha=3)
    assert margin.item() == pytest.approx(0.5 * (1.0 + 0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)) + 3 * 4 / 8)
    far, _ = rpo_loss(
        torch.tensor([-9e4]), torch.tensor([0.0]), torch.zeros(1), torch.zeros(1), torch.tensor([9]), 0.1, 0.0
    )
    assert far.item() == pytest.approx(9e3)


@pytest.mark.parametrize("beta, alpha", [(0.01, 3.0), (0.3, 0.0), (1.0, 1.0)])
def test_loss_and_gradient_are_those_of_the_formula(tiny_model, reference, beta, alpha):
    tiny_model.double(), reference.double()
    rollouts, settings = (
        make_rollouts(REWARDS, 4),
        settings_of(rpo_beta=beta, rpo_alpha=alpha, temperature=0.6),
    )
    expected_loss = literal_loss(tiny_model, reference, rollouts, PAIRS, beta, alpha)
    expected_loss.backward()
    expected = gradient(tiny_model)
    metrics = update(tiny_model, reference, rollouts, settings)
    assert expected.norm() > 0.1
    assert (gradient(tiny_model) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert metrics["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert (metrics["pairs"], metrics["tied_pairs"]) == (3, 3)
    with torch.no_grad():
        gaps = [literal_logprob(tiny_model, r) - literal_logprob(reference, r) for r in rollouts]
    margins = [float(beta * (gaps[i] - gaps[j])) for i, j in PAIRS]
    assert metrics["pair_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert metrics["margin"] == pytest.approx(sum(margins) / 3, rel=1e-3, abs=1e-6)
    assert metrics["kl"] > 0 and metrics["entropy"] > 0


def test_the_kl_that_is_logged_is_clamped(tiny_model, reference, monkeypatch):
    def far_apart(model, ids, attention_mask, mask, with_entropy=False):
        logprobs = mask * (-1.0 if with_entropy else -16.5) + 0 * model.lm_head.weight.sum()
        return (logprobs, 0.0 * logprobs) if with_entropy else logprobs

    monkeypatch.setattr(preferences, "token_logprobs", far_apart)
    assert update(tiny_model, reference, make_rollouts(REWARDS, 4), settings_of())["kl"] == pytest.approx(10)


def test_neither_micro_batches_nor_processes_change_the_gradient(tiny_model, reference, monkeypatch):
    rollouts, results = make_rollouts(REWARDS, 4), []
    for budget in (32, 64, 4096):
        metrics = update(tiny_model, reference, rollouts, settings_of(max_batch_tokens=budget))
        results.append((gradient(tiny_model), metrics))
    assert max((g - results[0][0]).abs().max() for g, _ in results) < 1e-5
    assert all(m == {k: pytest.approx(v, rel=1e-4) for k, v in results[0][1].items()} for _, m in results)
    monkeypatch.setattr(sharding, "sum_gradients", lambda model, processes: None)
    total = torch.zeros(())
    shares = [rollouts[i : i + 4] for i in (0, 4, 8)]  # the last has no pair at all
    counts = [[1, 1], [2, 0], [0, 2]]  # pairs and ties of each
    told = lambda obj, _: counts if isinstance(obj, list) else [obj | {"tokens": 1}]  # noqa: E731
    monkeypatch.setattr(preferences, "gather_objects", told)
    for rank, mine in enumerate(shares):
        update(tiny_model, reference, mine, settings_of(), Processes(rank, 3, rank))
        parts = [p.grad for p in tiny_model.parameters() if p.grad is not None]
        total = total + (torch.cat([g.flatten() for g in parts]) if parts else 0)
    assert (total - results[0][0]).abs().max() < 1e-5


# ---- the stage -------------------------------------------------------------------------------------------------------


def rpo_flags(data: Path, out: Path, **changes: object) -> list[str]:
    return rl_flags(data, out, **{"objective": "rpo", "learning_rate": RATE, "epochs": 1.4} | changes)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """6 steps of 4 of 18 prompts: the second epoch begins within the fifth."""
    out = tmp_path_factory.mktemp("alone") / "rl"
    run_process(RL, rpo_flags(data, out, save_every=1), out.with_suffix(".log"))
    return out


@pytest.mark.parametrize("preset, rate", [("paper", 3e-4), ("sandbox", 6e-4)])
def test_an_update_is_of_16_pairs_as_in_the_paper(preset, rate):
    """4 prompts of 8 completions, whatever RL's own defaults are; a flag goes before them."""
    words = ["--preset", preset, "--objective", "rpo"]
    settings = parse_settings(stage.Settings, "rl", words)
    assert settings.prompts_per_step * (settings.group_size // 2) == 16
    assert (settings.learning_rate, settings.temperature) == (
        rate,
        parse_settings(stage.Settings, "rl", words[:2]).temperature,
    )
    assert (
        parse_settings(
            stage.Settings, "rl", [*words[:2], "--objective=rpo", "--prompts-per-step", "6"]
        ).prompts_per_step
        == 6
    )
    assert parse_settings(stage.Settings, "rl", words[:2]).prompts_per_step in (16, 32)


def test_every_epoch_sees_the_same_responses_of_the_reference(data):
    """Whatever the policy is by then, and whoever shares the step."""
    tokenizer, policy = load_tokenizer(world.BASE), load_policy(world.BASE, device="cpu")
    usual = {"data": str(data), "max_new_tokens": 8, "group_size": 3, "temperature": 1.0, "reasoning": False}
    settings = stage.Settings(objective="rpo", **usual)
    records = stage.load_prompts(settings, tokenizer, 512)

    def responses(wanted: list[dict], step: int) -> dict[str, list[list[int]]]:
        rollouts = stage.collect_rollouts(policy, tokenizer, wanted, step, settings, ALONE)
        return {
            r["id"]: [x.completion.token_ids for x in rollouts if x.record["id"] == r["id"]] for r in wanted
        }

    first, later = responses(records[:4], 0), responses(records[3:1:-1], 40)
    assert later == {key: first[key] for key in later} and len({str(x) for x in first.values()}) == 4


def test_the_metrics_are_there_and_the_policy_comes_to_prefer_the_chosen(data, tmp_path, monkeypatch):
    out = tmp_path / "rl"
    run_here(RL, rpo_flags(data, out, learning_rate=1e-3, epochs=4.0, prompts_per_step=9), monkeypatch)
    lines = metrics_of(out)
    names = "loss kl entropy grad_norm reward reward_harmful reward_harmless reward_ambiguous format_rate zero_advantage_groups "
    assert all(
        set(names.split()) | {"pairs", "tied_pairs", "pair_accuracy", "margin"} <= set(line) for line in lines
    )
    assert (
        lines[0]["pair_accuracy"] == 0
        and lines[0]["margin"] == 0
        and lines[0]["kl"] == pytest.approx(0, abs=1e-9)
    )
    assert lines[-1]["pair_accuracy"] > 0.7 and lines[-1]["margin"] > 0 and lines[-1]["kl"] > 0
    assert sum(line["loss"] for line in lines[-2:]) < 0.9 * sum(line["loss"] for line in lines[:2])
    epochs = [sum(line["reward"] for line in lines[i : i + 2]) for i in (0, 2, 6)]
    assert epochs == pytest.approx(
        [epochs[0]] * 3
    )  # offline: the reward is that of the reference, in every epoch


def test_without_a_pair_nothing_moves(data, tmp_path, monkeypatch):
    """All rewards are alike: a reasoner without the format earns nothing. No weight decay and no momentum either."""
    records = read_jsonl(data / "rl.jsonl")
    write_jsonl(tmp_path / "data" / "rl.jsonl", records[:4])
    words = rl_flags(
        tmp_path / "data", tmp_path / "rl", objective="rpo", reasoning=True, max_new_tokens=2, epochs=2.0
    )
    run_here(RL, [*words, "--weight-decay", "0.5"], monkeypatch)
    for line in metrics_of(tmp_path / "rl"):
        assert (line["loss"], line["pairs"], line["tied_pairs"], line["pair_accuracy"]) == (0.0, 0, 8, None)
    before, after = (load_file(path / "model.safetensors") for path in (world.BASE, tmp_path / "rl"))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def same_as(alone: Path, out: Path) -> None:
    assert stages.same_update(alone, out, world.BASE)
    mine, theirs = (read_jsonl(path / "rollouts.jsonl") for path in (alone, out))
    assert [r["completion"] for r in mine] == [r["completion"] for r in theirs]
    for a, b in zip(metrics_of(alone), metrics_of(out), strict=True):
        (
            a.pop("pair_accuracy"),
            b.pop("pair_accuracy"),
        )  # a margin of nothing but rounding may have either sign
        assert a == {k: v if v is None else pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in b.items()}


@pytest.mark.parametrize("size, shard", [(2, False), (2, True)])
def test_any_number_of_processes_and_shards_equal_one_process(data, alone, tmp_path, size, shard):
    out, log = tmp_path / "rl", tmp_path / "log"
    for rank, process in enumerate(run_group(RL, rpo_flags(data, out, shard=shard), log, size)):
        process.join(stages.PATIENCE)
        assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()
    same_as(alone, out)


def test_a_kill_leaves_no_trace(data, alone, tmp_path):
    out, log = tmp_path / "rl", tmp_path / "log"
    process = launch(RL, rpo_flags(data, out, save_every=2), log)
    wait_for_lines(out / "metrics.jsonl", 3, process)
    kill_9(process)
    run_process(RL, rpo_flags(data, out, save_every=2), log)
    assert same_run(alone, out)


def test_a_pair_that_does_not_fit_a_micro_batch_is_one_line(data, tmp_path, monkeypatch, capsys):
    words = rpo_flags(data, tmp_path / "rl", max_batch_tokens=64)
    assert "--max-batch-tokens 64 for a pair" in stages.error_of(RL, words, monkeypatch, capsys)
    settings = json.loads((stages.ROOT / "lib/sandbox/base/config.json").read_text())
    assert settings["max_position_embeddings"] > 64  # so it was the pair
