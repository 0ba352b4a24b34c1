"""From sequences of tokens to tensors: padding, micro-batches under a budget of tokens, and data order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lib import UserError

T = TypeVar("T")
LAID_OUT = 8  # times max_tokens: how much attention may lay out where prompts are shared (lib/policy.py)


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows of one length T, the longest's: ids (B, T) int64 and attention_mask (B, T) bool, False on padding.

    >>> pad_batch([[5, 6, 7], [8]], 0, side="left")[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    width = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        begin = 0 if side == "right" else width - len(sequence)
        ids[row, begin : begin + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, begin : begin + len(sequence)] = True
    return ids, attention_mask


def masked_batch(
    sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T) int64, padded on the right; attention mask, mask of the tokens to learn, (B, T) bool."""
    ids, attention_mask = pad_batch(sequences, pad_id, side="right")
    mask, _ = pad_batch(masks, 0, side="right")
    return ids.to(device), attention_mask.to(device), mask.bool().to(device)


def scatter(values: list[Tensor], mask: Tensor) -> Tensor:
    """values: for each row those of its True places, (n,). Returns (B, T) fp32, 0 elsewhere."""
    placed = torch.zeros(mask.shape, device=mask.device)
    return placed.masked_scatter(mask, torch.cat(values).to(placed))


def micro_batches(
    lengths: Sequence[int], max_tokens: int, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Indices of rows, in batches of which at most max_tokens tokens are computed.

    Without `prompts` that is rows x longest row. `prompts`: the token ids with which each row begins;
    rows of one prompt stand together: `lib.policy.states_once` computes it once a batch, and no padding.
    Longest first, so that memory peaks at once. Raises UserError when a single row is over the budget.

    >>> micro_batches([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    >>> micro_batches([3, 9, 4, 8], max_tokens=18, prompts=[[5, 6], [7, 7, 7], [5, 6], [7, 7, 7]])
    [[1, 3, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and (longest := lengths[order[0]]) > max_tokens:
        raise UserError(f"a row of {longest} tokens exceeds --max-batch-tokens {max_tokens}: raise it")
    if prompts:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in order:
            groups.setdefault(tuple(prompts[i]), []).append(i)
        order = [i for group in groups.values() for i in group]
    batches: list[list[int]] = [[]]
    computed = 0  # tokens of the last batch
    for i in order:
        rows = [*batches[-1], i]
        longest, more = max(lengths[j] for j in rows), lengths[i]
        if prompts and len(rows) > 1 and prompts[i] == prompts[rows[-2]]:
            more -= len(prompts[i])
        total = computed + more if prompts else len(rows) * longest
        if total <= max_tokens and len(rows) * longest <= LAID_OUT * max_tokens:
            batches[-1], computed = rows, total
        else:
            batches, computed = [*batches, [i]], lengths[i]
    return batches if order else []


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `count` items: a function of (seed, epoch) alone."""
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def items_of_step(items: Sequence[T], step: int, count: int, seed: int) -> list[T]:
    """`count` items of an endless stream of shuffled epochs, by (seed, step) alone, so resuming is exact."""
    places = range(step * count, (step + 1) * count)
    orders = {e: epoch_order(len(items), seed, e) for e in {place // len(items) for place in places}}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]
