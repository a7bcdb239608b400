"""Exact draws of tokens from filtered logits and uniform numbers, and the measures that strategies read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logits import LogitsConfig, Measure, check_logits, clamped, filtered_scores, from_highest, top_k_scores
from .nucleus import (
    Weights,
    draw_by_rejection,
    draw_from_nucleus,
    draw_from_top,
    is_sequential,
    log_probs,
    sample_weights,
)
from .scratch import scratch

# Elements of the logits that are processed at once. On a CPU the chunk is small enough to stay in the cache.
_ELEMENTS_AT_ONCE = {"cpu": 2**20}
_ELEMENTS_ELSEWHERE = 2**24
_N_CANDIDATES = 4096  # most probable tokens among which an accelerator looks for the end of a nucleus first


class TokenDraws(NamedTuple):
    """What `draw_tokens` returns; a measure that was not requested is None.

    All measures are of the model's own distribution: after guidance, penalty and suppression, before temperature and
    filters, so they tell positions apart in greedy decoding as well. With `score_distribution: filtered`, `log_prob`,
    `margin` and `entropy` are of the distribution after temperature and filters.

    Attributes:
        ids: [n] int64, the tokens drawn.
        highest: [n] float32, the highest allowed logit; other fields are undefined where it is NaN or infinite.
        log_prob: [n] float32, log-probability of each id, in nats.
        margin: [n] float32, probability of the most probable token minus that of the second.
        entropy: [n] float32, in nats.
        argmax: [n] int64, the most probable token.
        top_log_prob: [n] float32, its log-probability, in nats.
    """

    ids: Tensor
    highest: Tensor
    log_prob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    top_log_prob: Tensor | None = None

    @property
    def bad(self) -> Tensor:
        """Return [n] bool, rows of logits that hold NaN or allow no token."""
        return ~self.highest.isfinite()


def draw_tokens(
    logits: Tensor,
    config: LogitsConfig,
    u: Tensor,
    *,
    suppress: tuple[int, ...] = (),
    measures: frozenset[Measure] = frozenset(),
) -> TokenDraws:
    """Draw one token for each row, exactly, in chunks of rows that bound the memory.

    A draw inverts the cumulative distribution in float64 at a uniform number of 48 bits. Like LLaDA's Gumbel maximum
    in float64 it is exact in the tail, and it needs one random number for each row, not one for each token. With a
    nucleus it draws from all tokens and repeats while the token lies outside; the last column of `u` draws from the
    nucleus itself. A CPU needs no sorting for that. Other devices find the end of the nucleus among the most probable
    tokens, wait once to count the rows where these do not suffice, and sort all tokens of those rows. The ids are the
    same.

    Args:
        logits: [n, vocab] float; -inf marks a token that must not be drawn.
        config: temperature and filters; guidance and penalty are applied already.
        u: [n] or [n, tries] float in [0, 1), the uniform numbers of a row.
        suppress: further ids that must not be drawn; ids beyond the vocabulary are ignored.
        measures: the scores to compute.
    Raises:
        ValueError: if the shapes disagree or an id in `suppress` is negative.
    Source: LLaDA (arXiv 2502.09992), appendix B.3 (after arXiv 2409.02908), for the precision.
    """
    check_logits(logits, suppress)
    u = u[:, None] if u.dim() == 1 else u
    if u.shape[:1] != logits.shape[:1] or u.dim() != 2:
        raise ValueError(
            f"u must be [n] or [n, tries] for logits [n, vocab], got {tuple(u.shape)}, {tuple(logits.shape)}"
        )
    elements = _ELEMENTS_AT_ONCE.get(logits.device.type, _ELEMENTS_ELSEWHERE)
    n_at_once = max(1, elements // max(1, logits.shape[1]))
    in_two_passes = config.uses_nucleus(logits.shape[1]) and u.shape[1] > 1
    in_two_passes &= not is_sequential(logits.device) and logits.shape[1] > _N_CANDIDATES
    parts = [slice(low, low + n_at_once) for low in range(0, max(len(u), 1), n_at_once)]
    draws = concatenate([_draw(logits[part], config, u[part], suppress, measures, in_two_passes) for part in parts])
    deferred = (draws.ids < 0).nonzero()[:, 0] if in_two_passes else draws.ids[:0]
    for low in range(0, len(deferred), n_at_once):
        rows = deferred[low : low + n_at_once]
        second_pass = _draw(logits[rows], config, u[rows], suppress, measures, False)
        for field, values in zip(draws, second_pass, strict=True):
            if field is not None and values is not None:
                field[rows] = values
    return draws


def concatenate(parts: list[TokenDraws]) -> TokenDraws:
    """Return the rows of all parts, which must hold the same measures."""
    if len(parts) == 1:
        return parts[0]
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenDraws(*columns)


def _draw(
    logits: Tensor,
    config: LogitsConfig,
    u: Tensor,
    suppress: tuple[int, ...],
    measures: frozenset[Measure],
    may_defer: bool,
) -> TokenDraws:
    """Draw for one chunk of rows; with `may_defer` an id is -1 where a second pass has to draw it."""
    u = u.double()
    values, highest = from_highest(logits, tuple(sorted({*config.suppress, *suppress})), out=scratch(logits, 0))
    is_filtered = config.score_distribution == "filtered"
    top = values.argmax(dim=1) if config.temperature == 0.0 or "argmax" in measures else None
    probs = values.softmax(dim=1) if not is_filtered and measures & {"margin", "entropy"} else None
    if config.temperature == 0.0 and top is not None:
        ids = top
    elif config.top_k is not None and config.top_k < values.shape[1]:
        candidates, scores = top_k_scores(values, config, config.top_k)
        ids = candidates.gather(1, sample_weights(Weights(scores.exp()), u[:, -1])[:, None])[:, 0]
    elif config.temperature == 1.0:
        weights = torch.exp(values, out=scratch(values, 1)) if probs is None else probs
        ids = _draw_nucleus(values, weights, config.top_p, u, may_defer)
    else:
        weights = torch.mul(values, 1.0 / clamped(config.temperature), out=scratch(values, 1)).exp_()
        ids = _draw_nucleus(values, weights, config.top_p, u, may_defer)
    log_prob = margin = entropy = top_log_prob = None
    if "top_log_prob" in measures:
        top_log_prob = -values.logsumexp(dim=1)  # the highest logit is 0
    if is_filtered and measures & {"log_prob", "margin", "entropy"}:
        values = filtered_scores(values, config)
        probs = values.softmax(dim=1)
    if "log_prob" in measures:
        log_prob = log_probs(values, ids.clamp(min=0))
    if probs is not None and "entropy" in measures:
        # H = log Z - sum p v. The highest logit is 0, so log Z = -log p_max. 0 times a logit of -inf would be NaN.
        energy = torch.linalg.vecdot(probs, values.clamp(min=torch.finfo(torch.float32).min))
        entropy = (-probs.amax(dim=1).log() - energy).clamp(min=0.0)
    if probs is not None and "margin" in measures:
        best = probs.argmax(dim=1, keepdim=True)
        first = probs.gather(1, best)
        margin = (first - probs.scatter_(1, best, 0.0).amax(dim=1, keepdim=True))[:, 0]
    argmax = top if "argmax" in measures else None
    return TokenDraws(ids, highest, log_prob, margin, entropy, argmax, top_log_prob)


def _draw_nucleus(values: Tensor, weights: Tensor, top_p: float, u: Tensor, may_defer: bool) -> Tensor:
    """Draw [n] ids from the nucleus; with `may_defer` the id is -1 where the most probable tokens do not suffice."""
    table = Weights(weights)
    if top_p == 1.0:
        return sample_weights(table, u[:, 0])
    if is_sequential(u.device):
        return draw_by_rejection(values, table, u, top_p)
    if may_defer:
        return draw_from_top(values, table, u, top_p, _N_CANDIDATES)
    return draw_from_nucleus(values, table, u, top_p)
