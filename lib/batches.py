"""What chapters 2 and 3 share: the model, micro-batches under a token budget, data order, rate and precision of a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from lib import UserError
from lib.chat import pad_batch
from lib.policy import load_policy
from lib.run.processes import Processes, gather_objects
from lib.run.shards import is_sharded, shard

T = TypeVar("T")


def load_model(
    settings: Any, device: torch.device, processes: Processes, *, trained: bool = True
) -> PreTrainedModel:
    """`settings.model` for a stage that trains: the policy, or a frozen reference. `settings` are those of stage 2 or 3. With
    `shard` it is read on the CPU, and this process's part of it stays: load one after the other."""
    checkpointing = trained and settings.gradient_checkpointing
    dtype = settings.dtype if settings.shard and not trained else "float32"
    at_first = "cpu" if settings.shard else device
    model = load_policy(settings.model, device=at_first, dtype=dtype, gradient_checkpointing=checkpointing)
    model.requires_grad_(trained)
    if settings.shard:
        return shard(model, device, processes, dtype=settings.dtype, offload=settings.offload)
    if settings.dtype == "bfloat16" and not trained:
        halve_linear_layers(model)
    return model


def halve_linear_layers(model: torch.nn.Module) -> None:
    """Keep in bfloat16 what autocast would cast anyway: a frozen reference takes half as much, and computes to the bit what the
    policy of equal weights does, so KL begins at 0. (All in bfloat16, the sums between layers are rounded, too.)"""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings
        ):  # a tied head stays as it is
            module.to(torch.bfloat16)


def drop_too_long(
    items: Sequence[T],
    records: Sequence[dict],
    lengths: Sequence[int],
    allowed: int,
    room: int,
    what: str,
    limits: str,
    leader: bool,
) -> list[T]:
    """Those of `items` that have at most `allowed` tokens; `leader`: says how many are left out, and names some.

    A few long ones must not end a run over a data set (the authors' script drops them, too). Raises UserError when less
    than half is left: then it is the limit that is wrong. And when one that is kept exceeds `room`, the budgets that say
    how to compute: a run may go on with others, so they must not decide what it learns from. `what` and `limits` are for the
    message.
    """
    long = [f"{record['id']} ({n})" for record, n in zip(records, lengths, strict=True) if n > allowed]
    names = ", ".join(long[:3]) + ", ..." * (len(long) > 3)
    text = f"{what}: {len(long)} of {len(items)} have more than the {allowed} tokens that fit, such as {names} ({limits})"
    if 2 * len(long) > len(items):
        raise UserError(f"{text}: shorten them, or change a limit")
    if long and leader:
        print(f"{text}: left out")
    kept = [i for i, n in enumerate(lengths) if n <= allowed]
    longest = max(kept, key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > room:
        name = records[longest]["id"]
        raise UserError(
            f"{what}: {name} has {lengths[longest]} tokens, {room} fit ({limits}): raise a budget, or shorten it"
        )
    return [items[i] for i in kept]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, grouped so that rows x longest row <= max_tokens; longest first, so that memory peaks at once.

    Raises UserError when a single sequence is over the budget.

    >>> micro_batches([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > max_tokens:
        raise UserError(
            f"a sequence of {lengths[order[0]]} tokens does not fit --max-batch-tokens {max_tokens}: raise it"
        )
    batches: list[list[int]] = []
    for i in order:  # sorted by length: the first row of a batch is its longest
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def even_rounds(batches: list[list[int]], model: torch.nn.Module, processes: Processes) -> list[list[int]]:
    """Micro-batches, with empty ones behind where a sharded model needs equally many on all processes."""
    rounds = max(gather_objects(len(batches), processes)) if is_sharded(model) else len(batches)
    return batches + [[]] * (rounds - len(batches))


def masked_batch(
    sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (B, T) int64, padded on the right, the attention mask, and the mask of the tokens to learn, (B, T) bool."""
    ids, attention_mask = pad_batch(sequences, pad_id, side="right")
    mask, _ = pad_batch(masks, 0, side="right")
    return ids.to(device), attention_mask.to(device), mask.bool().to(device)


def rollout_batch(
    rollouts: Sequence[Any], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`masked_batch` of prompts with their completions, which are what is learned."""
    rows = [r.prompt_ids + r.completion.token_ids for r in rollouts]
    masks = [[False] * len(r.prompt_ids) + [True] * len(r.completion.token_ids) for r in rollouts]
    return masked_batch(rows, masks, pad_id, device)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `count` items: a function of (seed, epoch) alone."""
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, warmup: int, total: int, decay: bool
) -> float:
    """Linear warm-up over `warmup` steps, then constant, or with `decay` linear to zero at `total`. Returns the rate set."""
    rate = peak * min(1.0, (step + 1) / max(1, warmup))
    if decay and step >= warmup:
        rate = peak * (total - step) / max(1, total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """A context to compute in: bfloat16 over fp32 weights, or fp32 as it is.

    The weights stay fp32 in both. In bfloat16 they would have 8 bits of precision, and an update of 1e-6 on a
    weight of 0.02 would be rounded away: training would run, and change nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def finite_or_stop(name: str, value: float, step: int, out: Path) -> float:
    """Returns `value`, or raises UserError before a step that would ruin the weights (the last checkpoint stays)."""
    if not torch.isfinite(torch.tensor(value)):
        raise UserError(
            f"step {step}: {name} is {value}, stopped before the update; the last checkpoint in {out} is kept: "
            "lower --learning-rate, or look at the last lines of metrics.jsonl"
        )
    return value
