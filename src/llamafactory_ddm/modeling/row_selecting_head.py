"""A hook that makes a causal language model compute its output embedding at selected positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.chunked_head import Cost, head_loss
from .lora import low_rank_parts, trained_copy, why_not_low_rank

# Number of a head -> `head_index` of the forward that runs. torch.compile takes a tensor that it reaches through a
# module, as a hook's attributes are, for one of fixed shape, and would recompile for each number of scored tokens.
_SELECTED: dict[int, Tensor] = {}
_numbers = count()


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
        self._number = next(_numbers)
        self._instead: Callable[[Tensor], Tensor] | None = None
        self._forward: Callable[[Tensor], Tensor] = self._call_instead  # one object, as torch.compile compares it
        self._limit: int | None = None
        self._keeps_hidden = False
        self._handle = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        head_index = _SELECTED.get(self._number)
        if head_index is None:
            return None
        selected = _select(args[0], head_index)
        if self._keeps_hidden:
            self.hidden = selected
        return (selected[: self._limit], *args[1:])

    @contextmanager
    def only(self, head_index: Tensor, limit: int | None = None, *, keep_hidden: bool = False) -> Iterator[None]:
        """Within the block, the model's forward returns logits [n, vocab] for `head_index`, [n] into [batch * length].

        With `limit` it returns only the first `limit` of them. With `keep_hidden` it stores the hidden states of all
        in `hidden`, [n, width].
        """
        _SELECTED[self._number], self._limit, self._keeps_hidden = head_index, limit, keep_hidden
        try:
            yield
        finally:
            del _SELECTED[self._number]
            self._limit, self._keeps_hidden = None, False

    def leave_uncompiled(self) -> None:
        """Let torch.compile leave out what `losing` and `constant` put in place of the output embedding."""
        self._forward = torch.compiler.disable(self._call_instead)

    def layer(self) -> tuple[Any | None, str]:
        """Return the layer that computes the logits: a linear layer, or LoRA on one.

        Returns:
            The layer and an empty text; or None and why `losing` cannot replace its forward.
        """
        module: Any = self.module
        if hasattr(module, "modules_to_save") and hasattr(module, "active_adapters"):
            module = trained_copy(module)
        if "forward" in vars(module):
            return None, "the forward of the output embedding is replaced"
        reason = "" if type(module) is nn.Linear else why_not_low_rank(module)
        return (None, reason) if reason else (module, "")

    def _call_instead(self, hidden: Tensor) -> Tensor:
        if self._instead is None:
            raise RuntimeError("the forward of the output embedding is not replaced")
        return self._instead(hidden)

    @contextmanager
    def _replaced(self, forward: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
        layer, reason = self.layer()
        if layer is None:
            raise RuntimeError(reason)
        self._instead = lambda hidden: forward(layer, hidden)
        vars(layer)["forward"] = self._forward
        try:
            yield
        finally:
            del vars(layer)["forward"]
            self._instead = None

    @contextmanager
    def losing(self, head_index: Tensor, cost: Cost, *, rows: int | None = None) -> Iterator[list[Tensor]]:
        """Within the block, the model's forward returns a loss of the logits instead of them, as [1, 1].

        The loss is computed within the forward of the output embedding, where wrappers have gathered its weight.

        Args:
            head_index: as in `only`.
            cost: as in `head_loss`.
            rows: as in `head_loss`.
        Yields:
            A list that holds the loss and the sum of its terms after the forward, both detached.
        """
        values: list[Tensor] = []

        def forward(layer: Any, hidden: Tensor) -> Tensor:
            hidden = _select(hidden, head_index)
            linear, low_rank = (layer, None) if type(layer) is nn.Linear else low_rank_parts(layer, hidden)
            loss, terms = head_loss(hidden, linear.weight, linear.bias, cost, low_rank=low_rank, rows=rows)
            values[:] = [loss.detach(), terms]
            return loss.reshape(1, 1)

        with self._replaced(forward):
            yield values

    @contextmanager
    def constant(self, device: torch.device) -> Iterator[Tensor]:
        """Within the block, the output embedding returns one row, [1, vocab], of whole numbers, which it yields.

        So the caller sees whether the model, or a hook, changes the logits behind the output embedding.
        """
        layer, _ = self.layer()
        vocabulary = 0 if layer is None else layer.out_features
        values = torch.arange(vocabulary, device=device) % 255 - 127  # exact in bfloat16

        def forward(layer: Any, hidden: Tensor) -> Tensor:
            return values.to(hidden.dtype)[None]

        with self._replaced(forward):
            yield values

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self.hidden = None


def _select(hidden: Tensor, head_index: Tensor) -> Tensor:
    """Return [n, width], the hidden states at `head_index` of [batch, length, width]."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, head_index)
