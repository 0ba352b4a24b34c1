"""Chapter 3: loss and gradient against tests/reference.py, the parts of a step, processes, shards, kills."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference as literal
import stages
import torch
from stages import RL, kill_9, launch, metrics_of, rl_flags, run_group, run_here, run_process, same_run
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib.batches import masked_batch
from lib.chat import Parsed
from lib.policy import token_logprobs
from lib.run.data import groups_to_show, load_prompts, summarise
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sampler import Completion
from lib.sandbox import world

stage = importlib.import_module(RL)
RATE = 3e-5  # at a higher one AdamW makes a step of rounding, where a gradient is nothing else (a key's bias)
NORMALISATIONS = ("token", "sequence", "constant")
KNOBS = list(itertools.product(NORMALISATIONS, (True, False), ("k1", "k2", "k3"), (False, True)))


def make_rollouts(groups: int = 2, group_size: int = 3) -> list:
    """Random prompts and completions of unequal lengths, rewards that differ within a group."""
    rng, rollouts = random.Random(0), []
    for _ in range(groups):
        prompt = [rng.randrange(97) for _ in range(rng.randint(2, 7))]
        for _ in range(group_size):
            new = [rng.randrange(97) for _ in range(rng.randint(1, 9))]
            mask = [False] * len(prompt) + [True] * len(new)
            completion = Completion(new, [0.0] * len(new), "eos")
            parsed = Parsed("", "", True)
            rollout = stage.Rollout({}, prompt + new, mask, completion, "", parsed, 0)
            rollout.reward = rng.random()
            rollouts.append(rollout)
    return rollouts


def literal_logprobs(model, rollouts, temperature: float) -> list[list[torch.Tensor]]:
    return [literal.logprobs(model, r.ids, r.mask.index(True), temperature) for r in rollouts]


def literal_advantages(rollouts, size: int, with_std: bool) -> list[float]:
    groups = [[r.reward for r in rollouts[i : i + size]] for i in range(0, len(rollouts), size)]
    return [advantage for group in groups for advantage in literal.advantages(group, with_std)]


def update(model, anchor, rollouts, settings) -> tuple[dict, torch.Tensor]:
    """Metrics of one update, and its gradient."""
    step = stage.update_policy
    return stages.step_of(model, lambda sgd: step(model, anchor, sgd, rollouts, 0, settings, Run(settings)))


def settings_of(**changes) -> stage.Settings:
    usual = {"group_size": 3, "max_new_tokens": 20, "max_grad_norm": 0.0, "kl_coef": 0.3}
    return stage.Settings(**usual | changes)


# ---- the loss ----


@pytest.mark.parametrize("normalisation, std, estimator, off_policy", KNOBS)
def test_update_is_that_of_the_formula(tiny_model, reference, normalisation, std, estimator, off_policy):
    """In double precision, so that what differs is the formula; with ratios clipped on both sides, too."""
    tiny_model.double(), reference.double()
    settings = settings_of(normalisation=normalisation, std_normalisation=std, kl_estimator=estimator)
    settings.max_batch_tokens, settings.temperature = 32, 1.0 if off_policy else 0.6
    rollouts, rng, clipped = make_rollouts(), random.Random(2), 0
    rollouts[4].reward = None  # no verdict: of its group the KL term alone moves the policy
    stage.assign_advantages(rollouts, settings)
    advantages = literal_advantages(rollouts, 3, std)
    assert [r.advantage for r in rollouts] == pytest.approx(advantages, abs=1e-5)
    new = literal_logprobs(tiny_model, rollouts, settings.temperature)
    old = [[x.detach() for x in row] for row in new]
    for i, rollout in enumerate(rollouts if off_policy else []):
        shift = [rng.choice((-0.5, -0.1, 0.1, 0.5)) for _ in old[i]]
        old[i] = [x - s for x, s in zip(old[i], shift, strict=True)]
        rollout.old_logprobs = torch.tensor(old[i]).float()
        clipped += sum(s > math.log(1.2) if advantages[i] > 0 else s < math.log(0.8) for s in shift)
    assert clipped > 5 or not off_policy
    anchor = literal_logprobs(reference, rollouts, settings.temperature)
    objective = literal.objective(new, old, anchor, advantages, settings)
    (-objective).backward()
    expected = stages.gradient(tiny_model)
    metrics, found = update(tiny_model, reference, rollouts, settings)
    assert expected.norm() > 0.1 and (found - expected).abs().max() < 1e-6
    assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    gaps = [a - n for row, theirs in zip(new, anchor, strict=True) for n, a in zip(row, theirs, strict=True)]
    mean = sum(float(literal.kl(gap, estimator)) for gap in gaps) / len(gaps)
    assert metrics["kl"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("temperature, budget", [(0.6, 32), (1.0, 4096)])
def test_entropy_bonus_and_its_gradient(tiny_model, reference, normalisation, temperature, budget):
    """loss(c) = loss(0) - c x entropy, against all logits of a plain pass."""
    usual = {"normalisation": normalisation, "temperature": temperature, "max_batch_tokens": budget}
    rollouts, coef = make_rollouts(), 0.7
    stage.assign_advantages(rollouts, settings_of())
    (plain, before), (metrics, after) = (
        update(tiny_model, reference, rollouts, settings_of(entropy_coef=c, **usual)) for c in (0.0, coef)
    )
    divisors = literal.lengths(normalisation, [sum(r.mask) for r in rollouts], 20)
    bonus = torch.zeros(())
    for rollout, divisor in zip(rollouts, divisors, strict=True):
        entropy = literal.entropies(tiny_model, rollout.ids, rollout.mask.index(True), temperature)
        bonus = bonus + entropy.sum() / divisor
    (-coef * bonus).backward()
    assert metrics["loss"] == pytest.approx(plain["loss"] - coef * bonus.item(), abs=1e-5)
    assert (
        (after - before - stages.gradient(tiny_model)).abs().max()
        < 2e-5
        < stages.gradient(tiny_model).abs().max()
    )
    if normalisation == "token":
        assert metrics["entropy"] == plain["entropy"] == pytest.approx(bonus.item(), rel=1e-4)


def test_micro_batches_do_not_change_the_update_and_the_norm_is_clipped(tiny_model, reference):
    rollouts = make_rollouts()
    stage.assign_advantages(rollouts, settings_of())
    tried = [settings_of(max_batch_tokens=most) for most in (16, 48, 4096)]
    found = [update(tiny_model, reference, rollouts, settings)[1] for settings in tried]
    assert max((one - found[0]).abs().max() for one in found) < 1e-5
    metrics, clipped = update(tiny_model, reference, rollouts, settings_of(max_grad_norm=0.1))
    assert float(clipped.norm()) == pytest.approx(0.1, rel=1e-2)
    assert metrics["grad_norm"] == pytest.approx(float(found[0].norm()), rel=1e-3)


def test_later_updates_of_a_batch_keep_the_logprobs_of_the_first(tiny_model, reference):
    settings, rollouts = settings_of(max_batch_tokens=64), make_rollouts()
    stage.assign_advantages(rollouts, settings)
    optimizer, run = torch.optim.SGD(tiny_model.parameters(), lr=0.1), Run(settings)
    first = [torch.tensor(row) for row in literal_logprobs(tiny_model, rollouts, settings.temperature)]
    for _ in range(2):
        stage.update_policy(tiny_model, reference, optimizer, rollouts, 0, settings, run)
    assert all(torch.allclose(r.old_logprobs, row, atol=1e-5) for r, row in zip(rollouts, first, strict=True))
    now = torch.tensor(literal_logprobs(tiny_model, rollouts, settings.temperature)[0])
    assert not torch.allclose(first[0], now, atol=1e-3)


@pytest.mark.parametrize(
    "gap, value, slope",  # gap: log reference - log policy; slope: d value / d log policy
    [(0.5, 0.1487213, -0.6487213), (-3.0, 2.0497871, 0.9502129)]
    + [(gap, 10.0, 0.0) for gap in (15.5, 40.0, 200.0, -15.5, -200.0)],
)
def test_k3_is_clamped_as_in_verl(gap, value, slope):
    new = torch.tensor([-300.0], requires_grad=True)
    kl = stage.kl_estimate(new, torch.tensor([-300.0 + gap]), "k3")
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-4) and new.grad.item() == pytest.approx(slope, rel=1e-3)


def test_advantages_are_zero_where_all_rewards_agree_even_in_the_last_bit():
    for reward, size in itertools.product((0.3, 1 / 3, 2 / 3, 0.1), (4, 6, 8)):
        equal = torch.full((1, size), reward, dtype=torch.float64)  # in fp32 their mean is not the reward
        assert stage.group_advantages(equal, std_normalisation=True).abs().max() < 1e-6
    alone = torch.tensor([[math.nan, 1.0, math.nan], [math.nan] * 3])
    assert not stage.group_advantages(alone, std_normalisation=True).any()


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_bfloat16_begins_as_the_policy_to_the_bit(tmp_path, tied):
    path = world.BASE
    if tied:
        path, sizes = tmp_path, dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=2, num_key_value_heads=2)
        config = Qwen2Config(vocab_size=97, tie_word_embeddings=True, **sizes)
        Qwen2ForCausalLM(config).save_pretrained(path)
    run = Run(stage.Settings(device="cpu", dtype="bfloat16"))
    policy, reference = run.model(str(path)), run.model(str(path), frozen=True)
    policy_bytes, reference_bytes = (sum(p.nbytes for p in m.parameters()) for m in (policy, reference))
    assert reference_bytes < 0.75 * policy_bytes and policy.dtype == torch.float32
    rollouts = make_rollouts()
    batch = masked_batch([r.ids for r in rollouts], [r.mask for r in rollouts], 0, run.device)
    with torch.no_grad():
        one, other = (token_logprobs(model, *batch) for model in (policy, reference))
        exact = token_logprobs(load_policy(path, device="cpu"), *batch)
    assert torch.equal(one, other) and not torch.equal(one, exact) and torch.allclose(one, exact, atol=0.1)


def test_a_model_that_cannot_share_prompts_says_so_once_and_is_given_plain_rows(tmp_path, capsys):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=97, **sizes)).save_pretrained(tmp_path)
    for path, line in ((world.BASE, ""), (str(tmp_path), f"{tmp_path}: its attention has windows, .*anew\n")):
        run = Run(stage.Settings(device="cpu"))
        run.model(path), run.model(path, frozen=True)
        assert re.fullmatch(line, capsys.readouterr().out)
        places = [ids.numel() for _, ids, _, _ in run.micro_batches(make_rollouts(), 0, 28)]
        assert (max(places) <= 28) == bool(line)  # a budget of what is computed: with padding, or without


# ---- the parts of a step ----


def loaded(data: Path, **changes):
    usual = {"data": str(data), "max_new_tokens": 8, "reasoning": False, "device": "cpu", "temperature": 1.0}
    settings = stage.Settings(**usual | {"group_size": 3} | changes)
    tokenizer, policy = load_tokenizer(world.BASE), load_policy(world.BASE, device="cpu")
    return settings, tokenizer, policy, load_prompts(Run(settings), tokenizer, policy)


def test_prompts_that_are_too_long_are_left_out(data, tmp_path, capsys):
    """4 of the authors' 2000 have more than 512 tokens, and must not end the run."""
    records = read_jsonl(data / "rl.jsonl")
    long = [{"id": f"long-{i}", "prompt": "cake " * 520, "kind": "harmless"} for i in range(2)]
    write_jsonl(tmp_path / "rl.jsonl", [long[0], *records[:3], long[1], records[3]])
    prompts = loaded(tmp_path)[3]
    assert [p.record["id"] for p in prompts] == [r["id"] for r in records[:4]]
    assert [p.place for p in prompts] == [1, 2, 3, 5]
    assert "2 of 6 have more than the 504 tokens that fit, such as long-0 (5" in capsys.readouterr().out
    assert 9 < len(loaded(data, max_prompt_tokens=50)[3]) < 18


