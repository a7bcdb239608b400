"""GELU in one kernel, for models that transformers gives a formula of eight operations (GPT-2, Phi, CodeGen, GPT-J).

In training the formula keeps four tensors as wide as its input for the backward pass, 16 values for each position and
unit of GPT-2's width; the kernel keeps its input alone. In half precision the kernel computes in float32.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation


def fuse_gelu(model: nn.Module) -> None:
    """Replace modules that compute GELU's tanh approximation step by step, in place; they have no weights.

        gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

    Results differ by rounding alone.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
