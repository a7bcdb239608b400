"""From a model's logits to a distribution: guidance, penalty, suppression, temperature, top-k and nucleus."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .nucleus import nucleus_mask

Measure = Literal["log_prob", "margin", "entropy", "argmax", "top_log_prob"]
ScoreDistribution = Literal["model", "filtered"]
SCORE_DISTRIBUTIONS: tuple[ScoreDistribution, ...] = get_args(ScoreDistribution)

_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE = 1e-30, 1e30
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits; the transforms apply in the order of the attributes below, guidance first.

    Attributes:
        guidance_scale: w of `unconditional + w (conditional - unconditional)`; 1 is no guidance and needs no second
            forward pass. LLaDA's cfg_scale is w - 1.
        repetition_penalty: divides the positive logits of tokens that the row already holds and multiplies the
            negative ones; 1 has no effect.
        eos_penalty: nats subtracted from the logits of EOS and padding, so that a text ends later; below 0 it ends
            sooner.
        suppress: ids that are never drawn.
        temperature: divides the logits; 0 takes the most probable token, of equal ones the lowest id.
        top_k: keep the k most probable tokens; None for all.
        top_p: nucleus mass in (0, 1]: of what top-k keeps, keep the fewest most probable tokens whose mass reaches it,
            at least one; of equal ones the lowest ids.
        score_distribution: the distribution whose probabilities score positions: the `model`'s own, before temperature
            and filters, or the `filtered` one, after them; a temperature of 0 then counts as 1.
    Raises:
        ValueError: if a value is out of range.
    Source: Ho & Salimans 2022 (arXiv 2207.12598) and LLaDA (arXiv 2502.09992), appendix A, for the guidance; CTRL
        (arXiv 1909.05858), section 4.1, for the penalty; Holtzman et al. 2020 (arXiv 1904.09751) for the nucleus.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    eos_penalty: float = 0.0
    suppress: tuple[int, ...] = ()
    score_distribution: ScoreDistribution = "model"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise ValueError(f"repetition_penalty must be a finite number above 0, got {self.repetition_penalty}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        if not math.isfinite(self.eos_penalty):
            raise ValueError(f"eos_penalty must be a finite number, got {self.eos_penalty}")
        if any(token < 0 for token in self.suppress):
            raise ValueError(f"ids to suppress must not be negative, got {self.suppress}")
        if self.score_distribution not in SCORE_DISTRIBUTIONS:
            raise ValueError(
                f"score_distribution must be one of {', '.join(SCORE_DISTRIBUTIONS)}, got {self.score_distribution!r}"
            )

    def uses_nucleus(self, vocab: int) -> bool:
        """Tell whether tokens are drawn from a nucleus of the whole vocabulary."""
        return self.temperature > 0.0 and self.top_p < 1.0 and (self.top_k is None or self.top_k >= vocab)


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return [n, vocab] float32 logits of classifier-free guidance, `unconditional + scale (conditional - ...)`.

    A token that the conditional model excludes with -inf stays excluded.
    """
    result = torch.lerp(unconditional.float(), conditional.float(), scale)
    return torch.where(conditional == -torch.inf, -torch.inf, result)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits in which the tokens that a row already holds are less probable.

    Args:
        logits: [n, vocab] float.
        seen: [n, length] int64, ids, with repetitions; an id beyond the vocabulary stands for none.
        penalty: above 1 makes them less probable, below 1 more.
    Returns:
        [n, vocab] float32, a new tensor.
    """
    values = logits.to(torch.float32, copy=True)
    vocab = values.shape[1]
    padded = torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
    ids = seen.clamp(max=vocab)
    score = padded.gather(1, ids)
    return padded.scatter_(1, ids, torch.where(score > 0, score / penalty, score * penalty))[:, :vocab]


def filtered_log_probs(logits: Tensor, config: LogitsConfig, *, suppress: tuple[int, ...] = ()) -> Tensor:
    """Return the distribution that `draw_tokens` draws from, over the whole vocabulary.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn.
        config: temperature and filters.
        suppress: further ids that must not be drawn.
    Returns:
        [n, vocab] float32 log-probabilities, -inf where a token is filtered out.
    Raises:
        ValueError: if `logits` is not two-dimensional or an id in `suppress` is negative.
    """
    check_logits(logits, suppress)
    values, _ = from_highest(logits, tuple(sorted({*config.suppress, *suppress})))
    if config.temperature == 0.0:
        result = torch.full_like(values, -torch.inf)
        return result.scatter_(1, values.argmax(dim=1, keepdim=True), 0.0)
    return filtered_scores(values, config).double().log_softmax(dim=1).float()


def filtered_scores(values: Tensor, config: LogitsConfig) -> Tensor:
    """Return [n, vocab] float32 logits after temperature, top-k and nucleus, 0 the highest; -inf where left out.

    A temperature of 0 counts as 1.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        config: temperature and filters.
    """
    config = config if config.temperature > 0.0 else replace(config, temperature=1.0)
    if config.top_k is not None and config.top_k < values.shape[1]:
        ids, scores = top_k_scores(values, config, config.top_k)
        return torch.full_like(values, -torch.inf).scatter_(1, ids, scores.float())
    scaled = values / clamped(config.temperature)
    if config.top_p < 1.0:
        scaled = scaled.masked_fill(~nucleus_mask(values, scaled.exp(), config.top_p), -torch.inf)
    return scaled


def check_logits(logits: Tensor, suppress: tuple[int, ...]) -> None:
    """Check shape and ids.

    Raises:
        ValueError: if `logits` is not [n, vocab] or an id is negative.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [n, vocab], got {tuple(logits.shape)}")
    if any(token < 0 for token in suppress):
        raise ValueError(f"ids to suppress must not be negative, got {suppress}")


