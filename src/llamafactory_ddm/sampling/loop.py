"""The denoising loop: draw tokens, choose positions, commit, repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from .logits import LogitsConfig, draw_tokens
from .steps import transfer_budget
from .strategies import Plan, Strategy


class Denoiser(Protocol):
    """A model as the sampler sees it."""

    def __call__(self, z: Tensor, select: Tensor) -> Tensor:
        """Return [n_selected, vocab] logits, at i for token i, in row-major order of `select`.

        Args:
            z: [batch, length] int64.
            select: [batch, length] bool.
        """


@dataclass(frozen=True)
class SamplerState:
    """Where a call stands between two steps.

    Attributes:
        z: [batch, length] int64, the sequences so far.
        is_masked: [batch, length] bool, what is still to be committed.
        committed: [batch, length] int64, the step that committed a token; -1 where none did.
        step: the next step, from 0.
        forwards: calls of the denoiser so far.
    """

    z: Tensor
    is_masked: Tensor
    committed: Tensor
    step: int = 0
    forwards: int = 0


@dataclass(frozen=True)
class SamplerOutput:
    """What `sample` returns.

    Attributes:
        sequences: [batch, length] int64.
        steps: denoising steps taken.
        forwards: calls of the denoiser; a step that chose no position needs none.
        committed: [batch, length] int64, the step that committed each token; -1 where it was given.
    """

    sequences: Tensor
    steps: int
    forwards: int
    committed: Tensor


# Called after each step with the step, the sequences and the positions committed in it.
Callback = Callable[[int, Tensor, Tensor], None]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int,
    strategy: Strategy,
    logits: LogitsConfig,
    seed: int,
    rows: Tensor,
    schedule: NoiseSchedule,
    callback: Callback | None = None,
) -> SamplerOutput:
    """Fill the editable positions of `x`, starting from [MASK] everywhere in them.

    What comes out of a row depends on `seed`, the row's ordinal and its own content, not on the batch it is in.

    Args:
        denoiser: the model.
        x: [batch, length] int64; ids at editable positions do not matter.
        editable: [batch, length] bool; everything else stays as it is, even an id equal to `mask_id`.
        mask_id: of [MASK]; never drawn.
        steps: number of denoising steps, at least 1.
        strategy: which positions each step commits.
        logits: how a token is drawn.
        seed: of every draw.
        rows: [batch] int64, the ordinal of each sample.
        schedule: the noise schedule that sets the pace.
        callback: called after each step.
    Raises:
        ValueError: if an argument does not fit, the denoiser's logits are unusable or the strategy leaves a position
            masked.
    """
    state, plan = start(x, editable=editable, mask_id=mask_id, steps=steps, seed=seed, rows=rows, schedule=schedule)
    for step in range(steps):
        before = state.is_masked
        state = denoise_step(denoiser, state, plan, strategy=strategy, logits=logits)
        if callback is not None:
            callback(step, state.z, before & ~state.is_masked)
    left = int(state.is_masked.sum())
    if left:
        raise ValueError(
            f"the strategy {strategy.name!r} left {left} positions masked after {steps} steps; "
            "in its last step it must commit every position that is left"
        )
    return SamplerOutput(state.z, state.step, state.forwards, state.committed)


def start(
    x: Tensor, *, editable: Tensor, mask_id: int, steps: int, seed: int, rows: Tensor, schedule: NoiseSchedule
) -> tuple[SamplerState, Plan]:
    """Return the state before the first step and what stays the same, for driving `denoise_step` by hand.

    The arguments are those of `sample`.

    Raises:
        ValueError: if `steps` or `mask_id` is out of range, or a shape or dtype is wrong.
    """
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
    plan = Plan(mask_id, steps, schedule, transfer_budget(editable.sum(dim=1), steps, schedule), seed, rows)
    return SamplerState(x.masked_fill(editable, mask_id), editable.clone(), torch.full_like(x, -1)), plan


@torch.no_grad()
def denoise_step(
    denoiser: Denoiser, state: SamplerState, plan: Plan, *, strategy: Strategy, logits: LogitsConfig
) -> SamplerState:
    """Take one step: the state after it, the one given is left as it is.

    Raises:
        ValueError: if all steps are taken, or the denoiser's logits have the wrong shape, hold NaN or allow no token.
    """
    if state.step >= plan.steps:
        raise ValueError(f"all {plan.steps} steps are taken; call `start` for a new sample")
    candidate = strategy.candidates(state.is_masked, state.step, plan) & state.is_masked
    place = candidate.flatten().nonzero()[:, 0]
    if not len(place):
        return replace(state, step=state.step + 1)
    scores = denoiser(state.z, candidate)
    if scores.dim() != 2 or len(scores) != len(place):
        raise ValueError(
            f"the denoiser must return [{len(place)}, vocab] logits, one row a selected position; "
            f"got {list(scores.shape)}"
        )
    u = plan.token_draws(state.step, state.z.shape[1]).flatten()[place]
    ids, log_p = draw_tokens(scores, logits, u, suppress=(plan.mask_id,))
    if bool(log_p.isnan().any()):
        raise ValueError(
            f"in step {state.step} the denoiser returned logits that hold NaN or inf or allow no token but [MASK] "
            f"(id {plan.mask_id}); float16 overflows easily, try bfloat16 or float32"
        )
    confidence = torch.full(candidate.shape, -torch.inf, device=state.z.device).masked_scatter(candidate, log_p)
    commit = strategy.commit(candidate, confidence, state.step, plan) & candidate
    return SamplerState(
        z=torch.where(commit, state.z.masked_scatter(candidate, ids), state.z),
        is_masked=state.is_masked & ~commit,
        committed=state.committed.masked_fill(commit, state.step),
        step=state.step + 1,
        forwards=state.forwards + 1,
    )
