"""The denoising loop: draw tokens, choose positions, commit, repeat; block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from .logits import LogitsConfig, Measure
from .prediction import Context, Denoiser, predict
from .state import Plan, SamplerState, Turn, left_behind, next_turn, start
from .strategies import Strategy

_UNCERTAIN = 1e4  # nats; more than any token's, and ends keep their order
_OF_STABLE_STOP: frozenset[Measure] = frozenset({"argmax", "entropy"})


@dataclass(frozen=True)
class StableStop:
    """Commit all that is left of a block once the model has made up its mind.

    Attributes:
        stable_steps: steps in a row in which the most probable token of no masked position changed.
        entropy: nats; the mean over the masked positions must not exceed it.
    Raises:
        ValueError: if a value is out of range.
    """

    stable_steps: int = 2
    entropy: float = 0.1

    def __post_init__(self) -> None:
        if self.stable_steps < 1:
            raise ValueError(f"stable_steps must be at least 1, got {self.stable_steps}")
        if not self.entropy >= 0.0:
            raise ValueError(f"entropy must be at least 0, got {self.entropy}")


@dataclass(frozen=True)
class SamplerOutput:
    """What `sample` returns.

    Attributes:
        sequences: [batch, length] int64.
        steps: denoising steps taken by the row with most.
        forwards: calls of the denoiser; a step that chose no position needs none, a guided one two.
        committed: [batch, length] int64, the step that committed each token; -1 where it was given, or left out
            behind the end of a text, where `sequences` hold the end again.
        row_forwards: [batch] int64, calls that the row needed, whatever the others in the batch did.
        computed: tokens that went through the model, padding included: rows that are finished do not.
    """

    sequences: Tensor
    steps: int
    forwards: int
    committed: Tensor
    row_forwards: Tensor
    computed: int

    @property
    def tokens_per_step(self) -> Tensor:
        """Return [steps] int64, tokens that each step committed over the batch."""
        return torch.bincount(self.committed[self.committed >= 0], minlength=self.steps)


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
    logits: LogitsConfig | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    block_length: int | None = None,
    stable_stop: StableStop | None = None,
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
        rows: [batch] int64, the ordinal of each sample; by default 0, 1, 2 …
        schedule: the noise schedule that sets the pace; by default linear.
        block_length: editable positions of a row that are decided together, from left to right; None is all at once.
        stable_stop: when to commit the rest of a block; never by default.
        end_ids: tokens behind which nothing is text. By default there are none.
        stop_at_end: whether a row is finished once an end is committed and everything before it: what stands before it
            is then what it would be without. Rows with given tokens behind editable ones go on.
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
        schedule=schedule,
        block_length=block_length,
        end_ids=end_ids,
        stop_at_end=stop_at_end,
        eos_last=eos_last,
    )
    _check_context(context, editable, logits)
    while True:
        before = state
        state = denoise_step(
            denoiser, state, plan, strategy=strategy, logits=logits, stable_stop=stable_stop, context=context
        )
        if state.finished:
            break
        if callback is not None:
            callback(before.step, state.z, state.committed == before.step)
    z = state.z
    if len(end_ids) and stop_at_end:
        z = torch.where(editable & (state.committed < 0), int(plan.end_ids[0]), z)
    return SamplerOutput(z, state.step, state.forwards, state.committed, state.row_forwards, state.computed)


@torch.no_grad()
def denoise_step(
    denoiser: Denoiser,
    state: SamplerState,
    plan: Plan,
    *,
    strategy: Strategy,
    logits: LogitsConfig,
    stable_stop: StableStop | None = None,
    context: Context | None = None,
) -> SamplerState:
    """Take one step: the state after it, the one given is left as it is; `finished` if there was nothing to do.

    The device is waited for once, to learn how many positions need logits; that is also when logits found unusable in
    the step before become an error.

    Raises:
        ValueError: if the denoiser's logits have the wrong shape, hold NaN or allow no token, or if all steps are
            taken and a position is masked still.
    """
    turn = next_turn(state, plan)
    chosen = strategy.candidates(turn) & turn.scope
    wanted = chosen if stable_stop is None else chosen | turn.is_masked
    active = turn.steps > 0
    overrun = (active & (turn.step >= turn.steps)).sum()
    asked = wanted.any(dim=1)
    n, left, too_many, bad, n_rows = torch.stack(
        [wanted.sum(), state.is_masked.sum(), overrun, state.bad, asked.sum()]
    ).tolist()
    if bad:
        raise ValueError(
            f"in step {bad - 1} the denoiser returned logits that hold NaN or inf or allow no token but [MASK] "
            f"(id {plan.mask_id}); float16 overflows easily, try bfloat16 or float32"
        )
    if not left:
        return replace(state, finished=True)
    if too_many:
        raise ValueError(
            f"the strategy {strategy.name!r} left {left} positions masked after its steps ({plan.steps} in all); "
            "in the last step of a block it must commit every position that is left"
        )
    advanced = replace(
        state,
        block=turn.block,
        block_step=turn.step + active,
        row_step=state.row_step + active,
        step=state.step + 1,
    )
    if not n:
        return advanced
    # A stable sort brings the places to the front without asking the device how many there are.
    place = wanted.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:n]
    measures: frozenset[Measure] = strategy.measures
    if stable_stop is not None:
        measures = measures | _OF_STABLE_STOP
    draws, forwards = predict(denoiser, state, plan, turn, place, measures, logits, context or Context())

    def spread(measure: Measure) -> Tensor:
        if measure not in measures:
            raise ValueError(f"the strategy {strategy.name!r} asks for {measure!r}, which its measures do not name")
        value: Tensor = getattr(draws, measure)
        empty = -1 if measure == "argmax" else torch.nan
        return value.new_full((state.z.numel(),), empty).index_copy(0, place, value).view_as(state.z)

    def score(measure: Measure) -> Tensor:
        value = spread(measure)
        if not plan.eos_last or measure == "argmax":
            return value
        is_end = torch.isin(draws.ids, plan.end_ids)
        at_end = torch.zeros_like(state.is_masked).flatten().index_copy(0, place, is_end).view_as(state.z)
        return torch.where(at_end, value + _UNCERTAIN if measure == "entropy" else value - _UNCERTAIN, value)

    commit = strategy.commit(turn, chosen, score) & chosen & turn.is_masked
    if stable_stop is not None:
        guess = spread("argmax")
        stable = torch.where((turn.is_masked & (guess != state.guess)).any(dim=1), 0, state.stable + 1)
        commit |= _settled(stable_stop, turn, stable, spread("entropy"))
        advanced = replace(advanced, guess=guess, stable=stable)
    ids = state.z.flatten().index_copy(0, place, draws.ids).view_as(state.z)
    z, is_masked = torch.where(commit, ids, state.z), state.is_masked & ~commit
    return replace(
        advanced,
        z=z,
        is_masked=is_masked & ~left_behind(z, is_masked, plan),
        committed=state.committed.masked_fill(commit, state.step),
        row_forwards=state.row_forwards + asked * forwards,
        bad=draws.bad.any() * (state.step + 1),
        forwards=state.forwards + forwards,
        computed=state.computed + forwards * n_rows * z.shape[1],
    )


def _settled(stable_stop: StableStop, turn: Turn, stable: Tensor, entropy: Tensor) -> Tensor:
    """Return [batch, length] bool, the masked positions of rows that may stop."""
    count = turn.is_masked.sum(dim=1).clamp(min=1)
    mean = torch.where(turn.is_masked, entropy, 0.0).sum(dim=1) / count
    return turn.is_masked & ((stable >= stable_stop.stable_steps) & (mean <= stable_stop.entropy))[:, None]


def _check_context(context: Context | None, editable: Tensor, logits: LogitsConfig) -> None:
    for name in ("no_text", "prompt"):
        value = None if context is None else getattr(context, name)
        if value is not None and (value.shape != editable.shape or value.dtype != torch.bool):
            raise ValueError(f"{name} must be {list(editable.shape)} bool, got {list(value.shape)} {value.dtype}")
    if logits.guidance_scale == 1.0:
        return
    prompt = None if context is None else context.prompt
    if prompt is None or bool((editable.any(dim=1) & ~prompt.any(dim=1)).any()):
        raise ValueError(
            f"guidance_scale: {logits.guidance_scale} needs a prompt to guide by, and there is none; give one, or "
            "leave guidance_scale at 1"
        )
