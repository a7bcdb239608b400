"""The length of a canvas, from one forward pass over it with every editable position masked.

`CanvasSizer` runs the model and cuts or grows canvases. The predictors and their thresholds are in
`sampling.length_predictors`, and their trained heads in `modeling.length_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.canvas import Canvas, CanvasBatch, stack_canvases
from ..modeling.block_denoiser import BlockDenoiser
from ..modeling.cached_denoiser import CachedDenoiser, check_cacheable, why_uncacheable
from ..modeling.denoiser import ModelDenoiser
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.length_heads import LengthPredictors, mean_hidden
from ..modeling.model_runner import Runner
from ..sampling import SamplingSettings
from ..sampling.length_predictors import (
    PREDICTORS,
    FirstStep,
    calibrated_threshold,
    eos_probability,
    round_up_to_block,
    uncalibrated_threshold,
)

_GROW_LENGTH = 32


@dataclass(frozen=True)
class SizedCanvas:
    """A canvas of predicted length.

    Attributes:
        canvas: the shortened canvas; its `room` counts the positions that were cut off.
        nfe: forward passes of the prediction.
        computed: tokens that went through the model for it, padding included.
    """

    canvas: Canvas
    nfe: int = 0
    computed: int = 0


class CanvasSizer:
    """Predicts the length of a text and cuts its canvas to it, with `early_stop: predict` or `grow`."""

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
        self.n_ids = n_ids
        self._why_uncacheable: str | None = None  # "" once the model was found to be; None if it was not tried
        self._runner: Runner | None = None
        variable = config.variable_length
        self.block = 1 if variable is None else variable.block or 1  # canvas lengths are multiples of it

    def with_runner(self, runner: Runner) -> CanvasSizer:
        """Return a sizer of the same model whose forward passes `runner` runs."""
        other = copy(self)
        other._runner = runner
        return other

    def try_cache(self) -> None:
        """Try whether the model can decode with a cache; `check` will not run the model for it then."""
        if self._why_uncacheable is None:
            self._why_uncacheable = why_uncacheable(self.model)

    @contextmanager
    def denoiser(
        self, canvases: Sequence[Canvas], settings: SamplingSettings | None = None, *, keep_hidden: bool = False
    ) -> Iterator[tuple[CanvasBatch, ModelDenoiser]]:
        """Yield the canvases as one batch, and a denoiser for it whose hook is removed afterwards.

        Args:
            canvases: of one batch.
            settings: of the one call of the sampler that the denoiser is for; their `kv_cache` applies. None for a
                denoiser without a cache.
            keep_hidden: see `ModelDenoiser`.
        Raises:
            ValueError: if the model cannot decode with this cache, see `check_cacheable`.
        """
        if settings is not None:
            self._check_cache(canvases, settings)
        batch = stack_canvases(canvases, pad_id=0 if self.config.mask_token_id else 1)
        is_padding = batch.is_padding.to(self.model.device) if bool(batch.is_padding.any()) else None
        denoiser = self._make(settings)(
            self.model,
            shift=self.config.shift,
            is_padding=is_padding,
            outputs=self.n_ids,
            keep_hidden=keep_hidden,
            runner=self._runner,
        )
        try:
            yield batch, denoiser
        finally:
            denoiser.close()

    def _make(self, settings: SamplingSettings | None) -> Callable[..., ModelDenoiser]:
        """Return the denoiser's class with the options that the model and `kv_cache` give it."""
        kind, block_length = None if settings is None else settings.kv_cache, self.config.train_block_length
        if block_length is not None:
            is_cached = settings is not None and kind != "none"
            return partial(BlockDenoiser, block_length=block_length, cached=is_cached)
        if settings is None or kind is None or kind == "none":
            return ModelDenoiser
        return partial(CachedDenoiser, kind=kind, refresh=settings.cache_refresh)

    def threshold(self, settings: SamplingSettings, canvas: Canvas) -> float:
        """Return the threshold of the length predictor on a canvas: the calibrated one, else the coverage itself.

        Raises:
            ValueError: if the predictor needs calibration and there is none for this canvas.
        """
        name, coverage = settings.length_predictor, settings.length_coverage
        reason = self.why_uncalibrated(settings, canvas)
        if reason is not None or self.lengths is None:
            return uncalibrated_threshold(name, coverage, reason or "")
        return calibrated_threshold(name, self.lengths.min_thresholds[name], coverage)

    def why_uncalibrated(self, settings: SamplingSettings, canvas: Canvas) -> str | None:
        """Return why there is no calibration for a canvas under these settings, or None if there is."""
        if self.lengths is None or settings.length_predictor not in self.lengths.min_thresholds:
            return "the model has no calibration"
        whole = len(canvas) + canvas.room
        if whole != self.lengths.canvas:
            return (
                f"its calibration was made with cutoff_len: {self.lengths.canvas}, and this canvas has {whole} tokens"
            )
        if settings.logits.eos_penalty:
            return f"its calibration was made without eos_penalty, which is {settings.logits.eos_penalty:g}"
        if set(settings.logits.suppress) & set(self.eos_ids):
            return "its calibration was made without suppress_tokens, which names EOS or padding"
        return None

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Check that `sized` can predict lengths, and that the model can decode with the cache of `kv_cache`.

        Raises:
            ValueError: see `sized` and `check_cacheable`.
        """
        self._check_cache(canvases, settings)
        early_stop = settings.early_stop
        if early_stop not in ("predict", "grow"):
            return
        if not self.eos_ids:
            raise ValueError(
                f"early_stop: {early_stop} needs a tokenizer with an EOS token, and this one has none; set "
                "early_stop: none"
            )
        if self.config.variable_length is None and not self.config.train_on_padding:
            raise ValueError(
                f"early_stop: {early_stop} needs a model trained with variable_length, which generates padding after "
                "EOS, and this one was trained without; set early_stop: eos"
            )
        for canvas in canvases:
            if not all(canvas.editable[canvas.editable.index(True) :]):
                raise ValueError(
                    f"early_stop: {early_stop} shortens the canvas at its end, where this text has fixed tokens "
                    "(infilling); set early_stop: eos"
                )
            if early_stop == "predict":
                self.threshold(settings, canvas)

    def _check_cache(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Check that the model can decode with the cache of `kv_cache`; its first call runs the model."""
        kind = settings.kv_cache
        if kind is None and self.config.train_block_length is not None:
            kind = "prefix"
        if kind is not None and kind != "none":
            length = max(map(len, canvases), default=0)
            self.try_cache()
            check_cacheable(self.model, kind, length=length, reason=self._why_uncacheable)

    def first_step(
        self, canvases: Sequence[Canvas], settings: SamplingSettings | None = None, *, keep_hidden: bool = False
    ) -> tuple[FirstStep, Tensor | None]:
        """Return the statistics of one forward pass over fully masked canvases, those of fitted heads included.

        Args:
            canvases: of one batch.
            settings: their suppress_tokens and eos_penalty apply; None for the model's own distribution.
            keep_hidden: whether to return the hidden states too, [n_editable, width] in row-major order.
        Raises:
            ValueError: if the heads were fitted on a model of another width.
        """
        heads = None if self.lengths is None else self.lengths.heads
        with self.denoiser(canvases, keep_hidden=keep_hidden or heads is not None) as (batch, denoiser):
            x, editable = batch.x.to(self.model.device), batch.editable.to(self.model.device)
            p_eos = eos_probability(
                denoiser,
                x,
                editable=editable,
                mask_id=self.config.mask_token_id,
                eos_ids=self.eos_ids,
                suppress=() if settings is None else settings.logits.suppress,
                eos_penalty=0.0 if settings is None else settings.logits.eos_penalty,
            )
            hidden = denoiser.hidden
        expected_length = p_ended = None
        if heads is not None and hidden is not None:
            if hidden.shape[1] != heads.width:
                raise ValueError(
                    f"the length predictors were fitted on a model of width {heads.width}, this one has "
                    f"{hidden.shape[1]}; fit them again with llamafactory-ddm fit-length"
                )
            heads.to(hidden.device)
            with torch.inference_mode():
                expected_length = heads.expected_length(mean_hidden(hidden, editable))
                p_ended = torch.zeros_like(p_eos).masked_scatter_(editable, heads.p_ended(hidden))
        return FirstStep(editable, p_eos, expected_length, p_ended), hidden

    def grow_length(self, settings: SamplingSettings) -> int:
        """Return the number of positions that `grow` starts with and adds: grow_length, else the block, else 32."""
        return settings.grow_length or (self.block if self.block > 1 else _GROW_LENGTH)

    def sized(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[SizedCanvas]:
        """Cut canvases to the length that their texts need, before anything is generated.

        Args:
            canvases: of one batch.
            settings: `early_stop: predict` cuts to the predicted length; `grow` starts with `grow_length` positions
                and adds as many until the model predicts EOS among them; other values leave canvases as they are.
        Raises:
            ValueError: if there is no EOS token, the model was trained without variable_length, fixed tokens follow
                editable positions, or the predictor needs calibration and there is none.
        """
        self.check(canvases, settings)
        if settings.early_stop == "predict":
            thresholds = torch.tensor([self.threshold(settings, canvas) for canvas in canvases], dtype=torch.float64)
            step, _ = self.first_step(canvases, settings)
            lengths = PREDICTORS[settings.length_predictor].lengths(step, thresholds).tolist()
            width = max(map(len, canvases))
            return [
                SizedCanvas(self.rounded(canvas, n), 1, width) for canvas, n in zip(canvases, lengths, strict=True)
            ]
        if settings.early_stop == "grow":
            return self._grow(canvases, settings)
        return [SizedCanvas(canvas) for canvas in canvases]

    def _grow(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[SizedCanvas]:
        """Lengthen canvases until the model predicts EOS in them; each extension costs a forward pass."""
        result = [SizedCanvas(self.rounded(canvas, self.grow_length(settings))) for canvas in canvases]
        growing = [index for index, sized in enumerate(result) if sized.canvas.room]
        while growing:
            step, _ = self.first_step([result[index].canvas for index in growing], settings)
            p_ended = step.p_eos.masked_fill(~step.editable, 0.0).amax(dim=1)
            width = step.editable.shape[1]
            still_growing = []
            for index, is_enough in zip(growing, (p_ended > settings.length_coverage).tolist(), strict=True):
                sized = result[index]
                canvas = sized.canvas if is_enough else self.longer(sized.canvas, self.grow_length(settings))
                result[index] = SizedCanvas(canvas, sized.nfe + 1, sized.computed + width)
                if not is_enough and canvas.room:
                    still_growing.append(index)
            growing = still_growing
        return result

    def rounded(self, canvas: Canvas, n_editable: int) -> Canvas:
        """Return the canvas cut to `n_editable` positions, rounded up to a multiple of the model's block."""
        return canvas.cut(round_up_to_block(len(canvas) - canvas.n_editable, n_editable, self.block))

    def longer(self, canvas: Canvas, n_more: int) -> Canvas:
        """Return the canvas with `n_more` further positions, rounded as in `rounded`, at most all of its room."""
        whole = canvas.grown(canvas.room)
        return self.rounded(whole, canvas.n_editable + n_more)
