"""What a device can do."""

from __future__ import annotations

import torch


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
