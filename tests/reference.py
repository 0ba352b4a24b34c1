"""The formulas of chapters 2 and 3, word by word and slow: what the tests compare with.

They are solutions of exercises: a course may keep this file to itself. Nothing else in tests/ has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch


def logprobs(model, ids: Sequence[int], start: int, temperature: float = 1.0) -> list[torch.Tensor]:
    """log p(ids[t] | ids[:t]) for t from `start` on: one plain forward pass of one sequence."""
    logits = model(torch.tensor([list(ids)])).logits[0]
    return [(logits[t - 1] / temperature).log_softmax(-1)[ids[t]] for t in range(start, len(ids))]


def entropies(model, ids: Sequence[int], start: int, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of each of those predictions, (n,)."""
    logits = model(torch.tensor([list(ids)])).logits[0, start - 1 : -1]
    return torch.distributions.Categorical(logits=logits / temperature).entropy()


def advantages(rewards: Sequence[float | None], with_std: bool) -> list[float]:
    """Of one group; an unknown reward is left out, and has none."""
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return [0.0] * len(rewards)
    scale = statistics.stdev(known) + 1e-6 if with_std else 1.0
    return [0.0 if reward is None else (reward - statistics.mean(known)) / scale for reward in rewards]


def kl(gap, estimator: str):
    """Schulman's estimators; gap = log pi_ref - log pi."""
    return {"k1": -gap, "k2": gap**2 / 2, "k3": torch.exp(gap) - gap - 1}[estimator]


def lengths(normalisation: str, sizes: Sequence[int], max_new_tokens: int) -> list[int]:
    """What each completion's sum over tokens is divided by."""
    if normalisation == "token":
        return [sum(sizes)] * len(sizes)
    return [(size if normalisation == "sequence" else max_new_tokens) * len(sizes) for size in sizes]


def objective(new, old, anchor, of_completion: Sequence[float], settings) -> torch.Tensor:
    """DeepSeekMath eq. 3; new[i][t] = log pi(o_i,t | q, o_i,<t), `of_completion` the advantages."""
    total = torch.zeros((), dtype=torch.double)
    divisors = lengths(settings.normalisation, [len(o) for o in new], settings.max_new_tokens)
    for i, advantage in enumerate(of_completion):
        for t in range(len(new[i])):
            ratio = torch.exp(new[i][t] - old[i][t])
            clipped = torch.clip(ratio, 1 - settings.clip_range, 1 + settings.clip_range)
            gain = torch.min(ratio * advantage, clipped * advantage)
            penalty = settings.kl_coef * kl(anchor[i][t] - new[i][t], settings.kl_estimator)
            total = total + (gain - penalty) / divisors[i]
    return total


def rpo(new, anchor, pairs: Sequence[tuple[int, int]], beta: float, alpha: float) -> torch.Tensor:
    """RPO eq. 1, the mean over pairs (chosen, rejected); new[i], anchor[i]: those of tokens of response i."""
    total = torch.zeros((), dtype=torch.double)
    for w, l in pairs:  # noqa: E741
        margin = beta * ((sum(new[w]) - sum(anchor[w])) - (sum(new[l]) - sum(anchor[l])))
        total = total - torch.log(1 / (1 + torch.exp(-margin))) - alpha * sum(new[w]) / len(new[w])
    return total / len(pairs)
