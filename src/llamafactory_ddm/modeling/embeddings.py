"""Embeddings for tokens that are new to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .quantization import is_quantized


def num_embeddings(model: Any) -> int:
    """Return how many tokens the input embedding has."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # under DeepSpeed ZeRO-3 a rank holds only a part


def has_tied_embeddings(model: Any) -> bool:
    """Tell whether input and output embedding are one weight, or there is no output embedding."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def init_new_embeddings(model: Any, ids: Iterable[int], *, known: int) -> None:
    """Set the embedding of every new id to the float32 mean of the first `known` embeddings; resize if needed.

    Embeddings that are added below the highest id get the mean too. An untied output embedding and its bias are
    treated alike.

    Args:
        model: a causal language model.
        ids: tokens that are new to the model, with or without an embedding.
        known: number of embeddings, from 0, that the model was trained with.
    Raises:
        ValueError: if there are new ids and the model is quantised.
    """
    wanted, rows = set(ids), num_embeddings(model)
    if not wanted:
        return
    if is_quantized(model):
        raise ValueError(f"{len(wanted)} tokens are new to the model, and a quantised model cannot grow")
    if max(wanted) >= rows:
        resize_embeddings(model, max(wanted) + 1)
        wanted |= set(range(rows, max(wanted)))
    _write_means(model, sorted(wanted), min(known, rows))


def resize_embeddings(model: Any, rows: int) -> None:
    """Resize the embeddings to `rows` tokens; added ones are not initialised to anything meaningful."""
    if rows != num_embeddings(model):
        model.resize_token_embeddings(rows, mean_resizing=False)


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
