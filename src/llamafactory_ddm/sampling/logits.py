"""From logits to a token: temperature, top-k, nucleus, and an exact draw from given uniform numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_WIDTH = 128
_WIDER = 8
_ELEMENTS_AT_ONCE = 2**25


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus mass in (0, 1]: the most probable tokens whose mass reaches it stay.
        top_k: how many of the most probable tokens stay, or None for all.
    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")


def candidates(logits: Tensor, config: LogitsConfig) -> tuple[Tensor, Tensor]:
    """Return the tokens that top-k and nucleus leave, most probable first, without sorting the vocabulary.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn.
        config: a temperature above 0.
    Returns:
        [n, width] float32 log-probabilities up to a constant of the row, -inf where a token is filtered out, and [n,
        width] int64 ids.
    """
    scaled = logits.float() / config.temperature
    vocab = scaled.shape[1]
    limit = vocab if config.top_k is None else min(config.top_k, vocab)
    if config.top_p == 1.0:
        if limit == vocab:
            return scaled, torch.arange(vocab, device=logits.device).expand_as(scaled)
        best = scaled.topk(limit, dim=1)
        return best.values, best.indices
    # With top-k first, the nucleus is taken of what top-k left.
    width = min(_FIRST_WIDTH, limit)
    log_total = scaled.logsumexp(dim=1, keepdim=True)
    while True:
        best = scaled.topk(width, dim=1)
        if limit < vocab:
            log_total = scaled.topk(limit, dim=1).values.logsumexp(dim=1, keepdim=True)
        mass = (best.values - log_total).exp()
        reached = mass.cumsum(dim=1)
        if width == limit or bool((reached[:, -1] >= config.top_p).all()):
            break
        width = min(width * _WIDER, limit)
    outside = reached - mass >= config.top_p
    outside[:, 0] = False
    return best.values.masked_fill(outside, -torch.inf), best.indices


def draw_tokens(logits: Tensor, config: LogitsConfig, u: Tensor) -> Tensor:
    """Draw one token a row.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn.
        config: temperature and filters.
        u: [n] float in [0, 1), the uniform number that decides a row; the inverse of the cumulative distribution is
            exact.
    Returns:
        [n] int64 ids.
    """
    if config.temperature == 0.0:
        return logits.argmax(dim=1)
    rows = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    parts = [_draw(part, config, v) for part, v in zip(logits.split(rows), u.split(rows), strict=True)]  # type: ignore[no-untyped-call]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=logits.device)


def _draw(logits: Tensor, config: LogitsConfig, u: Tensor) -> Tensor:
    scores, ids = candidates(logits, config)
    cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
    # `right`: the first entry above the target, so that a token of probability 0 is never taken.
    place = torch.searchsorted(cumulative, u.double()[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1))[:, 0]


def log_confidence(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the model's own log-probability of each drawn token, before temperature and filters.

    Args:
        logits: [n, vocab].
        ids: [n] int64.
    Returns:
        [n] float32.
    Source: LLaDA (arXiv 2502.09992), section 2.4, low-confidence remasking.
    """
    values = logits.float()
    return values.gather(1, ids[:, None])[:, 0] - values.logsumexp(dim=1)
