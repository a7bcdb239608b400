"""From logits to a token: penalties, temperature, top-k, nucleus, and an exact draw from given uniform numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .nucleus import Weights, in_nucleus, nucleus_mask, sample_weights

Measure = Literal["log_prob", "margin", "entropy", "argmax"]

# Rows are worked on a few at a time, so that a row is still in the cache when the next operation reads it.
_ELEMENTS_AT_ONCE = {"cpu": 2**19}
_ELEMENTS_ELSEWHERE = 2**24
_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE = 1e-30, 1e30
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class LogitsConfig:
    """How a token is drawn from logits; the steps are taken in the order of the attributes, guidance being the first.

    Attributes:
        guidance_scale: w of `unconditional + w (conditional - unconditional)`; 1 is no guidance and costs no second
            forward. LLaDA's cfg_scale is w - 1.
        repetition_penalty: divides the positive logits of tokens that the row holds already and multiplies the
            negative ones; 1 changes nothing.
        suppress: ids that are never drawn.
        temperature: divides the logits; 0 takes the most probable token, of equal ones the lowest id.
        top_k: how many of the most probable tokens stay, or None for all.
        top_p: nucleus mass in (0, 1]: of what top-k leaves, the fewest most probable tokens whose mass reaches it
            stay, at least one; of equal ones the lowest ids.
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
    suppress: tuple[int, ...] = ()

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
        if any(token < 0 for token in self.suppress):
            raise ValueError(f"ids to suppress must not be negative, got {self.suppress}")


