"""The data of a call of the sampler: its plan, the state between two steps, and the view of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..diffusion.rng import keyed_uniform
from ..diffusion.schedules import LinearSchedule, NoiseSchedule
from ..utils.devices import check_float64
from .budget import CommitSchedule, pace_of_blocks, split_into_blocks, steps_of_blocks, steps_of_each_block

MAX_SAMPLES = 2**32
TRIES = 8  # uniform numbers of a token, as draws outside the nucleus are repeated, see `draw_tokens`


@dataclass(frozen=True)
class Plan:
    """The constants of a call.

    Attributes:
        mask_id: id of [MASK].
        steps: largest number of denoising steps of a row.
        schedule: the noise schedule.
        seed: of every draw; or [batch] int64, that of each row, modulo 2**64.
        sample_index: [batch] int64, number of each sample; with `seed` it fixes the sample's draws.
        steps_taken: [batch] int64, steps that a sample took in earlier calls, whose random numbers are used up.
        editable_index: [batch, length] int64, number of editable positions before each position of the row.
        block: [batch, length] int64, index of the block of a position; -1 for a fixed token.
        block_steps: [batch, n_blocks] int64, denoising steps of each block.
        budget: [batch, steps] int64, tokens that each step commits, for strategies that commit a fixed number.
        reveal_probability: [batch, steps] float64, probability that a step reveals a masked token, for strategies that
            draw the positions.
        eos_ids: [n_eos] int64, EOS and padding tokens, which end a text; empty if there are none.
        can_stop: [batch, 1] bool, rows without a fixed token after an editable position.
        stop_at_eos: whether a row is finished once its text is complete.
        eos_last: whether a position at which an EOS is predicted counts as the least certain of its block.
        edit_steps: edit steps that a block may take once it is fully decoded.
    """

    mask_id: int
    steps: int
    schedule: NoiseSchedule
    seed: int | Tensor
    sample_index: Tensor
    steps_taken: Tensor
    editable_index: Tensor
    block: Tensor
    block_steps: Tensor
    budget: Tensor
    reveal_probability: Tensor
    eos_ids: Tensor
    can_stop: Tensor
    stop_at_eos: bool = True
    eos_last: bool = False
    edit_steps: int = 0

    def uniform(self, stream: Stream, row_step: Tensor) -> Tensor:
        """Return [batch, length] uniform numbers, a function of seed, sample index, stream and row step alone.

        Numbers go to editable positions in order, so padding in front of a text changes nothing.
        """
        width = int(self.editable_index.shape[1])
        u = keyed_uniform(self.seed, stream, self.sample_index, width, steps=self.steps_taken + row_step)
        return u.gather(1, self.editable_index)

    def token_draws(self, row_step: Tensor, flat_index: Tensor, *, tries: int = TRIES) -> Tensor:
        """Return [n, tries] float64 in [0, 1), multiples of 2**-48, for the draws of tokens at `flat_index`.

        A large vocabulary has many tokens less probable than 2**-24, the resolution of one number, so two are joined.
        As in `uniform`, the numbers go to editable positions in order.

        Args:
            row_step: [batch] int64, see `StepView`.
            flat_index: [n] int64 into [batch * length].
            tries: draws for each position.
        """
        row = torch.div(flat_index, self.editable_index.shape[1], rounding_mode="floor")
        pair = keyed_uniform(
            self.seed if isinstance(self.seed, int) else self.seed[row],
            Stream.SAMPLE_TOKEN,
            self.sample_index[row],
            2 * tries,
            steps=(self.steps_taken + row_step)[row],
            first=self.editable_index.flatten()[flat_index] * (2 * tries),
        ).double()
        return pair[:, 0::2] + pair[:, 1::2] * 2.0**-24


@dataclass(frozen=True)
class StepView:
    """The input of one step: the current block of each row, and the steps taken in it.

    Attributes:
        is_masked: [batch, length] bool, positions of the block that are still masked.
        scope: [batch, length] bool, all positions of the block.
        block: [batch] int64, index of the block.
        step: [batch] int64, steps that the row has taken in this block.
        steps: [batch] int64, steps of this block; 0 for a row that is finished.
        row_step: [batch] int64, steps that the row has taken in all blocks, without edit steps, which draw nothing.
        column: [batch] int64, column of this step in `plan.budget` and `plan.reveal_probability`.
        block_edits: [batch] int64, tokens that the row has edited in this block.
        edit_step: [batch] int64, edit steps that the row was granted in this block.
        plan: of the call.
    """

    is_masked: Tensor
    scope: Tensor
    block: Tensor
    step: Tensor
    steps: Tensor
    row_step: Tensor
    column: Tensor
    block_edits: Tensor
    edit_step: Tensor
    plan: Plan

    @property
    def is_decoded(self) -> Tensor:
        """Return [batch, length] bool, positions of the block that are not masked."""
        return self.scope & ~self.is_masked

    def of_step(self, table: Tensor) -> Tensor:
        """Return [batch, 1], the entry of a [batch, steps] table of the plan for this step."""
        return table.gather(1, self.column.clamp(max=table.shape[1] - 1)[:, None])


@dataclass(frozen=True)
class SamplerState:
    """The state of a call between two steps.

    Attributes:
        z: [batch, length] int64, the sequences so far.
        is_masked: [batch, length] bool, positions still to be committed.
        committed: [batch, length] int64, the last step that changed each token; -1 where none did.
        block: [batch] int64, current block of the row.
        block_step: [batch] int64, steps that the row has taken in it.
        block_edits: [batch] int64, tokens that the row has edited in it.
        row_step: [batch] int64, steps that the row has taken in all blocks, without edit steps.
        edit_step: [batch] int64, edit steps that the row was granted in the current block.
        held: [batch] bool, rows that stay in their block although it is fully decoded.
        edits: [batch] int64, tokens that the row has edited in all blocks.
        sample_nfe: [batch] int64, forward passes that the row needed.
        sample_computed: [batch] int64, tokens of the row that went through the model, padding included.
        is_bad: [batch] bool, rows whose logits were unusable in the last step.
        step: the next step, from 0.
        nfe: forward passes so far.
        finished: whether a step found nothing left to do.
        on_host: [batch, length] int64, `z` on the CPU, where whoever took the step has copied it; None elsewhere.
    """

    z: Tensor
    is_masked: Tensor
    committed: Tensor
    block: Tensor
    block_step: Tensor
    block_edits: Tensor
    row_step: Tensor
    edit_step: Tensor
    held: Tensor
    edits: Tensor
    sample_nfe: Tensor
    sample_computed: Tensor
    is_bad: Tensor
    step: int = 0
    nfe: int = 0
    finished: bool = False
    on_host: Tensor | None = None


def start(
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int,
    seed: int = 0,
    sample_index: Tensor | None = None,
    steps_taken: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    block: Tensor | None = None,
    commit_schedule: CommitSchedule = "even",
    eos_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    eos_last: bool = False,
    edit_steps: int = 0,
) -> tuple[SamplerState, Plan]:
    """Return the state before the first step and the plan of the call, for `denoising_step`.

    The arguments are those of `sample`; `edit_steps` is the `steps` of its edits.

    Raises:
        ValueError: if a number is out of range, a shape or dtype is wrong, or the device has no float64.
    """
    sample_index = torch.arange(len(x), device=x.device) if sample_index is None else sample_index
    steps_taken = torch.zeros_like(sample_index) if steps_taken is None else steps_taken
    schedule = LinearSchedule() if schedule is None else schedule
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if edit_steps < 0:
        raise ValueError(f"edit_steps must be at least 0, got {edit_steps}")
    if mask_id < 0:
        raise ValueError(f"mask_id must be at least 0, got {mask_id}")
    _check(x, editable, sample_index, steps_taken)
    check_float64(x.device, "sampling")
    if block is None:
        block = split_into_blocks(editable, block_length)
        block_steps = steps_of_blocks(block, steps)
    else:
        block_steps = steps_of_each_block(block, steps)
    budget, reveal_probability = pace_of_blocks(block, block_steps, schedule, commit_schedule)
    plan = Plan(
        mask_id=mask_id,
        steps=budget.shape[1],
        schedule=schedule,
        seed=seed,
        sample_index=sample_index,
        steps_taken=steps_taken,
        editable_index=editable.cumsum(dim=1) - editable.long(),
        block=block,
        block_steps=block_steps,
        budget=budget,
        reveal_probability=reveal_probability,
        eos_ids=torch.tensor(sorted(eos_ids), dtype=torch.int64, device=x.device),
        can_stop=~(editable.cummax(dim=1).values & ~editable).any(dim=1, keepdim=True),
        stop_at_eos=stop_at_eos,
        eos_last=eos_last,
        edit_steps=edit_steps,
    )
    zero = torch.zeros_like(sample_index)
    state = SamplerState(
        z=x.masked_fill(editable, mask_id),
        is_masked=editable.clone(),
        committed=torch.full_like(x, -1),
        block=zero,
        block_step=zero,
        block_edits=zero,
        row_step=zero,
        edit_step=zero,
        held=torch.zeros_like(sample_index, dtype=torch.bool),
        is_bad=torch.zeros_like(sample_index, dtype=torch.bool),
        edits=zero,
        sample_nfe=zero,
        sample_computed=zero,
    )
    return state, plan


def _check(x: Tensor, editable: Tensor, sample_index: Tensor, steps_taken: Tensor) -> None:
    """Check shapes, dtypes and ranges.

    Raises:
        ValueError: if one is wrong.
    """
    named = {"x": x, "editable": editable, "sample_index": sample_index, "steps_taken": steps_taken}
    dtypes = {"x": torch.int64, "editable": torch.bool, "sample_index": torch.int64, "steps_taken": torch.int64}
    shapes = {"x": x.shape, "editable": x.shape, "sample_index": x.shape[:1], "steps_taken": x.shape[:1]}
    fits = x.dim() == 2 and x.shape[1] > 0
    if not fits or any(v.shape != shapes[name] or v.dtype != dtypes[name] for name, v in named.items()):
        got = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in named.items())
        raise ValueError(
            "x must be [batch, length] int64 with length at least 1, editable [batch, length] bool, sample_index and "
            f"steps_taken [batch] int64; got {got}"
        )
    low, high = torch.cat([sample_index, steps_taken, sample_index.new_zeros(1)]).aminmax()
    if int(low) < 0 or int(high) >= MAX_SAMPLES:
        raise ValueError(f"sample_index and steps_taken must lie in [0, 2**32), got {int(low)} to {int(high)}")


def view_step(state: SamplerState, plan: Plan) -> StepView:
    """Return the view of the next step: each row is in its first unfinished block, or in the block that holds it."""
    n_blocks = plan.block_steps.shape[1]
    block = torch.where(state.is_masked, plan.block, n_blocks).amin(dim=1)
    block = torch.where(state.held, state.block, block)
    scope = plan.block == block[:, None]
    is_same = block == state.block
    step = torch.where(is_same, state.block_step, 0)
    steps = torch.cat([plan.block_steps, torch.zeros_like(plan.block_steps[:, :1])], dim=1)
    first_column = steps.cumsum(dim=1) - steps
    return StepView(
        is_masked=state.is_masked & scope,
        scope=scope,
        block=block,
        step=step,
        steps=steps.gather(1, block[:, None])[:, 0],
        row_step=state.row_step,
        column=first_column.gather(1, block[:, None])[:, 0] + step,
        block_edits=torch.where(is_same, state.block_edits, 0),
        edit_step=torch.where(is_same, state.edit_step, 0),
        plan=plan,
    )


def is_after_eos(z: Tensor, is_masked: Tensor, plan: Plan) -> Tensor:
    """Return [batch, length] bool, positions after the first decoded EOS, which are not part of the text."""
    if not (len(plan.eos_ids) and plan.stop_at_eos):
        return torch.zeros_like(is_masked)
    is_eos = torch.isin(z, plan.eos_ids) & ~is_masked & (plan.block >= 0)
    return (is_eos.cumsum(dim=1) - is_eos.long() > 0) & plan.can_stop


def is_complete(z: Tensor, is_masked: Tensor, plan: Plan) -> Tensor:
    """Return [batch, 1] bool, rows whose text is complete: an EOS is decoded, and everything before it."""
    if not (len(plan.eos_ids) and plan.stop_at_eos):
        return torch.zeros_like(plan.can_stop)
    length = z.shape[1]
    position = torch.arange(length, device=z.device)
    is_eos = torch.isin(z, plan.eos_ids) & ~is_masked & (plan.block >= 0)
    first_eos = torch.where(is_eos, position, length).amin(dim=1, keepdim=True)
    first_masked = torch.where(is_masked, position, length).amin(dim=1, keepdim=True)
    return (first_eos < first_masked) & plan.can_stop
