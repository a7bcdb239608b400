"""The floating-point operations of a training step, counted from the shapes of its matrix products.

A product of [n, k] and [k, m] takes 2 n k m operations. A step of a linear layer takes three such products: the output
and the gradients of input and weight; of a frozen weight two. Attention takes two products for the output and four for
the gradients; with causal attention a query sees half of the keys. Elementwise work, the optimiser and what a kernel
computes a second time are not counted, so the share of the peak is that of the model (MFU), not of the hardware. With
frozen embeddings the first layer's input needs no gradient; this is not taken off.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def training_operations(model: Any, *, rows: int, length: int, scored: float, is_causal: bool) -> float:
    """Return the floating-point operations of forward and backward passes.

    Args:
        model: a causal language model, with or without adapters.
        rows: of the batch.
        length: tokens of a row.
        scored: tokens of the batch whose logits are computed.
        is_causal: whether a token sees only those before it.
    """
    head = model.get_output_embeddings()
    linear = 0
    for module in model.modules():
        if module is not head and isinstance(module, nn.Linear | Conv1D):
            linear += _products(module) * module.weight.numel()
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = (length + 1) / 2 if is_causal else length
    attention = 3 * 2 * 2 * config.num_hidden_layers * rows * length * keys * config.num_attention_heads * width
    return 2 * rows * length * linear + attention + 2 * scored * _products(head) * head.weight.numel()


def _products(module: Any) -> int:
    """Return the products of a step of a linear layer."""
    return 3 if module.weight.requires_grad else 2