class Draws(NamedTuple):
    """What `draw_tokens` returns; a measure that was not asked for is None.

    All measures are of the model's own distribution: after guidance, penalty and suppression, before temperature and
    filters, so that they tell positions apart in greedy decoding as well.

    Attributes:
        ids: [n] int64, the tokens drawn.
        bad: [n] bool, True where a row of logits holds NaN or has no finite maximum; the rest then means nothing.
        log_prob: [n] float32, log-probability of each id, in nats.
        margin: [n] float32, probability of the most probable token less that of the second.
        entropy: [n] float32, in nats.
        argmax: [n] int64, the most probable token.
    """

    ids: Tensor
    bad: Tensor
    log_prob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return [n, vocab] float32 logits of classifier-free guidance, `unconditional + scale (conditional - ...)`.

    A token that the conditional model excludes with -inf stays excluded.
    """
    result = torch.lerp(unconditional.float(), conditional.float(), scale)
    return torch.where(conditional == -torch.inf, -torch.inf, result)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits in which the tokens that a row holds already are less probable.

    Args:
        logits: [n, vocab] float.
        seen: [n, length] int64, ids, repeated as often as one likes; an id beyond the vocabulary stands for none.
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
    _check(logits, suppress)
    values, _ = _from_highest(logits, tuple(sorted({*config.suppress, *suppress})))
    result = torch.full_like(values, -torch.inf)
    if config.temperature == 0.0:
        return result.scatter_(1, values.argmax(dim=1, keepdim=True), 0.0)
    if config.top_k is not None and config.top_k < values.shape[1]:
        ids, scores = _top_k(values, config, config.top_k)
        return result.scatter_(1, ids, scores.log_softmax(dim=1).float())
    scaled = values / _clamped(config.temperature)
    if config.top_p < 1.0:
        scaled = scaled.masked_fill(~nucleus_mask(values, scaled.exp(), config.top_p), -torch.inf)
    return scaled.double().log_softmax(dim=1).float()


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
    _check(logits, suppress)
    u = u[:, None] if u.dim() == 1 else u
    if u.shape[:1] != logits.shape[:1] or u.dim() != 2:
        raise ValueError(f"u must hold one number a row of logits, got {tuple(u.shape)} and {tuple(logits.shape)}")
    at_once = _ELEMENTS_AT_ONCE.get(logits.device.type, _ELEMENTS_ELSEWHERE)
    rows = max(1, at_once // max(1, logits.shape[1]))
    parts = [
        _draw(logits[place : place + rows], config, u[place : place + rows].double(), suppress, measures)
        for place in range(0, max(len(u), 1), rows)
    ]
    return concatenate(parts)


def concatenate(parts: list[Draws]) -> Draws:
    """Return the rows of all parts, which must hold the same measures."""
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Draws(*columns)


def _draw(
    logits: Tensor, config: LogitsConfig, u: Tensor, suppress: tuple[int, ...], measures: frozenset[Measure]
) -> Draws:
    values, highest = _from_highest(logits, tuple(sorted({*config.suppress, *suppress})))
    greedy = config.temperature == 0.0
    own = values.exp() if measures & {"log_prob", "margin", "entropy"} or config.temperature == 1.0 else None
    top = values.argmax(dim=1) if greedy or "argmax" in measures else None
    if greedy and top is not None:
        ids = top
    elif config.top_k is not None and config.top_k < values.shape[1]:
        candidates, scores = _top_k(values, config, config.top_k)
        weights = scores.exp()
        ids = candidates.gather(1, sample_weights(Weights(weights), u[:, -1])[:, None])[:, 0]
    else:
        same = own is not None and config.temperature == 1.0
        weights = own if same and own is not None else values.mul(1.0 / _clamped(config.temperature)).exp_()
        ids = _draw_nucleus(values, weights, config.top_p, u)
    total = None if own is None else Weights(own).total
    log_prob = margin = entropy = None
    if total is not None and "log_prob" in measures:
        log_prob = (values.gather(1, ids[:, None])[:, 0].double() - total.log()).float()
    if total is not None and own is not None and "margin" in measures:
        second = own.scatter(1, own.argmax(dim=1, keepdim=True), 0.0).amax(dim=1)
        margin = ((1.0 - second) / total).float()
    if total is not None and own is not None and "entropy" in measures:
        # A weight of 0 times a logit of -inf would be NaN.
        energy = torch.linalg.vecdot(own, values.clamp(min=torch.finfo(torch.float32).min))
        entropy = (total.log() - energy.double() / total).clamp(min=0.0).float()
    return Draws(ids, ~highest.isfinite(), log_prob, margin, entropy, top if "argmax" in measures else None)


def _draw_nucleus(values: Tensor, weights: Tensor, top_p: float, u: Tensor) -> Tensor:
    """Draw [n] ids from the nucleus: by rejection with all columns of `u` but the last, then outright.

    Most tokens are seen to lie inside in one pass over the row, which counts all equal ones as coming before; where
    that leaves it open, the exact count decides, so that a token is turned down only if it lies outside.
    """
    table = Weights(weights)
    if top_p == 1.0:
        return sample_weights(table, u[:, 0])
    rows = torch.arange(len(u), device=u.device)
    ids = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    is_open = torch.ones(len(u), dtype=torch.bool, device=u.device)
    compact = u.device.type == "cpu"  # elsewhere asking for the number of rows would stall the device
    for column in range(u.shape[1] - 1):
        drawn = sample_weights(table, u[rows, column])
        if compact:
            inside = _surely_inside(values, table, drawn, top_p)
            unclear = (~inside).nonzero()[:, 0]
            if len(unclear):
                inside[unclear] = in_nucleus(values[unclear], table.values[unclear], drawn[unclear], top_p)
        else:
            inside = in_nucleus(values, table.values, drawn, top_p)
        inside &= is_open[rows]
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


def _check(logits: Tensor, suppress: tuple[int, ...]) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [n, vocab], got {tuple(logits.shape)}")
    if any(token < 0 for token in suppress):
        raise ValueError(f"ids to suppress must not be negative, got {suppress}")


def _from_highest(logits: Tensor, suppress: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return [n, vocab] float32 logits less the highest that may be drawn, in a new tensor, and [n] that highest.

    Suppressed ids, ascending, become -inf.
    """
    vocab = logits.shape[1]
    suppress = tuple(token for token in suppress if token < vocab)
    ends = zip((0, *(token + 1 for token in suppress)), (*suppress, vocab), strict=True)
    between = [logits[:, low:high].amax(dim=1) for low, high in ends if low < high]
    highest = torch.stack(between).amax(dim=0).float() if between else logits.new_full((len(logits),), -torch.inf)
    values = logits.float() - highest[:, None]
    for token in suppress:
        values[:, token] = -torch.inf
    return values, highest


def _clamped(temperature: float) -> float:
    """Return a temperature by which float32 logits can be divided without making NaN of 0 and -inf."""
    return min(max(temperature, _SMALLEST_TEMPERATURE), _LARGEST_TEMPERATURE)


def _top_k(values: Tensor, config: LogitsConfig, width: int) -> tuple[Tensor, Tensor]:
    """Return [n, width] ids, and float64 scores up to a constant, -inf for those outside the nucleus of these k."""
    ids = _most_probable(values, width)
    scores = values.gather(1, ids).double() / _clamped(config.temperature)
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
