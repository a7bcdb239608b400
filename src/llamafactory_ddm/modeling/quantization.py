"""Quantised models: detection, and an evaluation mode that does not repack their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_quantized(model: Any) -> bool:
    """Tell whether any weight of `model` is stored in fewer bits than it is computed in."""
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        return True
    return any(_is_bitsandbytes(module) for module in model.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and similar modules within the block, then restore every module's mode.

    Layers of bitsandbytes keep their mode, as they draw no random numbers. On the CPU, evaluation mode would repack
    their weights for good, and they could no longer be trained.
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
