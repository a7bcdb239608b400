"""Forward passes for the sampler: hidden states at selected positions, and their logits in chunks.

The output embedding is applied only to these hidden states, so [batch, length, vocab] never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .kv_cache import ColumnCache
from .model_info import text_config
from .row_selecting_head import RowSelectingHead

ELEMENTS_AT_ONCE = 2**25  # 128 MiB in float32
_SLOW_ROWS = range(5, 16)  # on the CPUs measured, their logits take up to twice as long as those of 16 rows


def _projects_into_buffers(device: torch.device) -> bool:
    """Tell whether logits are written to reused buffers, and `_SLOW_ROWS` are padded: on a CPU.

    Not under autocast, which does not reach a product with an output argument.
    """
    return device.type == "cpu" and not torch.is_autocast_enabled(device.type)


@dataclass(frozen=True, eq=False)
class ModelPass:
    """A forward pass of the model.

    Attributes:
        ids: [n_rows, n_columns] int64.
        mask: the model's `attention_mask`, see `full_attention_mask`.
        position_ids: [n_rows, n_columns] int64; None for 0, 1, 2 …
        head_index: [n] int64, positions in [n_rows * n_columns] whose hidden states are wanted.
        cache: of keys and values, or None.
        columns: see `ColumnCache.writing`.
        cache_rows: its `rows`.
        end: its `end`.
    """

    ids: Tensor
    mask: Any
    position_ids: Tensor | None
    head_index: Tensor
    cache: ColumnCache | None = None
    columns: Tensor | slice | None = None
    cache_rows: Tensor | None = None
    end: int | None = None

    @property
    def n_rows(self) -> int:
        """Return the number of rows."""
        return self.ids.shape[0]

    @property
    def n_columns(self) -> int:
        """Return the number of columns that the pass computes."""
        return self.ids.shape[1]

    @property
    def n_keys(self) -> int:
        """Return the number of keys that each query sees."""
        if self.cache is None:
            return self.n_columns
        return self.cache.length if self.end is None else self.end

    def writing(self) -> AbstractContextManager[None]:
        """Within the block, the cache stores the keys and values of the pass."""
        if self.cache is None:
            return nullcontext()
        return self.cache.writing(self.columns, rows=self.cache_rows, end=self.end)


# Hidden states at `head_index`, [n, width], and their logits [n, vocab], or None where `Runner.logits` computes them.
PassOutput = tuple[Tensor, Tensor | None]


class Runner(Protocol):
    """What runs the model for a denoiser: a `ModelRunner`, or a server that joins the passes of several denoisers."""

    def run(self, one: ModelPass) -> PassOutput:
        """Run the model once."""

    def logits(self, hidden: Tensor, outputs: int | None, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield the first `outputs` logits of [n, width] hidden states in chunks; see `ModelRunner.logits`."""

    def close(self) -> None:
        """Stop using the model."""


class ModelRunner:
    """Runs a model for one denoiser at a time."""

    def __init__(self, model: nn.Module) -> None:
        """Install a hook on the output embedding of `model`, which `close` removes."""
        self.model = model
        self._rows_at_once = max(1, ELEMENTS_AT_ONCE // int(text_config(model).vocab_size))
        self._cap: float | None = getattr(text_config(model), "final_logit_softcapping", None)
        self._can_project: bool | None = None
        self._buffers: list[Tensor] = []
        self._head = RowSelectingHead(model)

    def run(self, one: ModelPass) -> PassOutput:
        """Run the model once; return the model's own logits too where `logits` would not reproduce them.

        Raises:
            RuntimeError: if the model does not call its output embedding.
        """
        with one.writing():
            return self.forward(one, one.cache)

    def forward(self, one: ModelPass, cache: Cache | None) -> PassOutput:
        """Do what `run` does, with a cache that is already within `writing`."""
        if self._can_project is False:
            return self._forward(one, cache, limit=None)
        # In the first call the model itself projects one hidden state, to test whether `project` gives the same.
        hidden, first = self._forward(one, cache, limit=0 if self._can_project else 1)
        if self._can_project is None:
            with self.project(hidden[:1], None) as projected:
                self._can_project = torch.allclose(projected.float(), first.float(), rtol=1e-2, atol=1e-3)
            if not self._can_project:
                return self._forward(one, cache, limit=None)
        return hidden, None

    def _forward(self, one: ModelPass, cache: Cache | None, limit: int | None) -> tuple[Tensor, Tensor]:
        """Return the hidden states at `head_index`, and the logits of the first `limit` of them."""
        rest: dict[str, Any] = {} if one.position_ids is None else {"position_ids": one.position_ids}
        if cache is not None:
            rest["past_key_values"] = cache
        with torch.inference_mode(), self._head.only(one.head_index, limit, keep_hidden=True):
            logits: Tensor = self.model(
                input_ids=one.ids, attention_mask=one.mask, use_cache=cache is not None, **rest
            ).logits
        hidden, self._head.hidden = self._head.hidden, None
        if hidden is None:
            raise RuntimeError(f"{type(self.model).__name__} did not call its output embedding")
        return hidden, logits.reshape(-1, logits.shape[-1])

    def logits(self, hidden: Tensor, outputs: int | None, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield the logits of hidden states in chunks; each is valid until the next is requested.

        Args:
            hidden: [n, width].
            outputs: number of ids, from 0, that get a logit; None for all.
            rows_at_once: rows of a chunk; None for as many as `ELEMENTS_AT_ONCE` logits allow.
        Yields:
            [n_chunk, outputs].
        """
        for part in hidden.split(rows_at_once or self._rows_at_once):
            with self.project(part, outputs) as logits:
                yield logits

    @contextmanager
    def project(self, hidden: Tensor, outputs: int | None) -> Iterator[Tensor]:
        """Return the logits [n, outputs] of [n, width] hidden states; their memory is reused after the block."""
        head = self._head.module
        is_plain = type(head) is nn.Linear and not head._forward_hooks and hidden.dtype == head.weight.dtype
        is_plain &= "forward" not in vars(head)  # which accelerate replaces where it offloads the weight
        if not (is_plain and isinstance(head, nn.Linear) and _projects_into_buffers(hidden.device)):
            with torch.inference_mode():
                logits = self._capped(head(hidden))[:, :outputs]
            yield logits
            return
        n, outputs = len(hidden), min(head.weight.shape[0], outputs or head.weight.shape[0])
        n_rows = _SLOW_ROWS.stop if n in _SLOW_ROWS else n
        buffer = self._buffers.pop() if self._buffers else hidden.new_empty(0)
        with torch.inference_mode():
            if buffer.numel() < n_rows * outputs:
                buffer = hidden.new_empty(n_rows * outputs)
            room = buffer[: n_rows * outputs].view(n_rows, outputs)
            hidden = functional.pad(hidden, (0, 0, 0, n_rows - n))
            logits = torch.mm(hidden, head.weight[:outputs].T, out=room)[:n]
            if head.bias is not None:
                logits += head.bias[:outputs]
            logits = self._capped(logits)
        try:
            yield logits
        finally:
            self._buffers.append(buffer)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def close(self) -> None:
        """Remove the hook from the model."""
        self._head.remove()
        self._buffers.clear()
