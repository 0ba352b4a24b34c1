"""Stage 3: the loss against a literal transcription of the paper's formula, processes, resume, and what a step logs."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages
import torch
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
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.batches import rollout_batch
from lib.chat import Parsed
from lib.judges import Judge
from lib.policy import token_logprobs
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.logs import summarise
from lib.run.processes import Processes
from lib.run.training import load_model
from lib.sampler import Completion
from lib.sandbox import world

stage = importlib.import_module(RL)
ALONE = Processes(0, 1, 0)
KNOBS = [
    (*knobs, *policy)
    for knobs in itertools.product(("token", "sequence", "constant"), (True, False), ("k1", "k2", "k3"))
    for policy in ((False, 0.6), (True, 1.0))
]


# ---- the loss --------------------------------------------------------------------------------------------------------


def literal_objective(logprob, old, reference, rewards, settings) -> torch.Tensor:
    """DeepSeekMath eq. 3 for groups of outputs o_i, word by word; logprob[q][i][t] = log pi(o_i,t | q, o_i,<t)."""
    outputs = [o for group in logprob for o in group]
    objective = torch.zeros((), dtype=torch.double)
    for q, group in enumerate(rewards):
        for i, reward in enumerate(group):
            advantage = reward - statistics.mean(group)
            if settings.std_normalisation:
                advantage = advantage / (statistics.stdev(group) + 1e-6)
            for t, new in enumerate(logprob[q][i]):
                ratio = torch.exp(new - old[q][i][t])
                clipped = torch.clip(ratio, 1 - settings.clip_range, 1 + settings.clip_range)
                gain = torch.min(ratio * advantage, clipped * advantage)
                r = torch.exp(reference[q][i][t] - new)  # pi_ref / pi
                kl = {"k1": -torch.log(r), "k2": torch.log(r) ** 2 / 2, "k3": r - torch.log(r) - 1}[
                    settings.kl_estimator
                ]
                length = {
                    "token": sum(len(o) for o in outputs),
                    "sequence": len(logprob[q][i]) * len(outputs),
                    "constant": settings.max_new_tokens * len(outputs),
                }[settings.normalisation]
                objective = objective + (gain - settings.kl_coef * kl) / length
    return objective


def literal_logprobs(model, rollout, temperature: float) -> list[torch.Tensor]:
    """One plain forward pass for one sequence, all its logits."""
    ids, start = rollout.prompt_ids + rollout.completion.token_ids, len(rollout.prompt_ids)
    logits = model(torch.tensor([ids])).logits[0]
    return [(logits[t - 1] / temperature).log_softmax(-1)[ids[t]] for t in range(start, len(ids))]


def make_rollouts(groups: int = 2, group_size: int = 3, old: bool = False) -> list:
    """Random prompts and completions of unequal lengths, rewards that differ within a group."""
    rng, rollouts = random.Random(0), []
    for _ in range(groups):
        prompt = [rng.randrange(97) for _ in range(rng.randint(2, 7))]
        for _ in range(group_size):
            ids = [rng.randrange(97) for _ in range(rng.randint(1, 9))]
            completion = Completion(ids, [0.0] * len(ids), "eos")
            rollout = stage.Rollout({}, prompt, completion, "", Parsed("", "", True), 0, reward=rng.random())
            rollouts.append(rollout)
    return rollouts


def set_advantages(rollouts, group_size: int, settings) -> list[list[float]]:
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, group_size)
    advantages = stage.group_advantages(rewards, settings.std_normalisation).flatten()
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        rollout.advantage = advantage
    return [[r.reward for r in rollouts[i : i + group_size]] for i in range(0, len(rollouts), group_size)]


def test_assigned_advantages_are_those_of_each_group_in_order():
    for std in (True, False):
        settings, rollouts = stage.Settings(group_size=3, std_normalisation=std), make_rollouts()
        stage.assign_advantages(rollouts, settings)
        mine = [r.advantage for r in rollouts]
        set_advantages(rollouts, 3, settings)
        assert mine == pytest.approx([r.advantage for r in rollouts], abs=1e-5)


def grouped(values: list, size: int = 3) -> list[list]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def shift_old_logprobs(model, rollouts, settings) -> int:
    """Pretend that another policy sampled, so that ratios are clipped on both sides. Returns how many are."""
    rng, clipped = random.Random(2), 0
    for rollout in rollouts:
        with torch.no_grad():
            new = torch.tensor(literal_logprobs(model, rollout, settings.temperature))
        shift = torch.tensor([rng.choice((-0.5, -0.1, 0.1, 0.5)) for _ in new])
        rollout.old_logprobs = (new - shift).float()
        clipped += int(((shift > math.log(1.2)) if rollout.advantage > 0 else (shift < math.log(0.8))).sum())
    return clipped


@pytest.mark.parametrize("normalisation, std, estimator, off_policy, temperature", KNOBS)
def test_gradient_is_that_of_the_papers_formula(
    tiny_model, reference, normalisation, std, estimator, off_policy, temperature
):
    (
        tiny_model.double(),
        reference.double(),
    )  # so that what differs is the formula; the head still rounds to single
    settings = stage.Settings(
        normalisation=normalisation, std_normalisation=std, kl_estimator=estimator, temperature=temperature,
        kl_coef=0.3, max_new_tokens=20, max_grad_norm=0.0, max_batch_tokens=32,
    )  # fmt: skip
    rollouts = make_rollouts()
    rewards = set_advantages(rollouts, 3, settings)
    if off_policy:
        assert shift_old_logprobs(tiny_model, rollouts, settings) > 5
    logprobs = [literal_logprobs(tiny_model, r, temperature) for r in rollouts]
    old = [
        list(r.old_logprobs) if off_policy else [x.detach() for x in new]
        for r, new in zip(rollouts, logprobs, strict=True)
    ]
    anchors = [literal_logprobs(reference, r, temperature) for r in rollouts]
    objective = literal_objective(grouped(logprobs), grouped(old), grouped(anchors), rewards, settings)
    (-objective).backward()
    expected = gradient(tiny_model)

    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    metrics = stage.update_policy(tiny_model, reference, optimizer, rollouts, 0, settings, ALONE)
    assert expected.norm() > 0.1
    assert (gradient(tiny_model) - expected).abs().max() < 1e-6
    assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_loss_on_random_tensors_to_double_precision():
    settings = stage.Settings(normalisation="sequence", kl_coef=0.3)
    torch.manual_seed(0)
    new, old, anchor = (torch.randn(6, 9, dtype=torch.double) / 3 for _ in range(3))
    new.requires_grad_()
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1))
    rewards = torch.rand(2, 3, dtype=torch.double)
    lengths = mask.sum(1)
    weights = stage.sequence_weights(lengths, int(lengths.sum()), 6, settings)
    advantages = stage.group_advantages(rewards, True).flatten()
    loss = stage.grpo_loss(new, old, anchor, advantages, mask, weights.double(), settings)
    rows = [grouped([list(x[i][mask[i]]) for i in range(6)]) for x in (new, old, anchor)]
    literal = -literal_objective(*rows, rewards.tolist(), settings)
    ours, theirs = (torch.autograd.grad(x, new)[0] for x in (loss, literal))
    assert (ours - theirs).abs().max() < 1e-7  # the weights are single
    assert not ours[~mask].any()


def test_micro_batches_do_not_change_the_gradient(tiny_model, reference):
    gradients = []
    for budget in (16, 48, 4096):
        settings = stage.Settings(max_batch_tokens=budget, max_grad_norm=0.0, kl_coef=0.3)
        rollouts = make_rollouts()
        set_advantages(rollouts, 3, settings)
        stage.update_policy(
            tiny_model, reference, torch.optim.SGD(tiny_model.parameters()), rollouts, 0, settings, ALONE
        )
        gradients.append(gradient(tiny_model))
    assert max((g - gradients[0]).abs().max() for g in gradients) < 1e-5


def test_later_updates_of_a_batch_keep_the_logprobs_of_the_first(tiny_model, reference):
    settings = stage.Settings(max_grad_norm=0.1, kl_coef=0.3, max_batch_tokens=64)
    rollouts = make_rollouts()
    set_advantages(rollouts, 3, settings)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1.0)
    stage.update_policy(tiny_model, reference, optimizer, rollouts, 0, settings, ALONE)
    assert float(gradient(tiny_model).norm()) == pytest.approx(0.1, rel=1e-3)  # clipped
    before = [r.old_logprobs.clone() for r in rollouts]
    assert torch.allclose(
        before[0], torch.tensor(literal_logprobs(tiny_model, rollouts[0], settings.temperature)), atol=1e-5
    )
    optimizer.step()
    stage.update_policy(tiny_model, reference, optimizer, rollouts, 0, settings, ALONE)
    assert all(torch.equal(r.old_logprobs, b) for r, b in zip(rollouts, before, strict=True))
    assert not torch.allclose(
        before[0], torch.tensor(literal_logprobs(tiny_model, rollouts[0], settings.temperature)), atol=1e-3
    )


@pytest.mark.parametrize(
    "gap, value, slope",  # gap: log reference - log policy; slope: d value / d log policy
    [(0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)), (-3.0, math.exp(-3) + 2, 1 - math.exp(-3))]
    + [(gap, 10.0, 0.0) for gap in (15.5, 40.0, 200.0, -15.5, -200.0)],
)
def test_k3_is_clamped_as_in_verl(gap, value, slope):
    new = torch.tensor([-300.0], requires_grad=True)
    kl = stage.kl_estimate(new, torch.tensor([-300.0 + gap]), "k3")
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-5) and new.grad.item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("temperature, budget", [(0.6, 32), (1.0, 4096)])
def test_entropy_bonus_and_its_gradient(
    tiny_model, reference, normalisation, temperature, budget, monkeypatch
):
    """loss(c) = loss(0) - c x entropy, against all logits of a plain pass; over several chunks of logits, too."""
    monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk_size", 5 if budget > 32 else 2048)
    usual = dict(
        normalisation=normalisation, temperature=temperature, max_new_tokens=20, max_batch_tokens=budget
    )
    coef, rollouts, results, optimizer = 0.7, make_rollouts(), [], torch.optim.SGD(tiny_model.parameters())
    for c in (0.0, coef):
        settings = stage.Settings(**usual, kl_coef=0.3, max_grad_norm=0.0, entropy_coef=c)
        set_advantages(rollouts, 3, settings)
        metrics = stage.update_policy(tiny_model, reference, optimizer, rollouts, 0, settings, ALONE)
        results.append((metrics, gradient(tiny_model)))
    tiny_model.zero_grad()
    total, bonus = sum(len(r.completion.token_ids) for r in rollouts), torch.zeros(())
    for r in rollouts:
        start, n = len(r.prompt_ids), len(r.completion.token_ids)
        logits = tiny_model(torch.tensor([r.prompt_ids + r.completion.token_ids])).logits[0, start - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy().sum()
        bonus = (
            bonus
            + entropy
            / {"token": total, "sequence": n * len(rollouts), "constant": 20 * len(rollouts)}[normalisation]
        )
    (-coef * bonus).backward()
    (plain, before), (metrics, after) = results
    assert metrics["loss"] == pytest.approx(plain["loss"] - coef * bonus.item(), abs=1e-5)
    assert (after - before - gradient(tiny_model)).abs().max() < 1e-5 < gradient(tiny_model).abs().max()
    if normalisation == "token":
        assert metrics["entropy"] == plain["entropy"] == pytest.approx(bonus.item(), rel=1e-4)


def test_kl_metric_is_the_mean_over_tokens(tiny_model, reference):
    settings = stage.Settings(max_batch_tokens=32, temperature=0.6)
    rollouts = make_rollouts()
    metrics = stage.update_policy(
        tiny_model, reference, torch.optim.SGD(tiny_model.parameters()), rollouts, 0, settings, ALONE
    )
    pairs = [
        zip(literal_logprobs(tiny_model, r, 0.6), literal_logprobs(reference, r, 0.6), strict=True)
        for r in rollouts
    ]
    gaps = [float(anchor - new) for pair in pairs for new, anchor in pair]
    assert metrics["kl"] == pytest.approx(statistics.mean(math.exp(g) - g - 1 for g in gaps), rel=1e-3)


# ---- the parts of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_bfloat16_begins_as_the_policy_to_the_bit(tmp_path, tied):
    path = world.BASE
    if tied:
        path, sizes = tmp_path, dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        heads = dict(num_attention_heads=2, num_key_value_heads=2)
        Qwen2ForCausalLM(
            Qwen2Config(vocab_size=97, tie_word_embeddings=True, **sizes, **heads)
        ).save_pretrained(path)
    settings = stage.Settings(model=str(path), dtype="bfloat16")
    device = torch.device("cpu")
    policy = load_model(settings, device, ALONE)
    reference = load_model(settings, device, ALONE, trained=False)
    size = lambda model: sum(p.numel() * p.element_size() for p in model.parameters())  # noqa: E731
    assert size(reference) < 0.75 * size(policy)
    rollouts = [r for r in make_rollouts() if r.advantage is not None]
    ids, attention_mask, mask = rollout_batch(rollouts, 0, device)
    with torch.no_grad(), stage.precision(device, "bfloat16"):
        one, other = (token_logprobs(model, ids, attention_mask, mask) for model in (policy, reference))
    assert torch.equal(one, other) and one.any()


def test_advantages_are_centred_and_of_unit_deviation_and_zero_where_all_rewards_agree():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.3, 0.3, 0.3, 0.3]])
    advantages = stage.group_advantages(rewards, std_normalisation=True)
    assert advantages[0].mean().abs() < 1e-6 and advantages[0].std() == pytest.approx(1, abs=1e-4)
    assert stage.group_advantages(rewards, std_normalisation=False)[0].tolist() == [
        0.5625,
        -0.4375,
        0.0625,
        -0.1875,
    ]
    for reward in (0.3, 1 / 3, 2 / 3, 0.1):  # whose mean over a group is not exactly itself in fp32
        for group_size in (4, 6, 8):
            equal = torch.full((1, group_size), reward, dtype=torch.float64)
            assert stage.group_advantages(equal, std_normalisation=True).abs().max() < 1e-6


def test_prompts_of_a_step_are_shuffled_epochs_and_depend_on_seed_and_step_alone():
    records = [{"id": i} for i in range(10)]
    settings = stage.Settings(prompts_per_step=4, seed=3)
    stream = [r["id"] for step in range(5) for r in stage.prompts_of_step(records, step, settings)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:] and stream[:10] != list(range(10))
    assert [r["id"] for r in stage.prompts_of_step(records, 3, settings)] == stream[12:16]
    other = stage.Settings(prompts_per_step=4, seed=4)
    assert [r["id"] for step in range(5) for r in stage.prompts_of_step(records, step, other)] != stream
    many = stage.prompts_of_step(records[:3], 1, settings)  # more prompts a step than there are
    assert len(many) == 4


def test_a_budget_with_which_a_run_may_go_on_does_not_decide_what_it_learns(data):
    tokenizer = load_tokenizer(world.BASE)

    def kept(**changes: int) -> list[str]:
        settings = stage.Settings(data=str(data), max_new_tokens=8, max_prompt_tokens=40, **changes)
        return [record["id"] for record in stage.load_prompts(settings, tokenizer, 512)]

    every = kept()
    assert 9 < len(every) < 18 and kept(max_batch_tokens=48) == kept(max_sample_tokens=48) == every  # 40 + 8
    for flag in ("max_batch_tokens", "max_sample_tokens"):
        with pytest.raises(UserError, match=f"has .* tokens, .* fit .*--{flag.replace('_', '-')} 17"):
            kept(**{flag: 17})


def test_seeds_are_shared_out_so_that_the_number_of_processes_does_not_matter(data):
    tokenizer = load_tokenizer(world.BASE)
    policy = load_policy(world.BASE, device="cpu")
    settings = stage.Settings(
        data=str(data), max_new_tokens=8, group_size=3, temperature=1.0, reasoning=False
    )
    records = stage.load_prompts(settings, tokenizer, 512)[:5]

    def completions(processes: Processes, step: int = 7) -> list[list[int]]:
        rollouts = stage.collect_rollouts(policy, tokenizer, records, step, settings, processes)
        return [r.completion.token_ids for r in rollouts]

    alone = completions(ALONE)
    assert completions(Processes(0, 2, 0)) + completions(Processes(1, 2, 1)) == alone
    assert sum((completions(Processes(rank, 3, rank)) for rank in range(3)), []) == alone
    assert completions(ALONE, step=8) != alone
    assert len(alone) == 15 and alone[0] != alone[1]


UNKNOWN = [  # rewards of a group, None: no verdict; its advantages with and without std
    ([1.0, 0.0, None, 0.5], [1.0, -1.0, 0.0, 0.0], [0.5, -0.5, 0.0, 0.0]),
    ([None, 1.0, 0.0, None], [0.0, 0.5**0.5, -(0.5**0.5), 0.0], [0.0, 0.5, -0.5, 0.0]),
    ([None, 1.0, None, None], [0.0] * 4, [0.0] * 4),
    ([None] * 4, [0.0] * 4, [0.0] * 4),
    ([0.3, None, 0.3, 0.3], [0.0] * 4, [0.0] * 4),
]


@pytest.mark.parametrize("rewards, with_std, without", UNKNOWN)
def test_a_reward_that_is_unknown_is_left_out_of_its_group(rewards, with_std, without):
    for std, expected in ((True, with_std), (False, without)):
        rollouts = make_rollouts(2, 4)
        for rollout, reward in zip(rollouts, [*rewards, 0.0, 1.0, 0.0, 1.0], strict=True):
            rollout.reward = reward
        stage.assign_advantages(rollouts, stage.Settings(group_size=4, std_normalisation=std))
        assert [r.advantage for r in rollouts[:4]] == pytest.approx(expected, abs=1e-4)
        assert rollouts[4].advantage == pytest.approx(
            -(0.75**0.5) if std else -0.5, abs=1e-4
        )  # the next group is as ever


def test_without_a_verdict_only_the_kl_term_moves_the_policy(tiny_model, reference):
    """And its tokens stay in the normaliser, as those of any completion of advantage 0."""
    settings = stage.Settings(
        group_size=3, std_normalisation=False, kl_coef=0.3, max_grad_norm=0.0, temperature=1.0
    )
    rollouts = make_rollouts(2, 3)
    rollouts[1].reward = None
    stage.assign_advantages(rollouts, settings)
    centred = [
        r.reward - statistics.mean(x.reward for x in rollouts[:3] if x.reward is not None)
        for r in rollouts[:3:2]
    ]
    centred[1:1] = [0.0]
    centred += [r.reward - statistics.mean(x.reward for x in rollouts[3:]) for r in rollouts[3:]]
    terms = []
    for rollout, advantage in zip(rollouts, centred, strict=True):
        anchors = literal_logprobs(reference, rollout, 1.0)
        for new, anchor in zip(literal_logprobs(tiny_model, rollout, 1.0), anchors, strict=True):
            kl = torch.exp(anchor - new) - (anchor - new) - 1
            terms.append(settings.kl_coef * kl - torch.exp(new - new.detach()) * advantage)
    (sum(terms) / len(terms)).backward()
    expected = gradient(tiny_model)
    stage.update_policy(
        tiny_model, reference, torch.optim.SGD(tiny_model.parameters()), rollouts, 0, settings, ALONE
    )
    assert (gradient(tiny_model) - expected).abs().max() < 1e-5 < expected.norm()


def test_reward_is_the_papers_and_the_judge_sees_no_reasoning():
    seen = []

    def harm(prompts, answers):
        seen.append((prompts, answers))
        return [0.05, 0.5, 0.5, 0.5]

    kinds, parsed = (
        ("harmful", "harmful", "ambiguous", "harmless"),
        [Parsed("secret", f"y{i}", i < 3) for i in range(4)],
    )
    rollouts = [
        stage.Rollout(
            {"id": i, "prompt": f"x{i}", "kind": kinds[i]},
            [],
            Completion([1], [0.0], "eos"),
            "",
            parsed[i],
            0,
        )
        for i in range(4)
    ]
    stage.score_rollouts(rollouts, Judge("j", harm, lambda prompts, answers: [0.8] * 4), 0)
    assert [r.reward for r in rollouts] == [1.0, 0.5, 0.8, 0.0]
    silent = Judge("j", lambda prompts, answers: [None] * 4, lambda prompts, answers: [None] * 4)
    stage.score_rollouts(rollouts, silent, 0)
    assert [r.reward for r in rollouts] == [None] * 3 + [
        0.0
    ]  # no verdict: unknown; but what is malformed earns nothing
    seen.pop()
    stage.score_rollouts(rollouts, Judge("j", harm, lambda prompts, answers: [0.8] * 4), 0)
    assert seen == [([f"x{i}" for i in range(4)], [f"y{i}" for i in range(4)])]
    nan = Judge("j", harm, lambda prompts, answers: [0.8, 0.8, math.nan, 0.8])
    with pytest.raises(UserError, match="step 9, prompt 2: .*nan.*--judge j"):
        stage.score_rollouts(rollouts, nan, 9)


def test_summary_by_kind_with_nothing_for_a_kind_that_did_not_occur():
    def line(kind: str, reward: float, **extra) -> dict:
        usual = {"completion": "so . </think> no .", "reasoning_tokens": 4, "refusal": "none"}
        usual |= {"well_formed": True, "finish_reason": "eos", "harm": 0.0, "task": None}
        return {"kind": kind, "reward": reward, **usual, **extra}

    lines = [
        line("harmful", 1.0, refusal="full"),
        line("harmful", 1.0, refusal="partial"),
        line("ambiguous", 0.0, reasoning_tokens=10, task=0.0),
    ]
    lines.append(line("ambiguous", 0.5, completion="so so", well_formed=False, finish_reason="length"))
    summary = summarise(lines, 2)
    expected = {"reward": 0.625, "reward_harmful": 1.0, "reward_ambiguous": 0.25, "reward_harmless": None}
    expected |= {
        "reasoning_tokens_ambiguous": 10.0,  # of reasonings that end
        "refusal_rate_harmful": 1.0,  # a refusal in part is one: 1 - compliance
        "refusal_rate_harmless": None,
    }
    expected |= {"format_rate": 0.75, "length_limit_rate": 0.25, "zero_advantage_groups": 1}
    expected["unknown_verdicts"] = 1  # a harmful prompt needs no verdict on the task
    assert {key: summary[key] for key in expected} == expected
    lines += [line("harmful", None, harm=None), line("harmful", 0.0, harm=None, well_formed=False)]
    lines += [line("harmless", None), line("harmless", None)]
    summary = summarise(lines, 2)  # unknown rewards are in no mean; a group of nothing but them has no signal
    expected = {"reward": 0.5, "reward_harmful": 2 / 3, "reward_harmless": None}
    expected |= {"unknown_verdicts": 5, "zero_advantage_groups": 3}
    assert {key: summary[key] for key in expected} == expected


def test_one_reward_needs_the_verdict_on_the_task_alone():
    line = {
        "completion": "",
        "reasoning_tokens": 0,
        "refusal": "none",
        "well_formed": True,
        "finish_reason": "eos",
    }
    lines = [
        {**line, "kind": kind, "reward": 0.0, "harm": None, "task": 0.0} for kind in ("harmful", "harmless")
    ]
    assert summarise(lines, 2)["unknown_verdicts"] == 1
    assert summarise(lines, 2, one_reward=True)["unknown_verdicts"] == 0


def test_one_reward_reaches_the_rollouts(data, tmp_path, monkeypatch):
    run_here(RL, rl_flags(data, tmp_path / "rl", judge="sandbox", one_reward=True, epochs=0.9), monkeypatch)
    rollouts = read_jsonl(tmp_path / "rl" / "rollouts.jsonl")
    assert {r["kind"] for r in rollouts} >= {"harmful", "ambiguous"}
    assert all(r["reward"] == r["task"] for r in rollouts)
    assert any(r["reward"] != 1 - r["harm"] for r in rollouts if r["kind"] == "harmful")


# ---- the stage -------------------------------------------------------------------------------------------------------

LOGGED = "step reward reward_harmful reward_harmless reward_ambiguous reasoning_tokens_harmful reasoning_tokens_harmless "
LOGGED += (
    "reasoning_tokens_ambiguous format_rate kl entropy grad_norm zero_advantage_groups sample_tokens_per_s "
)
LOGGED += "unknown_verdicts "
LOGGED += "train_tokens_per_s seconds_sample seconds_reward seconds_train"


def test_a_reasoner_that_breaks_the_format_earns_nothing_and_all_metrics_are_there(
    data, tmp_path, monkeypatch
):
    out = tmp_path / "rl"
    run_here(
        RL,
        rl_flags(
            data, out, judge="sandbox", reasoning=True, temperature=0.7, epochs=0.01, updates_per_batch=2
        ),
        monkeypatch,
    )
    (line,) = read_jsonl(out / "metrics.jsonl")
    assert set(LOGGED.split()) <= set(line)
    rollouts = read_jsonl(out / "rollouts.jsonl")
    assert len(rollouts) == 8 and all(r["well_formed"] or r["reward"] == 0 for r in rollouts)
    assert line["sampler_gap"] < 1e-4  # training and sampling agree on log-probabilities


def test_prompts_that_are_too_long_are_left_out_counted_and_said(data, tmp_path, monkeypatch, capsys):
    """4 of the authors' 2000 have more than 512 tokens, and must not end the run."""
    records = read_jsonl(data / "rl.jsonl")
    long = [{"id": f"long-{i}", "prompt": "cake " * 520, "kind": "harmless"} for i in range(2)]
    write_jsonl(tmp_path / "data" / "rl.jsonl", [long[0], *records[:3], long[1], records[3]])
    settings = stage.Settings(data=str(tmp_path / "data"), max_new_tokens=12, reasoning=False)
    kept = stage.load_prompts(settings, load_tokenizer(world.BASE), 4096)
    assert [(r["id"], r["place"]) for r in kept] == [
        (r["id"], i) for r, i in zip(records, (1, 2, 3, 5), strict=False)
    ]
    run_here(RL, rl_flags(tmp_path / "data", tmp_path / "rl", epochs=1.0), monkeypatch)
    out = capsys.readouterr().out
    assert (
        "2 of 6 have more than the 500 tokens that fit, such as long-0 (5" in out and "read 4 prompts" in out
    )
    assert len(metrics_of(tmp_path / "rl")) == 1


