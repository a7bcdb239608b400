"""What a call of the sampler holds: its plan, where it stands, and what the next step is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..diffusion.rng import keyed_uniform
from ..diffusion.schedules import LinearSchedule, NoiseSchedule
from .budget import CommitSchedule, pace_of_blocks, split_into_blocks, steps_of_blocks

MOST_ROWS = 2**32
TRIES = 8  # columns of uniform numbers: draws outside the nucleus are repeated, see `draw_tokens`


@dataclass(frozen=True)
class Plan:
    """What stays the same over the steps of one call.

    Attributes:
        mask_id: of [MASK].
        steps: number of denoising steps of a row.
        edit_steps: further steps that each block may take after its last mask is gone.
        schedule: sets the pace.
        seed: of every draw.
        rows: [batch] int64, ordinal of each sample; with `seed` it fixes the sample's draws.
        first_step: [batch] int64, steps that a sample took before this call, whose numbers are used up.
        ordinal: [batch, length] int64, how many editable positions of the row come before.
        block: [batch, length] int64, which block a position belongs to; -1 for a given token.
        block_steps: [batch, n_blocks] int64, denoising steps of each block.
        budget: [batch, steps] int64, tokens to commit in each step where a strategy goes by number.
        chance: [batch, steps] float64, chance to be revealed in each step where it goes by chance.
        end_ids: [n_ends] int64, tokens behind which nothing is text; empty where none is known.
        may_end: [batch, 1] bool, rows in which nothing is given behind an editable position.
        stop_at_end: whether a row is finished once its text is.
        eos_last: whether ends are taken to be uncertain.
    """

    mask_id: int
    steps: int
    schedule: NoiseSchedule
    seed: int
    rows: Tensor
    first_step: Tensor
    ordinal: Tensor
    block: Tensor
    block_steps: Tensor
    budget: Tensor
    chance: Tensor
    end_ids: Tensor
    may_end: Tensor
    stop_at_end: bool = True
    eos_last: bool = False
    edit_steps: int = 0

    def uniform(self, stream: Stream, row_step: Tensor, *, depth: int = 1) -> Tensor:
        """Return [batch, length, depth] uniform numbers that depend on seed, sample, stream and the row's step alone.

        Editable positions take theirs in order, so that padding before a text changes nothing.
        """
        width = int(self.ordinal.shape[1])
        u = keyed_uniform(self.seed, stream, self.rows, width * depth, steps=self.first_step + row_step)
        return u.view(-1, width, depth).gather(1, self.ordinal[:, :, None].expand(-1, -1, depth))

    def token_draws(self, row_step: Tensor, *, tries: int = TRIES) -> Tensor:
        """Return [batch, length, tries] float64 in [0, 1), multiples of 2**-48, that decide the tokens.

        A large vocabulary has many tokens less probable than 2**-24, the grain of a single draw, so two are joined.
        """
        pair = self.uniform(Stream.SAMPLE_TOKEN, row_step, depth=2 * tries).double()
        return pair[..., 0::2] + pair[..., 1::2] * 2.0**-24


@dataclass(frozen=True)
class Turn:
    """What a strategy decides upon: one step of each row, in the block that the row is at.

    Attributes:
        is_masked: [batch, length] bool, positions of the block that are still masked.
        scope: [batch, length] bool, all positions of the block.
        block: [batch] int64, which block it is.
        step: [batch] int64, steps that the row has taken in this block.
        steps: [batch] int64, steps of this block; 0 for a row that is finished.
        row_step: [batch] int64, steps that the row has taken in all blocks, further ones not counted: they draw
            nothing.
        place: [batch] int64, column of `plan.budget` and `plan.chance`.
        spent: [batch] int64, tokens that the row has rewritten in this block.
        further: [batch] int64, steps that the row was granted in this block after its last mask was gone.
        plan: of the call.
    """

    is_masked: Tensor
    scope: Tensor
    block: Tensor
    step: Tensor
    steps: Tensor
    row_step: Tensor
    place: Tensor
    spent: Tensor
    further: Tensor
    plan: Plan

    @property
    def is_decided(self) -> Tensor:
        """Return [batch, length] bool, positions of the block that were committed in earlier steps."""
        return self.scope & ~self.is_masked

    def of(self, table: Tensor) -> Tensor:
        """Return [batch, 1], this step's entry of a [batch, steps] table."""
        return table.gather(1, self.place.clamp(max=table.shape[1] - 1)[:, None])


