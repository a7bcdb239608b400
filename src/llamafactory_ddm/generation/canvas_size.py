"""The length of a canvas, from one forward pass over it with every editable position masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.canvas import Canvas, CanvasBatch, stack_canvases
from ..modeling.denoiser import ModelDenoiser
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.length_heads import LengthPredictors, mean_hidden
from ..sampling import SamplingSettings
from ..sampling.length_predictors import (
    PREDICTORS,
    FirstStep,
    calibrated_margin,
    default_margin,
    end_probability,
    up_to_block,
)

_GROW_LENGTH = 32


@dataclass(frozen=True)
class SizedCanvas:
    """A canvas of the size that its text is predicted to need.

    Attributes:
        canvas: with the positions that were cut off as room.
        nfe: forward passes that the prediction took.
        computed: tokens that went through the model for it, padding included.
    """

    canvas: Canvas
    nfe: int = 0
    computed: int = 0


class CanvasSizer:
    """Predicts how many positions a text needs, with `early_stop: predict` or `grow`, and cuts canvases to them."""

    def __init__(
        self,
        model: Any,
        config: DiffusionConfig,
        *,
        eos_ids: Sequence[int],
        n_ids: int,
        lengths: LengthPredictors | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: with bidirectional attention.
            config: of its diffusion process.
            eos_ids: EOS and padding tokens, which end a text.
            n_ids: ids that are tokens; the model may have more embeddings.
            lengths: fitted length predictors, or None.
        """
        self.model = model
        self.config = config
        self.eos_ids = tuple(sorted(eos_ids))
        self.lengths = lengths
        self._n_ids = n_ids
        variable = config.variable_length
        self.block = 1 if variable is None else variable.block or 1  # canvases are multiples of so many tokens

    @contextmanager
    def denoiser(
        self, canvases: Sequence[Canvas], *, keep_hidden: bool = False
    ) -> Iterator[tuple[CanvasBatch, ModelDenoiser]]:
        """Yield canvases as one batch, and the model as the sampler calls it; its hook is removed afterwards."""
        batch = stack_canvases(canvases, pad_id=0 if self.config.mask_token_id else 1)
        is_padding = batch.is_padding.to(self.model.device) if bool(batch.is_padding.any()) else None
        denoiser = ModelDenoiser(
            self.model, shift=self.config.shift, is_padding=is_padding, outputs=self._n_ids, keep_hidden=keep_hidden
        )
        try:
            yield batch, denoiser
        finally:
            denoiser.close()

    def margin(self, settings: SamplingSettings, canvas: Canvas) -> float:
        """Return the margin of the length predictor on a canvas: the calibrated one, or what the coverage itself says.

        Raises:
            ValueError: if there is no calibrated one and the predictor has no other.
        """
        name, coverage, why = settings.length_predictor, settings.length_coverage, self.uncalibrated(settings, canvas)
        if why is not None or self.lengths is None:
            return default_margin(name, coverage, why or "")
        return calibrated_margin(name, self.lengths.least_margins[name], coverage)

    def uncalibrated(self, settings: SamplingSettings, canvas: Canvas) -> str | None:
        """Return why the fitted margins do not hold for a canvas and settings, or None if they do."""
        if self.lengths is None or settings.length_predictor not in self.lengths.least_margins:
            return "they have not been fitted"
        whole = len(canvas) + canvas.room
        if whole != self.lengths.canvas:
            return f"they were fitted with cutoff_len: {self.lengths.canvas}, and this canvas has {whole} tokens"
        if settings.logits.eos_penalty or set(settings.logits.suppress) & set(self.eos_ids):
            return "they were fitted without eos_penalty and with ends that may be written"
        return None

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Find before the first forward pass why a size could not be predicted.

        Raises:
            ValueError: see `sized`.
        """
        way = settings.early_stop
        if way not in ("predict", "grow"):
            return
        if not self.eos_ids:
            raise ValueError(
                f"early_stop: {way} needs a tokenizer with an end-of-text token, and this one has none; take "
                "early_stop: none"
            )
        if self.config.variable_length is None and not self.config.train_on_padding:
            raise ValueError(
                f"early_stop: {way} needs a model that has learnt to generate padding after the end of a text, and "
                "this one was trained without variable_length; train it so, or take early_stop: eos"
            )
        for canvas in canvases:
            if not all(canvas.editable[canvas.editable.index(True) :]):
                raise ValueError(
                    f"early_stop: {way} cuts positions off at the end of a text, and here fixed tokens follow them "
                    "(infilling); take early_stop: eos"
                )
            if way == "predict":
                self.margin(settings, canvas)

    def first_step(
        self, canvases: Sequence[Canvas], settings: SamplingSettings | None = None, *, keep_hidden: bool = False
    ) -> tuple[FirstStep, Tensor | None]:
        """Return what one forward pass over fully masked canvases says of their length, fitted heads included.

        Args:
            canvases: of one batch.
            settings: whose suppressed tokens and eos_penalty count; None for the model's own distribution.
            keep_hidden: whether to return the hidden states too, [n_editable, width] in row-major order.
        Raises:
            ValueError: if the heads are those of another model.
        """
        heads = None if self.lengths is None else self.lengths.heads
        with self.denoiser(canvases, keep_hidden=keep_hidden or heads is not None) as (batch, denoiser):
            x, editable = batch.x.to(self.model.device), batch.editable.to(self.model.device)
            ended = end_probability(
                denoiser,
                x,
                editable=editable,
                mask_id=self.config.mask_token_id,
                end_ids=self.eos_ids,
                suppress=() if settings is None else settings.logits.suppress,
                eos_penalty=0.0 if settings is None else settings.logits.eos_penalty,
            )
            hidden = denoiser.hidden
        length = behind = None
        if heads is not None and hidden is not None:
            if hidden.shape[1] != heads.width:
                raise ValueError(
                    f"the length predictors were fitted on a model of width {heads.width}, this one has "
                    f"{hidden.shape[1]}; fit them again with llamafactory-ddm fit-length"
                )
            heads.to(hidden.device)
            with torch.inference_mode():
                length = heads.expected_places(mean_hidden(hidden, editable))
                behind = torch.zeros_like(ended).masked_scatter_(editable, heads.behind(hidden))
        return FirstStep(editable, ended, length, behind), hidden

    def grow_length(self, settings: SamplingSettings) -> int:
        """Return the tokens that `grow` starts with and adds: the key's, else the model's block, else 32."""
        return settings.grow_length or (self.block if self.block > 1 else _GROW_LENGTH)

    def sized(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[SizedCanvas]:
        """Cut canvases to the size that the settings ask for, before anything is generated.

        Args:
            canvases: of one batch.
            settings: with `early_stop: predict` the length predictor gives the size; with `grow` a canvas starts with
                `grow_length` positions and gets as many more while the model does not predict an end in it.
        Raises:
            ValueError: if there is no EOS token, the model has not learnt to generate padding, fixed tokens follow
                editable positions, or the predictor has no margin that holds.
        """
        self.check(canvases, settings)
        if settings.early_stop == "predict":
            margins = torch.tensor([self.margin(settings, canvas) for canvas in canvases], dtype=torch.float64)
            step, _ = self.first_step(canvases, settings)
            needed = PREDICTORS[settings.length_predictor].places(step, margins).tolist()
            width = max(map(len, canvases))
            return [SizedCanvas(self.rounded(canvas, n), 1, width) for canvas, n in zip(canvases, needed, strict=True)]
        if settings.early_stop == "grow":
            return self._grown(canvases, settings)
        return [SizedCanvas(canvas) for canvas in canvases]

    def _grown(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[SizedCanvas]:
        """Lengthen canvases, a forward pass each time, until the model predicts that their texts end in them."""
        result = [SizedCanvas(self.rounded(canvas, self.grow_length(settings))) for canvas in canvases]
        growing = [number for number, one in enumerate(result) if one.canvas.room]
        while growing:
            step, _ = self.first_step([result[number].canvas for number in growing], settings)
            p_ended = step.ended.masked_fill(~step.editable, 0.0).amax(dim=1)
            width = step.editable.shape[1]
            still_growing = []
            for number, is_enough in zip(growing, (p_ended > settings.length_coverage).tolist(), strict=True):
                one = result[number]
                canvas = one.canvas if is_enough else self.longer(one.canvas, self.grow_length(settings))
                result[number] = SizedCanvas(canvas, one.nfe + 1, one.computed + width)
                if not is_enough and canvas.room:
                    still_growing.append(number)
            growing = still_growing
        return result

    def rounded(self, canvas: Canvas, n_editable: int) -> Canvas:
        """Return the canvas cut to `n_editable` positions, or more, up to a length that the model was trained on."""
        return canvas.cut(up_to_block(len(canvas) - canvas.n_editable, n_editable, self.block))

    def longer(self, canvas: Canvas, n_more: int) -> Canvas:
        """Return the canvas with `n_more` further positions, rounded likewise, or as many as there is room for."""
        whole = canvas.grown(canvas.room)
        return self.rounded(whole, canvas.n_editable + n_more)
