"""The denoising loop and its step: predict tokens, select positions, commit, edit, remask; block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from . import edits as editing
from .budget import CommitSchedule
from .edits import Edits
from .forward import Context, Denoiser, Scores, check_context, predict
from .logits import LogitsConfig, Measure
from .state import Plan, SamplerState, Turn, is_behind_end, is_complete, next_turn, start
from .strategies import Strategy, remasked, stays

_NO_EDITS = Edits()


@dataclass(frozen=True)
class SamplerOutput:
    """What `sample` returns.

    Attributes:
        sequences: [batch, length] int64.
        steps: denoising steps taken by the row with most.
        forwards: calls of the denoiser; a step that chose no position needs none, a guided one two.
        committed: [batch, length] int64, the last step that wrote each token; -1 where it was given, or left out
            behind the end of a text, where `sequences` hold the end again.
        row_forwards: [batch] int64, calls that the row needed, whatever the others in the batch did.
        edits: [batch] int64, how often a token of the row was rewritten.
        computed: tokens that went through the model, padding included: rows that are finished do not.
    """

    sequences: Tensor
    steps: int
    forwards: int
    committed: Tensor
    row_forwards: Tensor
    edits: Tensor
    computed: int

    @property
    def tokens_per_step(self) -> Tensor:
        """Return [steps] int64, tokens over the batch that each step was the last to write."""
        return torch.bincount(self.committed[self.committed >= 0], minlength=self.steps)


# Called after each step with the step, the sequences and the positions written in it.
Callback = Callable[[int, Tensor, Tensor], None]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int,
    strategy: Strategy,
    logits: LogitsConfig | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    first_step: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    commit_schedule: CommitSchedule = "even",
    edits: Edits | None = None,
    end_ids: Sequence[int] = (),
    stop_at_end: bool = True,
    eos_last: bool = False,
    context: Context | None = None,
    callback: Callback | None = None,
) -> SamplerOutput:
    """Fill the editable positions of `x`, starting from [MASK] everywhere in them.

    What comes out of a row depends on `seed`, the row's ordinal and its own content, not on the batch it is in.

    Args:
        denoiser: the model.
        x: [batch, length] int64; ids at editable positions do not matter.
        editable: [batch, length] bool; everything else stays as it is, even an id equal to `mask_id`.
        mask_id: of [MASK]; never drawn.
        steps: number of denoising steps of a row, at least 1 and at least the number of its blocks. A row that is
            finished takes no more, and a step that needs no logits costs no forward.
        strategy: which positions each step commits.
        logits: how a token is drawn; by default from the model's own distribution.
        seed: of every draw.
        rows: [batch] int64, the ordinal of each sample, below 2**32; by default 0, 1, 2 …
        first_step: [batch] int64, steps that each sample has behind it, in earlier calls for its first places, so that
            it draws other numbers now; 0 by default.
        schedule: the noise schedule that sets the pace; by default linear.
        block_length: editable positions of a row that are decided together, from left to right; None is all at once.
        commit_schedule: how many tokens the steps of a block commit where a strategy goes by number, and with what
            chance in random order: `even`, or `dream`, see `sampling.steps`.
        edits: which decided tokens are rewritten; none by default. Their further steps come on top of `steps`.
        end_ids: tokens behind which nothing is text. By default there are none.
        stop_at_end: whether a row is finished once an end is committed and everything before it: what stands before it
            is then what it would be without. Not so with edits, or a strategy that masks tokens again: without, they
            would go on revising the text. Rows with given tokens behind editable ones go on.
        eos_last: whether a place at which an end was drawn is taken to be the least certain of its block.
        context: which given tokens are no text, and which are the prompt.
        callback: called after each step.
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
        rows=rows,
        first_step=first_step,
        schedule=schedule,
        block_length=block_length,
        commit_schedule=commit_schedule,
        end_ids=end_ids,
        stop_at_end=stop_at_end,
        eos_last=eos_last,
        edit_steps=0 if edits is None else edits.steps,
    )
    check_context(context, editable, logits)
    while True:
        before = state
        state = denoise_step(
            denoiser,
            state,
            plan,
            strategy=strategy,
            logits=logits,
            edits=edits,
            context=context,
        )
        if state.finished:
            break
        if callback is not None:
            callback(before.step, state.z, state.committed == before.step)
    z = state.z
    if len(end_ids) and stop_at_end:
        z = torch.where(editable & (state.committed < 0), int(plan.end_ids[0]), z)
    return SamplerOutput(
        z, state.step, state.forwards, state.committed, state.row_forwards, state.edits, state.computed
    )


