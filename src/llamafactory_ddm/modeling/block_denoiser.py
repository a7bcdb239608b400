"""The denoiser of a model with block attention, which generates block by block from left to right.

A token sees every token of the blocks up to its own, so columns behind the current block are never computed, and the
keys and values of finished blocks can be kept. A block is computed with [MASK] in it while it is decoded; once it is
finished it is computed again, with its final tokens, in the pass that the next block asks for first. So the cache
changes no logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bidirectional import NotBidirectionalError, additive_by_layer
from .denoiser import ModelDenoiser
from .kv_cache import ColumnCache
from .model_info import dtype_of, implementation, is_flash, window_of

# Columns that take about as long as the fixed costs of a further forward pass.
_COLUMNS_OF_A_PASS = {"cpu": 16}
_COLUMNS_OF_A_PASS_ELSEWHERE = 512


def block_of_columns(is_padding: Tensor | None, batch: int, length: int, block_length: int) -> tuple[Tensor, Tensor]:
    """Return the block and the position of each column, [batch, length] int64 each.

    Blocks begin at every multiple of `block_length` of the position within the document; padding, which is on the
    left, is block -1 at position 0.

    Args:
        is_padding: [batch, length] bool; None if there is none.
        batch: rows.
        length: columns.
        block_length: tokens in a block.
    """
    if is_padding is None:
        position = torch.arange(length).expand(batch, length)
        return torch.div(position, block_length, rounding_mode="floor"), position
    position = (~is_padding).cumsum(dim=1) - 1
    return torch.div(position, block_length, rounding_mode="floor"), position.clamp(min=0)


@dataclass(frozen=True)
class _Pass:
    """A forward pass over some columns of some rows.

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

    Attributes:
        computed: tokens that went through the model so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        block_length: int,
        shift: bool,
        is_padding: Tensor | None = None,
        outputs: int | None = None,
        cached: bool = True,
    ) -> None:
        """Wrap a `model` whose attention was switched to full; the masks of its blocks are made here.

        Args:
            model: see `ModelDenoiser`.
            block_length: tokens in a block, as in training.
            shift: see `ModelDenoiser`.
            is_padding: see `ModelDenoiser`.
            outputs: see `ModelDenoiser`.
            cached: whether finished blocks are kept; without, each pass computes every column up to the current
                block's end.
        Raises:
            NotBidirectionalError: if the model's attention takes no mask of blocks.
        """
        check_block_attention(model)
        super().__init__(model, shift=shift, is_padding=is_padding, outputs=outputs)
        self.computed = 0
        self._block_length = block_length
        self._is_cached = cached
        self._block = self._position = self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._cache: ColumnCache | None = None

    def __call__(self, z: Tensor, flat_index: Tensor) -> Iterator[Tensor]:
        """Yield the logits of the tokens at `flat_index`, see `ModelDenoiser`."""
        if z.shape != self._ids.shape:
            block, position = block_of_columns(self._is_padding, *z.shape, self._block_length)
            self._block, self._position = block.to(z.device), position.to(z.device)
            self._ids = torch.full_like(z, -1)  # those that each column was computed from; -1 before
            self._cache = ColumnCache(*z.shape) if self._is_cached else None
        return super().__call__(z, flat_index)

    def _forward(self, z: Tensor, head_index: Tensor, limit: int | None = None) -> Tensor:
        """Compute the fresh columns, in passes over rows with about as many; keep the hidden states as the base does.

        Returns:
            The logits of the first `limit` requested tokens, of all if None.
        """
        length = z.shape[1]
        row, column = torch.div(head_index, length, rounding_mode="floor"), head_index % length
        low, high = self._fresh_range(z, row, column)
        hidden, logits, order = [], [], []
        for number, one in enumerate(self._passes(low, high)):
            index_of_row = torch.full_like(low, -1).index_copy_(
                0, one.rows, torch.arange(len(one.rows), device=z.device)
            )
            here = (index_of_row[row] >= 0).nonzero()[:, 0]
            index = index_of_row[row[here]] * one.columns.shape[1] + column[here] - low[row[here]]
            logits.append(self._run(z, one, index, limit if number == 0 or limit is None else 0))
            hidden.append(self._take_hidden())
            order.append(here)
        self._note(z, low, high)
        back = torch.cat(order).argsort()
        self._head.hidden = hidden[0] if len(hidden) == 1 else torch.cat(hidden)[back]
        return logits[0] if len(logits) == 1 or limit is not None else torch.cat(logits)[back]

    def _rows(self) -> Tensor:
        """Return [n_rows] int64, the rows of the canvas that this call computes."""
        if self._requested is None:
            return torch.arange(len(self._ids), device=self._ids.device)
        return self._requested.nonzero()[:, 0]

    def _fresh_range(self, z: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first fresh column of each row and the one after the last, [n_rows] int64 each.

        Args:
            z: [n_rows, length] int64.
            row: [n] int64, row of each hidden state to compute.
            column: [n] int64, its column.
        """
        block, length = self._of_requested(self._block), z.shape[1]
        none = torch.full_like(z[:, 0], length)
        first = none.scatter_reduce(0, row, column, "amin")
        last = (none - length).scatter_reduce(0, row, column, "amax")
        high = (block <= block.gather(1, last[:, None])).sum(dim=1)
        if not self._is_cached:
            return torch.zeros_like(high), high
        changed = (z != self._of_requested(self._ids)) & (block >= 0)
        first_changed = torch.where(changed, torch.arange(length, device=z.device), length).amin(dim=1)
        first_changed = torch.where(first_changed < high, first_changed, first)
        return (block < block.gather(1, first_changed[:, None])).sum(dim=1).clamp(max=first), high

    def _passes(self, low: Tensor, high: Tensor) -> Iterator[_Pass]:
        """Yield the passes over the fresh columns; the first row is in the first of them."""
        widths = (high - low).tolist()
        at_once = _COLUMNS_OF_A_PASS.get(low.device.type, _COLUMNS_OF_A_PASS_ELSEWHERE)
        for numbers in sorted(grouped(widths, at_once)) if self._is_cached else [range(len(widths))]:
            rows = torch.tensor(list(numbers), device=low.device)
            span = torch.arange(max(widths[number] for number in numbers), device=low.device)
            columns = torch.minimum(low[rows][:, None] + span, high[rows][:, None] - 1)
            if not self._is_cached:
                columns = span.expand_as(columns)
            yield _Pass(rows, columns, int(high[rows].max()))

    def _run(self, z: Tensor, one: _Pass, head_index: Tensor, limit: int | None) -> Tensor:
        """Run the model on the columns of a pass; returns its logits, [n, outputs]."""
        rows = self._rows()[one.rows]
        block, position = self._block[rows], self._position[rows]
        seen = (block[:, None, : one.end] >= 0) & (
            block[:, None, : one.end] <= block.gather(1, one.columns)[:, :, None]
        )
        inputs = {
            "input_ids": z[one.rows].gather(1, one.columns),
            "position_ids": position.gather(1, one.columns),
            "attention_mask": additive_by_layer(self._model, seen[:, None], dtype_of(self._model)),
        }
        self.computed += one.columns.numel()
        with torch.inference_mode(), self._head.only(head_index, limit, keep_hidden=True):
            if self._cache is None:
                logits: Tensor = self._model(**inputs, use_cache=False).logits
            else:
                all_rows = None if len(rows) == len(self._ids) else rows
                with self._cache.writing(one.columns, rows=all_rows, end=one.end):
                    logits = self._model(**inputs, past_key_values=self._cache, use_cache=True).logits
        return logits.reshape(-1, logits.shape[-1])[:, : self._outputs]

    def _note(self, z: Tensor, low: Tensor, high: Tensor) -> None:
        """Note the ids that the columns were computed from; what lies behind them was computed with other ids."""
        if self._is_cached:
            column, rows = torch.arange(z.shape[1], device=z.device), self._rows()
            ids = torch.where(column < low[:, None], self._ids[rows], z)
            self._ids[rows] = ids.masked_fill(column >= high[:, None], -1)


def grouped(widths: Sequence[int], pass_cost: int) -> list[list[int]]:
    """Divide rows into passes: a row costs its pass's largest width, a pass `pass_cost` on top.

    A pass is divided as long as that makes it cheaper, where it saves the most.

    Args:
        widths: fresh columns of each row.
        pass_cost: fixed costs of a pass, in columns.
    Returns:
        Lists of the rows' numbers, each ascending.
    """

    def divide(rows: list[int]) -> list[list[int]]:
        saved = [(at * (widths[rows[-1]] - widths[rows[at - 1]]), at) for at in range(1, len(rows))]
        most, at = max(saved, default=(0, 0))
        if most <= pass_cost:
            return [sorted(rows)]
        return divide(rows[:at]) + divide(rows[at:])

    return divide(sorted(range(len(widths)), key=lambda row: widths[row]))


def check_block_attention(model: nn.Module) -> None:
    """Check that a model's attention takes a mask of blocks.

    Raises:
        NotBidirectionalError: for flash attention, which takes no such mask, and for sliding windows.
    """
    if is_flash(implementation(model)):
        raise NotBidirectionalError(
            "attention: block needs an attention mask that flash attention (flash_attn: fa2, fa3) does not support; set "
            "flash_attn: sdpa"
        )
    if window_of(model) is not None:
        raise NotBidirectionalError(
            f"{type(model).__name__} has sliding-window attention, which attention: block does not support; use a model "
            "with full attention, such as GPT-2, Llama, Qwen2 or Qwen3"
        )
