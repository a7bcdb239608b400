"""The moves of a denoising step: what is asked of the model, what is decided by its answer, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import edits as editing
from . import stable
from .edits import Edits
from .forward import Scores
from .logits import Measure
from .remasking import remasked, stays
from .stable import StableStop
from .state import Plan, SamplerState, Turn, is_behind_end, is_complete
from .strategies import Strategy


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


def ask(
    state: SamplerState, plan: Plan, turn: Turn, strategy: Strategy, stable_stop: StableStop | None, edits: Edits
) -> Asked:
    """Return what a step needs to know; the arguments are those of `denoise_step`."""
    again = remasked(strategy, turn)
    wanted = chosen = strategy.candidates(turn) & turn.scope
    measures, revisable = strategy.measures, None
    if stable_stop is not None:
        wanted, measures = wanted | turn.is_masked, measures | stable.MEASURES
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


def settle(
    stop: StableStop, state: SamplerState, advanced: SamplerState, turn: Turn, scores: Scores, made: Made
) -> tuple[SamplerState, Made]:
    """Return the state with the guesses of this step, and what it writes with what is committed as it is settled."""
    guess = scores.spread("argmax")
    stable = torch.where((turn.is_masked & (guess != state.guess)).any(dim=1), 0, state.stable + 1)
    settled = stop.settled(turn, stable, scores.spread("entropy"))
    made = replace(made, ids=torch.where(settled, scores.ids, made.ids), commit=made.commit | settled)
    return replace(advanced, guess=guess, stable=stable), made


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
