"""The floating-point operations of a training step, of the diffusion stages and of `stage: pt`.

Operations per token, logit and pair of tokens are the plugin's own counts, from which training logs the MFU. Rows have
no padding here, and with causal attention a query sees half of the keys. Elementwise work, the optimiser and what a
kernel computes a second time are not counted, so the fraction of the peak is that of the model (MFU), not of the
hardware.
"""

from __future__ import annotations

from typing import Any

from llamafactory_ddm.modeling.model_flops import StepCounts, model_flops


def training_operations(model: Any, *, rows: int, length: int, scored: float, is_causal: bool) -> float:
    """Return the floating-point operations of forward and backward passes.

    Args:
        model: a causal language model without a sliding window, with or without adapters.
        rows: of the batch.
        length: tokens of a row.
        scored: tokens of the batch whose logits are computed, or their mean over several steps.
        is_causal: whether a token sees only those before it.
    Raises:
        ValueError: if the operations of the model's layers are not known.
    """
    flops = model_flops(model, model.get_output_embeddings())
    if flops is None:
        raise ValueError(f"the operations of {type(model).__name__} are not known")
    pairs = rows * (length * (length + 1) // 2 if is_causal else length**2)
    counts = StepCounts(columns=rows * length, logits=0, pairs=pairs, near_pairs=pairs)
    return flops.of(counts) + flops.per_logit * scored