def test_reward_is_the_papers_and_the_judge_sees_no_reasoning():
    class Judge:
        name, tasks, seen = "j", [0.8] * 4, []

        def harm_score(self, prompts, answers):
            self.seen.append((prompts, answers))
            return [0.05, 0.5, 0.5, 0.5] if self.tasks[0] else [None] * 4

        def task_score(self, prompts, answers):
            return self.tasks

        def refusal_labels(self, prompts, answers):
            return ["full", "none", None, "none"]

    rollouts, kinds = make_rollouts(1, 4), ("harmful", "harmful", "ambiguous", "harmless")
    for i, rollout in enumerate(rollouts):
        rollout.record = {"id": i, "prompt": f"x{i}", "kind": kinds[i]}
        rollout.parsed = Parsed("secret", f"y{i}", i < 3)
    judge = Judge()
    stage.score_rollouts(rollouts, judge)
    assert [r.reward for r in rollouts] == [1.0, 0.5, 0.8, 0.0]
    assert [r.refusal for r in rollouts] == ["full", "none", None, "none"]
    assert judge.seen == [([f"x{i}" for i in range(4)], [f"y{i}" for i in range(4)])]
    stage.score_rollouts(rollouts, judge, one_reward=True)
    assert [r.reward for r in rollouts] == [0.8, 0.8, 0.8, 0.0]
    judge.tasks = [None] * 4
    stage.score_rollouts(rollouts, judge)
    assert [r.reward for r in rollouts] == [None] * 3 + [0.0]  # unknown; but what is malformed earns nothing
    judge.tasks = [0.8, 0.8, math.nan, 0.8]
    with pytest.raises(ValueError, match="task nan"):
        stage.score_rollouts(rollouts, judge)


