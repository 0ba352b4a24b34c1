"""The sampler's steps recorded as CUDA graphs: what would bring it near the card's limit.

An experiment for tests/bench/gpu.py. It writes the tokens of `lib.sampler.sample`, and depends on its inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lib import sampler


class FixedBatch(sampler._Batch):
    """Fixed shapes on a CPU, too."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.fixed_shapes = True


class GraphBatch(FixedBatch):
    """A step is recorded once a repack, on CUDA, and then replayed: nothing is launched kernel by kernel."""

    graph, warm = None, False

    def _repack(self, parts: list) -> None:
        super()._repack(parts)
        self.graph, self.warm = None, False

    def step(self, mask: Tensor) -> None:
        if not (self.column.is_cuda and self.warm):
            super().step(mask)  # the first one, too: workspaces, autocast's casts of the weights
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                super().step(mask)
        self.graph.replay()


@contextlib.contextmanager
def sampling_by(batch: type[sampler._Batch]) -> Iterator[None]:
    """While it lasts `lib.sampler.sample` decodes with this class."""
    before, sampler._Batch = sampler._Batch, batch
    try:
        yield
    finally:
        sampler._Batch = before


DECODERS = {"ours": sampler._Batch, "fixed_shapes": FixedBatch, "cuda_graph": GraphBatch}
