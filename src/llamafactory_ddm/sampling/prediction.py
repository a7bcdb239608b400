"""One forward of the model, or two where it is guided, and the tokens drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .draws import Draws, concatenate, draw_tokens
from .logits import LogitsConfig, Measure, guided_logits, penalise_repetition
from .state import TRIES, Plan, SamplerState, Turn

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


def _parts(output: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (output,) if isinstance(output, Tensor) else output


def _wrong_shape(n: int, got: Tensor, rows: int | None = None) -> str:
    said = list(got.shape) if rows is None else f"{rows} rows"
    return f"the denoiser must return [{n}, vocab] logits, one row a selected position; got {said}"