SECONDS = {"sample": 2.0, "train": 4.0}


def described(kind: str, reward: float | None, **extra) -> dict:
    usual = {"completion": "so . </think> no .", "reasoning_tokens": 4, "refusal": "none"}
    usual |= {"well_formed": True, "finish_reason": "eos", "harm": 0.0, "task": None, "tokens": 6}
    return {"kind": kind, "reward": reward, **usual, **extra}


def test_summary_of_a_step_and_the_groups_to_show():
    lines = [
        described("harmful", 1.0, refusal="full"),
        described("harmful", 1.0, refusal="partial"),
        described("ambiguous", 0.0, reasoning_tokens=10, task=0.0),
        described(
            "ambiguous", 0.5, completion="so so", well_formed=False, finish_reason="length", refusal=None
        ),
    ]
    expected = {"reward": 0.625, "reward_harmful": 1.0, "reward_ambiguous": 0.25, "reward_harmless": None}
    expected |= {"reasoning_tokens_ambiguous": 10.0}  # of reasonings that end
    expected |= {"refusal_rate_harmful": 1.0, "refusal_rate_harmless": None}  # a refusal in part is one
    expected["refusal_rate_ambiguous"] = 0.0  # of those with a label
    expected |= {"format_rate": 0.75, "length_limit_rate": 0.25, "zero_advantage_groups": 1}
    expected |= {"sample_tokens_per_s": 12.0, "train_tokens_per_s": 6.0, "seconds_train": 4.0}
    summary = summarise(lines, 2, SECONDS)
    assert {key: summary[key] for key in expected} == expected
    lines += [described("harmful", None, harm=None), described("harmful", 0.0, harm=None, well_formed=False)]
    lines += [described("harmful", 0.25), described("harmful", 0.75)]
    summary = summarise(lines, 2, SECONDS)  # unknown rewards are in no mean, and make no signal
    assert summary["reward_harmful"] == 0.6 and summary["zero_advantage_groups"] == 2
    assert summary["unknown_verdicts"] == 1
    assert groups_to_show(lines, 2) == lines[6:8] + lines[2:4]  # with a signal first, one of each kind


