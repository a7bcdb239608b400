"""What quantised weights need to be left alone with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_quantized(model: Any) -> bool:
    """Say whether any weight of `model` is stored in fewer bits than it computes with."""
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        return True
    return any(_is_bitsandbytes(module) for module in model.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout and its like off in the block, and give every module its own mode back.

    Layers of bitsandbytes, which draw nothing at random, keep their mode: one that is evaluated on the CPU is packed
    anew, for good, and can no longer be trained.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            if not _is_bitsandbytes(module):
                module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")