@torch.no_grad()
def denoise_step(
    denoiser: Denoiser,
    state: SamplerState,
    plan: Plan,
    *,
    strategy: Strategy,
    logits: LogitsConfig,
    edits: Edits | None = None,
    context: Context | None = None,
) -> SamplerState:
    """Take one step: the state after it, the one given is left as it is; `finished` if there was nothing to do.

    The device is waited for once, to learn how many positions need logits; that is also when logits found unusable in
    the step before become an error.

    Raises:
        ValueError: if the denoiser's logits have the wrong shape, hold NaN or allow no token, if all steps are taken
            and a position is masked still, or if the plan was not made for the edits' further steps.
    """
    edits = edits or _NO_EDITS
    if edits.steps != plan.edit_steps:
        raise ValueError(f"edits with {edits.steps} further steps need start(edit_steps={edits.steps}, ...)")
    turn = next_turn(state, plan)
    asked = ask(state, plan, turn, strategy, edits)
    found = counts(state, plan, turn, asked, strategy)
    if found is None:
        return replace(state, finished=True)
    active = turn.steps > 0
    advanced = replace(
        state,
        block=turn.block,
        block_step=turn.step + active,
        row_step=state.row_step + (active & (turn.further == 0)),
        further=turn.further,
        spent=turn.spent,
        step=state.step + 1,
    )
    n, n_rows = found
    if not n:
        return written(state, advanced, plan, turn, asked, Made(state.z, torch.zeros_like(state.is_masked)), strategy)
    # A stable sort brings the places to the front without asking the device how many there are.
    place = asked.wanted.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:n]
    draws, forwards = predict(denoiser, state, plan, turn, place, asked.measures, logits, context or Context())
    advanced = replace(
        advanced,
        row_forwards=state.row_forwards + asked.wanted.any(dim=1) * forwards,
        bad=draws.bad.any() * (state.step + 1),
        forwards=state.forwards + forwards,
        computed=state.computed + forwards * n_rows * state.z.shape[1],
    )
    scores = Scores(draws, place, state, plan)
    made = decide(state, turn, asked, scores, strategy)
    made = revise(state, turn, asked, scores, edits, made)
    return written(state, advanced, plan, turn, asked, made, strategy)


@dataclass(frozen=True)
class Asked:
    """What a step is about before the forward, [batch, length] bool each.

    Attributes:
        chosen: positions that the strategy needs logits of.
        revisable: decided positions that may be rewritten; None without edits.
        again: decided positions that are masked after the step; None where the strategy never does that.
        wanted: all positions that need logits.
        measures: what has to be known of them.
    """

    chosen: Tensor
    revisable: Tensor | None
    again: Tensor | None
    wanted: Tensor
    measures: frozenset[Measure]


@dataclass(frozen=True)
class Made:
    """What a step writes: [batch, length] int64 ids, and bool where they are committed and rewritten, or None."""

    ids: Tensor
    commit: Tensor
    rewrite: Tensor | None = None


