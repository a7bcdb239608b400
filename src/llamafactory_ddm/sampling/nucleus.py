"""Exact draws from unnormalised weights, and the nucleus of a distribution, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 256
_INFINITY_BITS = 0x7F800000


class Weights:
    """Non-negative weights with their sums over chunks, so that a draw reads a single chunk.

    Attributes:
        values: [n, vocab] float.
        cumulative: [n, n_chunks] float64, weight of each chunk and all before it.
        total: [n] float64.
    """

    def __init__(self, values: Tensor) -> None:
        whole = values.shape[1] // _CHUNK * _CHUNK
        # The sum of 256 float32 numbers is accurate to a few rounding errors; only the running sum needs float64.
        sums = values[:, :whole].reshape(len(values), whole // _CHUNK, _CHUNK).sum(dim=2)
        if whole < values.shape[1]:
            sums = torch.cat([sums, values[:, whole:].sum(dim=1, keepdim=True)], dim=1)
        self.values = values
        self.sums = sums.double()
        self.cumulative = self.sums.cumsum(dim=1)
        self.total = self.cumulative[:, -1]


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


def _first_above(cumulative: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """Return [n] the first entry of `cumulative`, the running sum of `parts`, above `target`."""
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=parts.shape[1] - 1)
    # Rounding can make a running sum decrease; an entry of weight 0 is replaced by the largest.
    return torch.where(parts.gather(1, index) > 0.0, index, parts.argmax(dim=1, keepdim=True))[:, 0]


def nucleus_mask(values: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """Return which tokens belong to the nucleus: the fewest most probable ones whose mass reaches `top_p`.

    The least probable member is found by bisection on the bits of the logits, which sort like the logits: 32 passes
    over the row.

    Args:
        values: [n, vocab] float32 logits, the highest of a row being 0.
        weights: [n, vocab] float32, increasing with `values`.
        top_p: mass to reach, in (0, 1].
    Returns:
        [n, vocab] bool; ties go to the lower ids.
    Source: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    depth = values.abs().view(torch.int32)  # 0 for the most probable token, larger for less probable ones
    bound = top_p * weights.sum(dim=1, keepdim=True, dtype=torch.float64)
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
    return Weights(weights * before).total < top_p * Weights(weights).total
