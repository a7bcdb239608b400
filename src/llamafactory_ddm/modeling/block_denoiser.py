"""The denoiser of a model with block attention, which generates block by block from left to right.

A token sees every token of the blocks up to its own, so columns behind the current block are never computed, and the
keys and values of finished blocks can be kept. A block is computed with [MASK] in it while it is decoded; once it is
finished it is computed again, with its final tokens, in the pass that the next block asks for first. So the cache
changes no logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..diffusion.blocks import block_of, positions_of
from ..utils.devices import integers_on
from .bidirectional import NotBidirectionalError, additive_by_layer
from .denoiser import Answers, ModelDenoiser, positions_in
from .kv_cache import ColumnCache
from .model_info import dtype_of, implementation, is_flash, window_of
from .model_runner import ModelPass
from .pass_widths import columns_of_a_pass, grouped


@dataclass(frozen=True)
class _Part:
    """Rows and columns that share a forward pass.

    Attributes:
        numbers: rows of the call, ascending.
        rows: [n_rows] int64, the same.
        columns: [n_rows, n_fresh] int64, the columns of each; a row with fewer than others repeats its last.
        end: number of columns that its queries see, from the first.
    """

    numbers: list[int]
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
        self._cache: ColumnCache | None = None

    @property
    def stack_key(self) -> Any:
        """Return what denoisers of a `StackedBlocks` must share."""
        return self._block_length, self._is_cached, self._shift

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int = 0) -> Tensor:
        """Return [batch, 3] int64: how many positions are asked for, the first fresh column, the one after the last.

        Which columns a pass computes follows from the ids, not from `scope`.

        Raises:
            ValueError: for a second branch, which would share the cache.
        """
        if branch:
            raise ValueError("guidance_scale is not supported with attention: block; remove guidance_scale")
        self._prepare(z)
        return torch.stack([asked.sum(dim=1), *self._fresh_range(z, self._asked_heads(asked))], dim=1)

    def _prepare(self, z: Tensor) -> None:
        """Lay out the blocks of a canvas with another shape than before."""
        if z.shape != self._ids.shape:
            position = positions_of(z, is_padding=self._is_padding)
            block = block_of(position, self._block_length, is_padding=self._is_padding)
            self._block, self._position = block.expand(z.shape), position.expand(z.shape)
            self._ids = torch.full_like(z, -1)  # those that each column was computed from; -1 before
            self._computed = torch.zeros_like(z[:, 0])
            self._cache = ColumnCache(*z.shape) if self._is_cached else None

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int, answers: Answers
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return the passes over the fresh columns, each over rows with about as many; see `ModelDenoiser`."""
        passes, order = [], []
        for one, here, index in self._asked_parts(z, head_index, answers):
            passes.append(self._pass(z, one, index))
            order.append(here)
        return passes, order

    def _asked_parts(self, z: Tensor, head_index: Tensor, answers: Answers) -> Iterator[tuple[_Part, Tensor, Tensor]]:
        """Yield each part, the entries of `head_index` that lie in it, and their places in it, [n] int64 each.

        Entries are given by their number in `head_index`, places as indices into the part's [n_rows * n_fresh].
        """
        length = z.shape[1]
        low, high = integers_on(z.device, answers)[:, 1:].unbind(dim=1)
        for one in self._parts(answers, low, high):
            here = torch.arange(len(head_index), device=z.device)
            if len(one.numbers) < len(z):
                here = positions_in(one.rows, head_index, length, sum(answers[number][0] for number in one.numbers))
            row = torch.div(head_index[here], length, rounding_mode="floor")
            number, first = torch.searchsorted(one.rows, row), one.columns[:, 0]
            yield one, here, number * one.columns.shape[1] + head_index[here] - row * length - first[number]
        self._note(z, low, high)

    def _canvas_rows(self) -> Tensor:
        """Return [n_rows] int64, the rows of the canvas that this call computes."""
        return torch.arange(len(self._ids), device=self._ids.device) if self._rows is None else self._rows

    def _fresh_range(self, z: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first fresh column of each row and the one after the last, [batch] int64 each.

        Args:
            z: [batch, length] int64.
            asked: [batch, length] bool, the hidden states to compute; of a row with none, the range is undefined.
        """
        block, length = self._block, z.shape[1]
        column = torch.arange(length, device=z.device)
        first = torch.where(asked, column, length - 1).amin(dim=1)
        last = torch.where(asked, column, 0).amax(dim=1)
        high = (block <= block.gather(1, last[:, None])).sum(dim=1)
        if not self._is_cached:
            return torch.zeros_like(high), high
        changed = (z != self._ids) & (block >= 0)
        first_changed = torch.where(changed, column, length).amin(dim=1)
        first_changed = torch.where(first_changed < high, first_changed, first)
        return (block < block.gather(1, first_changed[:, None])).sum(dim=1).clamp(max=first), high

    def _parts(self, answers: Answers, low: Tensor, high: Tensor) -> Iterator[_Part]:
        """Yield the rows that share a pass over their fresh columns; the first row is in the first of them."""
        widths = [last - first for _, first, last in answers]
        for numbers in sorted(grouped(widths, columns_of_a_pass(low.device))):
            rows = integers_on(low.device, numbers)
            span = torch.arange(max(widths[number] for number in numbers), device=low.device)
            columns = low[rows][:, None] + span
            if self._is_cached:  # without a cache, all keys are those of the pass
                columns = columns.minimum(high[rows][:, None] - 1)
            yield _Part(numbers, rows, columns, max(answers[number][2] for number in numbers))

    def _pass(self, z: Tensor, one: _Part, head_index: Tensor) -> ModelPass:
        """Return the forward pass of a part; `head_index` is into its columns."""
        rows = self._canvas_rows()[one.rows]
        block, position = self._block[rows], self._position[rows]
        keys, queries = block[:, None, : one.end], block.gather(1, one.columns)[:, :, None]
        mask = additive_by_layer(self._model, ((keys >= 0) & (keys <= queries))[:, None], dtype_of(self._model))
        ids, position_ids = z[one.rows].gather(1, one.columns), position.gather(1, one.columns)
        self._count(rows, one.columns.shape[1])
        if self._cache is None:
            return ModelPass(ids, mask, position_ids, head_index)
        cache_rows = None if len(rows) == len(self._ids) else rows
        return ModelPass(ids, mask, position_ids, head_index, self._cache, one.columns, cache_rows, one.end)

    def _note(self, z: Tensor, low: Tensor, high: Tensor) -> None:
        """Note the ids that the columns were computed from; what lies behind them was computed with other ids."""
        column, rows = torch.arange(z.shape[1], device=z.device), self._canvas_rows()
        ids = torch.where(column < low[:, None], self._ids[rows], z)
        self._ids[rows] = ids.masked_fill(column >= high[:, None], -1)


class StackedBlocks(BlockDenoiser):
    """Several block denoisers of one row each, used as one, with a separate pass for each row.

    The ids that columns were computed from are stored here; the denoisers hold views of them, and caches of their own.
    """

    def __init__(self, denoisers: Sequence[BlockDenoiser], lengths: Sequence[int], device: torch.device) -> None:
        """Stack denoisers of one model that agree in `stack_key`; earlier stacks of them must not be used any more.

        Args:
            denoisers: one for each row.
            lengths: of the rows; columns behind them are padding.
            device: of the rows.
        """
        first, width = denoisers[0], max(lengths)
        super().__init__(
            first._model,
            block_length=first._block_length,
            cached=first._is_cached,
            shift=first._shift,
            runner=first._runner,
        )
        for denoiser, length in zip(denoisers, lengths, strict=True):
            denoiser._prepare(torch.empty(1, length, dtype=torch.int64, device=device))
        # Padding has a block that no query sees, and the id -1, which no token has.
        self._block = _stacked([one._block for one in denoisers], width, width)
        self._position = _stacked([one._position for one in denoisers], width, 0)
        self._ids = _stacked([one._ids for one in denoisers], width, -1)
        self._caches = [one._cache for one in denoisers]
        for row, (denoiser, length) in enumerate(zip(denoisers, lengths, strict=True)):
            denoiser._ids = self._ids[row : row + 1, :length]

    def _prepare(self, z: Tensor) -> None:
        """Do nothing: `__init__` has laid out the blocks."""

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int, answers: Answers
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return a pass for each row with a requested position, and the entries of `head_index` that lie in it."""
        numbers = range(len(self._ids)) if self._requested is None else self._requested
        by_row: dict[int, tuple[ModelPass, Tensor]] = {}
        for one, here, index in self._asked_parts(z, head_index, answers):
            counts = [answers[number][0] for number in one.numbers]
            whole, heads = self._pass(z, one, index), (index % one.columns.shape[1]).split(counts)
            for place, (number, own, order) in enumerate(zip(one.numbers, heads, here.split(counts), strict=True)):
                _, low, high = answers[number]
                row, columns = slice(place, place + 1), slice(high - low)
                cache = self._caches[numbers[number]]
                by_row[number] = (
                    ModelPass(
                        whole.ids[row, columns],
                        _part_of_mask(whole.mask, row, columns, high),
                        None if whole.position_ids is None else whole.position_ids[row, columns],
                        own,
                        cache,
                        None if cache is None else slice(low, high),
                        None,
                        None if cache is None else high,
                    ),
                    order,
                )
        passes, orders = zip(*(by_row[number] for number in range(len(answers))), strict=True)
        return list(passes), list(orders)


def _stacked(rows: Sequence[Tensor], width: int, padding: int) -> Tensor:
    """Return [n_rows, width], rows [1, length] padded on the right."""
    return torch.cat([functional.pad(row, (0, width - row.shape[1]), value=padding) for row in rows])


def _part_of_mask(mask: Any, row: slice, columns: slice, end: int) -> Any:
    """Return one row, some of its queries and its first `end` keys of an additive mask, or of one by layer type."""
    if isinstance(mask, dict):
        return {name: _part_of_mask(one, row, columns, end) for name, one in mask.items()}
    return mask[row, :, columns, :end]


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
