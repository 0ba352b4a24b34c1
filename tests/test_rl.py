"""Chapter 3: loss and gradient against tests/reference.py, the parts of a step, processes, shards, kills."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import reference as literal
import stages
import torch
from stages import RL, kill_9, launch, metrics_of, rl_flags, run_group, run_here, run_process, same_run
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib.batches import masked_batch
from lib.chat import Parsed
from lib.judges import load_judge
from lib.policy import token_logprobs
from lib.run.data import groups_to_show, load_prompts, summarise
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sampler import Completion
from lib.sandbox import world

stage = importlib.import_module(RL)
RATE = 3e-5  # at a higher one AdamW makes a step of rounding, where a gradient is nothing else (a key's bias)
TWO = (True, False)
KNOBS = list(itertools.product(("token", "sequence", "constant"), TWO, ("k1", "k2", "k3"), TWO))


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
    """In double precision, so that what differs is the formula; with ratios clipped on both sides, too.

    Part by part: tests/course/test_3_*.py.
    """
    tiny_model.double(), reference.double()
    settings = settings_of(normalisation=normalisation, std_normalisation=std, kl_estimator=estimator)
    settings.max_batch_tokens, settings.temperature = 32, 1.0 if off_policy else 0.6
    settings.entropy_coef = 0.7
    rollouts, rng, clipped = make_rollouts(), random.Random(2), 0
    rollouts[4].reward = None  # no verdict: of its group KL and entropy alone move the policy
    stage.assign_advantages(rollouts, settings)
    rewards = [r.reward for r in rollouts]
    advantages = [a for group in (rewards[:3], rewards[3:]) for a in literal.advantages(group, std)]
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
    rows = [(r.ids, r.mask.index(True), settings.temperature) for r in rollouts]
    entropy = [literal.entropies(tiny_model, *row).sum() for row in rows]
    divisors = literal.lengths(normalisation, [len(row) for row in new], 20)
    bonus = sum(0.7 * one / divisor for one, divisor in zip(entropy, divisors, strict=True))
    objective = literal.objective(new, old, anchor, advantages, settings) + bonus
    (-objective).backward()
    expected = stages.gradient(tiny_model)
    metrics, found = update(tiny_model, reference, rollouts, settings)
    assert expected.norm() > 0.1 and (found - expected).abs().max() < 1e-6
    assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    gaps = [a - n for row, theirs in zip(new, anchor, strict=True) for n, a in zip(row, theirs, strict=True)]
    mean = sum(literal.kl(gap, estimator).item() for gap in gaps) / len(gaps)
    assert metrics["kl"] == pytest.approx(mean, rel=1e-3)
    assert metrics["entropy"] == pytest.approx(sum(entropy).item() / len(gaps), rel=1e-4)


def test_the_gradient_is_clipped_and_its_norm_is_that_before(tiny_model, reference):
    rollouts = make_rollouts()
    stage.assign_advantages(rollouts, settings_of())
    metrics, clipped = update(tiny_model, reference, rollouts, settings_of(max_grad_norm=0.1))
    assert float(clipped.norm()) == pytest.approx(0.1, rel=1e-2) and metrics["grad_norm"] > 0.2


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_bfloat16_begins_as_the_policy_to_the_bit(tiny_model, tmp_path, tied):
    tiny_model.save_pretrained(tmp_path)
    path = str(tmp_path) if tied else world.BASE
    run = Run(stage.Settings(device="cpu", dtype="bfloat16"))
    policy, reference = run.model(path), run.model(path, frozen=True)
    policy_bytes, reference_bytes = (sum(p.nbytes for p in m.parameters()) for m in (policy, reference))
    assert reference_bytes < 0.75 * policy_bytes and policy.dtype == torch.float32
    rollouts = make_rollouts()
    batch = masked_batch([r.ids for r in rollouts], [r.mask for r in rollouts], 0, run.device)
    with torch.no_grad():
        one, other = (token_logprobs(model, *batch) for model in (policy, reference))
        exact = token_logprobs(load_policy(path, device="cpu"), *batch)
    assert torch.equal(one, other) and not torch.equal(one, exact) and torch.allclose(one, exact, atol=0.1)


def test_a_model_that_cannot_share_prompts_is_given_plain_rows(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=97, **sizes)).save_pretrained(tmp_path)  # a window in one layer
    for path in (world.BASE, str(tmp_path)):
        run = Run(stage.Settings(device="cpu"))
        run.model(path)
        places = [ids.numel() for _, ids, _, _ in run.micro_batches(make_rollouts(), 0, 28)]
        padding_counts = max(places) <= 28  # the budget is of what is computed
        assert padding_counts == (path != world.BASE)


# ---- the parts of a step ----


def test_prompts_that_are_too_long_are_left_out(data, tmp_path, capsys):
    """4 of the authors' 2000 have more than 512 tokens, and must not end the run."""
    records = read_jsonl(data / "rl.jsonl")
    long = [{"id": f"long-{i}", "prompt": "cake " * 520, "kind": "harmless"} for i in range(2)]
    write_jsonl(tmp_path / "rl.jsonl", [long[0], *records[:3], long[1], records[3]])
    run = Run(stage.Settings(data=str(tmp_path), max_new_tokens=8, reasoning=False))
    prompts = load_prompts(run, load_tokenizer(world.BASE), load_policy(world.BASE, device="cpu"))
    assert [p.record["id"] for p in prompts] == [r["id"] for r in records[:4]]
    assert [p.place for p in prompts] == [1, 2, 3, 5]
    assert "2 of 6 have more than the 504 tokens that fit, such as long-0 (5" in capsys.readouterr().out


