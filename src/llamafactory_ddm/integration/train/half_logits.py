"""Logits of half precision as they are, in place of the float32 copies that accelerate makes of what a model returns.

The losses work on a few rows at a time in float32, so a copy of all of them, and of their gradient, is memory for
nothing: the largest there is with a large vocabulary.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from accelerate.utils.operations import ConvertOutputsToFp32


def keep_half_logits(model: Any) -> bool:
    """Take from a model that accelerate has prepared for mixed precision the conversion of its outputs to float32.

    Autocast stays, and accelerate can still undo it.

    Args:
        model: the module whose `forward` accelerate replaced, not a wrapper around it.
    Returns:
        Whether there was such a conversion.
    """
    forward = vars(model).get("forward")
    converter = getattr(getattr(forward, "__func__", forward), "__wrapped__", None)
    if not isinstance(converter, ConvertOutputsToFp32):
        return False
    inner = converter.model_forward
    model.forward = MethodType(inner, model) if hasattr(forward, "__func__") else inner
    return True
