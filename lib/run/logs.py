"""What stage 3 writes down of its rollouts: a line a step for metrics.jsonl, a readable one a rollout for rollouts.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

from lib.judges import refusal_label
from lib.rewards import KINDS

SILENT = 10  # steps without a signal in a row that are worth a word


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarise(rollouts: list[dict], group_size: int, one_reward: bool = False) -> dict:
    """Metrics of one step from every process's rollouts, as plain dicts; None where a kind did not occur.

    Rewards that are unknown (None) are in no mean. `unknown_verdicts` counts completions for which the judge did not give
    the score that its kind needs, the malformed ones too (whose reward is 0 all the same). `zero_advantage_groups` counts
    groups in which no two known rewards differ.
    """
    groups = [
        [r["reward"] for r in rollouts[i : i + group_size]] for i in range(0, len(rollouts), group_size)
    ]
    known = [[reward for reward in group if reward is not None] for group in groups]
    metrics = {"reward": mean([r["reward"] for r in rollouts])}
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
    asked = ["harm" if r["kind"] == "harmful" and not one_reward else "task" for r in rollouts]
    metrics["unknown_verdicts"] = sum(r[score] is None for r, score in zip(rollouts, asked, strict=True))
    metrics["zero_advantage_groups"] = sum(
        max(group, default=0) - min(group, default=0) < 1e-6 for group in known
    )
    return metrics


def no_signal(metrics: dict, steps: int) -> str:
    """What to say after so many steps in a row in which no group had two different rewards."""
    reward, form = (
        "unknown" if metrics[key] is None else f"{metrics[key]:.2f}" for key in ("reward", "format_rate")
    )
    return (
        f"warning: for {steps} steps no group has had two different rewards, so nothing is learned from them "
        f"(mean reward {reward}, format_rate {form}, unknown_verdicts {metrics['unknown_verdicts']}): read rollouts.jsonl. "
        "Reward near 1: it is learned. format_rate near 0: stage 2 did not teach the format, or --max-new-tokens cuts it off. "
        "Else look at the judge's scores, and at --temperature: samples must differ"
    )


def describe(rollout, step: int) -> dict:
    """A `Rollout` of stage 3 as a person reads it in rollouts.jsonl."""
    keys = ("reward", "harm", "task", "advantage", "reasoning_tokens")
    return {
        "step": step,
        "id": rollout.record["id"],
        "kind": rollout.record["kind"],
        "prompt": rollout.record["prompt"],
        "completion": rollout.text,
        "refusal": refusal_label(rollout.parsed.answer),
        "well_formed": rollout.parsed.well_formed,
        "finish_reason": rollout.completion.finish_reason,
        "tokens": len(rollout.completion.token_ids),
    } | {key: getattr(rollout, key) for key in keys}


def speed(described: Sequence[dict], clock: Sequence[float]) -> dict:
    """Seconds that a step spent on sampling, on the judge and on training, and tokens of completions per second; `clock` is
    the time before the first and after each of the three."""
    sample, reward, train = (after - before for before, after in zip(clock, clock[1:], strict=False))
    tokens = sum(r["tokens"] for r in described)
    rates = {"sample_tokens_per_s": tokens / sample, "train_tokens_per_s": tokens / train}
    return rates | {"seconds_sample": sample, "seconds_reward": reward, "seconds_train": train}


def forecast(metrics: dict, steps: int, max_new_tokens: int) -> str:
    """What one measured step says of a run of so many."""
    sample, judge, train = (metrics[f"seconds_{part}"] for part in ("sample", "reward", "train"))
    tokens, hours = metrics["sample_tokens_per_s"] * sample, steps * (sample + judge + train) / 3600
    return (
        f"one step: sampling {sample:.1f} s, judge {judge:.1f} s, training {train:.1f} s, {tokens:.0f} tokens; "
        f"{steps} steps: {hours:.1f} hours\ncompletions may grow to {max_new_tokens} tokens, and with them the time"
    )