def test_reward_is_the_papers_and_the_judge_sees_no_reasoning():
    """What it is for which scores: tests/course/test_3_rewards.py."""
    judge, labels = Mock(), ["full", "none", None, "none"]
    judge.harm_score.return_value, judge.task_score.return_value = [0.05, 0.5, None, 0.5], [0.8] * 4
    judge.refusal_labels.return_value = labels
    rollouts, kinds = make_rollouts(1, 4), ("harmful", "harmful", "harmful", "harmless")
    for i, rollout in enumerate(rollouts):
        rollout.record = {"id": i, "prompt": f"x{i}", "kind": kinds[i]}
        rollout.parsed = Parsed("secret", f"y{i}", True)
    stage.score_rollouts(rollouts, judge)
    assert [(r.reward, r.refusal) for r in rollouts] == list(zip([1.0, 0.5, None, 0.8], labels, strict=True))
    judge.harm_score.assert_called_once_with([f"x{i}" for i in range(4)], [f"y{i}" for i in range(4)])
    stage.score_rollouts(rollouts, judge, one_reward=True)
    assert [r.reward for r in rollouts] == [0.8] * 4


def described(kind: str, reward: float | None, **extra) -> dict:
    usual = {"completion": "so . </think> no .", "reasoning_tokens": 4, "refusal": "none", "tokens": 6}
    return {"kind": kind, "reward": reward, "well_formed": True, "finish_reason": "eos", **usual, **extra}


def test_summary_of_a_step_and_the_groups_to_show():
    lines = [
        described("harmful", 1.0, refusal="full"),
        described("harmful", 1.0, refusal="partial"),
        described("ambiguous", 0.0, reasoning_tokens=10),
        described("ambiguous", 0.5, completion="so", well_formed=False, finish_reason="length", refusal=None),
    ]
    expected = {"reward": 0.625, "reward_harmful": 1.0, "reward_ambiguous": 0.25, "reward_harmless": None}
    expected |= {"reasoning_tokens_ambiguous": 10.0}  # of reasonings that end
    expected |= {"refusal_rate_harmful": 1.0, "refusal_rate_harmless": None}  # a refusal in part is one
    expected["refusal_rate_ambiguous"] = 0.0  # of those with a label
    expected |= {"format_rate": 0.75, "length_limit_rate": 0.25, "zero_advantage_groups": 1}
    expected |= {"sample_tokens_per_s": 12.0, "train_tokens_per_s": 6.0, "seconds_train": 4.0}
    seconds = {"sample": 2.0, "train": 4.0}
    summary = summarise(lines, 2, seconds)
    assert {key: summary[key] for key in expected} == expected
    lines += [described("harmful", reward) for reward in (None, 0.0, 0.25, 0.75)]
    summary = summarise(lines, 2, seconds)  # unknown rewards are in no mean, and make no signal
    assert summary["reward_harmful"] == 0.6 and summary["zero_advantage_groups"] == 2
    assert summary["unknown_verdicts"] == 1
    assert groups_to_show(lines, 2) == lines[6:8] + lines[2:4]  # with a signal first, one of each kind


FILES = {"03_rl_train.py", "chat.py", "sampler.py", "cache.py", "rewards.py", "batches.py", "policy.py"}


