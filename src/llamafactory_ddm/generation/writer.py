"""Filling canvases: one batch of the sampler, and canvases that grow until their text has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.canvas import Canvas
from ..diffusion.schedules import get_schedule
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.model_info import max_positions
from ..sampling import Context, Edits, SamplerOutput, SamplingSettings, sample
from ..sampling.loop import StepFunction
from . import block_models
from .canvas_size import CanvasSizer
from .trace import Recorder

# Called after each step with the step, the canvases and the ids of each.
Watch = Callable[[int, Sequence[Canvas], list[list[int]]], None]


@dataclass(frozen=True)
class FilledCanvas:
    """A canvas that the sampler filled.

    Attributes:
        canvas: the canvas; with `early_stop: grow`, as far as it grew.
        ids: ids of all its positions.
        committed: the last step that changed each position; -1 where a token is fixed, or follows EOS and was never
            decoded.
        nfe: forward passes that the text needed.
        computed: tokens that went through the model for it, padding up to the longest of the batch included.
        steps: denoising steps that it could take.
        edits: number of edits of tokens.
        events: changes (step, position, id) in order of step, the id of [MASK] where a position was remasked; None if
            they were not recorded.
    """

    canvas: Canvas
    ids: list[int]
    committed: list[int]
    nfe: int
    computed: int = field(compare=False)
    steps: int = 0
    edits: int = 0
    events: tuple[tuple[int, int, int], ...] | None = None

    def cut(self, canvas: Canvas) -> FilledCanvas:
        """Return its beginning, which fills `canvas`."""
        n = len(canvas)
        events = None if self.events is None else tuple(event for event in self.events if event[1] < n)
        return replace(self, canvas=canvas, ids=self.ids[:n], committed=self.committed[:n], events=events)

    def continued(self, canvas: Canvas, new: FilledCanvas) -> FilledCanvas:
        """Return the whole canvas after it grew and its new part was filled; steps are numbered through.

        Args:
            canvas: the grown canvas, with all its editable positions.
            new: the same, filled with only the new positions editable.
        """
        offset = max(self.committed) + 1
        added = [step + offset if step >= 0 else -1 for step in new.committed[len(self.committed) :]]
        events = None
        if self.events is not None and new.events is not None:
            events = self.events + _shifted(new.events, steps=offset, positions=0)
        return FilledCanvas(
            canvas,
            new.ids,
            [*self.committed, *added],
            self.nfe + new.nfe,
            self.computed + new.computed,
            self.steps + new.steps,
            self.edits + new.edits,
            events,
        )


@dataclass(frozen=True)
class _Part:
    """The part of a sample that one call of the sampler fills: its canvas, or the positions that were added last.

    Attributes:
        canvas: canvas of the call; tokens that earlier calls generated are fixed.
        whole: the same canvas with all generated positions editable.
        sample_index: index of the sample, which with the seed determines its random numbers.
        steps_taken: steps of earlier calls, whose random numbers are used up.
    """

    canvas: Canvas
    whole: Canvas
    sample_index: int
    steps_taken: int = 0

    def steps(self, total: int) -> int:
        """Return its share of the `total` steps of the longest canvas that the sample may grow to."""
        return -(-total * self.canvas.n_editable // (self.whole.n_editable + self.whole.room))


class Writer:
    """Fills canvases with the sampler; with `early_stop: grow` it extends those whose text has not ended."""

    def __init__(self, sizer: CanvasSizer, step_function: StepFunction | None = None) -> None:
        """Fill canvases with the sizer's model.

        Args:
            sizer: determines by how much canvases grow.
            step_function: see `sample`.
        """
        self.sizer = sizer
        self._step_function = step_function

    @property
    def config(self) -> DiffusionConfig:
        """Return the model's `DiffusionConfig`."""
        return self.sizer.config

    def edits(self, settings: SamplingSettings) -> Edits:
        """Return which decoded tokens the settings edit with this model.

        Raises:
            ValueError: if the model was trained without [MASK], or edit_steps has no effect.
        """
        if self.config.uniform_ratio == 1:
            raise ValueError(
                "uniform_ratio: 1 trained this model without [MASK], which generation starts from; train it with a "
                "uniform_ratio below 1"
            )
        return settings.edits(self.config.uniform_ratio)

    def write(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        *,
        sample_indices: Sequence[int],
        traced: bool = False,
        watch: Watch | None = None,
    ) -> list[FilledCanvas]:
        """Fill canvases, all in one batch; with `early_stop: grow` extend those whose text has not ended.

        Args:
            canvases: see `data.canvas`.
            settings: how to sample.
            sample_indices: index of each sample, which with the seed determines its random numbers.
            traced: whether to record what each step changes.
            watch: called after each step.
        Raises:
            ValueError: if settings and canvases are incompatible, or logits are NaN or infinite.
        """
        parts = [_Part(canvas, canvas, index) for canvas, index in zip(canvases, sample_indices, strict=True)]
        if settings.early_stop != "grow":
            return self._sample(parts, settings, traced, watch)
        filled = self._sample_shares(parts, settings, traced, watch)
        while True:
            growing = [index for index, part in enumerate(filled) if part.canvas.room and not self._has_ended(part)]
            if not growing:
                return filled
            parts = [self._extension(filled[index], settings, sample_indices[index]) for index in growing]
            first_step = max(max(filled[index].committed) for index in growing) + 1
            added = self._sample_shares(parts, settings, traced, watch, first_step)
            for index, part, new in zip(growing, parts, added, strict=True):
                filled[index] = filled[index].continued(part.whole, new)

    def _has_ended(self, filled: FilledCanvas) -> bool:
        pairs = zip(filled.ids, filled.canvas.editable, strict=True)
        return any(editable and token in self.sizer.eos_ids for token, editable in pairs)

    def _extension(self, filled: FilledCanvas, settings: SamplingSettings, sample_index: int) -> _Part:
        """Return the next part of a growing sample: new positions after the tokens generated so far."""
        whole = self.sizer.longer(filled.canvas, self.sizer.grow_length(settings))
        canvas = filled.canvas.with_fixed(filled.ids).grown(len(whole) - len(filled.ids))
        return _Part(canvas, whole, sample_index, filled.steps)

    def _sample_shares(
        self,
        parts: Sequence[_Part],
        settings: SamplingSettings,
        traced: bool,
        watch: Watch | None,
        first_step: int = 0,
    ) -> list[FilledCanvas]:
        """Fill each part in its share of the steps; parts with equal shares form a batch."""
        shares = [part.steps(settings.diffusion_steps) for part in parts]
        filled: dict[int, FilledCanvas] = {}
        for steps in sorted(set(shares)):
            indices = [index for index, share in enumerate(shares) if share == steps]
            batch = [parts[index] for index in indices]
            batch_settings = replace(settings, diffusion_steps=steps)
            filled |= zip(indices, self._sample(batch, batch_settings, traced, watch, first_step), strict=True)
        return [filled[index] for index in range(len(parts))]

    def _sample(
        self,
        parts: Sequence[_Part],
        settings: SamplingSettings,
        traced: bool,
        watch: Watch | None,
        first_step: int = 0,
    ) -> list[FilledCanvas]:
        """Fill parts in one call of the sampler; for `watch` its steps are numbered from `first_step`."""
        device = self.sizer.model.device
        wanted = [part.canvas for part in parts]
        canvases = [self._in_whole_blocks(canvas) for canvas in wanted]
        index = torch.tensor([(part.sample_index, part.steps_taken) for part in parts], dtype=torch.int64)
        sample_index, steps_taken = index.to(device).unbind(dim=1)
        with self.sizer.denoiser(canvases, settings) as (batch, denoiser):
            block = block_models.blocks_of(batch, self.config)
            blank = batch.x.masked_fill(batch.editable, self.config.mask_token_id)
            recorder = Recorder(blank.to(device)) if traced else None

            def after_step(step: int, z: Tensor, changed: Tensor) -> None:
                if recorder is not None:
                    recorder(step, z)
                if watch is not None:
                    rows = [
                        ids[len(ids) - len(canvas) :][: len(own)]
                        for ids, canvas, own in zip(z.tolist(), canvases, wanted, strict=True)
                    ]
                    watch(first_step + step, wanted, rows)

            output = sample(
                denoiser,
                batch.x.to(device),
                editable=batch.editable.to(device),
                mask_id=self.config.mask_token_id,
                steps=settings.diffusion_steps,
                strategy=settings.strategy(),
                logits=settings.logits,
                seed=settings.seed % 2**64,
                sample_index=sample_index,
                steps_taken=steps_taken,
                schedule=get_schedule(self.config.noise_schedule),
                block_length=settings.block_length,
                block=None if block is None else block.to(device),
                commit_schedule=settings.commit_schedule,
                edits=self.edits(settings),
                eos_ids=self.sizer.eos_ids,
                stop_at_eos=settings.early_stop != "none",
                eos_last=settings.eos_last,
                context=Context(
                    no_text=(~batch.editable & ~batch.prompt).to(device),
                    prompt=batch.prompt.to(device) if bool(batch.prompt.any()) else None,
                ),
                callback=after_step,
                step_function=self._step_function,
            )
        filled = _unstacked(canvases, output, settings.diffusion_steps, recorder)
        return [one.cut(canvas) for one, canvas in zip(filled, wanted, strict=True)]

    def max_steps(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> int:
        """Return the largest number of denoising steps of a canvas, without edit steps."""
        by_size = {(len(canvas), canvas.n_editable): canvas for canvas in canvases}
        whole = map(self._in_whole_blocks, by_size.values())
        return max(block_models.max_steps(canvas, settings, self.config) for canvas in whole)

    def _in_whole_blocks(self, canvas: Canvas) -> Canvas:
        """Return the canvas up to the end of its last block for a block model; for others as it is."""
        if self.config.train_block_length is None:
            return canvas
        limit = max_positions(self.sizer.model.config)
        return block_models.in_whole_blocks(canvas, self.config.train_block_length, limit, shift=self.config.shift)


def _unstacked(
    canvases: Sequence[Canvas], output: SamplerOutput, steps: int, recorder: Recorder | None
) -> list[FilledCanvas]:
    """Return the rows of a batch without the padding in front of them."""
    width = output.sequences.shape[1]
    columns = (output.sequences, output.committed, output.sample_nfe, output.sample_computed, output.edits)
    rows = zip(canvases, *(column.tolist() for column in columns), strict=True)
    return [
        FilledCanvas(
            canvas,
            ids[-len(canvas) :],
            committed[-len(canvas) :],
            nfe,
            computed,
            steps,
            edits,
            None if recorder is None else _shifted(recorder.events[row], steps=0, positions=len(canvas) - width),
        )
        for row, (canvas, ids, committed, nfe, computed, edits) in enumerate(rows)
    ]


def _shifted(
    events: Sequence[tuple[int, int, int]], *, steps: int, positions: int
) -> tuple[tuple[int, int, int], ...]:
    """Return events with `steps` added to each step and `positions` to each position."""
    return tuple((step + steps, position + positions, token) for step, position, token in events)
