"""GELU in one kernel, where transformers computes it in eight operations (GPT-2, Phi, CodeGen, GPT-J).

In training these operations keep four tensors of the input's shape for the backward pass. GPT-2's MLP is four times as
wide as its hidden states, so these are 16 values for each hidden unit of a position. The kernel keeps its input alone.
In half precision the kernel computes in float32.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation


def fuse_gelu(model: nn.Module) -> None:
    """Replace modules that compute GELU's tanh approximation step by step, in place; they have no weights.

        gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

    Results are the same up to rounding.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