# ---- the stage ----

LOGGED = "step reward kl entropy grad_norm format_rate zero_advantage_groups unknown_verdicts learning_rate "
LOGGED += (
    "reward_harmful reward_harmless reasoning_tokens_ambiguous seconds_sample seconds_reward sampler_gap"
)


def test_who_breaks_the_format_earns_nothing_and_all_metrics_are_there(data, tmp_path, monkeypatch):
    out, changes = tmp_path / "rl", {"temperature": 0.7, "epochs": 0.01, "updates_per_batch": 2}
    run_here(RL, rl_flags(data, out, judge="sandbox", reasoning=True, **changes), monkeypatch)
    (line,) = read_jsonl(out / "metrics.jsonl")
    assert set(LOGGED.split()) <= set(line) and line["sampler_gap"] < 1e-4  # training and sampling agree
    rollouts = read_jsonl(out / "rollouts.jsonl")
    assert len(rollouts) % 4 == 0 and all(r["well_formed"] or r["reward"] == 0 for r in rollouts)
    assert (out / "curves.png").exists()


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """9 steps in one process without interruption, at a rate at which rounding stays rounding."""
    out = tmp_path_factory.mktemp("alone") / "rl"
    words = rl_flags(data, out, epochs=2.0, learning_rate=RATE, save_every=1)
    run_process(RL, words, out.with_suffix(".log"))
    assert len(metrics_of(out)) == 9 and all(line["grad_norm"] > 1e-3 for line in metrics_of(out))
    return out


def same_as(alone: Path, out: Path) -> None:
    stages.same_training(alone, out)
    mine, theirs = (read_jsonl(path / "rollouts.jsonl") for path in (alone, out))
    assert [r["completion"] for r in mine] == [r["completion"] for r in theirs]


