"""The key-value cache of a batch whose rows come and go: room to grow, repacking, and the attention mask.

A layer's keys and values have the shape (rows, kv_heads, columns, head_dim). Rows are aligned on the right:

    row 0   a b c d e x y        columns ->
    row 1   . . . f g z w        "." is padding
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


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


def pack_rows(parts: list[tuple[Cache, Tensor]], columns: int, capacity: int) -> Cache:
    """One roomy cache from rows of several: parts are (cache, row indices (r,) int64, which may repeat).

    All rows end at `columns`. What is cut off on the left must be padding; what is filled in there is zero
    (it is masked, but a NaN would survive the mask). The old caches are emptied layer by layer, so that a
    second whole cache never exists.
    """

    def place(pieces: list[Tensor]) -> Tensor:  # each (n, kv_heads, its columns, head_dim)
        rows, (_, heads, _, head_dim) = sum(len(index) for _, index in parts), pieces[0].shape
        kind, dtype = pieces[0].device.type, pieces[0].dtype
        if torch.is_autocast_enabled(kind):  # attention will compute in this anyway: no need to keep more
            dtype = torch.get_autocast_dtype(kind)
        room, row = pieces[0].new_zeros(rows, heads, capacity, head_dim, dtype=dtype), 0
        for piece, (_, index) in zip(pieces, parts, strict=True):
            width = min(columns, piece.shape[2])
            room[row : row + len(index), :, columns - width : columns] = piece[:, :, -width:][index]
            row += len(index)
        return room

    layers: list[Any] = []
    for _ in range(len(parts[0][0].layers)):
        old: list[Any] = [cache.layers.pop(0) for cache, _ in parts]
        layers.append(RoomyLayer(place([x.keys for x in old]), place([x.values for x in old]), columns))
    return Cache(layers=layers)


def copy_last_row(cache: Cache) -> Cache:
    """A cache of its own with the last row (DynamicCache copies what it is given)."""
    layers: list[Any] = cache.layers
    return DynamicCache([(layer.keys[-1:], layer.values[-1:]) for layer in layers])


def repeat_row(cache: Cache, rows: int) -> Cache:
    """A cache that begins with `rows` times the one row of `cache`: views, nothing is copied until a model appends."""
    layers: list[Any] = []
    old: list[Any] = cache.layers
    for layer in old:
        layers.append(DynamicLayer())
        layers[-1].lazy_initialization(layer.keys, layer.values)
        layers[-1].keys, layers[-1].values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return Cache(layers=layers)


def attention_mask(model: PreTrainedModel, padding: Tensor, queries: int, columns: int) -> Tensor | None:
    """The mask for the last `queries` of `columns` columns; rows begin with `padding` (rows,) columns of it.

    None where nothing is padded. With SDPA the finished mask (rows, 1, queries, columns) bool, which saves
    the model from building it in each step; padding may see itself there, since a query that sees nothing
    gives NaN on some devices. With other attention, or sliding windows, (rows, columns) bool, from which the
    model builds its own.
    """
    if not padding.any():
        return None
    column = torch.arange(columns, device=padding.device)
    visible = column >= padding[:, None]  # (rows, columns)
    if model.config._attn_implementation != "sdpa" or "sliding_attention" in layer_types(model):
        return visible
    query = column[columns - queries :, None]  # (queries, 1)
    return (visible[:, None, None] & (column <= query)) | (column == query)


def context_of(config: PreTrainedConfig) -> int:
    """The most tokens of a row that are computed alike whatever else is in the batch; sys.maxsize where nothing bounds them.

    That is the model's context; but rotary embeddings of two kinds change all positions as soon as the longest row of a
    batch is over another length (longrope: Phi-3, Phi-4-mini; dynamic NTK): with them it is this length.
    """
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (
        rope,
        *(part for part in rope.values() if isinstance(part, dict)),
    ):  # some have one for each kind of layer
        if kind.get("rope_type") in ("longrope", "dynamic"):
            context = min(context, kind.get("original_max_position_embeddings") or context)
    return context


def table_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for. A tokenizer may know more, or fewer."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return len(table)


def layer_types(model: PreTrainedModel) -> Sequence[str]:
    """The kinds of attention in the model; where the configuration has no such list, all layers are alike."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"]
    return getattr(config, "layer_types", None) or every
