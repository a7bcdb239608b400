"""The diffusion metrics of a training log: loss term, masked fraction, attention ratio, tokens per second, MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple

import torch
from torch import Tensor

from ...modeling.model_flops import StepCounts
from .utilization import Utilization


class StepMetrics:
    """Sums over the micro-batches since the last log; the loss terms stay on the device."""

    def __init__(self) -> None:
        self._terms: Tensor | None = None
        self._counts = torch.zeros(3, dtype=torch.int64)  # masked, maskable, tokens
        self._step_counts = torch.zeros(4, dtype=torch.int64)  # those of StepCounts
        self._start: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        """Start the clock of tokens_per_second, unless it runs."""
        if self._start is None:
            self._start, self._paused = time.perf_counter(), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the block's time from tokens_per_second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def add_counts(self, counts: StepCounts, *, n_masked: int, n_maskable: int, n_tokens: int) -> None:
        """Add the counts of a micro-batch."""
        self._counts += torch.tensor((n_masked, n_maskable, n_tokens))
        self._step_counts += torch.tensor(astuple(counts))

    def add_terms(self, terms: Tensor) -> None:
        """Add the summed loss terms of a micro-batch; scalar, on the device."""
        self._terms = terms if self._terms is None else self._terms + terms

    def take(
        self,
        sum_over_ranks: Callable[[Tensor], Tensor],
        term: str,
        device: torch.device,
        attention_ratio: float,
        utilization: Utilization | None,
    ) -> dict[str, float]:
        """Return the metrics since the last call, and reset them; empty without a step. Waits for the device.

        Args:
            sum_over_ranks: called twice on every rank.
            term: name of the loss term.
            device: device of the sums.
            attention_ratio: of the last step.
            utilization: gives the MFU; None for none.
        """
        if self._terms is None:
            return {}
        terms = sum_over_ranks(self._terms).item()
        sums = sum_over_ranks(torch.cat([self._counts, self._step_counts]).to(device)).tolist()
        (n_masked, n_maskable, n_tokens), counts = sums[:3], StepCounts(*sums[3:])
        seconds = time.perf_counter() - (self._start or 0.0) - self._paused
        self._terms, self._start, self._paused = None, None, 0.0
        self._counts.zero_()
        self._step_counts.zero_()
        metrics = {
            term: terms / max(counts.logits, 1),
            "masked_fraction": n_masked / max(n_maskable, 1),
            "attention_ratio": attention_ratio,
            "tokens_per_second": round(n_tokens / seconds, 1) if seconds > 0 else 0.0,
        }
        if utilization is not None and seconds > 0:
            metrics["mfu"] = float(f"{utilization.of(counts, seconds):.4g}")
        return metrics
