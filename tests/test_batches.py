"""Micro-batches and data order."""

from __future__ import annotations

import random

import pytest

from lib import UserError
from lib.batches import epoch_order, items_of_step, micro_batches


def test_micro_batches_hold_every_sequence_once_within_the_budget_longest_first():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        budget = rng.randint(max(lengths), 400)
        batches = micro_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        longest = [max(lengths[i] for i in batch) for batch in batches]
        assert all(len(batch) * most <= budget for batch, most in zip(batches, longest, strict=True))
        assert longest == sorted(longest, reverse=True) and longest[0] == max(lengths)
    assert micro_batches([], 10) == [] and micro_batches([5, 5], 10) == [[0, 1]]
    with pytest.raises(UserError, match="11 tokens .*--max-batch-tokens 10"):
        micro_batches([3, 11], 10)


def test_micro_batches_count_a_prompt_once_and_keep_its_rows_together():
    prompts = [[1] * 6, [2] * 3, [1] * 6, [2] * 3, [1] * 6, [3]]
    lengths = [8, 12, 9, 4, 7, 2]
    assert micro_batches(lengths, 13, prompts) == [[1, 3], [2, 0, 4], [5]]  # 12 + (4 - 3), 9 + 2 + 1, 2
    assert micro_batches(lengths, 12, prompts) == [[1], [3], [2, 0, 4], [5]]  # a batch of its own: all 4 of 3


def test_steps_go_on_through_epochs_shuffled_by_seed_and_number():
    stream = [x for step in range(5) for x in items_of_step(range(10), step, 4, seed=3)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == [*range(10)]
    assert len({tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(-1, 3)}) == 12