def test_steps_without_a_signal_are_said_once(data, tmp_path, monkeypatch, capsys):
    """A reasoner that cannot close its reasoning earns nothing for ever."""
    words = rl_flags(
        data, tmp_path / "rl", reasoning=True, max_new_tokens=2, prompts_per_step=1, group_size=2, epochs=0.7
    )
    run_here(RL, words, monkeypatch)
    assert len(metrics_of(tmp_path / "rl")) == 13
    (line,) = stages.messages(capsys.readouterr().err)
    assert (
        line.startswith("warning: for 10 steps no group")
        and "format_rate 0.00" in line
        and "rollouts.jsonl" in line
    )


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """9 steps without interruption."""
    out = tmp_path_factory.mktemp("unbroken") / "rl"
    run_process(RL, rl_flags(data, out, epochs=2.0, save_every=1), out.with_suffix(".log"))
    lines = metrics_of(out)
    assert len(lines) == 9 and all(line["grad_norm"] > 1e-3 for line in lines)
    return out


def test_five_kills_leave_no_trace(data, unbroken, tmp_path):
    out, log, rng = tmp_path / "rl", tmp_path / "log", random.Random(time.time_ns())
    for lines, save_every in (
        (0, 2),
        (1, 2),
        (4, 1),
        (6, 2),
        (8, 1),
    ):  # save points are no part of a run's identity
        process = launch(RL, rl_flags(data, out, epochs=2.0, save_every=save_every), log)
        wait_for_lines(out / "metrics.jsonl", lines, process)
        if lines < 8:
            time.sleep(rng.uniform(0, 0.3))
        kill_9(process)
    assert not (out / "config.json").exists()
    run_process(RL, rl_flags(data, out, epochs=2.0), log)
    assert same_run(unbroken, out)
    assert not list(out.glob(".*"))
    before = stages.contents(out)
    run_process(RL, rl_flags(data, out, epochs=2.0), log)  # once more: it is finished
    assert stages.contents(out) == before


