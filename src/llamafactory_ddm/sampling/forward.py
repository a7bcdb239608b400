"""One forward of the model, or two where it is guided, and the tokens drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .logits import LogitsConfig, Measure, guided_logits, penalise_repetition
from .state import TRIES, Plan, SamplerState, Turn
from .tokens import Draws, concatenate, draw_tokens

_UNCERTAIN = 1e4  # nats; more than any token's, and ends keep their order
_NO_TOKEN = torch.iinfo(torch.int64).max


class Denoiser(Protocol):
    """A model as the sampler sees it."""

    def __call__(self, z: Tensor, place: Tensor) -> Tensor | Iterable[Tensor]:
        """Return [n, vocab] logits, at i for token i, in the order of `place`, at once or in parts along n.

        Args:
            z: [batch, length] int64.
            place: [n] int64, ascending, into [batch * length].
        """


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


def predict(
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
        if config.eos_penalty and len(plan.end_ids):
            taken = values.new_full((len(values), len(plan.end_ids)), -config.eos_penalty, dtype=torch.float32)
            values = values.float().index_add(1, plan.end_ids, taken)
        results.append(draw_tokens(values, config, u[rows], suppress=(plan.mask_id,), measures=measures))
    if done != len(place):
        raise ValueError(_wrong_shape(len(place), results[-1].ids if results else place[:0], done))
    return concatenate(results), 1 + guided


class Scores:
    """What the draws of a step say of each position of the batch."""

    def __init__(self, draws: Draws, place: Tensor, state: SamplerState, plan: Plan) -> None:
        """Take the draws at `place`, [n] int64 into [batch * length]."""
        self._draws, self._place, self._state, self._plan = draws, place, state, plan

    @property
    def ids(self) -> Tensor:
        """Return [batch, length] int64, the tokens drawn; elsewhere those that stand there."""
        return self._state.z.flatten().index_copy(0, self._place, self._draws.ids).view_as(self._state.z)

    def spread(self, measure: Measure) -> Tensor:
        """Return [batch, length] of a measure; where nothing was drawn NaN, or -1 for ids."""
        value: Tensor = getattr(self._draws, measure)
        empty = -1 if measure == "argmax" else torch.nan
        z = self._state.z
        return value.new_full((z.numel(),), empty).index_copy(0, self._place, value).view_as(z)

    def certainty(self, measure: Measure) -> Tensor:
        """Return the same as a strategy gets it: with `eos_last` a place at which an end was drawn is the worst."""
        value = self.spread(measure)
        if not self._plan.eos_last or measure == "argmax":
            return value
        is_end = torch.isin(self._draws.ids, self._plan.end_ids)
        at_end = torch.zeros_like(value, dtype=torch.bool).flatten().index_copy(0, self._place, is_end).view_as(value)
        return torch.where(at_end, value + _UNCERTAIN if measure == "entropy" else value - _UNCERTAIN, value)


def check_context(context: Context | None, editable: Tensor, logits: LogitsConfig) -> None:
    """Look at what is said of the given tokens.

    Raises:
        ValueError: if a shape or dtype is wrong, or guidance has no prompt to guide by.
    """
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


def _parts(output: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (output,) if isinstance(output, Tensor) else output


def _wrong_shape(n: int, got: Tensor, rows: int | None = None) -> str:
    said = list(got.shape) if rows is None else f"{rows} rows"
    return f"the denoiser must return [{n}, vocab] logits, one row a selected position; got {said}"
