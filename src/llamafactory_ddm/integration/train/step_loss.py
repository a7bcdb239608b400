"""The loss of a training step: of all logits at once, or of a few rows at a time within the output embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modeling.quantization import evaluation_mode
from ...modeling.row_selecting_head import RowSelectingHead
from ...objectives.base import Objective
from ...utils.random_state import unchanged_random_state
from ..logs import get_logger
from .attention_inputs import PLACEMENT

logger = get_logger(__name__)
_NOT_SCORED = ("input_ids", "head_index", *PLACEMENT)  # the other inputs of a step have a value for each scored token


class StepLoss:
    """Computes the loss of micro-batches, without holding the logits of all scored tokens where that is possible.

    It is not possible where the output embedding is neither a linear layer nor plain LoRA on one (quantization, DoRA),
    or where the model or a hook changes the logits behind it (soft-capping). Where it is possible, torch.compile skips
    the output embedding; elsewhere it compiles one graph for every number of scored tokens.
    """

    def __init__(self, head: RowSelectingHead, objective: Objective, rows: int | None, *, is_compiled: bool) -> None:
        """Start a run.

        Args:
            head: of the unwrapped model.
            objective: noise process and loss.
            rows: logits of so many tokens at once; None for an automatic number, 0 for all.
            is_compiled: whether torch.compile compiles the model.
        """
        self._head, self._objective, self._rows = head, objective, rows
        self._is_compiled = is_compiled
        self._in_chunks: bool | None = None  # unknown before the first step

    def __call__(
        self, model: Any, z_t: Tensor, attention: Mapping[str, Any], inputs: Mapping[str, Tensor], denominator: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the sum of the terms, as `Objective.loss`.

        Args:
            model: the prepared model.
            z_t: [batch, columns] int64, its input.
            attention: further arguments of its forward.
            inputs: `head_index` and `scored` of the batch.
            denominator: as in `Objective.loss`.
        """
        index = inputs["head_index"]
        if self._in_chunks is None:
            reason = self._reason(model, z_t, attention)
            self._in_chunks = not reason
            if reason and self._rows != 0:
                say = logger.warning_rank0 if self._rows else logger.info_rank0
                say(f"Training holds the logits of all scored tokens at once, as {reason} (logits_chunk).")
            if self._is_compiled and self._in_chunks:
                self._head.leave_uncompiled()
        if not self._in_chunks:
            if self._is_compiled:
                torch._dynamo.maybe_mark_dynamic(index, 0)  # type: ignore[no-untyped-call]
            with self._head.only(index):
                logits = model(input_ids=z_t, use_cache=False, **attention).logits
            return self._objective.loss(logits.reshape(-1, logits.shape[-1]), inputs, denominator)

        scored = {name: value for name, value in inputs.items() if name not in _NOT_SCORED}

        def cost(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return self._objective.loss(logits, {name: value[rows] for name, value in scored.items()}, denominator)

        with self._head.losing(index, cost, rows=self._rows) as values:
            output = model(input_ids=z_t, use_cache=False, **attention).logits
        loss, terms = values
        # The gradient flows through the output; its value may have been rounded to half precision on its way.
        return loss + (output - output.detach()).sum(), terms

    def _reason(self, model: Any, z_t: Tensor, attention: Mapping[str, Any]) -> str:
        """Return why the loss cannot be computed in chunks; empty if it can. Every rank must call it."""
        if self._rows == 0:
            return "logits_chunk is 0"
        layer, reason = self._head.layer()
        if layer is None:
            return reason
        model = getattr(model, "_orig_mod", model)  # nothing is compiled for this
        with (
            torch.no_grad(),
            evaluation_mode(model),
            unchanged_random_state(),
            self._head.constant(z_t.device) as values,
        ):
            logits = model(input_ids=z_t, use_cache=False, **attention).logits
        if not torch.equal(logits.reshape(-1).float(), values.float()):
            return "the model changes the logits behind its output embedding"
        return ""
