"""What a call of the sampler holds: its plan, where it stands, and what the next step is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..diffusion.philox import keyed_uniform
from ..diffusion.schedules import LinearSchedule, NoiseSchedule
from .steps import reveal_probability, split_into_blocks, steps_of_blocks, transfer_budget

TRIES = 8  # columns of uniform numbers: draws outside the nucleus are repeated, see `draw_tokens`


@dataclass(frozen=True)
class Plan:
    """What stays the same over the steps of one call.

    Attributes:
        mask_id: of [MASK].
        steps: number of denoising steps of a row.
        schedule: sets the pace.
        seed: of every draw.
        rows: [batch] int64, ordinal of each sample; with `seed` it fixes the sample's draws.
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
    ordinal: Tensor
    block: Tensor
    block_steps: Tensor
    budget: Tensor
    chance: Tensor
    end_ids: Tensor
    may_end: Tensor
    stop_at_end: bool = True
    eos_last: bool = False

    def uniform(self, stream: Stream, row_step: Tensor, *, depth: int = 1) -> Tensor:
        """Return [batch, length, depth] uniform numbers that depend on seed, sample, stream and the row's step alone.

        Editable positions take theirs in order, so that padding before a text changes nothing.
        """
        width = int(self.ordinal.shape[1])
        u = keyed_uniform(self.seed, stream, self.rows * self.steps + row_step, width * depth)
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
        row_step: [batch] int64, steps that the row has taken in all blocks.
        place: [batch] int64, column of `plan.budget` and `plan.chance`.
        plan: of the call.
    """

    is_masked: Tensor
    scope: Tensor
    block: Tensor
    step: Tensor
    steps: Tensor
    row_step: Tensor
    place: Tensor
    plan: Plan

    def of(self, table: Tensor) -> Tensor:
        """Return [batch, 1], this step's entry of a [batch, steps] table."""
        return table.gather(1, self.place.clamp(max=table.shape[1] - 1)[:, None])


@dataclass(frozen=True)
class SamplerState:
    """Where a call stands between two steps.

    Attributes:
        z: [batch, length] int64, the sequences so far.
        is_masked: [batch, length] bool, what is still to be committed.
        committed: [batch, length] int64, the step that committed a token; -1 where none did.
        block: [batch] int64, the block that a row is at.
        block_step: [batch] int64, steps that the row has taken in it.
        row_step: [batch] int64, steps that the row has taken in all.
        row_forwards: [batch] int64, forwards that the row needed.
        bad: [] int64, 1 + the step in which logits were unusable, or 0.
        guess: [batch, length] int64, the most probable token where it was looked at; -1 elsewhere.
        stable: [batch] int64, steps since a guess changed.
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
    bad: Tensor
    guess: Tensor
    stable: Tensor
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
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    end_ids: Sequence[int] = (),
    stop_at_end: bool = True,
    eos_last: bool = False,
) -> tuple[SamplerState, Plan]:
    """Return the state before the first step and what stays the same, for driving `denoise_step` by hand.

    The arguments are those of `sample`.

    Raises:
        ValueError: if a number is out of range, or a shape or dtype is wrong.
    """
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    schedule = LinearSchedule() if schedule is None else schedule
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if mask_id < 0:
        raise ValueError(f"mask_id must be an id of the tokenizer, at least 0, got {mask_id}")
    fits = x.dim() == 2 and x.shape[1] > 0 and editable.shape == x.shape and rows.shape == x.shape[:1]
    if not fits or x.dtype != torch.int64 or editable.dtype != torch.bool or rows.dtype != torch.int64:
        given = ", ".join(
            f"{name} {list(value.shape)} {value.dtype}"
            for name, value in (("x", x), ("editable", editable), ("rows", rows))
        )
        raise ValueError(
            "x must be [batch, length] int64 with length at least 1, editable [batch, length] bool and rows [batch] "
            f"int64; got {given}"
        )
    block = split_into_blocks(editable, block_length)
    block_steps = steps_of_blocks(block, steps)
    budget, chance = _pace(block, block_steps, steps, schedule)
    plan = Plan(
        mask_id=mask_id,
        steps=steps,
        schedule=schedule,
        seed=seed,
        rows=rows,
        ordinal=editable.cumsum(dim=1) - editable.long(),
        block=block,
        block_steps=block_steps,
        budget=budget,
        chance=chance,
        end_ids=torch.tensor(sorted(end_ids), dtype=torch.int64, device=x.device),
        may_end=~(editable.cummax(dim=1).values & ~editable).any(dim=1, keepdim=True),
        stop_at_end=stop_at_end,
        eos_last=eos_last,
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
        bad=torch.zeros((), dtype=torch.int64, device=x.device),
        guess=nothing,
        stable=zero,
    )
    return state, plan


def next_turn(state: SamplerState, plan: Plan) -> Turn:
    """Return what the next step is about: for each row the first block that is not finished."""
    far = plan.block_steps.shape[1]
    block = torch.where(state.is_masked, plan.block, far).amin(dim=1)
    inside = plan.block == block[:, None]
    step = torch.where(block == state.block, state.block_step, 0)
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
        plan=plan,
    )


def left_behind(z: Tensor, is_masked: Tensor, plan: Plan) -> Tensor:
    """Return [batch, length] bool, masked positions of rows whose text is complete: all before an end is decided."""
    if not (len(plan.end_ids) and plan.stop_at_end):
        return torch.zeros_like(is_masked)
    length = z.shape[1]
    place = torch.arange(length, device=z.device)
    is_end = torch.isin(z, plan.end_ids) & ~is_masked & (plan.block >= 0)
    first_end = torch.where(is_end, place, length).amin(dim=1, keepdim=True)
    first_open = torch.where(is_masked, place, length).amin(dim=1, keepdim=True)
    return is_masked & (first_end < first_open) & plan.may_end


def _pace(block: Tensor, block_steps: Tensor, steps: int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return budget and chance, [batch, steps] each, the blocks of a row one after another."""
    n_blocks = block_steps.shape[1]
    sizes = torch.stack([(block == index).sum(dim=1) for index in range(n_blocks)], dim=1).tolist()
    budgets: dict[tuple[int, int], list[int]] = {}
    chances: dict[int, list[float]] = {}
    budget, chance = [], []
    for row_sizes, row_steps in zip(sizes, block_steps.tolist(), strict=True):
        numbers: list[int] = []
        probabilities: list[float] = []
        for size, count in zip(row_sizes, row_steps, strict=True):
            if not count:
                continue
            if (size, count) not in budgets:
                budgets[size, count] = transfer_budget(torch.tensor([size]), count, schedule)[0].tolist()
            if count not in chances:
                chances[count] = [reveal_probability(step, count, schedule) for step in range(count)]
            numbers += budgets[size, count]
            probabilities += chances[count]
        budget.append(numbers + [0] * (steps - len(numbers)))
        chance.append(probabilities + [0.0] * (steps - len(probabilities)))
    shape = (len(block), steps)
    return (
        torch.tensor(budget, dtype=torch.int64, device=block.device).view(shape),
        torch.tensor(chance, dtype=torch.float64, device=block.device).view(shape),
    )
