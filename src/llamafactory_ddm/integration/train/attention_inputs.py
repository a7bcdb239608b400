"""The arguments `attention_mask` and `position_ids` of a run's forward passes: full, annealed or in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...diffusion.attention import annealed_visibility
from ...modeling.bidirectional import full_attention_mask, probe_bidirectional
from ...modeling.block_attention import probe_block_attention, two_stream_inputs
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.flash_attention import segment_arguments, segments
from ...modeling.model_info import implementation, is_flash

# Names in `CleanBatch.placement` and `TrainingBatch.placement`, and those that `segments` adds for flash attention.
PLACEMENT = ("is_padding", "document", "position_ids", "block", "is_noisy", "cu_seq_lens", "max_length")


class AttentionInputs:
    """Builds the arguments of a forward, for rows without padding and packing once for each step and shape."""

    def __init__(self, config: DiffusionConfig, seed: int) -> None:
        """Start a run.

        Args:
            config: the diffusion config of the run.
            seed: the run's seed, which keys the annealed mask.
        """
        self._is_block = config.attention == "block"
        self._seed = seed
        self._key: tuple[int, ...] | None = None
        self._inputs: dict[str, Any] = {}
        self._visible_key: tuple[int, int] | None = None
        self._visible = torch.empty(0)

    def probe(self, model: Any, inner: Any) -> None:
        """Check that the model attends as it should.

        Args:
            model: the prepared model.
            inner: the unwrapped model.
        Raises:
            NotBidirectionalError: if it does not.
        """
        probe = probe_block_attention if self._is_block else probe_bidirectional
        probe(model, inner=inner)

    def on_host(self, model: Any, shape: torch.Size, placement: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a placement before it goes to the device, completed by what flash attention takes in its stead.

        Args:
            model: the unwrapped model.
            shape: of the model's input.
            placement: on the CPU.
        """
        if self._is_block or not is_flash(implementation(model)):
            return dict(placement)
        rows, columns = shape
        found = segments((rows, columns), placement.get("is_padding"), placement.get("document"))
        positions = {name: value for name, value in placement.items() if name == "position_ids"}
        return found | positions

    def of_step(
        self, model: Any, ids: Tensor, placement: Mapping[str, Any], dtype: torch.dtype, *, ratio: float, step: int
    ) -> dict[str, Any]:
        """Return the arguments of a training step's forward.

        Args:
            model: the unwrapped model.
            ids: [batch, columns] int64, the model's input.
            placement: those of `PLACEMENT` that the batch has.
            dtype: of the attention's queries.
            ratio: probability that a query sees a later key, with full attention.
            step: number of finished optimiser steps.
        """
        draw = step if ratio < 1.0 else -1
        # By all rows, and it follows from the shape.
        is_shared = "cu_seq_lens" not in placement and all(value.dim() == 1 for value in placement.values())
        key = (draw, *ids.shape) if is_shared else None
        if key is None or key != self._key:
            visible = None if ratio == 1.0 else self._step_visibility(ratio, draw, ids.shape[1], ids.device)
            self._inputs = self.build(model, ids, placement, dtype, visible=visible)
            self._key = key
        return self._inputs

    def build(
        self,
        model: Any,
        ids: Tensor,
        placement: Mapping[str, Any],
        dtype: torch.dtype,
        *,
        visible: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of a forward; `visible` is that of `full_attention_mask`, without blocks.

        Flash attention needs a placement from `on_host`.
        """
        if self._is_block:
            return two_stream_inputs(model, ids, dtype=dtype, **placement)
        mask = full_attention_mask(
            model,
            batch=ids.shape[0],
            length=ids.shape[1],
            is_padding=placement.get("is_padding"),
            document=placement.get("document"),
            visible=visible,
            dtype=dtype,
            device=ids.device,
        )
        return {"attention_mask": mask, "position_ids": placement.get("position_ids"), **segment_arguments(placement)}

    def _step_visibility(self, ratio: float, draw: int, length: int, device: torch.device) -> Tensor:
        """Return the step's annealed visibility, [1, 1, length, length], drawn once per step and length."""
        if self._visible_key != (draw, length):
            self._visible = annealed_visibility(length, ratio, seed=self._seed, draw=draw, device=device)
            self._visible_key = (draw, length)
        return self._visible
