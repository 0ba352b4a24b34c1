"""How much a policy's samples differ, and how long it thinks about twins (findings F5 and F3 of the paper).

    python -m lib.compare.diversity --preset sandbox --data runs/demo/data \
        --models sft=runs/demo/sft tars=runs/demo/rl --out runs/demo/diversity

**diversity**, which RL learns from: of groups that are sampled as RL does, of RL's prompts, the distinct
reasonings and answers; the entropy of the policy, nats a token; mean and best reward; the shares of groups
with two different rewards (GRPO learns from these alone) and with two verdicts (some refuse, some do not).

**twins**: a harmful prompt, its decoy and its toy show the same definitions, only the word asked for differs.
So a longer thought is owed to the verdict, not to the disguise. Reasoning tokens, of completions that close
their reasoning; differences are paired by disguise. In the sandbox alone.

Any checkpoint of 02 and 03 will do, that of an early stop, too (`03_rl_train.py --epochs 0.1`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib.batches import masked_batch
from lib.chat import encode_prompt
from lib.compare.rpo import Response, collect_responses
from lib.compare.tables import by_model
from lib.judges import load_judge
from lib.metrics import Interval, bootstrap, wilson
from lib.policy import token_logprobs
from lib.run import run_main, start
from lib.run.data import Prompt, has_signal, load_prompts, mean
from lib.run.files import append_jsonl, resume_log, write_json
from lib.run.folder import reasons
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import TOKENS, Common, named, setting

Groups = list[list[Response]]  # of each prompt


@dataclass
class Settings(Common):
    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    models: list[str] = setting(["sft=runs/demo/sft", "tars=runs/demo/rl"], "checkpoints, NAME=FOLDER")
    judge: str = setting("sandbox", "as in 03_rl_train.py")
    prompts: int = setting(64, "prompts of DATA/rl.jsonl, the first; as many disguises of twins", low=2)
    group_size: int = setting(8, "completions a prompt", low=2)
    temperature: float = setting(0.6, "of sampling", low=0.01, high=10.0)
    max_new_tokens: int = setting(4096, "tokens of a completion", low=1)
    max_prompt_tokens: int = setting(512, "prompts of more are left out", low=1, flag=False)
    max_sample_tokens: int = setting(65536, "rows x columns of the sampling cache", low=16, high=TOKENS)
    dtype: str = setting("float32", "to sample in", choices=("float32", "bfloat16"))
    reasoning: bool = setting(True, "as the checkpoint says", flag=False)

    def inputs(self) -> list[str]:
        return [f"{self.data}/rl.jsonl", *(text.partition("=")[2] for text in self.models)]


def diversity(groups: Groups, entropies: list[float], seed: int) -> dict[str, Interval]:
    known = [[r.reward for r in group if r.reward is not None] for group in groups]  # else no verdict
    means: dict[str, list[float]] = {
        "distinct_reasonings": [len({r.parsed.reasoning for r in group}) for group in groups],
        "distinct_answers": [len({r.parsed.answer for r in group}) for group in groups],
        "entropy": entropies,
        "reward": [sum(rewards) / len(rewards) for rewards in known if rewards],
        "best_reward": [max(rewards) for rewards in known if rewards],
    }
    figures = {name: bootstrap(values, seed) for name, values in means.items() if values}
    figures["two_rewards"] = wilson([has_signal([vars(r) for r in group]) for group in groups])
    figures["two_verdicts"] = wilson([len({r.refusal == "none" for r in group}) > 1 for group in groups])
    return figures


def twins(groups: Groups, seed: int) -> dict[str, Interval]:
    """Of groups for harmful, decoy, toy, harmful ... Left out: three of which one never closes a thought."""
    lengths = [mean([r.reasoning_tokens for r in group if "</think>" in r.text]) for group in groups]
    rows = [row for row in zip(lengths[::3], lengths[1::3], lengths[2::3], strict=True) if None not in row]
    harmful, decoy, toy = np.array(rows, dtype=float).reshape(-1, 3).T
    values = {"harmful": harmful, "decoy": decoy, "toy": toy}
    values |= {"decoy_minus_harmful": decoy - harmful, "toy_minus_harmful": toy - harmful}
    return {name: bootstrap(own, seed) for name, own in values.items() if rows}


@torch.no_grad()
def measure(folder: str, judge: Any, settings: Settings, run: Any) -> dict[str, dict]:
    """{section: {figure: ci}} of one model."""
    policy, tokenizer = load_policy(folder, device=run.device), load_tokenizer(folder)
    size = settings.group_size

    def sampled(prompts: list[Prompt]) -> Groups:
        responses = collect_responses(policy, tokenizer, prompts, judge, settings, run)
        return [responses[i : i + size] for i in range(0, len(responses), size)]

    groups, entropies = sampled(load_prompts(run, tokenizer, policy)[: settings.prompts]), list[float]()
    for group in groups:
        rows = [r.ids for r in group], [r.mask for r in group]
        tensors = masked_batch(*rows, tokenizer.pad_token_id, run.device)  # (G, T) each
        _, entropy = token_logprobs(policy, *tensors, temperature=settings.temperature, with_entropy=True)
        entropies.append((entropy.sum() / tensors[2].sum()).item())
    sections: dict[str, dict] = {"diversity": diversity(groups, entropies, settings.seed), "twins": {}}
    if settings.judge == "sandbox" and settings.reasoning:
        world = importlib.import_module("lib.sandbox.world")
        records = enumerate(world.twins("eval", settings.prompts, settings.seed))
        prompts = [Prompt(r, encode_prompt(tokenizer, r["prompt"], reasoning=True), i) for i, r in records]
        sections["twins"] = twins(sampled(prompts), settings.seed)
    return sections


def main() -> None:
    # A preset has no values of our own, but RL's: temperature, tokens of a completion, group size.
    settings, run = start(Settings, "diversity", "rl", "diversity", alone=True)
    models, judge = named("--models", settings.models, "FOLDER"), load_judge(settings.judge)
    for folder in models.values():  # all inputs are looked at before OUT is emptied
        load_tokenizer(folder)
    run.begin()
    log = run.out / "measured.jsonl"  # of a run that was stopped
    found = {line["model"]: line["found"] for line in resume_log(log)}
    for name in [name for name in models if name not in found]:
        settings.reasoning = reasons(name, models[name], ())
        found[name] = measure(models[name], judge, settings, run)
        append_jsonl(log, {"model": name, "found": found[name]})
    print(by_model({name: sections["diversity"] | sections["twins"] for name, sections in found.items()}))
    write_json(run.out / "results.json", {"models": found, "config": run.config, "seed": settings.seed})


if __name__ == "__main__":
    run_main(main)
