"""Several denoisers of one row each, used as one; each row keeps a forward pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..utils.devices import integers_on
from .block_denoiser import BlockDenoiser, StackedBlocks
from .denoiser import Answers, ModelDenoiser
from .model_runner import ModelPass


@dataclass(frozen=True)
class _Group:
    """Rows that share a denoiser.

    Attributes:
        numbers: those of the rows in the batch, ascending.
        rows: the same numbers as a slice, or [n_rows] int64.
        length: that of the longest row.
        denoiser: computes these rows, with a pass for each.
    """

    numbers: list[int]
    rows: slice | Tensor
    length: int
    denoiser: ModelDenoiser

    def of(self, values: Tensor) -> Tensor:
        """Return the group's rows and columns of [batch, length] values."""
        return values[self.rows, : self.length]


class DenoiserRows:
    """Several denoisers of one row each; those of block models are computed together."""

    def __init__(self, denoisers: Sequence[ModelDenoiser], lengths: Sequence[int], device: torch.device) -> None:
        """Stack the denoisers of block models; earlier stacks of them must not be used any more.

        Args:
            denoisers: one for each row.
            lengths: of the rows; columns behind them are padding, which no denoiser sees.
            device: of the rows.
        """
        by_key: dict[Any, list[int]] = {}
        for number, denoiser in enumerate(denoisers):
            key = denoiser.stack_key if isinstance(denoiser, BlockDenoiser) else number
            by_key.setdefault(key, []).append(number)
        self._groups: list[_Group] = []
        for numbers in by_key.values():
            own = [lengths[number] for number in numbers]
            blocks = [one for number in numbers if isinstance(one := denoisers[number], BlockDenoiser)]
            denoiser = StackedBlocks(blocks, own, device) if blocks else denoisers[numbers[0]]
            rows = slice(numbers[0], numbers[-1] + 1)
            is_range = len(numbers) == numbers[-1] + 1 - numbers[0]
            self._groups.append(
                _Group(numbers, rows if is_range else integers_on(device, numbers), max(own), denoiser)
            )
        order = [number for group in self._groups for number in group.numbers]
        # Where each row is in the groups' rows one after another; None if they are in order.
        places = sorted(range(len(order)), key=order.__getitem__)
        self._places = None if order == sorted(order) else integers_on(device, places)

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int) -> Tensor:
        """Return [batch, n] int64, see `ModelDenoiser.questions`; rows with fewer numbers are padded with zeros.

        Args:
            z: [batch, length] int64.
            asked: [batch, length] bool.
            scope: [batch, length] bool.
            branch: see `ModelDenoiser.questions`.
        """
        own = [
            group.denoiser.questions(group.of(z), group.of(asked), group.of(scope), branch) for group in self._groups
        ]
        width = max(numbers.shape[1] for numbers in own)
        joined = torch.cat([functional.pad(numbers, (0, width - numbers.shape[1])) for numbers in own])
        return joined if self._places is None else joined[self._places]

    def passes(
        self, z: Tensor, flat_index: Tensor, scope: Tensor, branch: int, answers: Answers
    ) -> list[ModelPass | None]:
        """Return the forward pass of each row; None where no position is asked for.

        Args:
            z: [batch, length] int64.
            flat_index: [n] int64, ascending, into [batch * length].
            scope: [batch, length] bool.
            branch: see `ModelDenoiser.questions`.
            answers: [batch][n] of `questions`.
        """
        by_row: list[ModelPass | None] = [None] * len(answers)
        columns = (flat_index % z.shape[1]).split([answer[0] for answer in answers])
        for group in self._groups:
            own = [answers[number] for number in group.numbers]
            asked = [number for number, answer in zip(group.numbers, own, strict=True) if answer[0]]
            if not asked:
                continue
            index = flat_index
            if len(self._groups) > 1:
                index = torch.cat(
                    [columns[number] + place * group.length for place, number in enumerate(group.numbers)]
                )
            passes, _ = group.denoiser.passes(group.of(z), index, group.of(scope), branch, own)
            for number, one in zip(asked, passes, strict=True):
                by_row[number] = one
        return by_row
