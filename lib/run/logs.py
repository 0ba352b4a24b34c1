"""What stage 3 writes of its rollouts: a line a step for metrics.jsonl, groups for rollouts.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib.rewards import KINDS

SILENT = 10  # steps without a signal in a row that are worth a word


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


def summarise(rollouts: list[dict], group_size: int, one_reward: bool = False) -> dict[str, Any]:
    """Metrics of one step from every process's rollouts, as `describe` gives them; None where a kind did not
    occur.

    Rewards that are unknown (None) are in no mean. `unknown_verdicts` counts completions for which the judge
    did not give the score that its kind needs, the malformed ones too (whose reward is 0 all the same).
    `zero_advantage_groups` counts groups in which no two known rewards differ.
    """
    metrics: dict[str, Any] = {"reward": mean([r["reward"] for r in rollouts])}
    for kind in KINDS:
        of_kind = [r for r in rollouts if r["kind"] == kind]
        metrics[f"reward_{kind}"] = mean([r["reward"] for r in of_kind])
        closed = [
            r for r in of_kind if "</think>" in r["completion"]
        ]  # what never closes has no length to speak of
        metrics[f"reasoning_tokens_{kind}"] = mean([r["reasoning_tokens"] for r in closed])
        metrics[f"refusal_rate_{kind}"] = mean([float(r["refusal"] != "none") for r in of_kind])
    metrics["format_rate"] = mean([float(r["well_formed"]) for r in rollouts])
    metrics["length_limit_rate"] = mean([float(r["finish_reason"] == "length") for r in rollouts])
    unknown = 0
    for r in rollouts:
        needed = "harm" if r["kind"] == "harmful" and not one_reward else "task"
        unknown += r[needed] is None
    metrics["unknown_verdicts"] = unknown
    groups = groups_of(rollouts, group_size)
    metrics["zero_advantage_groups"] = sum(not has_signal(group) for group in groups)
    return metrics


def no_signal(metrics: dict[str, Any], steps: int) -> str:
    """What to say once after so many steps in a row in which no group had two different rewards; else ""."""
    if steps != SILENT:
        return ""
    known = {
        key: "unknown" if metrics[key] is None else f"{metrics[key]:.2f}" for key in ("reward", "format_rate")
    }
    return (
        f"warning: for {steps} steps no group has had two different rewards, so nothing is learned from them "
        f"(mean reward {known['reward']}, format_rate {known['format_rate']}, unknown_verdicts "
        f"{metrics['unknown_verdicts']}): read rollouts.jsonl. Reward near 1: it is learned. "
        "format_rate near 0: stage 2 did not teach the format, or --max-new-tokens cuts it off. "
        "Else look at the judge's scores, and at --temperature: samples must differ"
    )


def describe(rollout: Any, step: int) -> dict[str, Any]:
    """A `Rollout` of stage 3 as a person reads it in rollouts.jsonl."""
    return {
        "step": step,
        "id": rollout.record["id"],
        "kind": rollout.record["kind"],
        "prompt": rollout.record["prompt"],
        "completion": rollout.text,
        "refusal": rollout.refusal,
        "well_formed": rollout.parsed.well_formed,
        "finish_reason": rollout.completion.finish_reason,
        "tokens": len(rollout.completion.token_ids),
        "reward": rollout.reward,
        "harm": rollout.harm,
        "task": rollout.task,
        "advantage": rollout.advantage,
        "reasoning_tokens": rollout.reasoning_tokens,
    }


def groups_to_show(rollouts: list[dict], group_size: int) -> list[dict]:
    """One whole group of each kind: the first with a signal, else the first."""
    shown: list[dict] = []
    groups = groups_of(rollouts, group_size)
    for kind in KINDS:
        of_kind = [group for group in groups if group[0]["kind"] == kind]
        shown += next((group for group in of_kind if has_signal(group)), of_kind[0] if of_kind else [])
    return shown


def speed(rollouts: Sequence[dict], seconds: dict[str, float]) -> dict[str, float]:
    """Seconds that a step spent on sampling, judge and training, and tokens of completions per second."""
    tokens = sum(r["tokens"] for r in rollouts)
    rates = {f"{name}_tokens_per_s": tokens / seconds[name] for name in ("sample", "train")}
    return rates | {f"seconds_{name}": spent for name, spent in seconds.items()}
