"""The formulas of the paper word by word, in plain Python and slow: what the chapters are compared with.

They are the solutions of exercises, so they stand here and in no other test: a course withholds this file.
One symbol a name; logprob[i][t] = log pi(o_i,t | q, o_i,<t) is a list of scalars for each completion o_i of a
batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

EPS = 1e-6  # of the advantage
SLACK = 0.1  # of the safety reward


# ---- rewards (section 4.3, equations 1 and 2) ----


def reward(kind: str, harm: float, task: float, well_formed: bool) -> float:
    r_f = 1 if well_formed else 0
    s = 1 - harm
    r_s = 1 if s >= 1 - SLACK else s
    r_n = task
    return r_f * r_s if kind == "harmful" else r_f * r_n


# ---- advantages (DeepSeekMath, section 4.1) ----


def advantages(group: Sequence[float | None], std: bool = True) -> list[float]:
    """Of one group's rewards; one that is unknown, None, has no say, and its advantage is 0."""
    known = [r for r in group if r is not None]
    scale = statistics.stdev(known) + EPS if std and len(known) > 1 else 1.0
    return [0.0 if r is None else (r - statistics.mean(known)) / scale for r in group]


# ---- log-probabilities of a completion, by one plain pass over one sequence ----


def logits(model, prompt_ids: list[int], ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Those that predict the completion, (tokens, vocab), all at once."""
    every = model(torch.tensor([prompt_ids + ids])).logits[0] / temperature
    return every[len(prompt_ids) - 1 : len(prompt_ids) + len(ids) - 1]


def logprobs(model, prompt_ids: list[int], ids: list[int], temperature: float = 1.0) -> list[torch.Tensor]:
    predictions = logits(model, prompt_ids, ids, temperature)
    return [
        torch.log(prediction.softmax(-1)[token]) for prediction, token in zip(predictions, ids, strict=True)
    ]


def entropies(model, prompt_ids: list[int], ids: list[int], temperature: float = 1.0) -> list[torch.Tensor]:
    predictions = logits(model, prompt_ids, ids, temperature).softmax(-1)
    return [-sum(p * torch.log(p) for p in prediction if p > 0) for prediction in predictions]


# ---- the loss (DeepSeekMath, equation 3) ----


def kl(new: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Of KL(policy || reference), from one token (Schulman). k3 is clamped to 10, as in verl."""
    log_r = reference - new  # r = pi_ref / pi
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r**2 / 2
    return (torch.exp(log_r) - log_r - 1).clamp(max=10)


def divisor(lengths: Sequence[int], i: int, normalisation: str, max_new_tokens: int) -> int:
    """What the terms of completion i are divided by, of a batch of completions of these lengths."""
    if normalisation == "token":
        return sum(lengths)
    if normalisation == "sequence":
        return lengths[i] * len(lengths)
    return max_new_tokens * len(lengths)


def objective(logprob, old, reference, groups: Sequence[Sequence[float | None]], settings) -> torch.Tensor:
    """What GRPO maximises. `groups`: rewards, in the order of the completions; `settings` are chapter 3's."""
    advantage = [a for group in groups for a in advantages(group, settings.std_normalisation)]
    lengths, total = [len(o) for o in logprob], torch.zeros((), dtype=torch.double)
    for i, completion in enumerate(logprob):
        for t, new in enumerate(completion):
            ratio = torch.exp(new - old[i][t])
            clipped = torch.clip(ratio, 1 - settings.clip_range, 1 + settings.clip_range)
            gain = torch.min(ratio * advantage[i], clipped * advantage[i])
            term = gain - settings.kl_coef * kl(new, reference[i][t], settings.kl_estimator)
            total = total + term / divisor(lengths, i, settings.normalisation, settings.max_new_tokens)
    return total