def from_highest(logits: Tensor, suppress: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return [n, vocab] float32 logits minus the highest that may be drawn, in a new tensor, and [n] that highest.

    Suppressed ids, ascending, become -inf.
    """
    vocab = logits.shape[1]
    suppress = tuple(token for token in suppress if token < vocab)
    bounds = zip((0, *(token + 1 for token in suppress)), (*suppress, vocab), strict=True)
    maxima = [logits[:, low:high].amax(dim=1) for low, high in bounds if low < high]
    highest = torch.stack(maxima).amax(dim=0).float() if maxima else logits.new_full((len(logits),), -torch.inf)
    values = logits.float() - highest[:, None]
    for token in suppress:
        values[:, token] = -torch.inf
    return values, highest


def clamped(temperature: float) -> float:
    """Return a temperature by which float32 logits can be divided without making NaN of 0 and -inf."""
    return min(max(temperature, _SMALLEST_TEMPERATURE), _LARGEST_TEMPERATURE)


def top_k_scores(values: Tensor, config: LogitsConfig, width: int) -> tuple[Tensor, Tensor]:
    """Return [n, width] ids, and float64 scores up to a constant, -inf for those outside the nucleus of these k."""
    ids = _most_probable(values, width)
    scores = values.gather(1, ids).double() / clamped(config.temperature)
    if config.top_p < 1.0:
        mass = scores.exp()
        full = (mass / mass.sum(dim=1, keepdim=True)).cumsum(dim=1) >= config.top_p
        scores[:, 1:].masked_fill_(full[:, :-1], -torch.inf)
    return ids, scores


def _most_probable(values: Tensor, width: int) -> Tensor:
    """Return the ids of the `width` highest values of each row in descending order, of equal ones the lowest id first.

    `topk` alone leaves the order of equal values to the device and to the shape of the batch, and logits that come
    from bfloat16 are often equal. Here value and id make one integer that orders as the pair does.

    Args:
        values: [n, vocab] float32.
        width: at most vocab.
    Returns:
        [n, width] int64.
    """
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # adding 0 turns -0.0 into 0.0
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative floats order the wrong way round
    key = (rank << 32) | (_LOW_32 - torch.arange(values.shape[1], device=values.device))
    return _LOW_32 - (key.topk(width, dim=1).values & _LOW_32)
