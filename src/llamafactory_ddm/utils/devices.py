"""What a device can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_float64(device: torch.device, purpose: str) -> None:
    """Check that a device has float64; Apple's GPUs (mps) do not.

    Args:
        device: of the computation.
        purpose: what needs it, as the message names it.
    Raises:
        ValueError: if it does not.
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        torch.zeros((), device=device)  # raises too if the device cannot be used at all
        raise ValueError(
            f"{purpose} needs float64, which the device {str(device)!r} does not have; use device='cpu', or a GPU "
            "that has it"
        ) from error


def copies_in_background(device: torch.device) -> bool:
    """Tell whether copies between a device and the host do not make the host wait."""
    return device.type == "cuda"


def integers_on(device: torch.device, values: Sequence[Any]) -> Tensor:
    """Return numbers of the host, perhaps nested, as an int64 tensor on a device; the host does not wait for a GPU.

    `torch.tensor(values, device=device)` would wait until the GPU has done all that it was given before.
    """
    on_host = torch.tensor(values, dtype=torch.int64)
    return on_host.to(device, non_blocking=copies_in_background(device))
