"""The sampler's steps in other manners, to compare: they write the tokens of `lib.sampler.sample`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from lib import sampler


class FixedBatch(sampler._Batch):
    """Shapes as on a GPU, on a CPU, too."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.fixed_shapes = True


class Replayed(FixedBatch):
    """As if recorded, on a CPU, too: what is replayed is the step, with the mask that it had."""

    def record(self, mask) -> Any:
        return SimpleNamespace(replay=partial(self.step, mask))


class OneByOne(sampler._Batch):
    """Nothing is recorded, on a GPU either: each kernel is launched by itself."""

    def record(self, mask) -> None:
        return None


@contextlib.contextmanager
def sampling_by(batch: type[sampler._Batch]) -> Iterator[None]:
    """While it lasts `lib.sampler.sample` decodes with this class."""
    before, sampler._Batch = sampler._Batch, batch
    try:
        yield
    finally:
        sampler._Batch = before


DECODERS = {"ours": sampler._Batch, "fixed_shapes": FixedBatch, "one_by_one": OneByOne}