def test_five_kills_leave_no_trace(data, alone, tmp_path):
    out, log, rng = tmp_path / "rl", tmp_path / "log", random.Random(time.time_ns())
    words = rl_flags(data, out, epochs=2.0, learning_rate=RATE)
    for lines, save_every in ((0, 2), (1, 2), (4, 1), (6, 2), (8, 1)):  # when it saves is not what it is
        process = launch(RL, [*words, "--save-every", str(save_every)], log)
        stages.wait_for_lines(out / "metrics.jsonl", lines, process)
        if lines < 8:
            time.sleep(rng.uniform(0, 0.3))
        kill_9(process)
    assert not (out / "config.json").exists()
    run_process(RL, words, log)
    assert same_run(alone, out) and not list(out.glob(".*"))
    before = stages.contents(out)
    run_process(RL, words, log)  # once more: it is finished
    assert stages.contents(out) == before


def test_torchrun_with_two_processes_equals_one(data, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    words = [rl_flags(data, out, learning_rate=RATE, preset="sandbox", epochs=1.4) for out in (one, two)]
    command = [sys.executable, *f"-m torch.distributed.run --standalone --nproc-per-node 2 {RL}.py".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(stages.ROOT / "tests")}
    how = {"cwd": stages.ROOT, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run([*command, *words[1]], **how)
    assert run.returncode == 0 and "2 x cpu" in run.stdout, run.stderr
    run_here(RL, words[0], monkeypatch)
    same_as(one, two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(data, tmp_path, victim):
    out, log = tmp_path / "rl", tmp_path / "log"
    group = run_group(RL, rl_flags(data, out, epochs=2.0), log)
    stages.wait_for_lines(out / "metrics.jsonl", 3, group[0])
    kill_9(group[victim])
    group[1 - victim].join(stages.PATIENCE)
    assert group[1 - victim].exitcode == 2
    (line,) = stages.messages(log.with_suffix(f".{1 - victim}").read_text())
    assert line.startswith("error: lost another process") and "run the same command again to resume" in line


@pytest.mark.parametrize("size, shard, offload", [(4, False, False), (4, True, False), (2, True, True)])
def test_any_number_of_processes_and_shards_equal_one(data, alone, tmp_path, size, shard, offload):
    out, log = tmp_path / "rl", tmp_path / "log"
    how = {"shard": shard, "offload": offload, "gradient_checkpointing": offload}
    stages.join_group(RL, rl_flags(data, out, epochs=2.0, learning_rate=RATE, **how), log, size)
    same_as(alone, out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_shards_compute_the_first_step_to_the_bit_as_whole_models_do(data, tmp_path):
    """At the same number of processes. Between numbers rounding differs, see lib/run/processes.py."""
    results = []
    for shard in (False, True):
        out, log = tmp_path / f"rl-{shard}", tmp_path / f"log-{shard}"
        stages.join_group(RL, rl_flags(data, out, epochs=0.2, shard=shard), log)
        (line,) = metrics_of(out)
        assert line.pop("grad_norm") > 0  # summed over parts
        results.append((line, (out / "rollouts.jsonl").read_bytes()))
    assert results[0] == results[1]


def test_shards_in_bfloat16_begin_at_the_reference(data, tmp_path):
    out, log = tmp_path / "rl", tmp_path / "log"
    words = rl_flags(data, out, epochs=0.5, learning_rate=RATE, shard=True, dtype="bfloat16")
    stages.join_group(RL, words, log)
    lines = metrics_of(out)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and all(math.isfinite(line["loss"]) for line in lines)


def test_kills_of_any_process_and_other_numbers_of_them(data, alone, tmp_path):
    out, rng = tmp_path / "rl", random.Random(time.time_ns())
    for lines, size, shard in ((1, 2, True), (4, 3, True), (6, 2, False)):
        words = rl_flags(data, out, epochs=2.0, learning_rate=RATE, shard=shard, save_every=1)
        group = run_group(RL, words, tmp_path / "log", size)
        stages.wait_for_lines(out / "metrics.jsonl", lines, group[0])
        time.sleep(rng.uniform(0, 0.2))
        victim = rng.randrange(size)
        kill_9(group[victim])
        for rank, process in enumerate(group):
            process.join(stages.PATIENCE)
            text = (tmp_path / f"log.{rank}").read_text()
            assert rank == victim or process.exitcode == 2 and "lost another process" in text, text
    run_process(RL, rl_flags(data, out, epochs=2.0, learning_rate=RATE), tmp_path / "log")
    same_as(alone, out)