def ask(state: SamplerState, plan: Plan, turn: Turn, strategy: Strategy, edits: Edits) -> Asked:
    """Return what a step needs to know; the arguments are those of `denoise_step`."""
    again = remasked(strategy, turn)
    wanted = chosen = strategy.candidates(turn) & turn.scope
    measures, revisable = strategy.measures, None
    if edits.active:
        revisable = edits.candidates(turn, (wanted & turn.is_masked).sum(dim=1)) & ~is_behind_end(
            state.z, state.is_masked, plan
        )
        if again is not None:
            revisable &= ~again
        wanted, measures = wanted | revisable, measures | editing.MEASURES
    return Asked(chosen, revisable, again, wanted, measures)


def counts(state: SamplerState, plan: Plan, turn: Turn, asked: Asked, strategy: Strategy) -> tuple[int, int] | None:
    """Return how many positions and rows need logits, or None if no row has anything left to do.

    Raises:
        ValueError: see `denoise_step`.
    """
    overrun = (turn.is_masked.any(dim=1) & (turn.step >= turn.steps)).sum()
    n, n_rows, left, active, too_many, bad = torch.stack(
        [
            asked.wanted.sum(),
            asked.wanted.any(dim=1).sum(),
            state.is_masked.sum(),
            (turn.steps > 0).sum(),
            overrun,
            state.bad,
        ]
    ).tolist()
    if bad:
        raise ValueError(
            f"in step {bad - 1} the denoiser returned logits that hold NaN or inf or allow no token but [MASK] "
            f"(id {plan.mask_id}); float16 overflows easily, try bfloat16 or float32"
        )
    if too_many:
        raise ValueError(
            f"the strategy {strategy.name!r} left {left} positions masked after its steps ({plan.steps} in all); "
            "in the last step of a block it must commit every position that is left"
        )
    return (n, n_rows) if active else None


def decide(state: SamplerState, turn: Turn, asked: Asked, scores: Scores, strategy: Strategy) -> Made:
    """Return what the strategy commits."""

    def score(measure: Measure) -> Tensor:
        if measure not in strategy.measures:
            raise ValueError(f"the strategy {strategy.name!r} asks for {measure!r}, which its measures do not name")
        return scores.certainty(measure)

    commit = strategy.commit(turn, asked.chosen, score) & asked.chosen & turn.is_masked
    return Made(torch.where(commit, scores.ids, state.z), commit)


def revise(state: SamplerState, turn: Turn, asked: Asked, scores: Scores, edits: Edits, made: Made) -> Made:
    """Return what the step writes with the decided tokens that it rewrites; what it commits counts in their budget."""
    if asked.revisable is None:
        return made
    argmax = scores.spread("argmax")
    certainty = scores.spread("top_log_prob")
    rewrite = edits.rewrites(turn, state.z, asked.revisable, made.commit, argmax, certainty)
    return replace(made, ids=torch.where(rewrite, argmax, made.ids), rewrite=rewrite)


def written(
    state: SamplerState, advanced: SamplerState, plan: Plan, turn: Turn, asked: Asked, made: Made, strategy: Strategy
) -> SamplerState:
    """Return the state with what the step writes, and who stays at a block of which nothing is masked."""
    changed = made.commit if made.rewrite is None else made.commit | made.rewrite
    z, is_masked = made.ids, state.is_masked & ~made.commit
    committed = state.committed.masked_fill(changed, state.step)
    if asked.again is not None:
        z, is_masked = z.masked_fill(asked.again, plan.mask_id), is_masked | asked.again
        committed = committed.masked_fill(asked.again, -1)
    complete = is_complete(z, is_masked, plan)
    is_masked = is_masked & ~complete
    after = replace(advanced, z=z, is_masked=is_masked, committed=committed)
    if made.rewrite is not None:
        rewritten = made.rewrite.sum(dim=1)
        after = replace(after, spent=turn.spent + rewritten, edits=state.edits + rewritten)
    if asked.again is None and not plan.edit_steps:
        return after
    done = (turn.steps > 0) & ~((is_masked & turn.scope).any(dim=1) | complete[:, 0])
    held = done & stays(strategy, turn)
    further = done & ~held & changed.any(dim=1) & (turn.further < plan.edit_steps)
    return replace(after, held=held | further, further=turn.further + further)
