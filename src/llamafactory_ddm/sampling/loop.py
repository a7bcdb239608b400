"""The denoising loop: draw tokens, choose positions, commit, repeat; block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.schedules import LinearSchedule, NoiseSchedule
from .logits import Draws, LogitsConfig, Measure, concatenate, draw_tokens, guided_logits, penalise_repetition
from .steps import reveal_probability, split_into_blocks, steps_of_blocks, transfer_budget
from .strategies import TRIES, Plan, Strategy, Turn

_NO_TOKEN = torch.iinfo(torch.int64).max
_OF_EARLY_STOP: frozenset[Measure] = frozenset({"argmax", "entropy"})


class Denoiser(Protocol):
    """A model as the sampler sees it."""

    def __call__(self, z: Tensor, place: Tensor) -> Tensor | Iterable[Tensor]:
        """Return [n, vocab] logits, at i for token i, in the order of `place`, at once or in parts along n.

        Args:
            z: [batch, length] int64.
            place: [n] int64, ascending, into [batch * length].
        """


@dataclass(frozen=True)
class EarlyStop:
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
class Context:
    """What the sampler has to know of the given tokens; all is None where it does not matter.

    Attributes:
        no_text: [batch, length] bool, given tokens that are no text, as padding and a start token; the repetition
            penalty passes over them.
        prompt: [batch, length] bool, given tokens that the unconditional pass of guidance does not see.
    """

    no_text: Tensor | None = None
    prompt: Tensor | None = None


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
    finished: bool = False


@dataclass(frozen=True)
class SamplerOutput:
    """What `sample` returns.

    Attributes:
        sequences: [batch, length] int64.
        steps: denoising steps taken by the row with most.
        forwards: calls of the denoiser; a step that chose no position needs none, a guided one two.
        committed: [batch, length] int64, the step that committed each token; -1 where it was given.
        row_forwards: [batch] int64, calls that the row needed, whatever the others in the batch did.
    """

    sequences: Tensor
    steps: int
    forwards: int
    committed: Tensor
    row_forwards: Tensor

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
    early_stop: EarlyStop | None = None,
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
        early_stop: when to commit the rest of a block; never by default.
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
    )
    _check_context(context, editable, logits)
    while True:
        before = state
        state = denoise_step(
            denoiser, state, plan, strategy=strategy, logits=logits, early_stop=early_stop, context=context
        )
        if state.finished:
            break
        if callback is not None:
            callback(before.step, state.z, before.is_masked & ~state.is_masked)
    return SamplerOutput(state.z, state.step, state.forwards, state.committed, state.row_forwards)


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


@torch.no_grad()
def denoise_step(
    denoiser: Denoiser,
    state: SamplerState,
    plan: Plan,
    *,
    strategy: Strategy,
    logits: LogitsConfig,
    early_stop: EarlyStop | None = None,
    context: Context | None = None,
) -> SamplerState:
    """Take one step: the state after it, the one given is left as it is; `finished` if there was nothing to do.

    The device is waited for once, to learn how many positions need logits; that is also when logits found unusable in
    the step before become an error.

    Raises:
        ValueError: if the denoiser's logits have the wrong shape, hold NaN or allow no token, or if all steps are
            taken and a position is masked still.
    """
    turn = _turn(state, plan)
    chosen = strategy.candidates(turn) & turn.scope
    wanted = chosen if early_stop is None else chosen | turn.is_masked
    active = turn.steps > 0
    overrun = (active & (turn.step >= turn.steps)).sum()
    n, left, too_many, bad = torch.stack([wanted.sum(), state.is_masked.sum(), overrun, state.bad]).tolist()
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
    if early_stop is not None:
        measures = measures | _OF_EARLY_STOP
    draws, forwards = _predict(denoiser, state, plan, turn, place, measures, logits, context or Context())

    def spread(measure: Measure) -> Tensor:
        if measure not in measures:
            raise ValueError(f"the strategy {strategy.name!r} asks for {measure!r}, which its measures do not name")
        value: Tensor = getattr(draws, measure)
        empty = -1 if measure == "argmax" else torch.nan
        return value.new_full((state.z.numel(),), empty).index_copy(0, place, value).view_as(state.z)

    commit = strategy.commit(turn, chosen, spread) & chosen & turn.is_masked
    if early_stop is not None:
        guess = spread("argmax")
        stable = torch.where((turn.is_masked & (guess != state.guess)).any(dim=1), 0, state.stable + 1)
        commit |= _settled(early_stop, turn, stable, spread("entropy"))
        advanced = replace(advanced, guess=guess, stable=stable)
    ids = state.z.flatten().index_copy(0, place, draws.ids).view_as(state.z)
    return replace(
        advanced,
        z=torch.where(commit, ids, state.z),
        is_masked=state.is_masked & ~commit,
        committed=state.committed.masked_fill(commit, state.step),
        row_forwards=state.row_forwards + wanted.any(dim=1) * forwards,
        bad=draws.bad.any() * (state.step + 1),
        forwards=state.forwards + forwards,
    )


def _turn(state: SamplerState, plan: Plan) -> Turn:
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


def _predict(
    denoiser: Denoiser,
    state: SamplerState,
    plan: Plan,
    turn: Turn,
    place: Tensor,
    measures: frozenset[Measure],
    config: LogitsConfig,
    context: Context,
) -> tuple[Draws, int]:
    """Return the draws at `place`, and how many forwards they took."""
    z, length = state.z, state.z.shape[1]
    conditional = _parts(denoiser(z, place))
    guided = config.guidance_scale != 1.0 and context.prompt is not None
    pairs: Iterable[tuple[Tensor, Tensor | None]]
    if guided and context.prompt is not None:
        unconditional = denoiser(z.masked_fill(context.prompt, plan.mask_id), place)
        pairs = zip(conditional, _parts(unconditional), strict=True)
    else:
        pairs = ((part, None) for part in conditional)
    u = torch.zeros(len(place), 1, dtype=torch.float64, device=z.device)
    if config.temperature > 0.0:
        tries = TRIES if config.top_p < 1.0 and config.top_k is None else 1
        u = plan.token_draws(turn.row_step, tries=tries).flatten(0, 1)[place]
    seen = None
    if config.repetition_penalty != 1.0:
        hidden = state.is_masked if context.no_text is None else state.is_masked | context.no_text
        seen = z.masked_fill(hidden, _NO_TOKEN)
    results: list[Draws] = []
    done = 0
    for values, other in pairs:
        if values.dim() != 2 or done + len(values) > len(place):
            raise ValueError(_wrong_shape(len(place), values))
        rows = slice(done, done + len(values))
        done += len(values)
        if other is not None:
            values = guided_logits(values, other, config.guidance_scale)
        if seen is not None:
            row = torch.div(place[rows], length, rounding_mode="floor")
            # A position that is decided already does not repeat itself.
            others_seen = seen[row].scatter(1, (place[rows] - row * length)[:, None], _NO_TOKEN)
            values = penalise_repetition(values, others_seen, config.repetition_penalty)
        results.append(draw_tokens(values, config, u[rows], suppress=(plan.mask_id,), measures=measures))
    if done != len(place):
        raise ValueError(_wrong_shape(len(place), results[-1].ids if results else place[:0], done))
    return concatenate(results), 1 + guided


def _parts(output: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (output,) if isinstance(output, Tensor) else output


def _wrong_shape(n: int, got: Tensor, rows: int | None = None) -> str:
    said = list(got.shape) if rows is None else f"{rows} rows"
    return f"the denoiser must return [{n}, vocab] logits, one row a selected position; got {said}"


def _settled(early_stop: EarlyStop, turn: Turn, stable: Tensor, entropy: Tensor) -> Tensor:
    """Return [batch, length] bool, the masked positions of rows that may stop."""
    count = turn.is_masked.sum(dim=1).clamp(min=1)
    mean = torch.where(turn.is_masked, entropy, 0.0).sum(dim=1) / count
    return turn.is_masked & ((stable >= early_stop.stable_steps) & (mean <= early_stop.entropy))[:, None]


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
