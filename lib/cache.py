"""The key-value cache of a batch whose rows come and go: its fixed shape, repacking, and attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class FixedLayer(StaticLayer):
    """A layer's keys and values that stay where they are: a step writes one column in place.

    Rows are aligned on the right; "." is padding, "_" not written yet:

        columns   0 1 2 3 4 5 6 7 8 9
        row 0     a b c d e x _ _ _ _     `column` is 6, a number on the device, () int64, that all layers
        row 1     . . . f g z _ _ _ _     share: there the next token goes
        window    =============           what a step attends to on a CPU; on a GPU to all, "_" masked, too

    keys, values: (rows, kv_heads, capacity, head_dim). (DynamicLayer copies all of it to append a column.)
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])  # transformers' name of the window
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.cumulative_length, self.is_initialized = column, True  # its name of `column`

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.cumulative_length, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.cumulative_length, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.max_cache_len], self.values[:, :, : self.max_cache_len]


def pack_rows(parts: Sequence[tuple[Cache, int, Tensor]], column: Tensor, capacity: int) -> Cache:
    """One cache of fixed shape from rows of several, all of which end at `column`, () int64.

    parts: (cache, its columns in use, indices (r,) int64 of its rows, which may repeat). What is cut off on
    the left is padding, as `column` is the longest row's. The old are emptied layer by layer, to save memory.
    """
    end, layers = int(column), list[Any]()
    while parts[0][0].layers:
        old: list[Any] = [(cache.layers.pop(0), used, index) for cache, used, index in parts]
        keys = _place([(x.keys[:, :, :used], index) for x, used, index in old], end, capacity)
        values = _place([(x.values[:, :, :used], index) for x, used, index in old], end, capacity)
        layers.append(FixedLayer(keys, values, column))
    return Cache(layers=layers)


def _place(pieces: list[tuple[Tensor, Tensor]], columns: int, capacity: int) -> Tensor:
    """Rows of pieces (n, kv_heads, its columns, head_dim) -> one room (rows, kv_heads, capacity, head_dim).

    What is filled in is zero: it is masked, but a NaN would survive the mask.
    """
    first, rows, row = pieces[0][0], sum(len(index) for _, index in pieces), 0
    (_, heads, _, head_dim), dtype, kind = first.shape, first.dtype, first.device.type
    if torch.is_autocast_enabled(kind):  # attention will compute in this anyway: no need to keep more
        dtype = torch.get_autocast_dtype(kind)
    room = first.new_zeros(rows, heads, capacity, head_dim, dtype=dtype)
    for piece, index in pieces:
        width = min(columns, piece.shape[2])
        target = room[row : row + len(index), :, columns - width : columns]
        torch.index_select(piece[:, :, -width:].to(dtype), 0, index, out=target)  # `[index]` copies twice
        row += len(index)
    return room


def repeat_row(cache: Cache, rows: int) -> Cache:
    """For GCG: `rows` times the one row of `cache`, which stays as it is. Views, copied at an append."""
    layers: list[Any] = [DynamicLayer() for _ in cache.layers]
    old: list[Any] = cache.layers
    for layer, one in zip(layers, old, strict=True):
        layer.lazy_initialization(one.keys, one.values)
        layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (one.keys, one.values))
    return Cache(layers=layers)


def attention_mask(model: PreTrainedModel, seen: Tensor, queries: int) -> Tensor:
    """The mask of a pass over whole prompts, or of a step (`queries` 1); seen: (rows, columns) bool.

    With SDPA (rows, 1, queries, columns) bool; padding sees itself: a query that sees nothing gives NaN on
    some devices. With other attention, such as windows, it is `seen`, and the model makes its own mask.
    """
    if model.config._attn_implementation != "sdpa" or {*layer_types(model)} != {"full_attention"}:
        return seen
    if queries == 1:
        return seen[:, None, None]
    column = torch.arange(queries, device=seen.device)
    return (seen[:, None, None] & (column <= column[:, None])) | (column == column[:, None])


def layer_types(model: PreTrainedModel) -> Sequence[str]:
    """The kinds of attention in the model; where the configuration has no such list, all layers are alike."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"]
    return getattr(config, "layer_types", None) or every
