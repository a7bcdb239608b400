"""A bidirectional model as the sampler calls it: logits of chosen tokens, in parts.

The output embedding runs on the hidden states of these tokens alone: [batch, length, vocab] never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..objectives.shift import source_index
from .bidirectional import full_attention_mask
from .model_info import dtype_of, text_config

_ELEMENTS_AT_ONCE = 2**25  # 128 MiB in float32
# A product of few rows with many outputs is half as fast again on a CPU if the outputs are taken 1,024 at a time and
# come first, and the rows are a multiple of 16.
_OUTPUTS_AT_ONCE, _ROWS_MULTIPLE = 1024, 16


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
        self.module = head
        self.hidden: Tensor | None = None
        self._rows: Tensor | None = None
        self._at_once: int | None = None
        self._keeps = False
        self._handle = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        hidden = args[0]
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows)
        if self._keeps:
            self.hidden = chosen
        if self._at_once is not None:
            chosen = chosen[: self._at_once]
        return (chosen, *args[1:])

    @contextmanager
    def only(self, rows: Tensor, at_once: int | None = None, *, keep: bool = False) -> Iterator[None]:
        """Within the block, forwards return logits [n_rows, vocab] for `rows`, [n_rows] into [batch * length].

        With `at_once` they return those of the first `at_once` rows. With `keep` they leave in `hidden`
        [n_rows, width], what the output embedding would have been given for all.
        """
        self._rows, self._at_once, self._keeps = rows, at_once, keep
        try:
            yield
        finally:
            self._rows, self._at_once, self._keeps = None, None, False

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        self.hidden = None


class ModelDenoiser:
    """What the sampler calls: noised ids and places in, logits for the tokens at these places out.

    Logits come in parts, so that [n, vocab] of a long batch need not exist at once, and in memory that later calls use
    again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shift: bool,
        is_padding: Tensor | None = None,
        outputs: int | None = None,
        elements_at_once: int = _ELEMENTS_AT_ONCE,
        keep_hidden: bool = False,
    ) -> None:
        """Wrap a bidirectional `model`.

        Args:
            model: a causal language model whose attention has been switched.
            shift: whether its logits at i predict token i + 1. Then the first token of a row is never predicted, and
                its place must not be asked for.
            is_padding: [batch, length] bool, tokens before a text that are none; nothing attends to them, and
                positions count from the first token that is real. None where all are real.
            outputs: how many of the ids, from 0, have a logit; models often have more rows than their tokenizer has
                tokens. None for all.
            elements_at_once: logits that a part may hold, at least one row. A model that changes its logits in a way
                that is not known here gives all in one part.
            keep_hidden: whether to leave in `hidden` [n, width], the states that the latest call's logits come from.
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
        self._at_once = max(1, elements_at_once // int(text_config(model).vocab_size))
        self._cap: float | None = getattr(text_config(model), "final_logit_softcapping", None)
        self._knows_head: bool | None = None
        self._buffers: list[Tensor] = []
        self._mask: tuple[tuple[int, ...], Any] | None = None
        self._asked: Tensor | None = None
        self._head = RowSelectingHead(model)

    def __call__(self, z: Tensor, place: Tensor) -> Iterator[Tensor]:
        """Yield the logits of the tokens at `place` in parts, each of which is valid until the next is asked for.

        Args:
            z: [batch, length] int64, noised ids.
            place: [n] int64, ascending, into [batch * length].
        Yields:
            [n_part, vocab], logits at i for token i, in the order of `place`.
        """
        z, place = self._unfinished(z, place)
        rows = source_index(place, self._shift)
        if self._knows_head is False:
            yield self._whole(z, rows)
            return
        # At first the model itself projects one row, which shows whether projecting the others here gives the same.
        first = self._forward(z, rows, at_once=0 if self._knows_head else 1)
        hidden = self._keep()
        if self._knows_head is None:
            with self._projected(hidden[:1]) as own:
                self._knows_head = torch.allclose(own.float(), first.float(), rtol=1e-2, atol=1e-3)
            if not self._knows_head:
                yield self._whole(z, rows)
                return
        for part in hidden.split(self._at_once):
            with self._projected(part) as logits:
                yield logits

    def _whole(self, z: Tensor, rows: Tensor) -> Tensor:
        """Return all logits as the model itself makes them."""
        logits = self._forward(z, rows)
        self._keep()
        return logits

    def _keep(self) -> Tensor:
        """Return the states that the output embedding was given, and let the head forget them."""
        hidden, self._head.hidden = self._head.hidden, None
        if hidden is None:
            raise RuntimeError(f"{type(self._model).__name__} did not call its output embedding")
        self.hidden = hidden if self._keeps_hidden else None
        return hidden

    def _unfinished(self, z: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sequences that are asked for alone, and the places in them; finished ones cost nothing."""
        batch, length = z.shape
        row = torch.div(place, length, rounding_mode="floor")
        asked = torch.zeros(batch, dtype=torch.bool, device=z.device).index_fill_(0, row, True)
        if bool(asked.all()):
            self._asked = None
            return z, place
        if self._asked is None or not torch.equal(asked, self._asked):
            self._mask = None
        self._asked = asked
        return z[asked], ((asked.cumsum(dim=0) - 1)[row] - row) * length + place

    def _of_asked(self, value: Tensor | None) -> Tensor | None:
        return value if value is None or self._asked is None else value[self._asked]

    def _forward(self, z: Tensor, rows: Tensor, at_once: int | None = None) -> Tensor:
        position_ids = self._of_asked(self._position_ids)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        with torch.inference_mode(), self._head.only(rows, at_once, keep=True):
            logits: Tensor = self._model(
                input_ids=z, attention_mask=self._attention_mask(z), use_cache=False, **positions
            ).logits
        return logits.reshape(-1, logits.shape[-1])[:, : self._outputs]

    @contextmanager
    def _projected(self, hidden: Tensor) -> Iterator[Tensor]:
        """Give the logits of [n, width] hidden states; their memory is used again after the block."""
        head = self._head.module
        plain = type(head) is nn.Linear and not head._forward_hooks and hidden.dtype == head.weight.dtype
        if not (plain and hidden.device.type == "cpu" and isinstance(head, nn.Linear)):
            with torch.inference_mode():
                logits = self._capped(head(hidden))[:, : self._outputs]
            yield logits
            return
        n, outputs = len(hidden), min(head.weight.shape[0], self._outputs or head.weight.shape[0])
        needed = n * outputs
        buffer = self._buffers.pop() if self._buffers else hidden.new_empty(0)
        with torch.inference_mode():
            if buffer.numel() < needed:
                buffer = hidden.new_empty(needed)
            logits = buffer[:needed].view(n, outputs)
            columns = functional.pad(hidden, (0, 0, 0, -n % _ROWS_MULTIPLE)).T.contiguous()
            for low in range(0, outputs, _OUTPUTS_AT_ONCE):
                part = slice(low, min(low + _OUTPUTS_AT_ONCE, outputs))
                logits[:, part] = torch.mm(head.weight[part], columns)[:, :n].T
            if head.bias is not None:
                logits += head.bias[:outputs]
            logits = self._capped(logits)
        try:
            yield logits
        finally:
            self._buffers.append(buffer)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _attention_mask(self, z: Tensor) -> Any:
        """Return the mask, made once for a shape of `z`."""
        if self._mask is None or self._mask[0] != tuple(z.shape):
            mask = full_attention_mask(
                self._model,
                batch=z.shape[0],
                length=z.shape[1],
                is_padding=self._of_asked(self._is_padding),
                visible=None,
                dtype=dtype_of(self._model),
                device=z.device,
            )
            self._mask = (tuple(z.shape), mask)
        return self._mask[1]

    def close(self) -> None:
        """Take the hook off the model."""
        self._head.remove()
        self._buffers.clear()
