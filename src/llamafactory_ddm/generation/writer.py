"""Canvases in, ids out: one batch of the sampler, and canvases that grow while their text has not ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.canvas import Canvas
from ..diffusion.schedules import get_schedule
from ..modeling.diffusion_config import DiffusionConfig
from ..sampling import Context, Edits, SamplerOutput, SamplingSettings, sample
from .canvas_size import CanvasSizer
from .trace import Recorder

# Called after each step with the step, the canvases and their ids.
Watch = Callable[[int, Sequence[Canvas], list[list[int]]], None]


@dataclass(frozen=True)
class FilledCanvas:
    """What the sampler generated on a canvas.

    Attributes:
        canvas: as far as it was filled.
        ids: of all its positions.
        committed: the last step that wrote each, -1 where a token is fixed or was left out after the EOS.
        nfe: forward passes that the text needed.
        computed: tokens that went through the model for it, padding up to the longest of the batch included.
        steps: denoising steps that it was granted; a row of fewer tokens takes fewer.
        edits: how often a token was edited.
        events: what the steps wrote, (step, position, id) in order of step, the id of [MASK] where a position was
            remasked; None if that was not requested.
    """

    canvas: Canvas
    ids: list[int]
    committed: list[int]
    nfe: int
    computed: int = field(compare=False)
    steps: int = 0
    edits: int = 0
    events: tuple[tuple[int, int, int], ...] | None = None

    def continued(self, canvas: Canvas, new: FilledCanvas) -> FilledCanvas:
        """Return what was generated on a canvas before and after it grew; steps count on.

        Args:
            canvas: the grown one, with all its editable positions.
            new: generated on the part that was added.
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
    """What one call of the sampler fills of a sample: all of its canvas, or the positions that were added last.

    Attributes:
        canvas: to fill now; what earlier calls generated is fixed in it.
        whole: the same with everything that is generated editable.
        sample_index: number of the sample, which with the seed determines its random numbers.
        steps_taken: in earlier calls, whose random numbers are used up.
    """

    canvas: Canvas
    whole: Canvas
    sample_index: int
    steps_taken: int = 0

    def steps(self, total: int) -> int:
        """Return its share of `total` steps, which are for the whole canvas and all the room that it has."""
        return -(-total * self.canvas.n_editable // (self.whole.n_editable + self.whole.room))


class Writer:
    """Fills canvases with the sampler; with `early_stop: grow` it extends those whose text has not ended."""

    def __init__(self, sizer: CanvasSizer) -> None:
        """Fill canvases with the sizer's model, and let it say by how much they grow."""
        self.sizer = sizer

    @property
    def config(self) -> DiffusionConfig:
        """Return the facts of the model's diffusion process."""
        return self.sizer.config

    def edits(self, settings: SamplingSettings) -> Edits:
        """Return which decoded tokens the settings edit with this model.

        Raises:
            ValueError: if the model has never seen [MASK], or there are edit steps and no edits.
        """
        if self.config.uniform_ratio == 1:
            raise ValueError(
                "generation starts from [MASK], which this model has never seen, as it was trained with "
                "uniform_ratio: 1; train it with a uniform_ratio below 1"
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
            sample_indices: a number for each canvas, which with the seed determines its random numbers.
            traced: whether to record what each step writes.
            watch: called after each step.
        Raises:
            ValueError: if the settings do not fit the canvases, or the model's logits are unusable.
        """
        parts = [_Part(canvas, canvas, index) for canvas, index in zip(canvases, sample_indices, strict=True)]
        if settings.early_stop != "grow":
            return self._sample(parts, settings, traced, watch)
        filled = self._sample_shares(parts, settings, traced, watch)
        while True:
            growing = [number for number, one in enumerate(filled) if one.canvas.room and not self._has_ended(one)]
            if not growing:
                return filled
            parts = [self._extension(filled[number], settings, sample_indices[number]) for number in growing]
            shown = max(max(filled[number].committed) for number in growing) + 1
            added = self._sample_shares(parts, settings, traced, watch, shown)
            for number, part, new in zip(growing, parts, added, strict=True):
                filled[number] = filled[number].continued(part.whole, new)

    def _has_ended(self, filled: FilledCanvas) -> bool:
        pairs = zip(filled.ids, filled.canvas.editable, strict=True)
        return any(editable and token in self.sizer.eos_ids for token, editable in pairs)

    def _extension(self, filled: FilledCanvas, settings: SamplingSettings, sample_index: int) -> _Part:
        """Return the positions that a canvas gets next, after what is generated so far."""
        whole = self.sizer.longer(filled.canvas, self.sizer.grow_length(settings))
        canvas = filled.canvas.given(filled.ids).grown(len(whole) - len(filled.ids))
        return _Part(canvas, whole, sample_index, filled.steps)

    def _sample_shares(
        self,
        parts: Sequence[_Part],
        settings: SamplingSettings,
        traced: bool,
        watch: Watch | None,
        shown: int = 0,
    ) -> list[FilledCanvas]:
        """Fill parts in their shares of the steps, those of equal shares together."""
        shares = [part.steps(settings.diffusion_steps) for part in parts]
        filled: dict[int, FilledCanvas] = {}
        for steps in sorted(set(shares)):
            numbers = [number for number, share in enumerate(shares) if share == steps]
            own = replace(settings, diffusion_steps=steps)
            done = self._sample([parts[number] for number in numbers], own, traced, watch, shown)
            filled |= dict(zip(numbers, done, strict=True))
        return [filled[number] for number in range(len(parts))]

    def _sample(
        self,
        parts: Sequence[_Part],
        settings: SamplingSettings,
        traced: bool,
        watch: Watch | None,
        shown: int = 0,
    ) -> list[FilledCanvas]:
        """Fill parts in one call of the sampler; `watch` has seen `shown` steps of them already."""
        device = self.sizer.model.device
        canvases = [part.canvas for part in parts]
        index = torch.tensor([(part.sample_index, part.steps_taken) for part in parts], dtype=torch.int64)
        sample_index, steps_taken = index.to(device).unbind(dim=1)
        with self.sizer.denoiser(canvases) as (batch, denoiser):
            blank = batch.x.masked_fill(batch.editable, self.config.mask_token_id)
            recorder = Recorder(blank.to(device)) if traced else None

            def after_step(step: int, z: Tensor, written: Tensor) -> None:
                if recorder is not None:
                    recorder(step, z)
                if watch is not None:
                    rows = [ids[len(ids) - len(canvas) :] for ids, canvas in zip(z.tolist(), canvases, strict=True)]
                    watch(shown + step, canvases, rows)

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
            )
        return _unstacked(canvases, output, settings.diffusion_steps, recorder)


def _unstacked(
    canvases: Sequence[Canvas], output: SamplerOutput, steps: int, recorder: Recorder | None
) -> list[FilledCanvas]:
    """Return the rows of a batch without the padding in front of them."""
    width = output.sequences.shape[1]
    columns = (output.sequences, output.committed, output.sample_nfe, output.edits)
    rows = zip(canvases, *(column.tolist() for column in columns), strict=True)
    return [
        FilledCanvas(
            canvas,
            ids[-len(canvas) :],
            committed[-len(canvas) :],
            nfe,
            nfe * width,
            steps,
            edits,
            None if recorder is None else _shifted(recorder.events[row], steps=0, positions=len(canvas) - width),
        )
        for row, (canvas, ids, committed, nfe, edits) in enumerate(rows)
    ]


def _shifted(
    events: Sequence[tuple[int, int, int]], *, steps: int, positions: int
) -> tuple[tuple[int, int, int], ...]:
    """Return events so many steps later and so many positions further to the right."""
    return tuple((step + steps, position + positions, token) for step, position, token in events)
