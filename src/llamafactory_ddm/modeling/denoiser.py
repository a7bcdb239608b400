"""A bidirectional model as the sampler's denoiser: logits at selected positions, in chunks.

The output embedding is applied only to the hidden states of these positions, so [batch, length, vocab] never exists.
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
from .kv_cache import ColumnCache
from .model_info import dtype_of, text_config

_ELEMENTS_AT_ONCE = 2**25  # 128 MiB in float32
# On a CPU a product of few rows with many outputs is about 1.5 times faster with the weight as the left factor, 1,024
# outputs at a time, and the number of rows a multiple of 16. Up to 8 rows it is not.
_OUTPUTS_AT_ONCE, _ROWS_MULTIPLE, _FEW_ROWS = 1024, 16, 8


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
        elements_at_once: int = _ELEMENTS_AT_ONCE,
        keep_hidden: bool = False,
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
            elements_at_once: largest number of logits in a chunk; a chunk has at least one row. There is a single
                chunk if the output embedding and soft-capping do not reproduce the model's logits.
            keep_hidden: whether to keep the hidden states of the latest call's logits in `hidden`, [n, width].
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
        self._rows_at_once = max(1, elements_at_once // int(text_config(model).vocab_size))
        self._cap: float | None = getattr(text_config(model), "final_logit_softcapping", None)
        self._can_project: bool | None = None
        self._buffers: list[Tensor] = []
        self._mask: tuple[tuple[int, ...], Any] | None = None
        self._requested: Tensor | None = None
        self._head = RowSelectingHead(model)

    def __call__(self, z: Tensor, flat_index: Tensor) -> Iterator[Tensor]:
        """Yield the logits of the tokens at `flat_index` in chunks; each is valid until the next is requested.

        Args:
            z: [batch, length] int64, noised ids.
            flat_index: [n] int64, ascending, into [batch * length].
        Yields:
            [n_chunk, vocab], logits at i for token i, in the order of `flat_index`.
        """
        z, flat_index = self._select_rows(z, flat_index)
        head_index = source_index(flat_index, self._shift)
        if self._can_project is False:
            yield self._all_logits(z, head_index)
            return
        # In the first call the model itself projects one hidden state, to test that `_projected` gives the same.
        first = self._forward(z, head_index, limit=0 if self._can_project else 1)
        hidden = self._take_hidden()
        if self._can_project is None:
            with self._projected(hidden[:1]) as projected:
                self._can_project = torch.allclose(projected.float(), first.float(), rtol=1e-2, atol=1e-3)
            if not self._can_project:
                yield self._all_logits(z, head_index)
                return
        for part in hidden.split(self._rows_at_once):
            with self._projected(part) as logits:
                yield logits

    def _all_logits(self, z: Tensor, head_index: Tensor) -> Tensor:
        """Return all logits, computed by the model itself."""
        logits = self._forward(z, head_index)
        self._take_hidden()
        return logits

    def _take_hidden(self) -> Tensor:
        """Return the inputs of the output embedding, and remove them from the head."""
        hidden, self._head.hidden = self._head.hidden, None
        if hidden is None:
            raise RuntimeError(f"{type(self._model).__name__} did not call its output embedding")
        self.hidden = hidden if self._keeps_hidden else None
        return hidden

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

    def _forward(self, z: Tensor, head_index: Tensor, limit: int | None = None) -> Tensor:
        """Return the logits at the first `limit` of `head_index`, [n] into the rows of `z`; the head keeps the hidden
        states at all."""
        return self._run(z, self._attention_mask(z), self._of_requested(self._position_ids), head_index, limit)

    def _run(
        self,
        ids: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        head_index: Tensor,
        limit: int | None,
        cache: ColumnCache | None = None,
    ) -> Tensor:
        """Run the model once: `_forward` for these ids, [n_rows, n_columns]."""
        rest: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if cache is not None:
            rest["past_key_values"] = cache
        with torch.inference_mode(), self._head.only(head_index, limit, keep_hidden=True):
            logits: Tensor = self._model(
                input_ids=ids, attention_mask=mask, use_cache=cache is not None, **rest
            ).logits
        return logits.reshape(-1, logits.shape[-1])[:, : self._outputs]

    @contextmanager
    def _projected(self, hidden: Tensor) -> Iterator[Tensor]:
        """Return the logits of [n, width] hidden states; their memory is reused after the block."""
        head = self._head.module
        is_plain = type(head) is nn.Linear and not head._forward_hooks and hidden.dtype == head.weight.dtype
        if not (is_plain and hidden.device.type == "cpu" and isinstance(head, nn.Linear)) or len(hidden) <= _FEW_ROWS:
            with torch.inference_mode():
                logits = self._capped(head(hidden))[:, : self._outputs]
            yield logits
            return
        n, outputs = len(hidden), min(head.weight.shape[0], self._outputs or head.weight.shape[0])
        n_elements = n * outputs
        buffer = self._buffers.pop() if self._buffers else hidden.new_empty(0)
        with torch.inference_mode():
            if buffer.numel() < n_elements:
                buffer = hidden.new_empty(n_elements)
            logits = buffer[:n_elements].view(n, outputs)
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
        """Remove the hook from the model."""
        self._head.remove()
        self._buffers.clear()
