"""Keys and values of a canvas, laid out by column: a forward pass writes some columns and reads the others.

`ColumnCache` is a transformers `Cache`, so no attention module is touched. Models store keys after the rotary
embedding: a forward pass needs the absolute `position_ids` of the columns that it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Pass:
    """What the current forward pass computes; all layers of a cache share it.

    Attributes:
        size: (rows, columns) of the canvas.
        end: number of columns that its queries see, from the first.
        columns: the columns that it computes, see `ColumnCache.writing`.
        rows: [n_rows] int64, its rows of the canvas; None for all.
    """

    size: tuple[int, int]
    end: int
    columns: Tensor | slice | None = None
    rows: Tensor | None = None


def _looks_for_ranges(device: torch.device) -> bool:
    """Tell whether to test columns for a range: on a CPU only, as the host would wait for a GPU's answer."""
    return device.type == "cpu"


def _as_slice(columns: Tensor) -> Tensor | slice:
    """Return columns [n_rows, n_fresh] as a slice if all rows share one range, as slices are faster to write."""
    if columns.numel() == 0:
        return columns
    first, n_fresh = int(columns[0, 0]), columns.shape[1]
    is_range = torch.equal(columns, torch.arange(first, first + n_fresh, device=columns.device).expand_as(columns))
    return slice(first, first + n_fresh) if is_range else columns


class ColumnLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, width]."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, current: _Pass) -> None:
        """Store the columns that `current` names whenever a forward pass updates the layer."""
        super().__init__()
        self._pass = current

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate keys and values like the given ones; transformers below 5 calls it without values."""
        rows, columns = self._pass.size
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[-1])
            for states in (key_states, key_states if value_states is None else value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the fresh columns.

        Args:
            key_states: [n_rows, heads, n_fresh, width].
            value_states: the same.
            args: of transformers; unused.
            kwargs: of transformers; unused.
        Returns:
            The keys and values that the queries see, [n_rows, heads, end, width] each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def _written(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """Write `fresh` into `stored`, and return what the queries see of it."""
        columns, rows, end = self._pass.columns, self._pass.rows, self._pass.end
        if columns is None:
            if rows is None:
                stored[:, :, :end] = fresh
            else:
                stored[rows, :, :end] = fresh
            return fresh  # as without a cache, so that the result is the same bit for bit
        if isinstance(columns, slice):
            stored[slice(None) if rows is None else rows, :, columns] = fresh
        else:
            index = torch.arange(len(stored), device=stored.device) if rows is None else rows
            stored[index[:, None], :, columns] = fresh.transpose(1, 2)
        seen = stored[:, :, :end]
        return seen if rows is None else seen[rows]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the number of keys and the first key's column; transformers below 5 gives the queries' columns."""
        return self._pass.end, 0

    def get_seq_length(self) -> int:
        """Return 0, as no column precedes the canvas."""
        return 0

    def get_max_cache_shape(self) -> int:
        """Return the number of columns."""
        return self._pass.size[1]


class ColumnCache(Cache):
    """A `past_key_values` for forward passes over some columns of a canvas.

    Within `writing` a forward pass of the model writes the keys and values of the columns given there, and its queries
    see those of all columns up to `end`. Columns that were never written hold zeros: mask them. Write under
    `torch.inference_mode()` only, or never.
    """

    def __init__(self, rows: int, length: int) -> None:
        """Make an empty cache for a canvas of `rows` rows and `length` columns; layers are allocated when written."""
        self._pass = _Pass((rows, length), length)
        super().__init__(layer_class_to_replicate=partial(ColumnLayer, self._pass))  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        """Return the number of columns."""
        return self._pass.size[1]

    @contextmanager
    def writing(
        self, columns: Tensor | slice | None = None, *, rows: Tensor | None = None, end: int | None = None
    ) -> Iterator[None]:
        """Within the block, a forward pass computes these columns.

        It needs the ids [n_rows, n_fresh] and `position_ids` of these columns, and an attention mask [1 or n_rows, 1,
        n_fresh, end].

        Args:
            columns: [n_rows, n_fresh] int64, below `end`; a row with fewer fresh columns than others repeats one. Or a
                slice, if all rows share one range (on a CPU it is found in a tensor too), or None for 0 .. end - 1.
            rows: [n_rows] int64, the rows that the pass computes; None for all.
            end: number of columns that its queries see, from the first; None for all.
        """
        current = self._pass
        if isinstance(columns, Tensor) and _looks_for_ranges(columns.device):
            columns = _as_slice(columns)
        current.columns, current.rows = columns, rows
        current.end = current.size[1] if end is None else end
        try:
            yield
        finally:
            current.columns, current.rows, current.end = None, None, current.size[1]

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys and the first key's column, of layers that are not allocated yet too."""
        return self._pass.end, 0