@dataclass(frozen=True)
class SamplerState:
    """Where a call stands between two steps.

    Attributes:
        z: [batch, length] int64, the sequences so far.
        is_masked: [batch, length] bool, what is still to be committed.
        committed: [batch, length] int64, the last step that wrote a token; -1 where none stands.
        block: [batch] int64, the block that a row is at.
        block_step: [batch] int64, steps that the row has taken in it.
        row_step: [batch] int64, steps that the row has taken in all, further ones not counted.
        row_forwards: [batch] int64, forwards that the row needed.
        held: [batch] bool, rows that stay at their block though nothing in it is masked.
        further: [batch] int64, steps that the row was granted in its block after its last mask was gone.
        spent: [batch] int64, tokens that the row has rewritten in its block.
        edits: [batch] int64, tokens that the row has rewritten in all.
        bad: [] int64, 1 + the step in which logits were unusable, or 0.
        step: the next step, from 0.
        forwards: calls of the denoiser so far.
        computed: tokens that went through the model so far, padding included.
        finished: whether a step found nothing left to do.
    """

    z: Tensor
    is_masked: Tensor
    committed: Tensor
    block: Tensor
    block_step: Tensor
    row_step: Tensor
    row_forwards: Tensor
    held: Tensor
    further: Tensor
    spent: Tensor
    edits: Tensor
    bad: Tensor
    step: int = 0
    forwards: int = 0
    computed: int = 0
    finished: bool = False


def start(
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int,
    seed: int = 0,
    rows: Tensor | None = None,
    first_step: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    commit_schedule: CommitSchedule = "even",
    end_ids: Sequence[int] = (),
    stop_at_end: bool = True,
    eos_last: bool = False,
    edit_steps: int = 0,
) -> tuple[SamplerState, Plan]:
    """Return the state before the first step and what stays the same, for driving `denoise_step` by hand.

    The arguments are those of `sample`; `edit_steps` is the `steps` of its edits.

    Raises:
        ValueError: if a number is out of range, or a shape or dtype is wrong.
    """
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    first_step = torch.zeros_like(rows) if first_step is None else first_step
    schedule = LinearSchedule() if schedule is None else schedule
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if edit_steps < 0:
        raise ValueError(f"edit_steps must be at least 0, got {edit_steps}")
    if mask_id < 0:
        raise ValueError(f"mask_id must be an id of the tokenizer, at least 0, got {mask_id}")
    _check(x, editable, rows, first_step)
    block = split_into_blocks(editable, block_length)
    block_steps = steps_of_blocks(block, steps)
    budget, chance = pace_of_blocks(block, block_steps, steps, schedule, commit_schedule)
    plan = Plan(
        mask_id=mask_id,
        steps=steps,
        schedule=schedule,
        seed=seed,
        rows=rows,
        first_step=first_step,
        ordinal=editable.cumsum(dim=1) - editable.long(),
        block=block,
        block_steps=block_steps,
        budget=budget,
        chance=chance,
        end_ids=torch.tensor(sorted(end_ids), dtype=torch.int64, device=x.device),
        may_end=~(editable.cummax(dim=1).values & ~editable).any(dim=1, keepdim=True),
        stop_at_end=stop_at_end,
        eos_last=eos_last,
        edit_steps=edit_steps,
    )
    nothing, zero = torch.full_like(x, -1), torch.zeros_like(rows)
    state = SamplerState(
        z=x.masked_fill(editable, mask_id),
        is_masked=editable.clone(),
        committed=nothing,
        block=zero,
        block_step=zero,
        row_step=zero,
        row_forwards=zero,
        held=torch.zeros_like(rows, dtype=torch.bool),
        further=zero,
        spent=zero,
        edits=zero,
        bad=torch.zeros((), dtype=torch.int64, device=x.device),
    )
    return state, plan


