"""What chapters 2 and 3 share: the model, micro-batches under a token budget, data order, rate and precision of a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib import UserError

T = TypeVar("T")


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


def items_of_step(items: Sequence[T], step: int, count: int, seed: int) -> list[T]:
    """`count` items of an endless stream of shuffled epochs: a function of (seed, step), so resuming is exact."""
    places = range(step * count, (step + 1) * count)
    orders = {e: epoch_order(len(items), seed, e) for e in {place // len(items) for place in places}}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


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


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows of one length T, the longest's: ids (B, T) int64 and attention_mask (B, T) bool, False on padding.

    >>> pad_batch([[5, 6, 7], [8]], 0, side="left")[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r}: 'left' or 'right'")
    width = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        part = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, part] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, part] = True
    return ids, attention_mask


def scatter(values: list[Tensor], mask: Tensor) -> Tensor:
    """Of each row the values of its True places, (n,) -> (B, T) fp32, 0 elsewhere."""
    placed = torch.zeros(mask.shape, device=mask.device)
    return placed.masked_scatter(mask, torch.cat(values).to(placed))
