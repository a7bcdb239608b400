"""From a model's logits to a distribution: guidance, penalty, suppression, temperature, top-k and nucleus."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from ..utils.keys import check_fields, key
from .nucleus import nucleus_mask

Measure = Literal["log_prob", "margin", "entropy", "argmax", "top_log_prob"]
ScoreDistribution = Literal["model", "filtered"]
SCORE_DISTRIBUTIONS: tuple[ScoreDistribution, ...] = get_args(ScoreDistribution)

_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE = 1e-30, 1e30
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits, in this order: guidance, repetition and EOS penalty, suppression, temperature,
    top_k, top_p.

    The help text of each field describes it. Temperature 0, top_k and top_p break ties in favour of lower ids.

    Raises:
        ValueError: if a value is out of range.
    Source: Ho & Salimans 2022 (arXiv 2207.12598) and LLaDA (arXiv 2502.09992), appendix A, for the guidance; CTRL
        (arXiv 1909.05858), section 4.1, for the penalty; Holtzman et al. 2020 (arXiv 1904.09751) for the nucleus.
    """

    temperature: float = key(
        1.0, "Sampling temperature; 0 takes the most probable token. Same as `temperature`.", low=0, name="logits_temp"
    )
    top_p: float = key(
        1.0,
        "Nucleus: keep the fewest most probable tokens whose probabilities sum to at least this; after top_k. Same as "
        "`top_p`.",
        low=0,
        above_low=True,
        high=1,
        name="topp_temp",
    )
    top_k: int | None = key(
        None, "Number of most probable tokens to keep; 0 or empty keeps all.", kind="integer", low=0, is_upstream=True
    )
    repetition_penalty: float = key(
        1.0,
        "Divides the positive logits of tokens that the text already holds, and multiplies the negative ones; 1 is "
        "off.",
        low=0,
        above_low=True,
        is_upstream=True,
    )
    guidance_scale: float = key(
        1.0,
        "Classifier-free guidance w: unconditional + w (conditional - unconditional), LLaDA's cfg_scale + 1; 1 is "
        "off, any other value doubles the forward passes.",
        low=0,
    )
    eos_penalty: float = key(
        0.0,
        "Nats subtracted from the logits of EOS and padding tokens, for a model that ends too early; below 0 for one "
        "that ends too late.",
    )
    suppress: tuple[int, ...] = key((), "Tokens that are never generated.", kind="tokens", name="suppress_tokens")
    score_distribution: ScoreDistribution = key(
        "model",
        "Distribution that confidence, margin and entropy are computed from: model, or filtered: after temperature, "
        "top_p and top_k (Dream).",
        choices=SCORE_DISTRIBUTIONS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_k == 0:
            object.__setattr__(self, "top_k", None)
        object.__setattr__(self, "suppress", tuple(self.suppress))  # a list has no hash
        if not all(isinstance(token, Integral) and token >= 0 for token in self.suppress):
            raise ValueError(f"suppress_tokens must hold token ids of at least 0, got {self.suppress}")

    def uses_nucleus(self, vocab: int) -> bool:
        """Tell whether tokens are drawn from a nucleus of the whole vocabulary."""
        return self.temperature > 0.0 and self.top_p < 1.0 and (self.top_k is None or self.top_k >= vocab)


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return [n, vocab] float32 logits of classifier-free guidance, `unconditional + scale (conditional - ...)`.

    A token that the conditional model excludes with -inf stays excluded.
    """
    result = torch.lerp(unconditional.float(), conditional.float(), scale)
    return torch.where(conditional == -torch.inf, -torch.inf, result)


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Return logits in which the tokens that a row already holds are penalised.

    Args:
        logits: [n, vocab] float.
        tokens: [n, length] int64, the ids of each row; ids beyond the vocabulary are ignored.
        penalty: above 1 makes them less probable, below 1 more probable.
    Returns:
        [n, vocab] float32, a new tensor.
    """
    values = logits.to(torch.float32, copy=True)
    vocab = values.shape[1]
    padded = torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
    ids = tokens.clamp(max=vocab)
    score = padded.gather(1, ids)
    return padded.scatter_(1, ids, torch.where(score > 0, score / penalty, score * penalty))[:, :vocab]


def filtered_log_probs(logits: Tensor, config: LogitsConfig, *, suppress: tuple[int, ...] = ()) -> Tensor:
    """Return the distribution that `draw_tokens` draws from, over the whole vocabulary.

    Args:
        logits: [n, vocab] float; -inf marks a token that must not be drawn.
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
    """Return [n, vocab] float32 logits after temperature, top-k and nucleus: 0 the highest, -inf where filtered out.

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
        raise ValueError(f"suppress must hold token ids of at least 0, got {suppress}")


def from_highest(logits: Tensor, suppress: tuple[int, ...], *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return float32 logits minus the highest allowed one of each row, [n, vocab], and that highest one, [n].

    Suppressed ids, ascending, become -inf. `out` is the first result's memory; None for a new tensor.
    """
    vocab = logits.shape[1]
    suppress = tuple(token for token in suppress if token < vocab)
    bounds = zip((0, *(token + 1 for token in suppress)), (*suppress, vocab), strict=True)
    maxima = [logits[:, low:high].amax(dim=1) for low, high in bounds if low < high]
    highest = reduce(torch.maximum, maxima) if maxima else logits.new_full((len(logits),), -torch.inf)
    highest = highest.float()
    narrow = logits.float() if logits.dtype == torch.float64 else logits
    values = torch.sub(narrow, highest[:, None], out=out)
    for token in suppress:
        values[:, token].fill_(-torch.inf)
    return values, highest


def clamped(temperature: float) -> float:
    """Return a temperature by which float32 logits can be divided without making NaN of 0 and -inf."""
    return min(max(temperature, _SMALLEST_TEMPERATURE), _LARGEST_TEMPERATURE)


def top_k_scores(values: Tensor, config: LogitsConfig, width: int) -> tuple[Tensor, Tensor]:
    """Return the ids of the `width` highest logits, [n, width], and float64 scores, -inf outside the nucleus."""
    ids = _most_probable(values, width)
    scores = values.gather(1, ids).double() / clamped(config.temperature)
    if config.top_p < 1.0:
        mass = scores.exp()
        full = (mass / mass.sum(dim=1, keepdim=True)).cumsum(dim=1) >= config.top_p
        scores[:, 1:].masked_fill_(full[:, :-1], -torch.inf)
    return ids, scores


def _most_probable(values: Tensor, width: int) -> Tensor:
    """Return the ids of the `width` highest values of each row in descending order; ties go to the lower id.

    `topk` alone leaves the order of equal values to the device and to the shape of the batch, and logits that come
    from bfloat16 are often equal. Here value and id are packed into one integer, which sorts like the pair.

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
