"""The denoising loop: draw tokens, choose positions, commit, repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..diffusion.schedules import NoiseSchedule
from .logits import LogitsConfig, draw_tokens, log_confidence
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
        ValueError: if `steps` is below 1 or the shapes disagree.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if x.shape != editable.shape or rows.shape != x.shape[:1] or editable.dtype != torch.bool:
        raise ValueError(
            f"x and editable must be [batch, length], editable bool, and rows [batch]; got {tuple(x.shape)}, "
            f"{tuple(editable.shape)} {editable.dtype} and {tuple(rows.shape)}"
        )
    plan = Plan(steps, schedule, transfer_budget(editable.sum(dim=1), steps, schedule), seed, rows)
    state = SamplerState(x.masked_fill(editable, mask_id), editable.clone(), torch.full_like(x, -1))
    for _ in range(steps):
        before = state.is_masked
        state = denoise_step(denoiser, state, plan, strategy=strategy, logits=logits, mask_id=mask_id)
        if callback is not None:
            callback(state.step - 1, state.z, before & ~state.is_masked)
    return SamplerOutput(state.z, state.step, state.forwards, state.committed)


def denoise_step(
    denoiser: Denoiser, state: SamplerState, plan: Plan, *, strategy: Strategy, logits: LogitsConfig, mask_id: int
) -> SamplerState:
    """Take one step: the state after it, the one given is left as it is."""
    candidate = strategy.candidates(state.is_masked, state.step, plan)
    if not bool(candidate.any()):
        return replace(state, step=state.step + 1)
    no_mask = torch.tensor([mask_id], device=state.z.device)
    scores = denoiser(state.z, candidate).index_fill(1, no_mask, -torch.inf)
    u = plan.uniform(Stream.SAMPLE_TOKEN, state.step, state.z.shape[1])[candidate]
    ids = draw_tokens(scores, logits, u)
    drawn = state.z.masked_scatter(candidate, ids)
    confidence = torch.full(candidate.shape, -torch.inf, device=candidate.device)
    confidence[candidate] = log_confidence(scores, ids)
    commit = strategy.commit(candidate, confidence, state.step, plan)
    return SamplerState(
        z=torch.where(commit, drawn, state.z),
        is_masked=state.is_masked & ~commit,
        committed=state.committed.masked_fill(commit, state.step),
        step=state.step + 1,
        forwards=state.forwards + 1,
    )
