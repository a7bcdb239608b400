"""A bidirectional model as the sampler's denoiser: logits at selected positions, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.shift import source_index
from .bidirectional import full_attention_mask
from .model_info import dtype_of
from .model_runner import ModelPass, ModelRunner, PassOutput, Runner


class ModelDenoiser:
    """The sampler's denoiser: takes noised ids and positions, and yields the logits at these positions.

    Logits come in chunks, so that [n, vocab] of a long batch never exists at once. Later calls reuse their memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shift: bool,
        is_padding: Tensor | None = None,
        outputs: int | None = None,
        rows_at_once: int | None = None,
        keep_hidden: bool = False,
        runner: Runner | None = None,
    ) -> None:
        """Wrap a bidirectional `model`.

        Args:
            model: a causal language model whose attention has been switched.
            shift: whether its logits at i predict token i + 1. Then the first token of a row is never predicted, and
                its position must not be requested.
            is_padding: [batch, length] bool, padding on the left; no token attends to it, and `position_ids` start at
                the first real token. None if there is none.
            outputs: number of ids, from 0, that get a logit; models often have more embeddings than their tokenizer
                has tokens. None for all.
            rows_at_once: positions in a chunk; None for as many as a bound on the number of logits allows. There is a
                single chunk if the output embedding and soft-capping do not reproduce the model's logits.
            keep_hidden: whether to keep the hidden states of the latest call's logits in `hidden`, [n, width].
            runner: what runs the model, closed by `close`; None for a `ModelRunner` of its own.
        """
        self.hidden: Tensor | None = None
        self._keeps_hidden = keep_hidden
        self._model = model
        self._shift = shift
        self._outputs = outputs
        self._is_padding = is_padding
        self._position_ids: Tensor | None = None
        if is_padding is not None:
            self._position_ids = ((~is_padding).cumsum(dim=1) - 1).clamp(min=0)
        self._rows_at_once = rows_at_once
        self._mask: tuple[tuple[int, ...], Any] | None = None
        self._requested: Tensor | None = None
        self._runner = ModelRunner(model) if runner is None else runner

    def __call__(self, z: Tensor, flat_index: Tensor) -> Iterator[Tensor]:
        """Return the logits of the tokens at `flat_index` in chunks; each is valid until the next is requested.

        Args:
            z: [batch, length] int64, noised ids.
            flat_index: [n] int64, ascending, into [batch * length].
        Yields:
            [n_chunk, vocab], logits at i for token i, in the order of `flat_index`.
        """
        return self._logits(*self.passes(z, flat_index))

    def _logits(self, passes: Sequence[ModelPass], order: Sequence[Tensor]) -> Iterator[Tensor]:
        """Run the passes and yield the logits in chunks."""
        hidden, logits = in_order([self._runner.run(one) for one in passes], order)
        self.hidden = hidden if self._keeps_hidden else None
        if logits is not None:
            yield logits[:, : self._outputs]
        else:
            yield from self._runner.logits(hidden, self._outputs, self._rows_at_once)

    def passes(
        self, z: Tensor, flat_index: Tensor, scope: Tensor | None = None, branch: int = 0
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return the forward passes of a call, which must all be run; see `__call__`.

        Args:
            z: [batch, length] int64, noised ids.
            flat_index: [n] int64, ascending, into [batch * length].
            scope: see `sampling.CachingDenoiser`; a denoiser with a cache reads it.
            branch: the same.
        Returns:
            The passes, and for each [n_i] int64, where its hidden states belong among those of all.
        """
        z, flat_index = self._select_rows(z, flat_index)
        return self._passes_of(z, source_index(flat_index, self._shift), scope, branch)

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return `passes` of the rows with a requested position; `head_index` is [n] into them."""
        one = ModelPass(z, self._attention_mask(z), self._of_requested(self._position_ids), head_index)
        return [one], [torch.arange(len(head_index), device=z.device)]

    def _select_rows(self, z: Tensor, flat_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows with a requested position, and the flat indices within them; other rows are not computed."""
        batch, length = z.shape
        row = torch.div(flat_index, length, rounding_mode="floor")
        requested = torch.zeros(batch, dtype=torch.bool, device=z.device).index_fill_(0, row, True)
        if bool(requested.all()):
            self._requested = None
            return z, flat_index
        if self._requested is None or not torch.equal(requested, self._requested):
            self._mask = None
        self._requested = requested
        return z[requested], ((requested.cumsum(dim=0) - 1)[row] - row) * length + flat_index

    def _of_requested(self, value: Tensor | None) -> Tensor | None:
        return value if value is None or self._requested is None else value[self._requested]

    def _attention_mask(self, z: Tensor) -> Any:
        """Return the attention mask, built once for each shape of `z`."""
        if self._mask is None or self._mask[0] != tuple(z.shape):
            self._mask = (tuple(z.shape), self._mask_of(z, self._of_requested(self._is_padding)))
        return self._mask[1]

    def _mask_of(self, z: Tensor, is_padding: Tensor | None, columns: Tensor | None = None) -> Any:
        """Return the mask of a pass over `columns` of `z`; see `full_attention_mask`."""
        return full_attention_mask(
            self._model,
            batch=z.shape[0],
            length=z.shape[1],
            is_padding=is_padding,
            visible=None,
            columns=columns,
            dtype=dtype_of(self._model),
            device=z.device,
        )

    def close(self) -> None:
        """End the use of the model."""
        self._runner.close()


def in_order(outputs: Sequence[PassOutput], order: Sequence[Tensor]) -> PassOutput:
    """Join what the passes of a call returned.

    Args:
        outputs: of each pass.
        order: [n_i] int64, where each state of a pass belongs among those of all.
    """
    if len(outputs) == 1:
        return outputs[0]
    back = torch.cat(list(order)).argsort()
    hidden = torch.cat([states for states, _ in outputs])[back]
    logits = [values for _, values in outputs if values is not None]
    return hidden, torch.cat(logits)[back] if len(logits) == len(outputs) else None
