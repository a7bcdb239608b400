"""From logits to a token: temperature, top-k, nucleus, and an exact draw from given uniform numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_WIDTH = 128
_WIDER = 8
_ELEMENTS_AT_ONCE = 2**24
_SMALLEST_TEMPERATURE = 1e-300
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus mass in (0, 1]: the fewest most probable tokens whose mass reaches it stay, at least one.
        top_k: how many of the most probable tokens stay, or None for all; the nucleus is taken of what it leaves.
    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")


def filtered_log_probs(logits: Tensor, config: LogitsConfig, *, suppress: tuple[int, ...] = ()) -> Tensor:
    """Return the distribution that `draw_tokens` draws from, over the whole vocabulary.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn.
        config: temperature and filters.
        suppress: ids that must not be drawn.
    Returns:
        [n, vocab] float32 log-probabilities, -inf where a token is filtered out.
    Raises:
        ValueError: if `logits` is not two-dimensional or an id in `suppress` is negative.
    """
    _check(logits, suppress)
    scores, ids = _candidates(_suppressed(logits, suppress), config)
    result = torch.full(logits.shape, -torch.inf, dtype=torch.float32, device=logits.device)
    return result.scatter_(1, ids, scores.log_softmax(dim=1).float())


def draw_tokens(
    logits: Tensor, config: LogitsConfig, u: Tensor, *, suppress: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution, a few rows at a time to bound the memory.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn.
        config: temperature and filters.
        u: [n] float in [0, 1), the uniform number that decides a row.
        suppress: ids that must not be drawn; one beyond the vocabulary changes nothing.
    Returns:
        [n] int64 ids, and [n] float32 confidences: the model's own log-probability of each id, before temperature and
        filters, so that it tells positions apart in greedy decoding as well. It is NaN where a row of logits holds
        NaN or has no finite maximum; the id means nothing there.
    Raises:
        ValueError: if the shapes disagree or an id in `suppress` is negative.
    Source: LLaDA (arXiv 2502.09992), section 2.4, for the confidence.
    """
    _check(logits, suppress)
    if u.shape != logits.shape[:1]:
        raise ValueError(f"u must hold one number a row of logits, got {tuple(u.shape)} and {tuple(logits.shape)}")
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, logits.shape[1]))
    ids = torch.empty(len(u), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(len(u), dtype=torch.float32, device=logits.device)
    for start in range(0, len(u), rows):
        part = slice(start, start + rows)
        values = _suppressed(logits[part], suppress)
        ids[part] = _draw(values, config, u[part])
        confidence[part] = values.gather(1, ids[part, None])[:, 0] - values.logsumexp(dim=1)
    return ids, confidence


def _check(logits: Tensor, suppress: tuple[int, ...]) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [n, vocab], got {tuple(logits.shape)}")
    if any(token < 0 for token in suppress):
        raise ValueError(f"ids to suppress must not be negative, got {suppress}")


def _suppressed(logits: Tensor, suppress: tuple[int, ...]) -> Tensor:
    """Return a float32 copy, the caller's logits being left alone, with -inf for the suppressed ids."""
    values = logits.to(torch.float32, copy=True)
    for token in suppress:
        values[:, token : token + 1] = -torch.inf
    return values


def _draw(values: Tensor, config: LogitsConfig, u: Tensor) -> Tensor:
    scores, ids = _candidates(values, config)
    weights = scores.exp()
    cumulative = weights.cumsum(dim=1)
    # `right`: the first entry above the target, which a token of weight 0 never is.
    place = torch.searchsorted(cumulative, u.double()[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp(max=ids.shape[1] - 1)
    # A parallel sum may fall by a rounding error from one entry to the next, so the promise is kept here as well.
    place = torch.where(weights.gather(1, place) > 0.0, place, scores.argmax(dim=1, keepdim=True))
    return ids.gather(1, place)[:, 0]


def _candidates(values: Tensor, config: LogitsConfig) -> tuple[Tensor, Tensor]:
    """Return what top-k and nucleus leave, sorting no more of the vocabulary than they need.

    Args:
        values: [n, vocab] float32.
        config: temperature and filters.
    Returns:
        [n, width] float64 log-probabilities up to a constant of the row, the highest being 0 and -inf standing for a
        token that is filtered out, and [n, width] int64 ids.
    """
    vocab = values.shape[1]
    if config.temperature == 0.0:
        ids = values.argmax(dim=1, keepdim=True)
        return torch.zeros(ids.shape, dtype=torch.float64, device=values.device), ids
    if config.top_k is not None and config.top_k < vocab:
        ids = _most_probable(values, config.top_k)
        scores = _scaled(values.gather(1, ids), config.temperature)
        return _nucleus(scores, scores.exp().sum(dim=1, keepdim=True), config.top_p)[0], ids
    scaled = _scaled(values, config.temperature)
    if config.top_p == 1.0:
        return scaled, torch.arange(vocab, device=values.device).expand_as(scaled)
    total = scaled.exp().sum(dim=1, keepdim=True)
    width = min(_FIRST_WIDTH, vocab)
    while True:
        ids = _most_probable(values, width)
        scores, reached = _nucleus(scaled.gather(1, ids), total, config.top_p)
        if width == vocab or bool(reached.all()):
            return scores, ids
        width = min(width * _WIDER, vocab)


def _scaled(values: Tensor, temperature: float) -> Tensor:
    """Return float64 logits over temperature, the highest of each row being 0, whatever the temperature."""
    exact = values.double()
    # A device may multiply by the reciprocal, which must stay finite.
    return (exact - exact.amax(dim=1, keepdim=True)) / max(temperature, _SMALLEST_TEMPERATURE)


def _nucleus(scores: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Drop each token before which the mass is reached already.

    Args:
        scores: [n, width] float64, descending.
        total: [n, 1] float64, the sum of exp(scores) over all tokens, those beyond `width` included.
        top_p: mass to reach.
    Returns:
        [n, width] float64, -inf where dropped, and [n] bool, True where `width` tokens reach the mass.
    """
    if top_p == 1.0:
        return scores, torch.ones_like(total[:, 0], dtype=torch.bool)
    full = (scores.exp() / total).cumsum(dim=1) >= top_p
    result = scores.clone()
    result[:, 1:].masked_fill_(full[:, :-1], -torch.inf)
    return result, full[:, -1]


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
