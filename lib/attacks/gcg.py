"""GCG, a white-box attack by gradients, and the random control that it has to beat (paper, "Evaluation").

GCG (greedy coordinate gradient) looks for a *suffix*: a few tokens behind the prompt that make a *target*
("Sure, here is how to ...") the likely beginning of what the model writes.

    chat template, prompt | suffix | end of turn, model's turn | target
    `prefix`, read once   | varies | `rest`                    | loss: mean negative log-likelihood

Against a reasoner the target stands right after `<think>\\n`, where the reasoning would begin. One step:

1. `gradient`: with the suffix as one-hot rows, the loss's gradient says to first order how much each token of
   the vocabulary would lower the loss at each position, (suffix, vocab).
2. `propose`: `width` different swaps of one token each, at random among the `top_k` best of each position.
3. `losses`: the true loss of each candidate. Move to the best one, even if it is worse than where we are: the
   search must get out of local minima. The trace keeps the best suffix so far.

A model is attacked through text, so a candidate counts as the tokens of its *re-encoded text*. One that comes
back as other tokens is dropped and counted; else an attack may report a suffix that nobody can type.

An attack is a function (model, tokenizer, behaviours, budget, generator) -> attempts with trace and cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.settings import UserError
from lib.suffix import Budget, Slot

RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip


@dataclass(frozen=True)
class Attempt:
    """What an attack did to one behaviour. trace[k]: step k, and the best suffix so far with its loss."""

    id: str
    prompt: str  # without the suffix
    trace: list[dict]  # {"step": int, "loss": float, "suffix": str}
    cost: dict[str, float]  # queries, forward_tokens, backward_tokens, did_not_survive (candidates), seconds


def gcg(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviours: Sequence[dict],
    budget: Budget,
    generator: torch.Generator,
    *,
    reasoning: bool,
    on_step: Callable[[], object] = lambda: None,
) -> list[Attempt]:
    """Attack each behaviour (a record with id, prompt, target) for `budget.steps` steps. Access: white-box.

    `generator` is on the CPU; `on_step` is called after each step (a progress bar). Raises UserError for a
    behaviour without a target, and for an `init` that is not one token.
    """
    attempts = []
    for behaviour in behaviours:
        slot = Slot(model, tokenizer, behaviour, budget, reasoning=reasoning)
        suffix, allowed = slot.start, slot.allowed()
        best = slot.losses(suffix[None]).item()
        trace = [{"step": 0, "loss": best, "suffix": budget.initial_suffix()}]
        for step in range(1, budget.steps + 1):
            candidates = propose(slot.gradient(suffix), suffix, allowed, budget, generator)
            kept, texts = slot.surviving(candidates)
            losses = slot.losses(kept)
            trace.append({**trace[-1], "step": step})
            for i in losses.argsort().tolist():
                if slot.is_exact(texts[i], kept[i]):  # the first one almost always is
                    suffix, loss = kept[i], losses[i].item()
                    if loss < best:
                        best, trace[-1] = loss, {"step": step, "loss": loss, "suffix": texts[i]}
                    break
                slot.cost["did_not_survive"] += 1
            on_step()
        attempts.append(finished(slot, trace))
    return attempts


def random_suffix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviours: Sequence[dict],
    budget: Budget,
    generator: torch.Generator,
    *,
    reasoning: bool,
) -> list[Attempt]:
    """The control: as many tokens, drawn from those that GCG may use, surviving the round trip."""
    attempts = []
    for behaviour in behaviours:
        slot = Slot(model, tokenizer, behaviour, budget, reasoning=reasoning)
        tokens = slot.allowed().nonzero()[:, 0]
        suffix, text = torch.empty(0, dtype=torch.long), ""
        for _ in range(budget.suffix_tokens):
            drawn = tokens[torch.randint(len(tokens), (RANDOM_TRIES, 1), generator=generator)]
            kept, texts = slot.surviving(torch.cat([suffix.expand(RANDOM_TRIES, -1), drawn], dim=1))
            if not texts:
                raise UserError(f"behaviour {behaviour['id']}: found no random suffix that survives re-encoding")
            suffix, text = kept[0], texts[0]
        trace = [{"step": 0, "loss": slot.losses(suffix[None]).item(), "suffix": text}]
        attempts.append(finished(slot, trace))
    return attempts


def propose(gradient: Tensor, suffix: Tensor, allowed: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """gradient (S, vocab), suffix (S,), allowed (vocab,) -> N <= width different single swaps, (N, S)."""
    promise = (-gradient).masked_fill(~allowed, -torch.inf)
    promise[torch.arange(len(suffix)), suffix] = -torch.inf  # a swap must change something
    top_k = min(budget.top_k, int(allowed.sum()) - 1)
    tokens = promise.topk(top_k, dim=1).indices.flatten()  # (S * top_k,), position by position
    chosen = torch.randperm(len(tokens), generator=generator)[: budget.width]
    candidates = suffix.repeat(len(chosen), 1)
    candidates[torch.arange(len(chosen)), chosen // top_k] = tokens[chosen]
    return candidates


def finished(slot: Slot, trace: list[dict]) -> Attempt:
    cost = {**slot.cost, "seconds": round(time.perf_counter() - slot.started, 3)}
    return Attempt(slot.id, slot.prompt, trace, cost)
