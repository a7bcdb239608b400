"""Stops a run whose loss stays NaN or infinite, without making the host wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..logs import get_logger

logger = get_logger(__name__)


class LossNotFiniteError(ValueError):
    """The loss or the weights are NaN or infinite; the message names the steps and what to do."""


class FiniteLoss:
    """Counts consecutive optimiser steps whose loss was NaN or infinite on any process.

    The flags stay on the device. They are reduced over the processes together with the next step's denominator. The
    host reads them late enough not to wait: on a GPU one step later, elsewhere at once. All processes read the same
    numbers at the same steps, so they stop together.

    Args:
        limit: number of consecutive steps that ends the run; 0 for no limit.
        device: device of the losses.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.streak = 0  # consecutive steps up to the last one that was read
        self._flag = torch.zeros((), dtype=torch.int64, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._counted = -1
        self._unread: deque[tuple[int, Tensor, Any]] = deque()

    def see(self, loss: Tensor) -> None:
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
            step: number of the step, from 1. A step that was counted already is not counted again.
        Raises:
            LossNotFiniteError: if the limit is reached by the steps that can be read by now.
        """
        if step == self._counted:
            return
        self._counted = step
        self._streak = torch.where(flag > 0, self._streak + 1, 0)
        written = None
        value = self._streak
        if value.device.type == "cuda":
            value = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(value, non_blocking=True)
            written = torch.cuda.Event()
            written.record()
        self._unread.append((step, value, written))
        self._read(leave=0 if written is None else 1)

    def read_all(self) -> None:
        """Read all counted steps; waits for the device.

        Raises:
            LossNotFiniteError: if the limit is reached.
        """
        self._read(leave=0)

    def _read(self, *, leave: int) -> None:
        while len(self._unread) > leave:
            step, value, written = self._unread.popleft()
            if written is not None:
                written.synchronize()
            self.streak = int(value)
            if self.limit and self.streak >= self.limit:
                first = step - self.streak + 1
                steps = f"step {step}" if first == step else f"steps {first} to {step}"
                raise LossNotFiniteError(
                    f"the loss was NaN or infinite in {steps}, so training has stopped, and these steps were not "
                    "saved. Resume from the last checkpoint, or start again, with a lower learning_rate, more "
                    f"warmup_steps or bf16 in place of fp16 (stop_after_nan_steps: {self.limit}; 0 disables this stop)"
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
        share = getattr(parameter, "ds_tensor", parameter)  # of DeepSpeed ZeRO-3
        share = getattr(share, "to_local", lambda share=share: share)()  # of FSDP 2
        if parameter.requires_grad and share.numel():
            # A norm takes no memory of the weights' size, as isfinite would.
            norm = torch.linalg.vector_norm(share.detach(), torch.inf).to(device, torch.float32)
            largest = torch.maximum(largest, norm)  # NaN wins
    return not bool(sum_over_processes((~torch.isfinite(largest)).long()))