def _check(x: Tensor, editable: Tensor, rows: Tensor, first_step: Tensor) -> None:
    """Look at shapes, dtypes and ordinals.

    Raises:
        ValueError: if one is wrong.
    """
    named = {"x": x, "editable": editable, "rows": rows, "first_step": first_step}
    dtypes = {"x": torch.int64, "editable": torch.bool, "rows": torch.int64, "first_step": torch.int64}
    shapes = {"x": x.shape, "editable": x.shape, "rows": x.shape[:1], "first_step": x.shape[:1]}
    fits = x.dim() == 2 and x.shape[1] > 0
    if not fits or any(v.shape != shapes[name] or v.dtype != dtypes[name] for name, v in named.items()):
        given = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in named.items())
        raise ValueError(
            "x must be [batch, length] int64 with length at least 1, editable [batch, length] bool, rows and "
            f"first_step [batch] int64; got {given}"
        )
    low, high = torch.cat([rows, first_step, rows.new_zeros(1)]).aminmax()
    if int(low) < 0 or int(high) >= MOST_ROWS:
        raise ValueError(f"rows and first_step must lie in [0, 2**32), 32 bits each; got {int(low)} to {int(high)}")


def next_turn(state: SamplerState, plan: Plan) -> Turn:
    """Return what the next step is about: for each row the first block that is not finished, or that it stays at."""
    far = plan.block_steps.shape[1]
    block = torch.where(state.is_masked, plan.block, far).amin(dim=1)
    block = torch.where(state.held, state.block, block)
    inside = plan.block == block[:, None]
    is_same = block == state.block
    step = torch.where(is_same, state.block_step, 0)
    steps = torch.cat([plan.block_steps, torch.zeros_like(plan.block_steps[:, :1])], dim=1)
    offset = steps.cumsum(dim=1) - steps
    here = block[:, None]
    return Turn(
        is_masked=state.is_masked & inside,
        scope=inside,
        block=block,
        step=step,
        steps=steps.gather(1, here)[:, 0],
        row_step=state.row_step,
        place=offset.gather(1, here)[:, 0] + step,
        spent=torch.where(is_same, state.spent, 0),
        further=torch.where(is_same, state.further, 0),
        plan=plan,
    )


def is_behind_end(z: Tensor, is_masked: Tensor, plan: Plan) -> Tensor:
    """Return [batch, length] bool, what stands behind the first end that is decided, and so is no text."""
    if not (len(plan.end_ids) and plan.stop_at_end):
        return torch.zeros_like(is_masked)
    is_end = torch.isin(z, plan.end_ids) & ~is_masked & (plan.block >= 0)
    return (is_end.cumsum(dim=1) - is_end.long() > 0) & plan.may_end


def is_complete(z: Tensor, is_masked: Tensor, plan: Plan) -> Tensor:
    """Return [batch, 1] bool, rows whose text is complete: an end is decided, and all before it."""
    if not (len(plan.end_ids) and plan.stop_at_end):
        return torch.zeros_like(plan.may_end)
    length = z.shape[1]
    place = torch.arange(length, device=z.device)
    is_end = torch.isin(z, plan.end_ids) & ~is_masked & (plan.block >= 0)
    first_end = torch.where(is_end, place, length).amin(dim=1, keepdim=True)
    first_open = torch.where(is_masked, place, length).amin(dim=1, keepdim=True)
    return (first_end < first_open) & plan.may_end
