"""A bidirectional model as the sampler's denoiser: logits at selected positions, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.shift import source_index
from ..utils.devices import integers_on
from .bidirectional import full_attention_mask
from .model_info import dtype_of
from .model_runner import ModelPass, ModelRunner, PassOutput, Runner

Answers = Sequence[Sequence[int]]  # of `ModelDenoiser.questions`, [batch][n]


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
        self._requested: list[int] | None = None
        self._rows: Tensor | None = None
        self._computed: Tensor | None = None
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

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int = 0) -> Tensor:
        """Return [batch, n] int64, what the host must know of each row; see `sampling.CachingDenoiser`.

        The first number is how many positions are asked for.
        """
        return asked.sum(dim=1, keepdim=True)

    def step(
        self, scope: Tensor, branch: int = 0, answers: Answers | None = None
    ) -> Callable[[Tensor, Tensor], Iterator[Tensor]]:
        """Return the denoiser of a step.

        Args:
            scope: [batch, length] bool, the current block of each row.
            branch: which of several inputs per step it gets; a cache keeps them apart.
            answers: [batch][n] of `questions`; None to wait for them.
        """

        def denoise(z: Tensor, flat_index: Tensor) -> Iterator[Tensor]:
            return self._logits(*self.passes(z, flat_index, scope, branch, answers))

        return denoise

    def take_computed(self) -> Tensor:
        """Return [batch] int64, the tokens of each row that went through the model since the last call."""
        if self._computed is None:
            raise RuntimeError("take_computed() was called before a pass")
        computed, self._computed = self._computed, torch.zeros_like(self._computed)
        return computed

    def passes(
        self,
        z: Tensor,
        flat_index: Tensor,
        scope: Tensor | None = None,
        branch: int = 0,
        answers: Answers | None = None,
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return the forward passes of a call, which must all be run; see `__call__`.

        Args:
            z: [batch, length] int64, noised ids.
            flat_index: [n] int64, ascending, into [batch * length].
            scope: see `sampling.CachingDenoiser`; a denoiser with a cache reads it.
            branch: the same.
            answers: [batch][n] of `questions`; None to wait for them.
        Returns:
            The passes, and for each [n_i] int64, where its hidden states belong among those of all.
        """
        if self._computed is None or len(self._computed) != len(z):
            self._computed = torch.zeros_like(z[:, 0])
        if answers is None:
            asked = marked(flat_index, z)
            answers = self.questions(z, asked, asked if scope is None else scope, branch).tolist()
        z, flat_index = self._select_rows(z, flat_index, [row for row, answer in enumerate(answers) if answer[0]])
        answers = [answer for answer in answers if answer[0]]
        return self._passes_of(z, source_index(flat_index, self._shift), scope, branch, answers)

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int, answers: Answers
    ) -> tuple[list[ModelPass], list[Tensor]]:
        """Return `passes` of the rows with a requested position; `head_index` is [n] into them."""
        self._count(None, z.shape[1])
        one = ModelPass(z, self._attention_mask(z), self._of_requested(self._position_ids), head_index)
        return [one], [torch.arange(len(head_index), device=z.device)]

    def _count(self, rows: Tensor | None, n_columns: int) -> None:
        """Add the columns of a pass to `_computed`; `rows` are [n] int64 of the canvas, None for those requested."""
        rows = self._rows if rows is None else rows
        if self._computed is not None and rows is None:
            self._computed += n_columns
        elif self._computed is not None and rows is not None:
            self._computed.index_add_(0, rows, torch.full_like(rows, n_columns))

    def _select_rows(self, z: Tensor, flat_index: Tensor, requested: list[int]) -> tuple[Tensor, Tensor]:
        """Return the requested rows, and the flat indices within them; other rows are not computed."""
        batch, length = z.shape
        if len(requested) == batch:
            self._requested = self._rows = None
            return z, flat_index
        if requested != self._requested:
            self._mask = None
            self._rows = integers_on(z.device, requested)
        self._requested = requested
        assert self._rows is not None
        row = torch.div(flat_index, length, rounding_mode="floor")
        return z[self._rows], (torch.searchsorted(self._rows, row) - row) * length + flat_index

    def _of_requested(self, value: Tensor | None) -> Tensor | None:
        return value if value is None or self._rows is None else value[self._rows]

    def _asked_heads(self, asked: Tensor) -> Tensor:
        """Return [batch, length] bool, the columns whose hidden states predict the positions asked for."""
        return asked.roll(-1, dims=1) if self._shift else asked

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


def marked(flat_index: Tensor, like: Tensor) -> Tensor:
    """Return a bool tensor with the shape of `like`, True at `flat_index`."""
    nothing = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    return nothing.index_fill(0, flat_index, True).view_as(like)


def positions_in(rows: Tensor, head_index: Tensor, length: int, n: int) -> Tensor:
    """Return [n] int64, ascending, which entries of `head_index` lie in some rows.

    A stable sort moves them to the front; `nonzero` would wait for the device to count them.

    Args:
        rows: [n_rows] int64, ascending.
        head_index: [m] int64 into [batch * length].
        length: of a row.
        n: the number of these entries.
    """
    row = torch.div(head_index, length, rounding_mode="floor")
    found = rows[torch.searchsorted(rows, row).clamp(max=len(rows) - 1)] == row
    return found.to(torch.uint8).sort(descending=True, stable=True).indices[:n]


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
