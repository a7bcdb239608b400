"""The denoising loop, `sample`, and its step, `denoising_step`: select, predict, commit, edit, remask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from . import edits as editing
from .budget import CommitSchedule
from .edits import Edits
from .logits import LogitsConfig, Measure
from .prediction import (
    Answers,
    Branches,
    CachingDenoiser,
    Context,
    Denoiser,
    Prediction,
    StepScores,
    check_context,
    predict_tokens,
)
from .state import Plan, SamplerState, StepView, is_after_eos, is_complete, start, view_step
from .strategies import Strategy, remask_positions, stays


@dataclass(frozen=True)
class SamplerOutput:
    """What `sample` returns.

    Attributes:
        sequences: [batch, length] int64.
        steps: largest number of denoising steps that a row took.
        nfe: forward passes of the denoiser; a step that selects no position needs none, a guided one two.
        committed: [batch, length] int64, the last step that changed each token; -1 where it is fixed, and where it was
            never decoded because it follows the EOS of a complete text. There `sequences` repeat the EOS.
        sample_nfe: [batch] int64, forward passes that the row needed, whatever other rows needed.
        edits: [batch] int64, how often a token of the row was edited.
        sample_computed: [batch] int64, tokens of the row that went through the model, padding included; of a finished
            row none do, and with a `CachingDenoiser` only those that it computes again.
    """

    sequences: Tensor
    steps: int
    nfe: int
    committed: Tensor
    sample_nfe: Tensor
    edits: Tensor
    sample_computed: Tensor

    @property
    def computed(self) -> int:
        """Return the tokens of all rows that went through the model."""
        return int(self.sample_computed.sum())

    @property
    def tokens_per_step(self) -> Tensor:
        """Return [steps] int64, the number of tokens in the batch that each step was the last to change."""
        return torch.bincount(self.committed[self.committed >= 0], minlength=self.steps)


# Called after each step with the step, the sequences, on any device, and the positions that it changed.
Callback = Callable[[int, Tensor, Tensor], None]


class StepFunction(Protocol):
    """`denoising_step`, or a function that takes the steps of several calls at once."""

    def __call__(
        self,
        denoiser: Denoiser | CachingDenoiser,
        state: SamplerState,
        plan: Plan,
        *,
        strategy: Strategy,
        logits: LogitsConfig,
        edits: Edits | None = None,
        context: Context | None = None,
    ) -> SamplerState:
        """Return the state after one step, see `denoising_step`."""


def sample(
    denoiser: Denoiser | CachingDenoiser,
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int,
    strategy: Strategy,
    logits: LogitsConfig | None = None,
    seed: int = 0,
    sample_index: Tensor | None = None,
    steps_taken: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    block: Tensor | None = None,
    commit_schedule: CommitSchedule = "even",
    edits: Edits | None = None,
    eos_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    eos_last: bool = False,
    context: Context | None = None,
    callback: Callback | None = None,
    step_function: StepFunction | None = None,
) -> SamplerOutput:
    """Run the reverse process: fill the editable positions of `x`, starting from [MASK] in all of them.

    A row's result depends on `seed`, its sample index and its own content, not on the batch it is in.

    Args:
        denoiser: the model; a `CachingDenoiser` is told which block each row is at.
        x: [batch, length] int64; ids at editable positions do not matter.
        editable: [batch, length] bool; all other positions are fixed, even those whose id equals `mask_id`.
        mask_id: id of [MASK], which is never drawn.
        steps: denoising steps of a row, at least 1 and at least the number of its blocks. A finished row takes no
            more, and a step that needs no logits costs no forward pass.
        strategy: which positions each step commits.
        logits: how a token is drawn; by default from the model's own distribution.
        seed: of every draw.
        sample_index: [batch] int64, a number for each sample, below 2**32; by default 0, 1, 2 …
        steps_taken: [batch] int64, steps that earlier calls took for the first positions of each sample, so that this
            call draws other numbers; by default 0.
        schedule: the noise schedule that sets how many tokens each step commits; by default linear.
        block_length: editable positions of a row that are decoded together, from left to right; None for all at once.
        block: [batch, length] int64, the blocks of a block model, from `budget.split_by_position`, each of which takes
            `steps` steps; None for blocks of `block_length`, which share them.
        commit_schedule: how many tokens the steps of a block commit under a strategy that counts, and with what
            probability under `random`: `even` or `dream`, see `budget.pace_of_blocks`.
        edits: which decoded tokens are edited; by default none. Edit steps come on top of `steps`.
        eos_ids: EOS and padding tokens, which end a text; by default none.
        stop_at_eos: stop a row once an EOS and everything before it are decoded. Without editing or remasking, the
            text before the EOS is the same as with False. Rows with fixed tokens after editable positions do not stop.
        eos_last: treat a position at which an EOS is predicted as the least certain of its block.
        context: which fixed tokens are not text, and which are the prompt.
        callback: called after each step.
        step_function: what takes a step; None for `denoising_step`.
    Raises:
        ValueError: if an argument does not fit, the denoiser's logits are unusable or the strategy leaves a position
            masked.
    """
    logits = logits or LogitsConfig()
    state, plan = start(
        x,
        editable=editable,
        mask_id=mask_id,
        steps=steps,
        seed=seed,
        sample_index=sample_index,
        steps_taken=steps_taken,
        schedule=schedule,
        block_length=block_length,
        block=block,
        commit_schedule=commit_schedule,
        eos_ids=eos_ids,
        stop_at_eos=stop_at_eos,
        eos_last=eos_last,
        edit_steps=0 if edits is None else edits.steps,
    )
    check_context(context, editable, logits)
    take_step = step_function or denoising_step
    while True:
        step = state.step
        state = take_step(denoiser, state, plan, strategy=strategy, logits=logits, edits=edits, context=context)
        if state.finished:
            break
        if callback is not None:
            callback(step, state.z if state.on_host is None else state.on_host, state.committed == step)
    z = state.z
    if len(eos_ids) and stop_at_eos:
        z = torch.where(editable & (state.committed < 0), int(plan.eos_ids[0]), z)
    return SamplerOutput(
        z, state.step, state.nfe, state.committed, state.sample_nfe, state.edits, state.sample_computed
    )


@torch.no_grad()
def denoising_step(
    denoiser: Denoiser | CachingDenoiser,
    state: SamplerState,
    plan: Plan,
    *,
    strategy: Strategy,
    logits: LogitsConfig,
    edits: Edits | None = None,
    context: Context | None = None,
) -> SamplerState:
    """Return the state after one step, `finished` if there was nothing left to do; `state` is not changed.

    Select the positions whose logits are needed, predict a token at each, commit the strategy's choice of them, edit
    decoded tokens, remask decoded tokens.

    Raises:
        ValueError: if the denoiser's logits have the wrong shape, hold NaN or allow no token (found one step later),
            if all steps are taken and a position is still masked, or if the plan was made for another `edits.steps`.
    """
    edits, context = edits or Edits(), context or Context()
    if edits.steps != plan.edit_steps:
        raise ValueError(
            f"edits.steps is {edits.steps}, but the plan was made with edit_steps={plan.edit_steps}; pass "
            f"edit_steps={edits.steps} to start()"
        )
    view = view_step(state, plan)
    request = select_positions(state, view, strategy, edits)
    branches = Branches.of(denoiser, state.z, view, logits, context)
    n_positions, answers = count_active(state, view, request, strategy, branches.questions(request.needs_logits))
    if n_positions is None:
        return replace(state, finished=True)
    denoisers = branches.steps(answers)
    z, commit, edit = state.z, torch.zeros_like(state.is_masked), torch.zeros_like(state.is_masked)
    if n_positions:
        flat_index = request.flat_index(n_positions)
        prediction = predict_tokens(branches, denoisers, state, view, flat_index, request.measures, logits, context)
        scores = StepScores(prediction.draws, flat_index, state.z, plan)
        commit = commit_positions(view, request, scores, strategy)
        z = torch.where(commit, scores.ids, state.z)
        if edits.active:
            argmax, top_log_prob = scores.measure("argmax"), scores.measure("top_log_prob")
            edit = edits.edit_positions(view, state.z, request.edit, commit, argmax, top_log_prob)
            z = torch.where(edit, argmax, z)
        state = count_forward(state, request, flat_index, prediction)
    z = z.masked_fill(request.remask, plan.mask_id)
    return apply_update(state, view, StepUpdate(z, commit, edit, request.remask), strategy)


@dataclass(frozen=True)
class LogitsRequest:
    """What a step selects before its forward pass, [batch, length] bool each.

    Attributes:
        commit: positions whose scores the strategy needs; it may commit the masked ones among them.
        edit: decoded positions that may be edited.
        remask: decoded positions that are masked again after the step; they need no logits.
        measures: the scores to compute at each position.
    """

    commit: Tensor
    edit: Tensor
    remask: Tensor
    measures: frozenset[Measure]

    @property
    def needs_logits(self) -> Tensor:
        """Return [batch, length] bool, the positions whose logits the step needs."""
        return self.commit | self.edit

    def flat_index(self, n: int) -> Tensor:
        """Return [n] int64, ascending, the flat indices in [batch * length] of the `n` positions that need logits.

        A stable sort moves them to the front; `nonzero` would wait for the device to count them.
        """
        return self.needs_logits.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:n]


@dataclass(frozen=True)
class StepUpdate:
    """What a step changes.

    Attributes:
        z: [batch, length] int64, the sequences after it.
        commit: [batch, length] bool, masked positions that it decodes.
        edit: [batch, length] bool, decoded positions that it rewrites.
        remask: [batch, length] bool, decoded positions that it masks again.
    """

    z: Tensor
    commit: Tensor
    edit: Tensor
    remask: Tensor


def select_positions(state: SamplerState, view: StepView, strategy: Strategy, edits: Edits) -> LogitsRequest:
    """Return the positions that may change in this step, and the scores that it needs."""
    remask = remask_positions(strategy, view)
    commit = strategy.candidates(view) & view.scope
    if not edits.active:
        return LogitsRequest(commit, torch.zeros_like(commit), remask, strategy.measures)
    edit = edits.candidates(view, (commit & view.is_masked).sum(dim=1))
    edit = edit & ~remask & ~is_after_eos(state.z, state.is_masked, view.plan)
    return LogitsRequest(commit, edit, remask, strategy.measures | editing.MEASURES)


def count_active(
    state: SamplerState, view: StepView, request: LogitsRequest, strategy: Strategy, questions: Sequence[Tensor]
) -> tuple[int | None, list[Answers]]:
    """Return how many positions need logits, or None if every row is finished, and the answers to `questions`.

    A step waits for the device only here, so unusable logits of the previous step and positions that were left masked
    are also found here. With a nucleus other devices than a CPU wait once more for each part of the logits, see
    `draw_tokens`.

    Args:
        state: before the step.
        view: of the step.
        request: of the step.
        strategy: named in errors.
        questions: [batch, n_i] int64 each, see `CachingDenoiser.questions`.
    Raises:
        ValueError: see `denoising_step`.
    """
    overrun = view.is_masked.any(dim=1) & (view.step >= view.steps)
    counts = (
        request.needs_logits.sum(),
        (view.steps > 0).sum(),
        overrun.sum(),
        state.is_masked.sum(),
        state.is_bad.sum(),
    )
    numbers = torch.cat([torch.stack(counts), *(question.flatten() for question in questions)]).tolist()
    n_positions, n_unfinished, n_overrun, n_masked, n_bad = numbers[: len(counts)]
    if n_bad:
        raise ValueError(
            f"in step {state.step - 1} the denoiser returned logits that hold NaN or inf, or allow no token but "
            f"[MASK] (id {view.plan.mask_id}); use bfloat16 or float32 if it runs in float16, which overflows easily"
        )
    if n_overrun:
        raise ValueError(
            f"the strategy {strategy.name!r} left {n_masked} positions masked after all {view.plan.steps} steps; its "
            "commit() must return every masked position in the last step of a block"
        )
    first = len(counts)
    answers: list[Answers] = []
    for question in questions:
        n = question.shape[1]
        answers.append([numbers[first + row * n : first + (row + 1) * n] for row in range(len(question))])
        first += question.numel()
    return n_positions if n_unfinished else None, answers


def commit_positions(view: StepView, request: LogitsRequest, scores: StepScores, strategy: Strategy) -> Tensor:
    """Return [batch, length] bool, the masked positions that the strategy commits.

    Raises:
        ValueError: if it requests a measure that it has not declared.
    """

    def score(measure: Measure) -> Tensor:
        if measure not in strategy.measures:
            raise ValueError(
                f"the strategy {strategy.name!r} requests {measure!r}, which is not in its measures "
                f"{sorted(strategy.measures)}; add it to them"
            )
        return scores.certainty(measure)

    return strategy.commit(view, request.commit, score) & request.commit & view.is_masked


def count_forward(
    state: SamplerState, request: LogitsRequest, flat_index: Tensor, prediction: Prediction
) -> SamplerState:
    """Return the state with a step's forward passes counted, and rows with unusable logits noted in `is_bad`."""
    row = torch.div(flat_index, state.z.shape[1], rounding_mode="floor")
    n_bad = torch.zeros_like(state.sample_nfe).index_add_(0, row, prediction.draws.bad.long())
    return replace(
        state,
        sample_nfe=state.sample_nfe + request.needs_logits.any(dim=1) * prediction.n_passes,
        is_bad=n_bad > 0,
        nfe=state.nfe + prediction.n_passes,
        sample_computed=state.sample_computed + prediction.computed,
    )


def apply_update(state: SamplerState, view: StepView, update: StepUpdate, strategy: Strategy) -> SamplerState:
    """Return the state after a step; `held` marks the rows that stay in their block although it is fully decoded."""
    changed = update.commit | update.edit
    is_masked = (state.is_masked & ~update.commit) | update.remask
    complete = is_complete(update.z, is_masked, view.plan)
    is_masked = is_masked & ~complete
    n_edits = update.edit.sum(dim=1)
    unfinished = view.steps > 0
    decoded = unfinished & ~((is_masked & view.scope).any(dim=1) | complete[:, 0])
    held = decoded & stays(strategy, view)
    may_edit = decoded & ~held & changed.any(dim=1) & (view.edit_step < view.plan.edit_steps)
    return replace(
        state,
        z=update.z,
        is_masked=is_masked,
        committed=state.committed.masked_fill(changed, state.step).masked_fill(update.remask, -1),
        block=view.block,
        block_step=view.step + unfinished,
        block_edits=view.block_edits + n_edits,
        row_step=state.row_step + (unfinished & (view.edit_step == 0)),
        edit_step=view.edit_step + may_edit,
        held=held | may_edit,
        edits=state.edits + n_edits,
        step=state.step + 1,
        on_host=None,
    )
