"""The prediction of a step: one forward pass, or two with guidance, the tokens drawn from it, and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .logits import LogitsConfig, Measure, guided_logits, penalise_repetition
from .state import TRIES, Plan, SamplerState, StepView
from .tokens import TokenDraws, concatenate, draw_tokens

_UNCERTAIN = 1e4  # nats; larger than any score, and the order of EOS tokens among themselves is unchanged
_NO_TOKEN = torch.iinfo(torch.int64).max
Answers = Sequence[Sequence[int]]


class Denoiser(Protocol):
    """A model as the sampler sees it."""

    def __call__(self, z: Tensor, flat_index: Tensor, /) -> Tensor | Iterable[Tensor]:
        """Return [n, vocab] logits, at i for token i, in the order of `flat_index`, at once or in parts along n.

        Args:
            z: [batch, length] int64.
            flat_index: [n] int64, ascending, positions in [batch * length].
        """


@runtime_checkable
class CachingDenoiser(Protocol):
    """A denoiser that reuses in a step what it computed in earlier steps of the same call.

    The shapes of its forward passes depend on numbers on the device. The sampler reads them together with its own, so
    that a step waits for the device once.
    """

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int = 0) -> Tensor:
        """Return [batch, n] int64, the numbers that `step` needs on the host.

        Args:
            z: [batch, length] int64.
            asked: [batch, length] bool, the positions whose logits the step needs.
            scope: [batch, length] bool, the current block of each row.
            branch: 0; 1 for the unconditional pass of guidance, whose prompt is masked.
        """

    def step(self, scope: Tensor, branch: int = 0, answers: Answers | None = None) -> Denoiser:
        """Return the denoiser of a step, which is not called if the step needs no logits.

        Args:
            scope: [batch, length] bool, the current block of each row.
            branch: see `questions`.
            answers: [batch][n] of `questions`; None to ask them itself.
        """

    def take_computed(self) -> Tensor:
        """Return [batch] int64, the tokens of each row that went through the model since the last call."""


@dataclass(frozen=True)
class Prediction:
    """What a step's forward passes gave.

    Attributes:
        draws: the tokens drawn, and their scores.
        n_passes: forward passes.
        computed: [batch] int64, tokens of each row that went through the model in them.
    """

    draws: TokenDraws
    n_passes: int
    computed: Tensor


@dataclass(frozen=True)
class Context:
    """Which of the fixed tokens are not text, and which are the prompt.

    Attributes:
        no_text: [batch, length] bool, fixed tokens that are not text, such as padding and a start token; the
            repetition penalty ignores them. None if there are none.
        prompt: [batch, length] bool, fixed tokens that are masked in the unconditional pass of guidance. None if there
            are none.
    """

    no_text: Tensor | None = None
    prompt: Tensor | None = None


@dataclass(frozen=True)
class Branches:
    """The forward passes of a step: one, or with guidance a second one without the prompt.

    Attributes:
        denoiser: the model.
        inputs: [batch, length] int64 of each pass.
        scope: [batch, length] bool, the current block of each row.
    """

    denoiser: Denoiser | CachingDenoiser
    inputs: tuple[Tensor, ...]
    scope: Tensor

    @classmethod
    def of(
        cls, denoiser: Denoiser | CachingDenoiser, z: Tensor, view: StepView, config: LogitsConfig, context: Context
    ) -> Branches:
        """Return the passes of a step over the ids `z`."""
        prompt = context.prompt if config.guidance_scale != 1.0 else None
        masked = () if prompt is None else (z.masked_fill(prompt, view.plan.mask_id),)
        return cls(denoiser, (z, *masked), view.scope)

    def questions(self, asked: Tensor) -> list[Tensor]:
        """Return what the host must know for each pass, [batch, n] int64; see `CachingDenoiser.questions`."""
        if not isinstance(self.denoiser, CachingDenoiser):
            return []
        return [self.denoiser.questions(z, asked, self.scope, branch) for branch, z in enumerate(self.inputs)]

    def steps(self, answers: Sequence[Answers]) -> list[Denoiser]:
        """Return the denoiser of each pass, given the answers to its questions."""
        if not isinstance(self.denoiser, CachingDenoiser):
            return [self.denoiser for _ in self.inputs]
        return [self.denoiser.step(self.scope, branch, answer) for branch, answer in enumerate(answers)]


def predict_tokens(
    branches: Branches,
    denoisers: Sequence[Denoiser],
    state: SamplerState,
    view: StepView,
    flat_index: Tensor,
    measures: frozenset[Measure],
    config: LogitsConfig,
    context: Context,
) -> Prediction:
    """Return the draws at `flat_index`, [n] int64 into [batch * length]; `denoisers` are `branches.steps`.

    Raises:
        ValueError: if the denoiser's logits have the wrong shape.
    """
    plan, z, n = view.plan, state.z, len(flat_index)
    u = torch.zeros(n, 1, dtype=torch.float64, device=z.device)
    if config.temperature > 0.0:
        tries = TRIES if config.top_p < 1.0 and config.top_k is None else 1
        u = plan.token_draws(view.row_step, flat_index, tries=tries)
    draws: list[TokenDraws] = []
    n_done = 0
    for conditional, unconditional in _logit_parts(denoisers, branches.inputs, flat_index):
        if conditional.dim() != 2 or n_done + len(conditional) > n:
            raise ValueError(_wrong_shape(n, str(list(conditional.shape))))
        part = slice(n_done, n_done + len(conditional))
        n_done += len(conditional)
        values = conditional
        if unconditional is not None:
            values = guided_logits(values, unconditional, config.guidance_scale)
        if config.repetition_penalty != 1.0:
            tokens = _other_tokens(state, context, flat_index[part])
            values = penalise_repetition(values, tokens, config.repetition_penalty)
        if config.eos_penalty and len(plan.eos_ids):
            penalty = values.new_full((len(values), len(plan.eos_ids)), -config.eos_penalty, dtype=torch.float32)
            values = values.float().index_add(1, plan.eos_ids, penalty)
        draws.append(draw_tokens(values, config, u[part], suppress=(plan.mask_id,), measures=measures))
    if n_done != n:
        raise ValueError(_wrong_shape(n, f"{n_done} rows"))
    n_passes = len(branches.inputs)
    if isinstance(branches.denoiser, CachingDenoiser):
        computed = branches.denoiser.take_computed()
    else:
        row = torch.div(flat_index, z.shape[1], rounding_mode="floor")
        computed = state.sample_nfe.new_zeros(len(z)).index_fill(0, row, n_passes * z.shape[1])
    return Prediction(concatenate(draws), n_passes, computed)


def _logit_parts(
    denoisers: Sequence[Denoiser], inputs: Sequence[Tensor], flat_index: Tensor
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Return the conditional logits in parts along n, each with the logits without the prompt, or None."""
    parts = [_parts(denoiser(z, flat_index)) for denoiser, z in zip(denoisers, inputs, strict=True)]
    if len(parts) == 1:
        return ((part, None) for part in parts[0])
    return zip(*parts, strict=True)


