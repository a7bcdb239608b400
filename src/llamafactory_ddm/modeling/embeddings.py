"""Embeddings for tokens that are new to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .quantization import is_quantized


def num_embeddings(model: Any) -> int:
    """Return the number of tokens of the input embedding."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # under DeepSpeed ZeRO-3 a rank holds only a part


def has_tied_embeddings(model: Any) -> bool:
    """Tell whether input and output embedding are one weight, or there is no output embedding."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def init_new_embeddings(model: Any, ids: Iterable[int], *, known: int) -> None:
    """Set the embedding of every new id to the float32 mean of the first `known` embeddings; resize if needed.

    Embeddings that are added below the highest id get the mean too. The same is done to an untied output embedding
    and its bias.

    Args:
        model: a causal language model.
        ids: tokens that are new to the model, with or without an embedding.
        known: number of embeddings, from 0, that the model was trained with.
    Raises:
        ValueError: if there are new ids and the model is quantised.
    """
    new_ids, n_embeddings = set(ids), num_embeddings(model)
    if not new_ids:
        return
    if is_quantized(model):
        raise ValueError(
            f"{len(new_ids)} tokens are new to the model, and a quantised model cannot get new embeddings; remove "
            "quantization_bit, or use tokens that the model has"
        )
    if max(new_ids) >= n_embeddings:
        resize_embeddings(model, max(new_ids) + 1)
        new_ids |= set(range(n_embeddings, max(new_ids)))
    _write_means(model, sorted(new_ids), min(known, n_embeddings))


def resize_embeddings(model: Any, n_tokens: int) -> None:
    """Resize the embeddings to `n_tokens`; the values of added embeddings are not meaningful."""
    if n_tokens != num_embeddings(model):
        model.resize_token_embeddings(n_tokens, mean_resizing=False)


def _write_means(model: Any, ids: list[int], known: int) -> None:
    """Set the embeddings of `ids`, and their entries of an output bias, to the float32 mean of the first `known`."""
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if not has_tied_embeddings(model):
        tables.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    with torch.no_grad(), _gathered(tables):
        for table in tables:
            table[ids] = table[:known].mean(dim=0, dtype=torch.float32).to(table.dtype)


@contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    """Gather parameters that DeepSpeed ZeRO-3 has partitioned, within the block."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield
