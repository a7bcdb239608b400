"""Canvases in, ids out: how large each canvas is to be, one batch of the sampler, and canvases that grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .data.canvas import Canvas, CanvasBatch, stack_canvases
from .diffusion.schedules import get_schedule
from .modeling.denoiser import ModelDenoiser
from .modeling.diffusion_config import DiffusionConfig
from .modeling.length_heads import LengthPredictors, mean_hidden
from .sampling import Context, SamplingSettings, sample
from .sampling.length import PREDICTORS, FirstStep, calibrated_margin, default_margin, end_probability

# Called after each step with the step, the canvases and their ids.
Watch = Callable[[int, Sequence[Canvas], list[list[int]]], None]
_NEXT_SEED = 0x9E3779B97F4A7C15  # a grown canvas draws other numbers


@dataclass(frozen=True)
class Sized:
    """A canvas of the size that its text is thought to need.

    Attributes:
        canvas: with the places that were cut off as room.
        forwards: that it took to see.
        computed: tokens that went through the model for it.
    """

    canvas: Canvas
    forwards: int = 0
    computed: int = 0


@dataclass(frozen=True)
class Written:
    """What the sampler wrote on a canvas.

    Attributes:
        canvas: as far as it was written on.
        ids: of all its places.
        committed: the step that wrote each, -1 where a token was given or lies behind the end.
        forwards: calls of the model that the text needed.
        computed: tokens that went through the model for it, without other texts' padding.
    """

    canvas: Canvas
    ids: list[int]
    committed: list[int]
    forwards: int
    computed: int


class Writer:
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

    def margin(self, settings: SamplingSettings) -> float:
        """Return the margin of the length predictor: the calibrated one, or what the coverage itself says.

        Raises:
            ValueError: if the predictor needs to be fitted and is not.
        """
        name, coverage = settings.length_predictor, settings.length_coverage
        known = None if self.lengths is None else self.lengths.least_margins.get(name)
        if known is None:
            return default_margin(name, coverage)
        return calibrated_margin(name, known, coverage)

    def check(self, settings: SamplingSettings) -> None:
        """Find before the first forward what the size of canvases would fail on.

        Raises:
            ValueError: see `sized`.
        """
        if settings.early_stop in ("predict", "grow") and not self.end_ids:
            raise ValueError("the length of a text cannot be predicted: the tokenizer has no end-of-text token")
        if settings.early_stop == "predict":
            self.margin(settings)

    def first_step(self, canvases: Sequence[Canvas], *, keep_hidden: bool = False) -> tuple[FirstStep, Tensor | None]:
        """Return what one forward sees with nothing written, with what fitted heads say of it.

        Args:
            canvases: of one batch.
            keep_hidden: whether to return the hidden states too, [n_editable, width] in row-major order.
        Raises:
            ValueError: if the heads are those of another model.
        """
        heads = None if self.lengths is None else self.lengths.heads
        batch, denoiser = self._batch(canvases, keep_hidden=keep_hidden or heads is not None)
        try:
            x, editable = batch.x.to(self.model.device), batch.editable.to(self.model.device)
            ended = end_probability(
                denoiser, x, editable=editable, mask_id=self.config.mask_token_id, end_ids=self.end_ids
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
            canvases: of one batch; one that goes on behind its editable places stays as it is.
            settings: with `early_stop: predict` the length predictor says the size; with `grow` a canvas begins with
                `grow_length` places and gets so many more while the model does not believe that the text ends in it.
        Raises:
            ValueError: if there is no token that ends a text, or the predictor needs to be fitted and is not.
        """
        self.check(settings)
        if settings.early_stop == "predict":
            predictor, margin = PREDICTORS[settings.length_predictor], self.margin(settings)
            step, _ = self.first_step(canvases)
            needed = predictor.places(step, margin).tolist()
            return [
                Sized(self._rounded(canvas, n), 1, len(canvas)) for canvas, n in zip(canvases, needed, strict=True)
            ]
        if settings.early_stop != "grow":
            return [Sized(canvas) for canvas in canvases]
        result = [Sized(self._rounded(canvas, settings.grow_length)) for canvas in canvases]
        todo = [number for number, one in enumerate(result) if one.canvas.room]
        while todo:
            step, _ = self.first_step([result[number].canvas for number in todo])
            believed = step.ended.masked_fill(~step.editable, 0.0).amax(dim=1) > settings.length_coverage
            for number, is_enough in zip(todo, believed.tolist(), strict=True):
                one = result[number]
                canvas = one.canvas if is_enough else self._longer(one.canvas, settings.grow_length)
                result[number] = Sized(canvas, one.forwards + 1, one.computed + len(one.canvas))
            todo = [n for n, is_enough in zip(todo, believed.tolist(), strict=True) if not is_enough]
            todo = [number for number in todo if result[number].canvas.room]
        return result

    def _rounded(self, canvas: Canvas, n_editable: int) -> Canvas:
        """Return the canvas cut to so many places, or a few more: to a length that the model was trained on."""
        ends = self.config.variable_length
        block = 1 if ends is None or ends.block is None else ends.block
        given = len(canvas) - canvas.n_editable
        return canvas.cut(-(-(given + n_editable) // block) * block - given)

    def _longer(self, canvas: Canvas, n_more: int) -> Canvas:
        whole = canvas.grown(canvas.room)
        return self._rounded(whole, canvas.n_editable + n_more)

    def write(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        *,
        ordinals: Sequence[int],
        watch: Watch | None = None,
    ) -> list[Written]:
        """Write on canvases, all in one batch; with `early_stop: grow` those whose text has not ended grow.

        Args:
            canvases: see `data.canvas`.
            settings: see there.
            ordinals: a number for each canvas, which with the seed fixes its random numbers.
            watch: called after each step.
        Raises:
            ValueError: if the settings do not fit the canvases, or the model's logits are unusable.
        """
        result = self._once(canvases, settings, ordinals, watch, 0)
        while settings.early_stop == "grow":
            todo = [number for number, one in enumerate(result) if one.canvas.room and not self._has_ended(one)]
            if not todo:
                break
            longer = [self._longer(result[number].canvas, settings.grow_length) for number in todo]
            grown = [
                result[number].canvas.given(result[number].ids).grown(len(canvas) - len(result[number].ids))
                for number, canvas in zip(todo, longer, strict=True)
            ]
            settings = replace(settings, seed=(settings.seed + _NEXT_SEED) % 2**64)
            shown = max(max(result[number].committed) for number in todo) + 1
            more = self._once(grown, settings, [ordinals[number] for number in todo], watch, shown)
            for number, canvas, new in zip(todo, longer, more, strict=True):
                result[number] = _continued(result[number], canvas, new)
        return result

    def _has_ended(self, written: Written) -> bool:
        pairs = zip(written.ids, written.canvas.editable, strict=True)
        return any(editable and token in self.end_ids for token, editable in pairs)

    def _batch(self, canvases: Sequence[Canvas], *, keep_hidden: bool = False) -> tuple[CanvasBatch, ModelDenoiser]:
        batch = stack_canvases(canvases, pad_id=0 if self.config.mask_token_id else 1)
        is_padding = batch.is_padding.to(self.model.device) if bool(batch.is_padding.any()) else None
        return batch, ModelDenoiser(
            self.model, shift=self.config.shift, is_padding=is_padding, outputs=self._n_ids, keep_hidden=keep_hidden
        )

    def _once(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        ordinals: Sequence[int],
        watch: Watch | None,
        first_step: int,
    ) -> list[Written]:
        device = self.model.device
        batch, denoiser = self._batch(canvases)

        def after_step(step: int, z: Tensor, fresh: Tensor) -> None:
            if watch is not None:
                ids = [row[len(row) - len(canvas) :] for row, canvas in zip(z.tolist(), canvases, strict=True)]
                watch(first_step + step, canvases, ids)

        prompt = batch.prompt.to(device) if bool(batch.prompt.any()) else None
        try:
            output = sample(
                denoiser,
                batch.x.to(device),
                editable=batch.editable.to(device),
                mask_id=self.config.mask_token_id,
                steps=settings.diffusion_steps,
                strategy=settings.strategy(),
                logits=settings.logits,
                seed=settings.seed % 2**64,
                rows=torch.tensor(list(ordinals), dtype=torch.int64, device=device),
                schedule=get_schedule(self.config.noise_schedule),
                block_length=settings.block_length,
                stable_stop=settings.stable_stop,
                end_ids=self.end_ids,
                stop_at_end=settings.early_stop != "none",
                eos_last=settings.eos_last,
                context=Context(no_text=(~batch.editable & ~batch.prompt).to(device), prompt=prompt),
                callback=after_step,
            )
        finally:
            denoiser.close()
        columns = zip(
            canvases,
            output.sequences.tolist(),
            output.committed.tolist(),
            output.row_forwards.tolist(),
            strict=True,
        )
        return [
            Written(canvas, ids[-len(canvas) :], steps[-len(canvas) :], forwards, forwards * len(canvas))
            for canvas, ids, steps, forwards in columns
        ]


def _continued(old: Written, canvas: Canvas, new: Written) -> Written:
    """Return what was written on a canvas before and after it grew; its steps count on."""
    begin = max(old.committed) + 1
    behind = [step + begin if step >= 0 else -1 for step in new.committed[len(old.committed) :]]
    return Written(
        canvas, new.ids, [*old.committed, *behind], old.forwards + new.forwards, old.computed + new.computed
    )
