"""The key-value cache of a batch whose rows come and go: room to grow, repacking, and the attention mask.

A layer's keys and values have the shape (rows, kv_heads, columns, head_dim). Rows are aligned on the right:

    row 0   a b c d e x y        columns ->
    row 1   . . . f g z w        "." is padding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's cache with spare columns on its right: a step writes one column and copies none.

    key_room, value_room: (rows, kv_heads, capacity, head_dim), of which the first `columns` are in use.
    (DynamicLayer grows by torch.cat, which copies the whole cache in every step.)
    """

    def __init__(self, key_room: Tensor, value_room: Tensor, columns: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.key_room, self.value_room, self.is_initialized = key_room, value_room, True
        self._show(columns)

    def _show(self, columns: int) -> None:
        self.keys = self.key_room[:, :, :columns]  # a view, not a copy
        self.values = self.value_room[:, :, :columns]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        self.key_room[:, :, begin:end] = key_states
        self.value_room[:, :, begin:end] = value_states
        self._show(end)
        return self.keys, self.values


def pack_rows(parts: Sequence[tuple[Cache, Tensor]], columns: int, capacity: int) -> Cache:
    """One roomy cache from rows of several: parts are (cache, row indices (r,) int64, which may repeat).

    All rows end at `columns`. What is cut off on the left must be padding. The old caches are emptied layer
    by layer, so that a second whole cache never exists.
    """
    indices, layers = [index for _, index in parts], list[Any]()
    for _ in range(len(parts[0][0].layers)):
        old: list[Any] = [cache.layers.pop(0) for cache, _ in parts]
        keys = _place([layer.keys for layer in old], indices, columns, capacity)
        values = _place([layer.values for layer in old], indices, columns, capacity)
        layers.append(RoomyLayer(keys, values, columns))
    return Cache(layers=layers)


def _place(pieces: list[Tensor], indices: list[Tensor], columns: int, capacity: int) -> Tensor:
    """Rows of pieces (n, kv_heads, its columns, head_dim) -> one room (rows, kv_heads, capacity, head_dim).

    What is filled in is zero: it is masked, but a NaN would survive the mask.
    """
    (_, heads, _, head_dim), dtype, kind = pieces[0].shape, pieces[0].dtype, pieces[0].device.type
    if torch.is_autocast_enabled(kind):  # attention will compute in this anyway: no need to keep more
        dtype = torch.get_autocast_dtype(kind)
    room, row = pieces[0].new_zeros(sum(map(len, indices)), heads, capacity, head_dim, dtype=dtype), 0
    for piece, index in zip(pieces, indices, strict=True):
        width = min(columns, piece.shape[2])
        room[row : row + len(index), :, columns - width : columns] = piece[:, :, -width:][index]
        row += len(index)
    return room


def repeat_row(cache: Cache, rows: int) -> Cache:
    """For attacks: `rows` times the one row of `cache`, which stays as it is. Views, copied at an append."""
    layers: list[Any] = [DynamicLayer() for _ in cache.layers]
    old: list[Any] = cache.layers
    for layer, one in zip(layers, old, strict=True):
        layer.lazy_initialization(one.keys, one.values)
        layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (one.keys, one.values))
    return Cache(layers=layers)


def attention_mask(model: PreTrainedModel, padding: Tensor, queries: int, columns: int) -> Tensor | None:
    """The mask for the last `queries` of `columns` columns; rows begin with `padding` (rows,) columns of it.

    None where nothing is padded. With SDPA the finished mask (rows, 1, queries, columns) bool, which saves
    the model from building it in each step. There each column may see itself, padding too: a query that sees
    nothing gives NaN on some devices. With other attention, or sliding windows, (rows, columns) bool, from
    which the model builds its own.
    """
    if not padding.any():
        return None
    column = torch.arange(columns, device=padding.device)
    visible = column >= padding[:, None]  # (rows, columns)
    if model.config._attn_implementation != "sdpa" or "sliding_attention" in layer_types(model):
        return visible
    query = column[columns - queries :, None]  # (queries, 1)
    return (visible[:, None, None] & (column <= query)) | (column == query)


def layer_types(model: PreTrainedModel) -> Sequence[str]:
    """The kinds of attention in the model; where the configuration has no such list, all layers are alike."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"]
    return getattr(config, "layer_types", None) or every
