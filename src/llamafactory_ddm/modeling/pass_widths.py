"""Which rows share a forward pass, by the number of columns that each computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Columns that take about as long as the fixed costs of a further forward pass.
_COLUMNS_OF_A_PASS = {"cpu": 16}
_COLUMNS_OF_A_PASS_ELSEWHERE = 512


def columns_of_a_pass(device: torch.device) -> int:
    """Return the fixed costs of a forward pass on a device, in columns."""
    return _COLUMNS_OF_A_PASS.get(device.type, _COLUMNS_OF_A_PASS_ELSEWHERE)


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
