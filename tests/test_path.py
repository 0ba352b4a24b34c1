"""The path of a prompt: how many files a reader opens between rollouts and gradient."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import stages
import torch

from lib.judges import load_judge
from lib.run.data import load_prompts
from lib.run.hub import load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sandbox import world

FILES = {"03_rl_train.py", "chat.py", "sampler.py", "cache.py", "rewards.py", "batches.py", "policy.py"}


def test_from_rollouts_to_the_gradient_seven_files_execute(data):
    """Of chapters and flat lib: the plumbing (lib/run) and the judge are one call each."""
    stage = importlib.import_module(stages.RL)
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
