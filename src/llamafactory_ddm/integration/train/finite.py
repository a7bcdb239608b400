"""Stops a run whose loss stays NaN or infinite, without making the host wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...utils.devices import copies_in_background
from ..logs import get_logger

logger = get_logger(__name__)


class LossNotFiniteError(ValueError):
    """The loss or the weights are NaN or infinite; the message names the steps and what to do."""


class FiniteLoss:
    """Counts consecutive optimiser steps whose loss was NaN or infinite on any process.

    The flags stay on the device. They are reduced over the processes together with the next step's denominator. To
    avoid waiting for the device, the host reads them one step later on a GPU, and at once elsewhere. All processes
    read the same numbers at the same steps, so they stop together.

    Args:
        limit: number of consecutive steps that ends the run; 0 for no limit.
        device: device of the losses.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.streak = 0  # consecutive steps up to the last one that was read
        self._flag = torch.zeros((), dtype=torch.int64, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._last_step = -1
        self._unread: deque[tuple[int, Tensor, Any]] = deque()  # step, streak, event of its copy to the host

    def add(self, loss: Tensor) -> None:
        """Record whether the loss of a micro-batch is finite."""
        self._flag |= (~torch.isfinite(loss.detach())).long()

    def take(self) -> Tensor:
        """Return 1 if a loss of this process was not finite since the last call, else 0, on the device."""
        flag, self._flag = self._flag, torch.zeros_like(self._flag)
        return flag

    def count(self, flag: Tensor, step: int) -> None:
        """Count a finished step.

        Args:
            flag: what `take` returned, summed over the processes; scalar int64.
            step: number of the step, from 1; a step is counted once.
        Raises:
            LossNotFiniteError: if the steps read so far reach the limit.
        """
        if step == self._last_step:
            return
        self._last_step = step
        self._streak = torch.where(flag > 0, self._streak + 1, 0)
        copied = None
        streak = self._streak
        if copies_in_background(streak.device):
            streak = streak.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((step, streak, copied))
        self._read(n_unread=0 if copied is None else 1)

    def read_all(self) -> None:
        """Read all counted steps; waits for the device.

        Raises:
            LossNotFiniteError: if the limit is reached.
        """
        self._read(n_unread=0)

    def _read(self, *, n_unread: int) -> None:
        """Read the counted steps, except the last `n_unread`."""
        while len(self._unread) > n_unread:
            step, streak, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            self.streak = int(streak)
            if self.limit and self.streak >= self.limit:
                first = step - self.streak + 1
                steps = f"step {step}" if first == step else f"steps {first} to {step}"
                raise LossNotFiniteError(
                    f"the loss was NaN or infinite in {steps}, so training stopped without saving them "
                    f"(stop_after_nan_steps: {self.limit}; 0 disables this). Resume from the last checkpoint, or "
                    "start over, with a lower learning_rate, more warmup_steps, or bf16 in place of fp16"
                )
            if self.streak == 1:
                logger.warning_rank0(f"The loss of step {step} is NaN or infinite.")


def weights_are_finite(model: Any, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Tell whether all trained weights are finite, on every process.

    Args:
        model: the model; its parameters may be sharded.
        sum_over_processes: called once on every process.
        device: device of the sum.
    """
    largest = torch.zeros((), device=device)
    for parameter in model.parameters():
        shard = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3
        shard = getattr(shard, "to_local", lambda shard=shard: shard)()  # FSDP 2
        if parameter.requires_grad and shard.numel():
            # Unlike isfinite, a norm allocates no tensor of the weights' size.
            norm = torch.linalg.vector_norm(shard.detach(), torch.inf).to(device, torch.float32)
            largest = torch.maximum(largest, norm)  # propagates NaN
    return not bool(sum_over_processes((~torch.isfinite(largest)).long()))
