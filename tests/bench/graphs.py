"""A decoder of fixed shapes, recorded as CUDA graphs: what would bring the sampler near the card's limit.

An experiment for tests/bench/gpu.py. It writes the tokens of `lib.sampler.sample`, and depends on its inside.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lib import sampler
from lib.cache import pack_rows


class FixedLayer(DynamicLayer):
    """All columns are attended in every step; the mask hides those that are not written yet. So between two
    repacks every step has the same shapes and addresses, and can be recorded once."""

    def __init__(self, keys: Tensor, values: Tensor, batch: GraphBatch) -> None:
        super().__init__()
        self.keys, self.values, self.batch, self.is_initialized = keys, values, batch, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.batch.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.batch.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.batch.columns


class GraphBatch(sampler._Batch):
    """The sampler's rows, EVERY steps at a time; on CUDA recorded once a repack, then replayed."""

    EVERY, ALIGN, RECORD = 16, 64, True
    columns, column = 0, torch.zeros(1, dtype=torch.long)  # that are written; the same on the device

    def _repack(self, parts: list[tuple[Cache, Tensor]]) -> None:
        for layer in self.cache.layers:  # what is written so far
            layer.keys, layer.values = layer.keys[:, :, : self.columns], layer.values[:, :, : self.columns]
        used = self.lengths[self.rows] + self.drawn[self.rows] - 1
        self.columns, most = int(used.max()), int(self.lengths[self.rows].max()) + self.limit
        wanted = min(most, self.columns + max(64, self.columns // 4))
        self.capacity = -(-wanted // self.ALIGN) * self.ALIGN  # aligned: no kernel has to pad the mask
        packed = pack_rows(parts, self.columns, self.capacity)
        self.column = self._long([self.columns])
        layers = [FixedLayer(layer.key_room, layer.value_room, self) for layer in packed.layers]
        self.cache = Cache(layers=layers)
        place = torch.arange(self.capacity, device=self.column.device)
        seen = (place >= (self.columns - used)[:, None]) & (place < self.columns)  # (rows, capacity)
        hidden = torch.zeros(seen.shape, dtype=layers[0].keys.dtype, device=seen.device)
        self.mask = hidden.masked_fill(~seen, -math.inf)[:, None, None]
        self.rows_ended = int(self.ended[self.rows].sum())
        self.graph, self.warm = None, False

    def one(self) -> None:
        """A token for every row, with nothing that waits for the device or has an address of its own."""
        newest = self.drawn[self.rows] - 1
        self.mask.index_fill_(3, self.column, 0)
        ids, positions = self.tokens[self.rows, newest], self.lengths[self.rows] + newest
        self._draw(self.rows, self._logits(ids[:, None], positions[:, None], self.mask, self.cache))
        self.column.add_(1)

    def step(self) -> None:
        count = min(self.EVERY, self.capacity - self.columns)
        for _ in range(count):
            if not (self.RECORD and self.column.is_cuda and self.warm):
                self.one()  # the first one, too: workspaces, autocast's casts of the weights
                self.warm = True
                continue
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.one()
            self.graph.replay()
        self.columns += count
        self.rows_ended = int(self.ended[self.rows].sum())


class FixedBatch(GraphBatch):
    """The same shapes, nothing recorded."""

    RECORD = False


@contextlib.contextmanager
def sampling_by(batch: type[sampler._Batch]) -> Iterator[None]:
    """While it lasts `lib.sampler.sample` decodes with this class."""
    before, sampler._Batch = sampler._Batch, batch
    try:
        yield
    finally:
        sampler._Batch = before


DECODERS = {"ours": sampler._Batch, "fixed_shapes": FixedBatch, "cuda_graph": GraphBatch}
