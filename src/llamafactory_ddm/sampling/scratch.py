"""Memory that draws of tokens on a CPU reuse, as the first write to a new page of memory is slow."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LARGEST = 2**20  # numbers in a buffer; larger results get memory of their own


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_slot: dict[int, Tensor] = {}


_buffers = _Buffers()


def scratch(like: Tensor, slot: int) -> Tensor | None:
    """Return a float32 tensor of the shape of `like`, for the argument `out` of an operation.

    Its memory is that of the thread's last tensor of the same slot, which must not be read any more.

    Args:
        like: input of that operation, which gives the shape.
        slot: number of the buffer.
    Returns:
        None where the operation shall make its own result: on other devices, with gradients, or if it is large.
    """
    if like.device.type != "cpu" or like.requires_grad or like.numel() > _LARGEST:
        return None
    buffer = _buffers.by_slot.get(slot)
    if buffer is None or buffer.numel() < like.numel():
        with torch.inference_mode(False):  # so that it can be written to outside inference mode too
            buffer = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
        _buffers.by_slot[slot] = buffer
    return buffer[: like.numel()].view(like.shape)