def _parts(output: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (output,) if isinstance(output, Tensor) else output


def _other_tokens(state: SamplerState, context: Context, flat_index: Tensor) -> Tensor:
    """Return [n, length] int64, the other tokens of text in the row of each position.

    The token of the position itself, [MASK] and tokens that are not text are replaced by `_NO_TOKEN`.
    """
    length = state.z.shape[1]
    hidden = state.is_masked if context.no_text is None else state.is_masked | context.no_text
    row = torch.div(flat_index, length, rounding_mode="floor")
    tokens = state.z.masked_fill(hidden, _NO_TOKEN)[row]
    return tokens.scatter(1, (flat_index - row * length)[:, None], _NO_TOKEN)


def _wrong_shape(n: int, got: str) -> str:
    return f"the denoiser returned logits {got}, expected [{n}, vocab]: one row for each selected position"


class StepScores:
    """The draws of a step, laid out over the batch."""

    def __init__(self, draws: TokenDraws, flat_index: Tensor, z: Tensor, plan: Plan) -> None:
        """Take the draws at `flat_index`, [n] int64 into [batch * length], and the sequences before the step."""
        self._draws, self._flat_index, self._z, self._plan = draws, flat_index, z, plan

    @property
    def ids(self) -> Tensor:
        """Return [batch, length] int64, the tokens drawn; elsewhere the tokens before the step."""
        return self._z.flatten().index_copy(0, self._flat_index, self._draws.ids).view_as(self._z)

    def measure(self, name: Measure) -> Tensor:
        """Return a measure, [batch, length]; where nothing was drawn it is NaN, or -1 for `argmax`."""
        value: Tensor = getattr(self._draws, name)
        empty = value.new_full((self._z.numel(),), -1 if name == "argmax" else torch.nan)
        return empty.index_copy(0, self._flat_index, value).view_as(self._z)

    def certainty(self, name: Measure) -> Tensor:
        """Return the measure that a strategy reads; with `eos_last`, positions that drew EOS score worst."""
        value = self.measure(name)
        if not self._plan.eos_last or name == "argmax":
            return value
        drew_eos = torch.isin(self._draws.ids, self._plan.eos_ids)
        is_eos = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
        is_eos = is_eos.index_copy(0, self._flat_index, drew_eos).view_as(value)
        return torch.where(is_eos, value + _UNCERTAIN if name == "entropy" else value - _UNCERTAIN, value)


def check_context(context: Context | None, editable: Tensor, logits: LogitsConfig) -> None:
    """Check the context against the batch and the guidance.

    Raises:
        ValueError: if a shape or dtype is wrong, or a row with guidance has no prompt.
    """
    for name in ("no_text", "prompt"):
        value = None if context is None else getattr(context, name)
        if value is not None and (value.shape != editable.shape or value.dtype != torch.bool):
            raise ValueError(f"{name} must be {list(editable.shape)} bool, got {list(value.shape)} {value.dtype}")
    if logits.guidance_scale == 1.0:
        return
    prompt = None if context is None else context.prompt
    if prompt is None or bool((editable.any(dim=1) & ~prompt.any(dim=1)).any()):
        raise ValueError(f"guidance_scale: {logits.guidance_scale} needs a prompt; give one, or set guidance_scale: 1")