def test_torchrun_with_two_processes_equals_one(data, tmp_path, monkeypatch):
    # Not at a higher rate: where a gradient is nothing but rounding (a key's bias), AdamW makes a step of the noise.
    one, two, rate = tmp_path / "one", tmp_path / "two", 3e-5
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        f"{RL}.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(stages.ROOT / "tests")}
    run = subprocess.run(
        [*command, *rl_flags(data, two, learning_rate=rate)],
        cwd=stages.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "2 x cpu" in run.stdout
    run_here(RL, rl_flags(data, one, learning_rate=rate), monkeypatch)
    mine, theirs = (read_jsonl(out / "rollouts.jsonl") for out in (one, two))
    assert [r["completion"] for r in mine] == [r["completion"] for r in theirs]
    assert [(r["id"], r["reward"]) for r in mine] == [(r["id"], r["reward"]) for r in theirs]
    assert stages.same_update(one, two, world.BASE)
    assert len(metrics_of(one)) == len(metrics_of(two)) == 2
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == {k: v if v is None else pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in b.items()}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line_and_the_run_resumes(data, tmp_path, victim):
    out, log = tmp_path / "rl", tmp_path / "log"
    words = rl_flags(data, out, epochs=2.0)
    group = run_group(RL, words, log)
    wait_for_lines(out / "metrics.jsonl", 3, group[0])
    kill_9(group[victim])
    survivor = group[1 - victim]
    survivor.join(stages.PATIENCE)
    assert survivor.exitcode == 2
    (line,) = stages.messages(log.with_suffix(f".{1 - victim}").read_text())
    assert line.startswith("error: lost another process") and "run the same command again to resume" in line
    if victim:
        return
    for process in run_group(RL, words, log):
        process.join(stages.PATIENCE)
        assert process.exitcode == 0
    assert (out / "model.safetensors").exists() and not (out / "state").exists()
    assert [line["step"] for line in metrics_of(out)] == list(range(9))


RATE = 3e-5  # see test_torchrun_with_two_processes_equals_one


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """9 steps in one process, at a rate at which rounding stays rounding."""
    out = tmp_path_factory.mktemp("alone") / "rl"
    run_process(RL, rl_flags(data, out, epochs=2.0, learning_rate=RATE), out.with_suffix(".log"))
    return out


def same_as(alone: Path, out: Path) -> None:
    assert stages.same_update(alone, out, world.BASE)
    mine, theirs = (read_jsonl(path / "rollouts.jsonl") for path in (alone, out))
    assert [r["completion"] for r in mine] == [r["completion"] for r in theirs]
    for a, b in zip(metrics_of(alone), metrics_of(out), strict=True):
        assert a == {k: v if v is None else pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in b.items()}


@pytest.mark.parametrize(
    "size, shard, offload", [(4, False, False), (2, True, False), (4, True, False), (2, True, True)]
)
def test_any_number_of_processes_and_shards_equal_one_process(data, alone, tmp_path, size, shard, offload):
    out, log = tmp_path / "rl", tmp_path / "log"
    words = rl_flags(
        data,
        out,
        epochs=2.0,
        learning_rate=RATE,
        shard=shard,
        offload=offload,
        gradient_checkpointing=offload,
    )
    for rank, process in enumerate(run_group(RL, words, log, size)):
        process.join(stages.PATIENCE)
        assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()
    same_as(alone, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_shards_compute_the_first_step_to_the_bit_as_whole_models_do(data, tmp_path):
    """At the same number of processes. Between numbers it is rounding that differs, see lib/run/shards.py."""
    results = []
    for shard in (False, True):
        out, log = tmp_path / f"rl-{shard}", tmp_path / f"log-{shard}"
        for rank, process in enumerate(run_group(RL, rl_flags(data, out, epochs=0.2, shard=shard), log)):
            process.join(stages.PATIENCE)
            assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()
        (line,) = metrics_of(out)
        assert line.pop("grad_norm") > 0  # summed over parts
        results.append((line, (out / "rollouts.jsonl").read_bytes()))
    assert results[0] == results[1]


def test_shards_in_bfloat16_begin_at_the_reference(data, tmp_path):
    out, log = tmp_path / "rl", tmp_path / "log"
    words = rl_flags(data, out, epochs=1.0, learning_rate=RATE, shard=True, dtype="bfloat16")
    for rank, process in enumerate(run_group(RL, words, log)):
        process.join(stages.PATIENCE)
        assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()
    lines = metrics_of(out)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and all(math.isfinite(line["loss"]) for line in lines)


def test_five_kills_of_any_process_and_other_numbers_of_them(data, alone, tmp_path):
    out, rng = tmp_path / "rl", random.Random(time.time_ns())
    for lines, size, shard in ((1, 2, True), (3, 4, False), (4, 3, True), (6, 2, False), (7, 2, True)):
        words = rl_flags(data, out, epochs=2.0, learning_rate=RATE, shard=shard, save_every=1)
        group = run_group(RL, words, tmp_path / "log", size)
        wait_for_lines(out / "metrics.jsonl", lines, group[0])
        time.sleep(rng.uniform(0, 0.2))
        victim = rng.randrange(size)
        kill_9(group[victim])
        for rank, process in enumerate(group):
            process.join(stages.PATIENCE)
            text = (tmp_path / f"log.{rank}").read_text()
            assert rank == victim or process.exitcode == 2 and "lost another process" in text, text
    run_process(RL, rl_flags(data, out, epochs=2.0, learning_rate=RATE), tmp_path / "log")
    same_as(alone, out)


@pytest.mark.parametrize(
    "settings, message",
    [({"shard": True}, "there is one process"), ({"offload": True}, "so it needs --shard")],
)
def test_shards_need_several_processes(data, tmp_path, monkeypatch, capsys, settings, message):
    assert message in stages.error_of(RL, rl_flags(data, tmp_path / "rl", **settings), monkeypatch, capsys)
    assert not (tmp_path / "rl").exists()