def test_from_rollouts_to_the_gradient_a_reader_opens_seven_files(data):
    """Of chapters and flat lib: the plumbing (lib/run) and the judge are one call each."""
    settings = stage.Settings(data=str(data), max_new_tokens=8, group_size=2, device="cpu", kl_coef=0.1)
    run, tokenizer, judge = Run(settings), load_tokenizer(world.BASE), load_judge("sandbox")
    policy, reference = load_policy(world.BASE, device="cpu"), load_policy(world.BASE, device="cpu")
    prompts, optimizer = load_prompts(run, tokenizer, policy)[:3], torch.optim.SGD(policy.parameters())
    run.clip_and_step = lambda optimizer, loss: 0.0
    seen: set[str] = set()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code.co_filename))
    try:
        rollouts = stage.collect_rollouts(policy, tokenizer, prompts, 0, settings, run)
        stage.score_rollouts(rollouts, judge)
        stage.assign_advantages(rollouts, settings)
        stage.update_policy(policy, reference, optimizer, rollouts, tokenizer.pad_token_id, settings, run)
    finally:
        sys.setprofile(None)
    paths = map(Path, seen)
    assert {path.name for path in paths if path.parent in (stages.ROOT, stages.ROOT / "lib")} == FILES


# ---- the stage ----

LOGGED = "step reward kl entropy grad_norm format_rate zero_advantage_groups unknown_verdicts learning_rate "
LOGGED += "reward_harmful reward_harmless reasoning_tokens_ambiguous seconds_sample sampler_gap"


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


def test_kills_leave_no_trace_and_meanwhile_a_second_run_is_refused(data, alone, tmp_path):
    out, log, rng = tmp_path / "rl", tmp_path / "log", random.Random(time.time_ns())
    words = rl_flags(data, out, epochs=2.0, learning_rate=RATE)
    for lines, save_every in ((0, 2), (4, 1), (8, 2)):  # when it saves is not what it is
        process = launch(RL, [*words, "--save-every", str(save_every)], log)
        stages.wait_for_lines(out / "metrics.jsonl", lines, process)
        for more in ([], ["--learning-rate", "0.5", "--overwrite"]) if lines == 0 else ():
            (second,) = run_group(RL, [*words, *more], tmp_path / "second", 1)
            second.join(stages.PATIENCE)
            (line,) = stages.messages((tmp_path / "second.0").read_text())
            assert second.exitcode == 2 and "a run is writing there" in line
        if lines < 8:
            time.sleep(rng.uniform(0, 0.3))
        kill_9(process)
    assert not (out / "config.json").exists()
    run_process(RL, words, log)
    assert same_run(alone, out) and not list(out.glob(".*"))  # no lock, no half-written file


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


@pytest.mark.parametrize("size, shard, offload", [(4, False, False), (4, True, False), (2, True, True)])
def test_any_number_of_processes_and_shards_equal_one(data, alone, tmp_path, size, shard, offload):
    out, how = tmp_path / "rl", {"shard": shard, "offload": offload, "gradient_checkpointing": offload}
    words = rl_flags(data, out, epochs=2.0, learning_rate=RATE, **how)
    stages.join_group(RL, words, tmp_path / "log", size)
    same_as(alone, out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_shards_compute_the_first_step_to_the_bit_as_whole_models_do(data, tmp_path):
    """At the same number of processes. Between numbers rounding differs, see lib/run/processes.py."""
    results = []
    for shard in (False, True):
        out = tmp_path / f"rl-{shard}"
        stages.join_group(RL, rl_flags(data, out, epochs=0.2, shard=shard), tmp_path / "log")
        (line,) = metrics_of(out)
        assert line.pop("grad_norm") > 0  # summed over parts
        results.append((line, (out / "rollouts.jsonl").read_bytes()))
    assert results[0] == results[1]


def test_shards_in_bfloat16_begin_at_the_reference(data, tmp_path):
    words = rl_flags(data, tmp_path / "rl", learning_rate=RATE, shard=True, dtype="bfloat16")
    stages.join_group(RL, words, tmp_path / "log")
    lines = metrics_of(tmp_path / "rl")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and all(math.isfinite(line["loss"]) for line in lines)


def test_a_killed_process_ends_the_others_and_other_numbers_of_them_go_on(data, alone, tmp_path):
    out, rng = tmp_path / "rl", random.Random(time.time_ns())
    for lines, size, shard, victim in ((1, 2, True, 0), (4, 3, True, 2), (6, 2, False, 1)):
        words = rl_flags(data, out, epochs=2.0, learning_rate=RATE, shard=shard, save_every=1)
        group = run_group(RL, words, tmp_path / "log", size)
        stages.wait_for_lines(out / "metrics.jsonl", lines, group[0])
        time.sleep(rng.uniform(0, 0.2))
        kill_9(group[victim])
        for rank, process in enumerate(group):
            process.join(stages.PATIENCE)
            if rank != victim:
                (line,) = stages.messages((tmp_path / f"log.{rank}").read_text())
                assert process.exitcode == 2 and line.startswith("error: lost another process"), line
                assert "run the same command again to resume" in line
    run_process(RL, rl_flags(data, out, epochs=2.0, learning_rate=RATE), tmp_path / "log")
    same_as(alone, out)
