"""How large a canvas is to be: what one look at it says of its text's length, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Sized:
    """A canvas of the size that its text is thought to need.

    Attributes:
        canvas: with the places that were cut off as room.
        forwards: that it took to see.
        computed: tokens that went through the model for it, padding included.
    """

    canvas: Canvas
    forwards: int = 0
    computed: int = 0


class Sizer:
    """A bidirectional model, the tokens that end a text, and what is known of lengths."""

    def __init__(
        self,
        model: Any,
        config: DiffusionConfig,
        *,
        end_ids: Sequence[int],
        n_ids: int,
        lengths: LengthPredictors | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: with its attention switched.
            config: of its diffusion process.
            end_ids: tokens behind which nothing is text.
            n_ids: ids that are tokens; the model may have more rows.
            lengths: fitted length predictors, or None.
        """
        self.model = model
        self.config = config
        self.end_ids = tuple(sorted(end_ids))
        self.lengths = lengths
        self._n_ids = n_ids
        ends = config.variable_length
        self.block = 1 if ends is None else ends.block or 1  # canvases are cut to multiples of so many tokens

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
        if settings.logits.eos_penalty or set(settings.logits.suppress) & set(self.end_ids):
            return "they were fitted without eos_penalty and with ends that may be written"
        return None

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Find before the first forward what the size of canvases would fail on.

        Raises:
            ValueError: see `sized`.
        """
        way = settings.early_stop
        if way not in ("predict", "grow"):
            return
        if not self.end_ids:
            raise ValueError("the length of a text cannot be predicted: the tokenizer has no end-of-text token")
        if self.config.variable_length is None and not self.config.train_on_padding:
            raise ValueError(
                f"early_stop: {way} needs a model that has learnt to write padding behind the end of a text, and this "
                "one was trained without variable_length; train it so, or take early_stop: eos"
            )
        for canvas in canvases:
            if not all(canvas.editable[canvas.editable.index(True) :]):
                raise ValueError(
                    f"early_stop: {way} gives a text fewer places at its end, and here tokens are given behind them "
                    "(infilling); take early_stop: eos"
                )
            if way == "predict":
                self.margin(settings, canvas)

    def first_step(
        self, canvases: Sequence[Canvas], settings: SamplingSettings | None = None, *, keep_hidden: bool = False
    ) -> tuple[FirstStep, Tensor | None]:
        """Return what one forward sees with nothing written, with what fitted heads say of it.

        Args:
            canvases: of one batch.
            settings: whose suppressed tokens and eos_penalty count; None for the model's own distribution.
            keep_hidden: whether to return the hidden states too, [n_editable, width] in row-major order.
        Raises:
            ValueError: if the heads are those of another model.
        """
        heads = None if self.lengths is None else self.lengths.heads
        batch, denoiser = self.batch(canvases, keep_hidden=keep_hidden or heads is not None)
        try:
            x, editable = batch.x.to(self.model.device), batch.editable.to(self.model.device)
            ended = end_probability(
                denoiser,
                x,
                editable=editable,
                mask_id=self.config.mask_token_id,
                end_ids=self.end_ids,
                suppress=() if settings is None else settings.logits.suppress,
                eos_penalty=0.0 if settings is None else settings.logits.eos_penalty,
            )
            hidden = denoiser.hidden
        finally:
            denoiser.close()
        length = behind = None
        if heads is not None and hidden is not None:
            if hidden.shape[1] != heads.width:
                raise ValueError(
                    f"the length predictors were fitted on a model of width {heads.width}, this one has "
                    f"{hidden.shape[1]}; fit them anew with llamafactory-ddm fit-length"
                )
            heads.to(hidden.device)
            with torch.inference_mode():
                length = heads.expected_places(mean_hidden(hidden, editable))
                behind = torch.zeros_like(ended).masked_scatter_(editable, heads.behind(hidden))
        return FirstStep(editable, ended, length, behind), hidden

    def sized(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[Sized]:
        """Cut canvases to the size that the settings ask for, before anything is written.

        Args:
            canvases: of one batch.
            settings: with `early_stop: predict` the length predictor says the size; with `grow` a canvas begins with
                `grow_length` places and gets so many more while the model does not believe that the text ends in it.
        Raises:
            ValueError: if there is no token that ends a text, the model has not learnt to write padding, tokens are
                given behind the places to be written, or the predictor has no margin that holds.
        """
        self.check(canvases, settings)
        if settings.early_stop == "predict":
            margins = torch.tensor([self.margin(settings, canvas) for canvas in canvases], dtype=torch.float64)
            step, _ = self.first_step(canvases, settings)
            needed = PREDICTORS[settings.length_predictor].places(step, margins).tolist()
            width = max(map(len, canvases))
            return [Sized(self.rounded(canvas, n), 1, width) for canvas, n in zip(canvases, needed, strict=True)]
        if settings.early_stop != "grow":
            return [Sized(canvas) for canvas in canvases]
        result = [Sized(self.rounded(canvas, settings.grow_length)) for canvas in canvases]
        todo = [number for number, one in enumerate(result) if one.canvas.room]
        while todo:
            step, _ = self.first_step([result[number].canvas for number in todo], settings)
            believed = step.ended.masked_fill(~step.editable, 0.0).amax(dim=1) > settings.length_coverage
            width = step.editable.shape[1]
            for number, is_enough in zip(todo, believed.tolist(), strict=True):
                one = result[number]
                canvas = one.canvas if is_enough else self.longer(one.canvas, settings.grow_length)
                result[number] = Sized(canvas, one.forwards + 1, one.computed + width)
            todo = [n for n, is_enough in zip(todo, believed.tolist(), strict=True) if not is_enough]
            todo = [number for number in todo if result[number].canvas.room]
        return result

    def rounded(self, canvas: Canvas, n_editable: int) -> Canvas:
        """Return the canvas cut to so many places, or a few more: to a length that the model was trained on."""
        return canvas.cut(up_to_block(len(canvas) - canvas.n_editable, n_editable, self.block))

    def longer(self, canvas: Canvas, n_more: int) -> Canvas:
        """Return the canvas with so many further places, or a few more, or as many as there is room for."""
        whole = canvas.grown(canvas.room)
        return self.rounded(whole, canvas.n_editable + n_more)

    def batch(self, canvases: Sequence[Canvas], *, keep_hidden: bool = False) -> tuple[CanvasBatch, ModelDenoiser]:
        """Return canvases side by side, and the model to look at them with, to be closed."""
        batch = stack_canvases(canvases, pad_id=0 if self.config.mask_token_id else 1)
        is_padding = batch.is_padding.to(self.model.device) if bool(batch.is_padding.any()) else None
        return batch, ModelDenoiser(
            self.model, shift=self.config.shift, is_padding=is_padding, outputs=self._n_ids, keep_hidden=keep_hidden
        )
