"""Exact draws from unnormalised weights, and the nucleus of a distribution.

A CPU finds the nucleus without sorting the vocabulary. Other devices are fast at sorting, and there each operation has
fixed costs.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional

from .scratch import scratch

_CHUNK = 256
_INFINITY_BITS = 0x7F800000
_WORD = 2**32
_WIDE = 2**14  # vocabulary size from which reading a row costs more than starting an operation
_ROUNDING = 1e-5  # more than the relative rounding error of float32 sums over a vocabulary


class Weights:
    """Non-negative weights with their sums over chunks, so that a draw reads a single chunk.

    Attributes:
        values: [n, vocab] float.
        sums: [n, n_chunks], weight of each chunk, in the type of `values`.
        cumulative: [n, n_chunks] float64, weight of each chunk and all before it.
        total: [n] float64.
    """

    def __init__(self, values: Tensor) -> None:
        sums = _chunk_sums(values)
        self._set(values, sums, sums.cumsum(dim=1, dtype=torch.float64))

    def _set(self, values: Tensor, sums: Tensor, cumulative: Tensor) -> None:
        self.values, self.sums, self.cumulative, self.total = values, sums, cumulative, cumulative[:, -1]

    def rows(self, index: Tensor) -> Weights:
        """Return the weights of some rows, [n_rows] int64."""
        chosen = Weights.__new__(Weights)
        chosen._set(self.values[index], self.sums[index], self.cumulative[index])
        return chosen


def _chunk_sums(values: Tensor) -> Tensor:
    """Return [n, n_chunks], the sums over chunks of [n, vocab]; those of a row do not depend on other rows.

    The sum of 256 float32 numbers is accurate to a few rounding errors; only running sums and totals need float64.
    """
    whole = values.shape[1] // _CHUNK * _CHUNK
    sums = values[:, :whole].reshape(len(values), whole // _CHUNK, _CHUNK).sum(dim=2)
    if whole < values.shape[1]:
        sums = torch.cat([sums, values[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    return sums


def log_probs(values: Tensor, ids: Tensor) -> Tensor:
    """Return [n] float32, the log-probability of each id, in nats; overwrites the `scratch` of slot 1.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        ids: [n] int64.
    """
    index = ids[:, None]
    if values.shape[1] < _WIDE or not is_sequential(values.device):
        return values.log_softmax(dim=1).gather(1, index)[:, 0]
    total = _chunk_sums(torch.exp(values, out=scratch(values, 1))).sum(dim=1, dtype=torch.float64)
    return values.gather(1, index)[:, 0] - total.log().float()


def sample_weights(weights: Weights, u: Tensor) -> Tensor:
    """Draw an id for each row by inverting its cumulative distribution, in the order of ids.

    Args:
        weights: of n rows.
        u: [n] float64 in [0, 1).
    Returns:
        [n] int64 ids, of positive weight unless all weights of the row are 0.
    """
    values, target = weights.values, u * weights.total
    chunk = _first_above(weights.cumulative, weights.sums, target)
    before = weights.cumulative.gather(1, (chunk - 1).clamp(min=0)[:, None])[:, 0].masked_fill(chunk == 0, 0.0)
    ids = chunk[:, None] * _CHUNK + torch.arange(_CHUNK, device=u.device)
    inside = values.gather(1, ids.clamp(max=values.shape[1] - 1)).double().masked_fill(ids >= values.shape[1], 0.0)
    # The chunk's float32 sum is rounded, so the target is placed as a fraction of the chunk, whose sum is taken again.
    fraction = (target - before) / weights.sums.gather(1, chunk[:, None])[:, 0]
    cumulative = inside.cumsum(dim=1)
    return chunk * _CHUNK + _first_above(cumulative, inside, fraction * cumulative[:, -1])


def sample_each(weights: Weights, u: Tensor) -> Tensor:
    """Do what `sample_weights` does for several numbers of each row, in few operations.

    The ids are the same except that rounding may give an id of weight 0, at which `sample_weights` looks again.

    Args:
        weights: of n rows.
        u: [n, k] float64 in [0, 1).
    Returns:
        [n, k] int64.
    """
    values, target = weights.values, u * weights.total[:, None]
    n, vocab = values.shape
    chunk = torch.searchsorted(weights.cumulative, target, right=True).clamp(max=weights.sums.shape[1] - 1)
    # What lies above the target, as a fraction of the chunk.
    above = (weights.cumulative.gather(1, chunk) - target) / weights.sums.gather(1, chunk)
    if vocab % _CHUNK:
        ids = torch.add(torch.arange(_CHUNK, device=u.device), chunk[:, :, None], alpha=_CHUNK)
        inside = values.gather(1, ids.clamp(max=vocab - 1).flatten(1)).view_as(ids).masked_fill(ids >= vocab, 0.0)
    else:
        inside = values.view(n, -1, _CHUNK).gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))
    cumulative = inside.cumsum(dim=2, dtype=torch.float64)
    whole = cumulative[:, :, -1:]
    index = torch.searchsorted(cumulative, torch.addcmul(whole, whole, above[:, :, None], value=-1.0), right=True)
    return torch.add(index[:, :, 0], chunk, alpha=_CHUNK).clamp(max=vocab - 1)


def _first_above(cumulative: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """Return [n] the first entry of `cumulative`, the running sum of `parts`, above `target`."""
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=parts.shape[1] - 1)
    # Rounding can make a running sum decrease; an entry of weight 0 is replaced by the largest.
    return torch.where(parts.gather(1, index) > 0.0, index, parts.argmax(dim=1, keepdim=True))[:, 0]


def nucleus_mask(values: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """Return which tokens belong to the nucleus: the fewest most probable ones whose mass reaches `top_p`.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        weights: [n, vocab] float32, increasing with `values`.
        top_p: mass to reach, in (0, 1].
    Returns:
        [n, vocab] bool; ties go to the lower ids.
    Source: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    return (_bisected if is_sequential(values.device) else _sorted)(values, weights, top_p)


