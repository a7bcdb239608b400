"""The one place that knows which row of a model's output belongs to which token, and that computes no other row.

With `shift` (DiffuLLaMA) the logits at position i - 1 predict token i, so token 0 is never scored; everything outside
this file sees logits at i for token i. The output embedding runs on the wanted rows alone: [batch, length, vocab]
never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def predictable(maskable: Tensor, shift: bool) -> Tensor:
    """Return the part of `maskable` that the model can predict: with `shift` everything but position 0.

    Args:
        maskable: [batch, length] bool.
        shift: whether logits at i - 1 predict token i.
    Returns:
        [batch, length] bool.
    """
    if not shift:
        return maskable
    result = maskable.clone()
    result[:, 0] = False
    return result


def head_rows(select: Tensor, shift: bool) -> Tensor:
    """Return which rows of the flattened hidden states predict the selected tokens.

    Args:
        select: [batch, length] bool, the tokens to predict.
        shift: whether logits at i - 1 predict token i.
    Returns:
        [n_selected] int64 into [batch * length], in row-major order of `select`.
    Raises:
        ValueError: if `shift` is set and position 0 is selected, which nothing predicts.
    """
    if shift and bool(select[:, 0].any()):
        raise ValueError("with shift the first token of a sequence is never predicted; leave position 0 unselected")
    return select.flatten().nonzero()[:, 0] - int(shift)


class RowSelectingHead:
    """Lets a causal language model compute its output embedding for chosen rows only.

    A forward pre-hook on the output embedding picks the rows, so the model's own forward, its wrappers (DDP, FSDP,
    ZeRO-3, PEFT) and its logit soft-capping stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        """Install the hook on `model`'s output embedding.

        Raises:
            ValueError: if the model has none.
        """
        find: Any = getattr(model, "get_output_embeddings", None)
        head: nn.Module | None = None if find is None else find()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embedding; a causal language model is needed")
        self._rows: Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows), *args[1:])

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Within the block, forwards return logits [n_rows, vocab] for `rows`, [n_rows] into [batch * length]."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()


class ModelDenoiser:
    """What the sampler calls: noised ids and a selection in, logits for the selected tokens out."""

    def __init__(self, model: nn.Module, *, shift: bool, attention_mask: Any = None) -> None:
        """Wrap a bidirectional `model`; `attention_mask` is passed to every forward as it is."""
        self._model = model
        self._shift = shift
        self._attention_mask = attention_mask
        self._head = RowSelectingHead(model)

    def __call__(self, z: Tensor, select: Tensor) -> Tensor:
        """Return the logits of the selected tokens.

        Args:
            z: [batch, length] int64, noised ids.
            select: [batch, length] bool.
        Returns:
            [n_selected, vocab], logits at i for token i, in row-major order of `select`.
        """
        with torch.inference_mode(), self._head.only(head_rows(select, self._shift)):
            logits: Tensor = self._model(input_ids=z, attention_mask=self._attention_mask, use_cache=False).logits
        return logits.reshape(-1, logits.shape[-1])

    def close(self) -> None:
        """Take the hook off the model."""
        self._head.remove()
