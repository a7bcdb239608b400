"""FlexAttention for two streams: a kernel that skips the parts of the mask of `block_attention` that nobody sees.

Opt-in (`sparse_attention: true`), on a GPU: on the CPU the kernel takes no input that requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.two_streams import sees
from .model_info import implementation, text_config

FLEX = "flex_attention"


def check_takes_sparse(model: nn.Module) -> None:
    """Check that transformers runs a model with FlexAttention.

    Raises:
        ValueError: if it does not, or if the model has attention dropout, which FlexAttention lacks.
    """
    config = text_config(model)
    name = f"{type(model).__name__} (model_type {getattr(config, 'model_type', '?')})"
    if not getattr(model, "_supports_flex_attn", False):
        raise ValueError(f"sparse_attention: true is not supported by {name}; remove sparse_attention")
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"sparse_attention: true has no dropout, but {name} has attention_dropout: {dropout}; remove "
            "sparse_attention, or set attention_dropout to 0 in the model's config.json"
        )


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Within the block, the model computes attention with this implementation of transformers."""
    before = implementation(model)
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def mask_rule(
    block: Tensor, is_noisy: Tensor, document: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the rule of `two_stream_visibility` as FlexAttention takes it: (row, head, query, key) -> bool.

    The arguments are those of `two_stream_visibility`; one row of them serves every row of a batch.
    """
    documents = torch.zeros_like(block) if document is None else document

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row % len(block)
        same = documents[row, query] == documents[row, key]
        seen = sees(block[row, query], is_noisy[row, query], block[row, key], is_noisy[row, key], same)
        return seen | (query == key)

    return rule


def sparse_mask(block: Tensor, is_noisy: Tensor, document: Tensor | None = None) -> Any:
    """Return the mask of `two_stream_visibility` as a `BlockMask` of FlexAttention; the arguments are the same."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = block.shape
    return create_block_mask(mask_rule(block, is_noisy, document), rows, None, columns, columns, device=block.device)
