"""The floating-point operations that a training step needs, from the shapes of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..diffusion.attention import full_pairs
from ..diffusion.two_streams import visible_pairs
from ..objectives.base import CleanBatch, TrainingBatch
from .bidirectional import attention_modules
from .model_info import text_config, window_of

_PRODUCT = 2  # a multiplication and an addition


@dataclass(frozen=True)
class StepCounts:
    """What the operations of a training step are proportional to; sums over its rows.

    Attributes:
        columns: columns of the model's input that are not padding; two streams count both.
        logits: rows of logits, one for each scored token.
        pairs: pairs of a query and a key that it sees, in layers without a sliding window.
        near_pairs: the same in layers with one.
    """

    columns: int
    logits: int
    pairs: int
    near_pairs: int

    @classmethod
    def of(cls, clean: CleanBatch, batch: TrainingBatch, window: int | None) -> StepCounts:
        """Return the counts of a micro-batch on the CPU; attention that is annealed counts as full.

        Args:
            clean: the batch before noise.
            batch: the batch after it.
            window: the sliding window of the model's windowed layers; None for none.
        """
        if batch.placement is None:
            lengths = clean.document_lengths()
            pairs, near = full_pairs(lengths), full_pairs(lengths, window)
            return cls(int(lengths.sum()), len(batch.head_index), pairs, near)
        block, is_noisy = batch.placement["block"], batch.placement["is_noisy"]
        document = batch.placement.get("document")
        rows = len(batch.z_t) if block.dim() == 1 else 1  # the same columns in each
        columns, pairs = rows * int((block >= 0).sum()), rows * visible_pairs(block, is_noisy, document)
        return cls(columns, len(batch.head_index), pairs, pairs)


@dataclass(frozen=True)
class ModelFlops:
    """Operations of forward and backward pass, a multiplication and an addition counted as two.

    A weight of a linear layer takes 2 for each column in the forward pass, 2 more for the gradient of its input if
    anything before it is trained, and 2 more for its own gradient if it is trained: 6 in full finetuning. Attention
    takes 4 d for each pair of query and key, for a layer whose heads have d numbers together, and three times as much
    if a gradient goes through it: 12 L d s for each column, with L layers and s keys that a query sees. The output
    embedding counts for scored tokens alone, as no other logits are needed. Embeddings, norms, softmax and loss are
    left out, and so is what gradient checkpointing or float16 computes a second time.

    Attributes:
        per_column: operations for each column.
        per_logit: operations for each scored token.
        per_pair: operations for each pair of query and key, summed over the layers without a sliding window.
        per_near_pair: the same over the layers with one.
    Source: PaLM (arXiv 2204.02311), appendix B, for 6 N and 12 L d s. That unscored tokens need no logits, that frozen
        weights need no gradient, and that only visible pairs count, is ours.
    """

    per_column: int
    per_logit: int
    per_pair: int
    per_near_pair: int

    def of(self, counts: StepCounts) -> int:
        """Return the operations of a step."""
        return (
            self.per_column * counts.columns
            + self.per_logit * counts.logits
            + self.per_pair * counts.pairs
            + self.per_near_pair * counts.near_pairs
        )


def model_flops(model: nn.Module, head: nn.Module) -> ModelFlops | None:
    """Return the operations of a model, or None where its layers do not tell them.

    Those are a mixture of experts, which computes only some of its weights, and weights packed by GPTQ or AWQ.

    Args:
        model: the unwrapped model, with its adapters.
        head: its output embedding, as the model gives it.
    """
    config = text_config(model)
    # Configs name the number of experts in several ways, and not every model calls them so.
    is_mixture = bool(getattr(config, "num_experts_per_tok", None))
    if is_mixture or any(_is_experts_or_packed(name, module) for name, module in model.named_modules()):
        return None
    of_head = {id(module) for module in head.modules()}
    layer_types = getattr(config, "layer_types", None) or ()
    attention = {id(module) for module in attention_modules(model)}
    per_column = per_logit = per_pair = per_near_pair = n_layers = 0
    is_reached = False  # whether anything before is trained, so that gradients flow back to here
    for name, module in model.named_modules():
        if "original_module" in name.split("."):  # PEFT trains a copy of it
            continue
        weight = module._parameters.get("weight")  # its own: an adapter's layer also shows that of the layer within
        if weight is not None and not isinstance(module, nn.Embedding):
            factor = _PRODUCT * (1 + is_reached + weight.requires_grad)
            if id(module) in of_head:
                per_logit += factor * _size(module)
            else:
                per_column += factor * _size(module)
        if id(module) in attention:
            has_gradient = is_reached or any(parameter.requires_grad for parameter in module.parameters())
            operations = _PRODUCT * _attention_widths(config, module) * (3 if has_gradient else 1)
            if _is_windowed(model, layer_types, n_layers):
                per_near_pair += operations
            else:
                per_pair += operations
            n_layers += 1
        is_reached = is_reached or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return ModelFlops(per_column, per_logit, per_pair, per_near_pair)


def _size(module: Any) -> int:
    """Return the number of weights of a linear layer, packed or sharded ones too; 0 for other modules."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features * module.out_features)
    shape = getattr(module.weight, "ds_shape", module.weight.shape)  # DeepSpeed ZeRO-3
    return int(shape[0] * shape[1]) if len(shape) == 2 else 0


def _is_experts_or_packed(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "experts" or "qweight" in module._buffers


def _attention_widths(config: Any, module: Any) -> int:
    """Return the numbers of all heads of a query together, plus those of a value; layers may differ in them."""
    heads = int(config.num_attention_heads)
    width = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    of_query = int(getattr(module, "qk_head_dim", None) or width)
    return heads * (of_query + int(getattr(module, "v_head_dim", None) or of_query))


def _is_windowed(model: nn.Module, layer_types: Any, layer: int) -> bool:
    if window_of(model) is None:
        return False
    return layer_types[layer] == "sliding_attention" if layer < len(layer_types) else True
