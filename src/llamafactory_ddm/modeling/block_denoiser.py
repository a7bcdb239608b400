"""The denoiser of a model with block attention, which generates block by block from left to right.

A token sees every token of the blocks up to its own, so columns behind the current block are never computed, and the
keys and values of finished blocks can be kept. A block is computed with [MASK] in it while it is decoded; once it is
finished it is computed again, with its final tokens, in the pass that the next block asks for first. So the cache
changes no logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.blocks import block_of, positions_of
from .bidirectional import NotBidirectionalError, additive_by_layer
from .denoiser import ModelDenoiser
from .kv_cache import ColumnCache
from .model_info import dtype_of, implementation, is_flash, window_of
from .model_runner import ModelPass
from .pass_widths import columns_of_a_pass, grouped


@dataclass(frozen=True)
class _Part:
    """Rows and columns that share a forward pass.

    Attributes:
        rows: [n_rows] int64, rows of the call.
        columns: [n_rows, n_fresh] int64, the columns of each; a row with fewer than others repeats its last.
        end: number of columns that its queries see, from the first.
    """

    rows: Tensor
    columns: Tensor
    end: int


class BlockDenoiser(ModelDenoiser):
    """The sampler's denoiser for a model with block attention.

    The columns of a pass follow from the ids alone: those whose ids have changed since they were computed, up to the
    end of the last block with a requested token, and what comes after the first of them.
    """

    def __init__(self, model: nn.Module, *, block_length: int, cached: bool = True, **options: Any) -> None:
        """Wrap a `model` whose attention was switched to full; the masks of its blocks are made here.

        Args:
            model: see `check_block_attention`.
            block_length: tokens in a block, as in training.
            cached: whether finished blocks are kept; without, each pass computes every column up to the current
                block's end.
            options: those of `ModelDenoiser`.
        Raises:
            NotBidirectionalError: if the model's attention takes no mask of blocks.
        """
        check_block_attention(model)
        super().__init__(model, **options)
        self._block_length = block_length
        self._is_cached = cached
        self._block = self._position = self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._computed = torch.empty(0, dtype=torch.int64)
        self._cache: ColumnCache | None = None

    def step(self, scope: Tensor, branch: int = 0) -> BlockDenoiser:
        """Return itself: which columns a pass computes follows from the ids; see `sampling.CachingDenoiser`."""
        return self

    def take_computed(self) -> Tensor:
        """Return [batch] int64, the columns of each row that went through the model since the last call."""
        computed, self._computed = self._computed, torch.zeros_like(self._computed)
        return computed

    def passes(
        self, z: Tensor, flat_index: Tensor, scope: Tensor | None = None, branch: int = 0
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return the forward passes of a call, see `ModelDenoiser`."""
        batch, length = z.shape
        if z.shape != self._ids.shape:
            position = positions_of(z, is_padding=self._is_padding)
            block = block_of(position, self._block_length, is_padding=self._is_padding)
            self._block, self._position = block.expand(z.shape), position.expand(z.shape)
            self._ids = torch.full_like(z, -1)  # those that each column was computed from; -1 before
            self._computed = torch.zeros_like(z[:, 0])
            self._cache = ColumnCache(batch, length) if self._is_cached else None
        return super().passes(z, flat_index)

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return the passes over the fresh columns, each over rows with about as many; see `ModelDenoiser`."""
        length = z.shape[1]
        row, column = torch.div(head_index, length, rounding_mode="floor"), head_index % length
        low, high = self._fresh_range(z, row, column)
        passes, order = [], []
        for one in self._parts(low, high):
            number = torch.full_like(low, -1)
            number[one.rows] = torch.arange(len(one.rows), device=z.device)
            here = (number[row] >= 0).nonzero()[:, 0]
            number, first = number[row[here]], one.columns[:, 0]
            index = number * one.columns.shape[1] + column[here] - first[number]
            passes.append(self._pass(z, one, index))
            order.append(here)
        self._note(z, low, high)
        return passes, order

    def _rows(self) -> Tensor:
        """Return [n_rows] int64, the rows of the canvas that this call computes."""
        rows = torch.arange(len(self._ids), device=self._ids.device)
        return rows if self._requested is None else rows[self._requested]

    def _fresh_range(self, z: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first fresh column of each row and the one after the last, [n_rows] int64 each.

        Args:
            z: [n_rows, length] int64.
            row: [n] int64, row of each hidden state to compute.
            column: [n] int64, its column.
        """
        block, length = self._block[self._rows()], z.shape[1]
        none = torch.full_like(z[:, 0], length)
        first = none.scatter_reduce(0, row, column, "amin")
        last = (none - length).scatter_reduce(0, row, column, "amax")
        high = (block <= block.gather(1, last[:, None])).sum(dim=1)
        if not self._is_cached:
            return torch.zeros_like(high), high
        changed = (z != self._ids[self._rows()]) & (block >= 0)
        first_changed = torch.where(changed, torch.arange(length, device=z.device), length).amin(dim=1)
        first_changed = torch.where(first_changed < high, first_changed, first)
        return (block < block.gather(1, first_changed[:, None])).sum(dim=1).clamp(max=first), high

    def _parts(self, low: Tensor, high: Tensor) -> Iterator[_Part]:
        """Yield the rows that share a pass over their fresh columns; the first row is in the first of them."""
        widths = (high - low).tolist()
        for numbers in sorted(grouped(widths, columns_of_a_pass(low.device))):
            rows = torch.tensor(numbers, device=low.device)
            span = torch.arange(max(widths[number] for number in numbers), device=low.device)
            columns = low[rows][:, None] + span
            if self._is_cached:  # without a cache, all keys are those of the pass
                columns = columns.minimum(high[rows][:, None] - 1)
            yield _Part(rows, columns, int(high[rows].max()))

    def _pass(self, z: Tensor, one: _Part, head_index: Tensor) -> ModelPass:
        """Return the forward pass of a part; `head_index` is into its columns."""
        rows = self._rows()[one.rows]
        block, position = self._block[rows], self._position[rows]
        keys, queries = block[:, None, : one.end], block.gather(1, one.columns)[:, :, None]
        mask = additive_by_layer(self._model, ((keys >= 0) & (keys <= queries))[:, None], dtype_of(self._model))
        ids, position_ids = z[one.rows].gather(1, one.columns), position.gather(1, one.columns)
        self._computed[rows] += one.columns.shape[1]
        if self._cache is None:
            return ModelPass(ids, mask, position_ids, head_index)
        cache_rows = None if len(rows) == len(self._ids) else rows
        return ModelPass(ids, mask, position_ids, head_index, self._cache, one.columns, cache_rows, one.end)

    def _note(self, z: Tensor, low: Tensor, high: Tensor) -> None:
        """Note the ids that the columns were computed from; what lies behind them was computed with other ids."""
        column, rows = torch.arange(z.shape[1], device=z.device), self._rows()
        ids = torch.where(column < low[:, None], self._ids[rows], z)
        self._ids[rows] = ids.masked_fill(column >= high[:, None], -1)


def check_block_attention(model: nn.Module) -> None:
    """Check that a model's attention takes a mask of blocks.

    Raises:
        NotBidirectionalError: for flash attention, which takes no such mask, and for sliding windows.
    """
    if is_flash(implementation(model)):
        raise NotBidirectionalError(
            "attention: block needs an attention mask that flash attention (flash_attn: fa2, fa3) does not support; "
            "set flash_attn: sdpa"
        )
    if window_of(model) is not None:
        raise NotBidirectionalError(
            f"{type(model).__name__} has sliding-window attention, which attention: block does not support; use a "
            "model with full attention, such as GPT-2, Llama, Qwen2 or Qwen3"
        )
