"""A hook that makes a causal language model compute its output embedding at selected positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class RowSelectingHead:
    """Makes a causal language model compute its output embedding for selected positions only.

    A forward pre-hook on the output embedding selects the hidden states. The model's own forward, its wrappers (DDP,
    FSDP, ZeRO-3, PEFT) and its logit soft-capping are unchanged.
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
        self.module = head
        self.hidden: Tensor | None = None
        self._head_index: Tensor | None = None
        self._limit: int | None = None
        self._keeps_hidden = False
        self._handle = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._head_index is None:
            return None
        hidden = args[0]
        selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._head_index)
        if self._keeps_hidden:
            self.hidden = selected
        return (selected[: self._limit], *args[1:])

    @contextmanager
    def only(self, head_index: Tensor, limit: int | None = None, *, keep_hidden: bool = False) -> Iterator[None]:
        """Within the block, the model's forward returns logits [n, vocab] for `head_index`, [n] into [batch * length].

        With `limit` it returns only the first `limit` of them. With `keep_hidden` it stores the hidden states of all
        in `hidden`, [n, width].
        """
        self._head_index, self._limit, self._keeps_hidden = head_index, limit, keep_hidden
        try:
            yield
        finally:
            self._head_index, self._limit, self._keeps_hidden = None, None, False

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self.hidden = None
