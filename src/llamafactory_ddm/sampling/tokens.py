"""An exact draw of tokens from filtered logits and given uniform numbers, and what a strategy asks of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logits import LogitsConfig, Measure, check_logits, clamped, filtered_scores, from_highest, top_k_scores
from .nucleus import Weights, in_nucleus, nucleus_mask, sample_weights

# Rows are worked on a few at a time, so that a row is still in the cache when the next operation reads it.
_ELEMENTS_AT_ONCE = {"cpu": 2**19}
_ELEMENTS_ELSEWHERE = 2**24


class Draws(NamedTuple):
    """What `draw_tokens` returns; a measure that was not asked for is None.

    All measures are of the model's own distribution: after guidance, penalty and suppression, before temperature and
    filters, so that they tell positions apart in greedy decoding as well. With `score_distribution: filtered`
    `log_prob`, `margin` and `entropy` are of what temperature and filters leave.

    Attributes:
        ids: [n] int64, the tokens drawn.
        bad: [n] bool, True where a row of logits holds NaN or has no finite maximum; the rest then means nothing.
        log_prob: [n] float32, log-probability of each id, in nats.
        margin: [n] float32, probability of the most probable token less that of the second.
        entropy: [n] float32, in nats.
        argmax: [n] int64, the most probable token.
        top_log_prob: [n] float32, its log-probability, in nats.
    """

    ids: Tensor
    bad: Tensor
    log_prob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    top_log_prob: Tensor | None = None


def draw_tokens(
    logits: Tensor,
    config: LogitsConfig,
    u: Tensor,
    *,
    suppress: tuple[int, ...] = (),
    measures: frozenset[Measure] = frozenset(),
) -> Draws:
    """Draw one token a row, exactly, a few rows at a time to bound the memory.

    A token is found by inverting the cumulative distribution in float64 with uniform numbers of 48 bits: like LLaDA's
    Gumbel maximum in float64 it does not cut the tail off, and it needs one random number a row, not one a token. For
    a nucleus the draw is from all tokens and is repeated while the token lies outside, which needs no sorting; with
    the last column of `u` the nucleus is found and drawn from.

    Args:
        logits: [n, vocab] float; -inf is a token that must not be drawn. They are left as they are.
        config: temperature and filters; guidance and penalty have been applied.
        u: [n] or [n, tries] float in [0, 1), the uniform numbers that decide a row.
        suppress: further ids that must not be drawn; one beyond the vocabulary changes nothing.
        measures: what to compute beside the ids.
    Raises:
        ValueError: if the shapes disagree or an id in `suppress` is negative.
    Source: LLaDA (arXiv 2502.09992), appendix B.3 (after arXiv 2409.02908), for the precision.
    """
    check_logits(logits, suppress)
    u = u[:, None] if u.dim() == 1 else u
    if u.shape[:1] != logits.shape[:1] or u.dim() != 2:
        raise ValueError(f"u must hold one number a row of logits, got {tuple(u.shape)} and {tuple(logits.shape)}")
    at_once = _ELEMENTS_AT_ONCE.get(logits.device.type, _ELEMENTS_ELSEWHERE)
    rows = max(1, at_once // max(1, logits.shape[1]))
    # Asking how many rows are left would stall another device, so there every draw is made to the end at once.
    in_two_passes = logits.device.type == "cpu" and config.uses_nucleus(logits.shape[1])
    drawn = concatenate(
        [
            _draw(logits[place : place + rows], config, u[place : place + rows], suppress, measures, in_two_passes)
            for place in range(0, max(len(u), 1), rows)
        ]
    )
    left = (drawn.ids < 0).nonzero()[:, 0] if in_two_passes else drawn.ids[:0]
    for place in range(0, len(left), rows):
        some = left[place : place + rows]
        again = _draw(logits[some], config, u[some], suppress, measures, False)
        for whole, part in zip(drawn, again, strict=True):
            if whole is not None and part is not None:
                whole[some] = part
    return drawn


def concatenate(parts: list[Draws]) -> Draws:
    """Return the rows of all parts, which must hold the same measures."""
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Draws(*columns)


def _draw(
    logits: Tensor,
    config: LogitsConfig,
    u: Tensor,
    suppress: tuple[int, ...],
    measures: frozenset[Measure],
    may_leave: bool,
) -> Draws:
    """Draw for a few rows; with `may_leave` an id is -1 where more than a first look is needed, for a second pass."""
    u = u.double()
    values, highest = from_highest(logits, tuple(sorted({*config.suppress, *suppress})))
    is_filtered = config.score_distribution == "filtered"
    top = values.argmax(dim=1) if config.temperature == 0.0 or "argmax" in measures else None
    own = values.softmax(dim=1) if not is_filtered and measures & {"margin", "entropy"} else None
    if config.temperature == 0.0 and top is not None:
        ids = top
    elif config.top_k is not None and config.top_k < values.shape[1]:
        candidates, scores = top_k_scores(values, config, config.top_k)
        ids = candidates.gather(1, sample_weights(Weights(scores.exp()), u[:, -1])[:, None])[:, 0]
    elif config.temperature == 1.0:
        ids = _draw_nucleus(values, values.softmax(dim=1) if own is None else own, config.top_p, u, may_leave)
    else:
        weights = values.mul(1.0 / clamped(config.temperature)).softmax(dim=1)
        ids = _draw_nucleus(values, weights, config.top_p, u, may_leave)
    log_prob = margin = entropy = top_log_prob = None
    if "top_log_prob" in measures:
        top_log_prob = -values.logsumexp(dim=1)  # the highest logit is 0
    if is_filtered and measures & {"log_prob", "margin", "entropy"}:
        values = filtered_scores(values, config)
        own = values.softmax(dim=1)
    if "log_prob" in measures:
        log_prob = values.log_softmax(dim=1).gather(1, ids.clamp(min=0)[:, None])[:, 0]
    if own is not None and "entropy" in measures:
        # The highest logit is 0, so the logarithm of its share is the log-partition with the other sign. A share of 0
        # times a logit of -inf would be NaN.
        energy = torch.linalg.vecdot(own, values.clamp(min=torch.finfo(torch.float32).min))
        entropy = (-own.amax(dim=1).log() - energy).clamp(min=0.0)
    if own is not None and "margin" in measures:
        best = own.argmax(dim=1, keepdim=True)
        first = own.gather(1, best)
        margin = (first - own.scatter_(1, best, 0.0).amax(dim=1, keepdim=True))[:, 0]
    argmax = top if "argmax" in measures else None
    return Draws(ids, ~highest.isfinite(), log_prob, margin, entropy, argmax, top_log_prob)


def _draw_nucleus(values: Tensor, weights: Tensor, top_p: float, u: Tensor, may_leave: bool) -> Tensor:
    """Draw [n] ids from the nucleus: by rejection with all columns of `u` but the last, then outright.

    Most tokens are seen to lie inside in one pass over the row, which counts all equal ones as coming before; where
    that leaves it open, the exact count decides, so that a token is turned down only if it lies outside. With
    `may_leave` that is left to another call, and the id is -1: on a CPU a few rows of many blocks are faster together.
    """
    table = Weights(weights)
    if top_p == 1.0:
        return sample_weights(table, u[:, 0])
    if may_leave and u.shape[1] > 1:
        drawn = sample_weights(table, u[:, 0])
        return torch.where(_surely_inside(values, table, drawn, top_p), drawn, -1)
    rows = torch.arange(len(u), device=u.device)
    ids = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    is_open = torch.ones(len(u), dtype=torch.bool, device=u.device)
    compact = u.device.type == "cpu"
    for column in range(u.shape[1] - 1):
        drawn = sample_weights(table, u[rows, column])
        inside = in_nucleus(values, table.values, drawn, top_p) & is_open[rows]
        ids[rows] = torch.where(inside, drawn, ids[rows])
        is_open[rows] &= ~inside
        if compact:
            left = (~inside).nonzero()[:, 0]
            if not len(left):
                return ids
            rows, values, table = rows[left], values[left], Weights(table.values[left])
    outright = sample_weights(Weights(table.values * nucleus_mask(values, table.values, top_p)), u[rows, -1])
    ids[rows] = torch.where(is_open[rows], outright, ids[rows])
    return ids


def _surely_inside(values: Tensor, table: Weights, drawn: Tensor, top_p: float) -> Tensor:
    """Tell where even all equal tokens coming first would leave [n] `drawn` inside, by more than float32 may err."""
    at = drawn[:, None]
    not_after = torch.ge(values, values.gather(1, at), out=torch.empty_like(values))
    before = torch.linalg.vecdot(not_after, table.values) - table.values.gather(1, at)[:, 0]
    inside: Tensor = before < top_p * (1.0 - 1e-5) * table.total
    return inside
