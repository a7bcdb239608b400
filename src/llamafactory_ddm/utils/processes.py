"""Communication between the processes of a run; with `world`, their number, 1 nothing is sent."""

from __future__ import annotations

from typing import Any

import torch


def barrier(world: int) -> None:
    """Wait until all processes have reached this call."""
    if world > 1:
        torch.distributed.barrier()


def broadcast_from_first(value: Any, world: int) -> Any:
    """Return the value of the first process on every process."""
    values = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any, world: int) -> list[Any]:
    """Return the values of all processes, on every process."""
    values = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(values, value)
    return values
