"""Canvases in, ids out: one batch of the sampler, and canvases that grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.canvas import Canvas
from ..diffusion.schedules import get_schedule
from ..sampling import Context, Edits, SamplingSettings, sample
from .canvas_size import Sizer
from .trace import Recorder

# Called after each step with the step, the canvases and their ids.
Watch = Callable[[int, Sequence[Canvas], list[list[int]]], None]


@dataclass(frozen=True)
class Written:
    """What the sampler wrote on a canvas.

    Attributes:
        canvas: as far as it was written on.
        ids: of all its places.
        committed: the last step that wrote each, -1 where a token was given or lies behind the end.
        forwards: calls of the model that the text needed.
        computed: tokens that went through the model for it, padding up to the longest of the batch included.
        steps: denoising steps that it was given; a row of fewer tokens takes fewer.
        edits: how often a token was rewritten.
        events: what the steps wrote, (step, place, id) in order of step, the id of [MASK] where a place was masked
            again; None if that was not asked for.
    """

    canvas: Canvas
    ids: list[int]
    committed: list[int]
    forwards: int
    computed: int = field(compare=False)
    steps: int = 0
    edits: int = 0
    events: tuple[tuple[int, int, int], ...] | None = None


class Writer(Sizer):
    """Writes on canvases, once their size is known."""

    def edits(self, settings: SamplingSettings) -> Edits:
        """Return which decided tokens the settings have rewritten with this model.

        Raises:
            ValueError: if the model has never seen [MASK], or there are further steps and nothing to do in them.
        """
        if self.config.uniform_ratio == 1:
            raise ValueError(
                "generation starts from [MASK], which this model has never seen, as it was trained with "
                "uniform_ratio: 1; train it with a uniform_ratio below 1"
            )
        return settings.edits(self.config.uniform_ratio)

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Find before the first forward what the size of canvases or edits would fail on.

        Raises:
            ValueError: see `edits` and `Sizer.check`.
        """
        self.edits(settings)
        super().check(canvases, settings)

    def write(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        *,
        ordinals: Sequence[int],
        traced: bool = False,
        watch: Watch | None = None,
    ) -> list[Written]:
        """Write on canvases, all in one batch; with `early_stop: grow` those whose text has not ended grow.

        Args:
            canvases: see `data.canvas`.
            settings: see there.
            ordinals: a number for each canvas, which with the seed fixes its random numbers.
            traced: whether to note what each step writes.
            watch: called after each step.
        Raises:
            ValueError: if the settings do not fit the canvases, or the model's logits are unusable.
        """
        none = [0] * len(canvases)
        if settings.early_stop != "grow":
            return self._once(canvases, settings, ordinals, none, traced, watch, 0)
        result = self._in_steps(canvases, canvases, settings, ordinals, none, traced, watch, 0)
        while True:
            todo = [number for number, one in enumerate(result) if one.canvas.room and not self._has_ended(one)]
            if not todo:
                return result
            longer = [self.longer(result[number].canvas, settings.grow_length) for number in todo]
            grown = [
                result[number].canvas.given(result[number].ids).grown(len(canvas) - len(result[number].ids))
                for number, canvas in zip(todo, longer, strict=True)
            ]
            shown = max(max(result[number].committed) for number in todo) + 1
            own, taken = [ordinals[number] for number in todo], [result[number].steps for number in todo]
            more = self._in_steps(grown, longer, settings, own, taken, traced, watch, shown)
            for number, canvas, new in zip(todo, longer, more, strict=True):
                result[number] = _continued(result[number], canvas, new)

    def _in_steps(
        self,
        canvases: Sequence[Canvas],
        whole: Sequence[Canvas],
        settings: SamplingSettings,
        ordinals: Sequence[int],
        taken: Sequence[int],
        traced: bool,
        watch: Watch | None,
        shown: int,
    ) -> list[Written]:
        """Write on parts of canvases, each in its share of the steps of the whole; parts of equal steps together."""
        steps = []
        for part, canvas in zip(canvases, whole, strict=True):
            places = canvas.n_editable + canvas.room
            steps.append(-(-settings.diffusion_steps * part.n_editable // places))
        result: dict[int, Written] = {}
        for count in sorted(set(steps)):
            own = [number for number, its in enumerate(steps) if its == count]
            written = self._once(
                [canvases[number] for number in own],
                replace(settings, diffusion_steps=count),
                [ordinals[number] for number in own],
                [taken[number] for number in own],
                traced,
                watch,
                shown,
            )
            result |= dict(zip(own, written, strict=True))
        return [result[number] for number in range(len(canvases))]

    def _has_ended(self, written: Written) -> bool:
        pairs = zip(written.ids, written.canvas.editable, strict=True)
        return any(editable and token in self.end_ids for token, editable in pairs)

    def _once(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        ordinals: Sequence[int],
        taken: Sequence[int],
        traced: bool,
        watch: Watch | None,
        shown: int,
    ) -> list[Written]:
        """Write on canvases that have taken so many steps, of which `shown` were shown, in one call of the sampler."""
        device, edits = self.model.device, self.edits(settings)
        batch, denoiser = self.batch(canvases)
        blank = batch.x.masked_fill(batch.editable, self.config.mask_token_id)
        record = Recorder(blank.to(device)) if traced else None

        def after_step(step: int, z: Tensor, fresh: Tensor) -> None:
            if record is not None:
                record(step, z)
            if watch is not None:
                ids = [row[len(row) - len(canvas) :] for row, canvas in zip(z.tolist(), canvases, strict=True)]
                watch(shown + step, canvases, ids)

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
                sample_index=torch.tensor(list(ordinals), dtype=torch.int64, device=device),
                steps_taken=torch.tensor(list(taken), dtype=torch.int64, device=device),
                schedule=get_schedule(self.config.noise_schedule),
                block_length=settings.block_length,
                commit_schedule=settings.commit_schedule,
                edits=edits,
                eos_ids=self.end_ids,
                stop_at_eos=settings.early_stop != "none",
                eos_last=settings.eos_last,
                context=Context(no_text=(~batch.editable & ~batch.prompt).to(device), prompt=prompt),
                callback=after_step,
            )
        finally:
            denoiser.close()
        width = output.sequences.shape[1]
        columns = (output.sequences, output.committed, output.sample_nfe, output.edits)
        rows = zip(canvases, *(column.tolist() for column in columns), strict=True)
        return [
            Written(
                canvas,
                ids[-len(canvas) :],
                steps[-len(canvas) :],
                forwards,
                forwards * width,
                settings.diffusion_steps,
                n_edits,
                None if record is None else _moved(record.events[row], 0, len(canvas) - width),
            )
            for row, (canvas, ids, steps, forwards, n_edits) in enumerate(rows)
        ]


def _moved(events: Sequence[tuple[int, int, int]], steps: int, places: int) -> tuple[tuple[int, int, int], ...]:
    """Return events so many steps later and so many places further to the right."""
    return tuple((step + steps, place + places, token) for step, place, token in events)


def _continued(old: Written, canvas: Canvas, new: Written) -> Written:
    """Return what was written on a canvas before and after it grew; its steps count on."""
    begin = max(old.committed) + 1
    behind = [step + begin if step >= 0 else -1 for step in new.committed[len(old.committed) :]]
    return Written(
        canvas,
        new.ids,
        [*old.committed, *behind],
        old.forwards + new.forwards,
        old.computed + new.computed,
        old.steps + new.steps,
        old.edits + new.edits,
        None if old.events is None or new.events is None else old.events + _moved(new.events, begin, 0),
    )
