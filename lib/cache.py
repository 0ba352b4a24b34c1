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
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class FixedLayer(StaticLayer):
    """A layer's cache that stays where it is: a step writes one column in place.

    keys, values: (rows, kv_heads, capacity, head_dim)

        column 0 1 2 3 4 5 6 7 8 9        "." is padding, "_" not written yet
        row 0  a b c d e x _ _ _ _
        row 1  . . . f g z _ _ _ _        the next token goes to column 6: a number on the device, () int64,
               `---- window ---'          which all layers share

    A step attends to the first `window` columns; the mask hides what is not written. (DynamicLayer would copy
    the whole cache in every step to append.)
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])  # the window: all there is
        self.keys, self.values, self.cumulative_length, self.is_initialized = keys, values, column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.cumulative_length, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.cumulative_length, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.max_cache_len], self.values[:, :, : self.max_cache_len]


def pack_rows(parts: Sequence[tuple[Cache, int, Tensor]], columns: Tensor, capacity: int) -> Cache:
    """One cache of fixed shape from rows of several.

    parts: (cache, its columns in use, indices (r,) int64 of its rows, which may repeat). All rows end at
    `columns`, () int64. What is cut off on the left must be padding. The old caches are emptied layer by
    layer, so that a second whole cache never exists.
    """
    indices, layers = [index for _, _, index in parts], list[Any]()
    end = int(columns)
    for _ in range(len(parts[0][0].layers)):
        old: list[Any] = [(cache.layers.pop(0), used) for cache, used, _ in parts]
        keys = _place([layer.keys[:, :, :used] for layer, used in old], indices, end, capacity)
        values = _place([layer.values[:, :, :used] for layer, used in old], indices, end, capacity)
        layers.append(FixedLayer(keys, values, columns))
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
        target = room[row : row + len(index), :, columns - width : columns]
        torch.index_select(piece[:, :, -width:].to(dtype), 0, index, out=target)  # `[index]` copies twice
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


def prompt_mask(model: PreTrainedModel, real: Tensor) -> Tensor | None:
    """The mask of a pass over whole prompts, of which `real` (rows, columns) bool marks the tokens.

    None where nothing is padded. With SDPA the finished mask (rows, 1, columns, columns) bool. There each
    column may see itself, padding too: a query that sees nothing gives NaN on some devices.
    """
    if real.all() or _builds_masks(model):
        return None if real.all() else real
    column = torch.arange(real.shape[1], device=real.device)
    query = column[:, None]
    return (real[:, None, None] & (column <= query)) | (column == query)


def step_mask(model: PreTrainedModel, padding: Tensor, columns: int, capacity: int) -> Tensor:
    """The mask of a step, (rows, 1, 1, capacity) bool: of `columns` each row sees all but its `padding` (rows,)."""
    column = torch.arange(capacity, device=padding.device)
    seen = (column >= padding[:, None]) & (column < columns)
    return seen if _builds_masks(model) else seen[:, None, None]


def _builds_masks(model: PreTrainedModel) -> bool:
    """With attention other than SDPA, or sliding windows, it builds its own from (rows, columns) bool."""
    return model.config._attn_implementation != "sdpa" or "sliding_attention" in layer_types(model)


def layer_types(model: PreTrainedModel) -> Sequence[str]:
    """The kinds of attention in the model; where the configuration has no such list, all layers are alike."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"]
    return getattr(config, "layer_types", None) or every