def is_sequential(device: torch.device) -> bool:
    """Tell whether a device draws fastest by rejection, row by row, rather than in few operations over all rows."""
    return device.type == "cpu"


def _bisected(values: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """Do what `nucleus_mask` does by bisection on the bits of the logits, which sort like the logits: 32 passes."""
    depth = values.abs().view(torch.int32)  # 0 for the most probable token, larger for less probable ones
    bound = _bound(weights, top_p)
    low = torch.full_like(depth[:, :1], -1)  # the mass down to here does not reach the bound
    high = torch.full_like(depth[:, :1], _INFINITY_BITS)  # and down to here it does
    for _ in range(32):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        mass = (depth <= middle).mul(weights).sum(dim=1, keepdim=True, dtype=torch.float64)
        reached = mass >= bound
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    above, last = depth < high, depth == high
    missing = bound - above.mul(weights).sum(dim=1, keepdim=True, dtype=torch.float64)
    last_weight = weights.gather(1, last.to(torch.uint8).argmax(dim=1, keepdim=True)).double()
    count = (missing / last_weight).ceil().clamp(min=1.0)
    return above | (last & (last.cumsum(dim=1) <= count))


def _sorted(values: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """Do what `nucleus_mask` does by sorting."""
    rank = _rank(values, torch.arange(values.shape[1], device=values.device).expand(values.shape))
    in_order = rank.sort(dim=1).values
    return rank <= _last_rank(in_order, in_order % _WORD, weights, top_p)


def _rank(values: Tensor, ids: Tensor) -> Tensor:
    """Return [n, k] int64 numbers of the tokens `ids`, lower for a higher logit, then for a lower id.

    The bits of logits of at most 0 are the upper word, the id the lower one.
    """
    return torch.add(ids, values.gather(1, ids).abs().view(torch.int32), alpha=_WORD)


def _upper_words(rank: Tensor) -> Tensor:
    """Return [n, k] int32, the upper words of [n, k] ranks, without an operation."""
    return rank.view(torch.int32)[:, 1 if sys.byteorder == "little" else 0 :: 2]


def _bound(weights: Tensor, top_p: float) -> Tensor:
    """Return [n, 1] float64, the mass that a nucleus reaches; float32 would lose small weights beside large ones."""
    return top_p * weights.sum(dim=1, keepdim=True, dtype=torch.float64)


def _last_rank(rank: Tensor, ids: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """Return [n, 1] the rank of the last token of the nucleus; that of the last candidate if the nucleus goes beyond.

    Args:
        rank: [n, k] of the k most probable tokens, the candidates, ascending.
        ids: [n, k] of the candidates, by descending weight.
        weights: [n, vocab] float32.
        top_p: mass to reach, in (0, 1].
    """
    mass = weights.gather(1, ids[:, :-1]).cumsum(dim=1, dtype=torch.float64)
    return rank.gather(1, torch.searchsorted(mass, _bound(weights, top_p)))


def draw_from_nucleus(values: Tensor, weights: Weights, u: Tensor, top_p: float) -> Tensor:
    """Draw a token of each row's nucleus: the first of several tokens that lies inside, or else from the nucleus.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        weights: of n rows, increasing with `values`.
        u: [n, tries] float64 in [0, 1); the last column draws from the nucleus itself.
        top_p: mass to reach, in (0, 1].
    Returns:
        [n] int64.
    """
    mask = nucleus_mask(values, weights.values, top_p)
    ids = sample_weights(Weights(weights.values * mask), u[:, -1])
    if u.shape[1] == 1:
        return ids
    drawn = sample_each(weights, u[:, :-1])
    is_inside, first = mask.gather(1, drawn).max(dim=1, keepdim=True)
    return torch.where(is_inside, drawn.gather(1, first), ids[:, None])[:, 0]


def draw_from_top(values: Tensor, weights: Weights, u: Tensor, top_p: float, width: int) -> Tensor:
    """Draw as `draw_from_nucleus` does, by sorting the `width` most probable tokens only.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        weights: of n rows, increasing with `values`.
        u: [n, tries] float64 in [0, 1), of at least two columns.
        top_p: mass to reach, in (0, 1].
        width: below vocab.
    Returns:
        [n] int64, -1 where these tokens do not suffice: because the nucleus is larger, or ends in a tie with the
        least probable of them, or no drawn token lies inside.
    """
    drawn = sample_each(weights, u[:, :-1])
    candidates = values.topk(width, dim=1).indices
    rank = _rank(values, torch.cat([candidates, drawn], dim=1))
    top = rank[:, :width].sort(dim=1).values
    last = _last_rank(top, candidates, weights.values, top_p)
    is_open = _upper_words(last) >= _upper_words(top)[:, -1:]
    is_outside = rank[:, width:] > last.masked_fill(is_open, -1)
    first = is_outside.min(dim=1, keepdim=True).indices
    return drawn.masked_fill(is_outside, -1).gather(1, first)[:, 0]


def draw_by_rejection(values: Tensor, weights: Weights, u: Tensor, top_p: float) -> Tensor:
    """Draw from the nucleus by rejection; the nucleus itself is computed only for rows whose tries all lie outside it.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        weights: of n rows, increasing with `values`.
        u: [n, tries] float64 in [0, 1); the last column is for the draw from the computed nucleus.
        top_p: mass to reach, in (0, 1].
    Returns:
        [n] int64.
    """
    rows = torch.arange(len(u), device=u.device)
    ids = torch.zeros_like(rows)
    for column in range(u.shape[1] - 1):
        drawn = sample_weights(weights, u[rows, column])
        ids[rows] = drawn
        outside = (~_are_inside(values, weights, drawn, top_p)).nonzero()[:, 0]
        if not len(outside):
            return ids
        rows, values, weights = rows[outside], values[outside], weights.rows(outside)
    ids[rows] = sample_weights(Weights(weights.values * nucleus_mask(values, weights.values, top_p)), u[rows, -1])
    return ids


def _are_inside(values: Tensor, weights: Weights, ids: Tensor, top_p: float) -> Tensor:
    """Return what `in_nucleus` returns, by float32 sums except where rounding or ties could change the answer."""
    own, bound = weights.values.gather(1, ids[:, None])[:, 0], top_p * weights.total
    # An upper bound of the mass before the id: it counts all ids of equal weight, whose logits may be lower.
    before = _mass_above(weights, own.nextafter(torch.zeros_like(own))) - own
    inside: Tensor = before < bound * (1.0 - _ROUNDING)
    rest = (~inside).nonzero()[:, 0]
    if len(rest):
        values, weights = values[rest], weights.rows(rest)
        outside = _mass_above(weights, own[rest]) >= bound[rest] * (1.0 + _ROUNDING)
        near = (~outside).nonzero()[:, 0]
        if len(near):
            inside[rest[near]] = in_nucleus(values[near], weights.values[near], ids[rest[near]], top_p)
    return inside


def _mass_above(weights: Weights, level: Tensor) -> Tensor:
    """Return [n] float32, the sum of each row's weights above `level`, [n]."""
    values = weights.values
    if values.shape[1] < _WIDE or not len(values):
        return torch.gt(values, level[:, None], out=torch.empty_like(values)).mul_(values).sum(dim=1)
    return torch.stack(
        [functional.hardshrink(row, lowest).sum() for row, lowest in zip(values, level.tolist(), strict=True)]
    )


def in_nucleus(values: Tensor, weights: Tensor, ids: Tensor, top_p: float) -> Tensor:
    """Tell whether a token of each row belongs to its nucleus: whether the mass before it is below `top_p`.

    Args:
        values: [n, vocab] float32 logits.
        weights: [n, vocab] float32, increasing with `values`.
        ids: [n] int64.
        top_p: mass to reach, in (0, 1].
    Returns:
        [n] bool. Before a token come those with a higher logit, and those with an equal logit and a lower id.
    """
    index = ids[:, None]
    level = values.gather(1, index)
    lower = torch.arange(values.shape[1], device=values.device) < index
    before = (values > level) | ((values == level) & lower)
    mass = (weights * before).sum(dim=1, keepdim=True, dtype=torch.float64)
    return (mass < _bound(weights, top_p))[:, 0]
