"""What stage 3 reads, prompts as token ids; and writes, metrics and groups of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.chat import encode_prompt
from lib.policy import context_of
from lib.rewards import KINDS
from lib.run.files import read_jsonl


@dataclass
class Prompt:
    record: dict  # id, prompt, kind, source
    ids: list[int]  # of the generation prompt, "<think>\n" included
    place: int  # in the file


def load_prompts(run: Any, tokenizer: Any, policy: Any) -> list[Prompt]:
    """DATA/rl.jsonl without the prompts that are too long. UserError for a record that cannot be used."""
    settings, prompts = run.settings, []
    path = Path(settings.data) / "rl.jsonl"
    for place, record in enumerate(read_jsonl(path, ("id", "prompt", "kind"))):
        ids = encode_prompt(tokenizer, record["prompt"], reasoning=settings.reasoning)
        prompts.append(Prompt(record, ids, place))
    context, new, most = context_of(policy.config), settings.max_new_tokens, settings.max_prompt_tokens
    limits = f"context {context}, max_prompt_tokens {most}, --max-new-tokens {new}"
    return run.usable(prompts, policy, tokenizer, min(most, context - new), f"{path} ({limits})")


# ---- what it writes ----


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def groups_of(rollouts: Sequence[dict], group_size: int) -> list[Sequence[dict]]:
    return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]


def has_signal(group: Sequence[dict]) -> bool:
    """Whether two known rewards of the group differ."""
    known = [r["reward"] for r in group if r["reward"] is not None]
    return max(known, default=0) - min(known, default=0) >= 1e-6


def summarise(rollouts: list[dict], group_size: int, seconds: dict) -> dict[str, Any]:
    """Metrics of one step from every process's rollouts, as `rollout_line` gives them; None: no such kind.

    Rewards that are unknown (None), because the judge gave no verdict, are in no mean: `unknown_verdicts`
    counts them. `zero_advantage_groups` counts groups in which no two known rewards differ. `seconds`: of
    each phase.
    """
    metrics: dict[str, Any] = {"reward": mean([r["reward"] for r in rollouts])}
    for kind in KINDS:
        of_kind = [r for r in rollouts if r["kind"] == kind]
        closed = [r for r in of_kind if "</think>" in r["completion"]]  # what never closes has no length
        metrics[f"reward_{kind}"] = mean([r["reward"] for r in of_kind])
        metrics[f"reasoning_tokens_{kind}"] = mean([r["reasoning_tokens"] for r in closed])
        labelled = [r for r in of_kind if r["refusal"] is not None]
        metrics[f"refusal_rate_{kind}"] = mean([r["refusal"] != "none" for r in labelled])
    metrics["format_rate"] = mean([r["well_formed"] for r in rollouts])
    metrics["length_limit_rate"] = mean([r["finish_reason"] == "length" for r in rollouts])
    metrics["unknown_verdicts"] = sum(r["reward"] is None for r in rollouts)
    groups = groups_of(rollouts, group_size)
    metrics["zero_advantage_groups"] = sum(not has_signal(group) for group in groups)
    for name in ("sample", "train"):
        metrics[f"{name}_tokens_per_s"] = sum(r["tokens"] for r in rollouts) / seconds[name]
    return metrics | {f"seconds_{name}": spent for name, spent in seconds.items()}


def rollout_line(rollout: Any, step: int) -> dict[str, Any]:
    """A `Rollout` of stage 3 as a person reads it in rollouts.jsonl."""
    return {
        "step": step,
        **{key: rollout.record[key] for key in ("id", "kind", "prompt")},
        "completion": rollout.text,
        "refusal": rollout.refusal,
        "well_formed": rollout.parsed.well_formed,
        "finish_reason": rollout.completion.finish_reason,
        "tokens": len(rollout.completion.token_ids),
        **{key: getattr(rollout, key) for key in ("reward", "harm", "task", "advantage", "reasoning_tokens")},
    }


SILENT = 10  # steps without a signal in a row that are worth a word
NO_SIGNAL = (
    f"warning: for {SILENT} steps no group has had two different rewards, so nothing is learned: read "
    "rollouts.jsonl. Reward near 1: it is learned. format_rate near 0: stage 2 did not teach the format, "
    "or --max-new-tokens cuts it off. Else look at the judge's scores, and at --temperature"
)


def groups_to_show(rollouts: list[dict], group_size: int) -> list[dict]:
    """One whole group of each kind: the first with a signal, else the first."""
    shown: dict[str, Sequence[dict]] = {}
    for group in sorted(groups_of(rollouts, group_size), key=has_signal, reverse=True):
        shown.setdefault(group[0]["kind"], group)
    return [rollout for kind in KINDS for rollout in shown.get(kind, [])]
