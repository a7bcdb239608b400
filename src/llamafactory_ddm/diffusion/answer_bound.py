"""The evidence bound of one text, such as an answer: which masks give it, and its standard error.

A `MaskSet` says which tokens are masked in each forward pass, and how the cross-entropies add up to the bound.
`every_mask` is exact, `balanced_masks` an unbiased estimate; `bound_and_error` takes the cross-entropies.
`llada_masks` and `diffullama_masks` are those of the published evaluations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import Stream, k_smallest_mask
from .rng import keyed_uniform

# Number and first index of further mask sets, from which the variance due to random masks is estimated.
_REDRAWN, _REDRAWN_FROM = 64, 2**40
# Pairs are balanced among so many tokens at most, as their number grows with the square.
_LARGEST_PAIRED = 64
# How much a pair counts beside the shares of its tokens; 0.05 to 0.5 do much the same.
_PAIR_WEIGHT = 0.2
_TIE = 1e-6


@dataclass(frozen=True)
class MaskSet:
    """The masks of a text x of n tokens, and their weights in its score, the bound or DiffuLLaMA's value,

        score = sum over j of weight[j] * sum over i masked in j of -log p(x[i] | tokens not masked in j).

    Attributes:
        is_masked: [m, n] bool.
        weight: [m] float64.
        kind: "every": all masks, no error; "balanced" or "independent": random masks.
    """

    is_masked: Tensor
    weight: Tensor
    kind: Literal["every", "balanced", "independent"]


def every_mask(n: int) -> MaskSet:
    """Return all 2^n - 1 masks of n tokens; the weight of a mask of k tokens is 1 / (k C(n, k)).

    The bound is the mean over k = 1..n, and over the C(n, k) masks of k tokens, of (n / k) times their cross-entropy.
    """
    codes = torch.arange(1, 2**n)
    is_masked = ((codes[:, None] >> torch.arange(n)) & 1).bool()
    k = is_masked.sum(dim=1)
    return MaskSet(is_masked, 1.0 / (k * torch.bincount(k)[k].double()), "every")


def balanced_masks(n: int, samples: int, *, seed: int, sample_index: Tensor) -> list[MaskSet]:
    """Return, for each index, `samples` random masks of n tokens in which tokens and pairs of tokens are balanced.

    Mask j has k = floor(n (j + u_j) / samples) + 1 tokens, u_j uniform in [0, 1). Its tokens are chosen one after
    another: the next is the token i with the least

        share_i + 0.2 * sum over the tokens l chosen before it of together_il

    where share_i is the sum of 1 / k over the earlier masks with i, and together_il that of 1 / (k (k - 1)) over those
    with i and l; ties are broken at random. So all tokens have nearly the same weight in the bound, and each is
    masked together with many different others. The rule treats all positions alike, so each mask is a uniformly random
    subset of its size and the estimate is unbiased. Texts with the same index and length draw the same masks: choices
    of a question share an index, and with it most of the error.

    Args:
        n: number of tokens; pairs are balanced up to 64.
        samples: number of masks.
        seed: the seed of the evaluation.
        sample_index: [batch] int64, indices of questions, in [0, 2**40).
    Source: ours. LLaDA (arXiv 2502.09992), appendix B.5, draws k evenly and tokens independently.
    """
    masks = _balanced(n, samples, seed, sample_index)
    return [MaskSet(each, n / (samples * each.sum(dim=1).double()), "balanced") for each in masks]


def llada_masks(n: int, samples: int, *, seed: int, sample_index: Tensor) -> list[MaskSet]:
    """Return masks as LLaDA's evaluation draws them; the arguments are those of `balanced_masks`.

    Mask j has ((k_0 + round(j n / samples)) mod n) + 1 tokens, k_0 uniform, chosen independently in each mask.

    Source: LLaDA (arXiv 2502.09992), appendix B.5.
    """
    first = (keyed_uniform(seed, Stream.ANSWER_LEVEL, sample_index, 1).double() * n).floor().long()
    sizes = ((first + (torch.arange(samples) * n / samples).round().long()) % n + 1).sort(dim=1).values
    masks = _independent(n, samples, seed, sample_index, sizes)
    return [MaskSet(each, n / (samples * each.sum(dim=1).double()), "independent") for each in masks]


def diffullama_masks(n: int, samples: int, *, seed: int, sample_index: Tensor) -> list[MaskSet]:
    """Return masks as DiffuLLaMA's evaluation draws them; the arguments are those of `balanced_masks`.

    For t = 1..samples each token is masked with probability t / samples, independently. The value is the mean over t
    of the mean cross-entropy of the masked tokens, in nats per token. It is no bound. A mask of no token counts as 0.

    Source: DiffuLLaMA (arXiv 2410.17891), its evaluation script.
    """
    index = sample_index[:, None] * samples + torch.arange(samples)
    u = keyed_uniform(seed, Stream.ANSWER, index.flatten(), n).view(len(sample_index), samples, n)
    masks = u < (torch.arange(1, samples + 1) / samples)[:, None]
    return [MaskSet(each, 1.0 / (samples * each.sum(dim=1).clamp(min=1).double()), "independent") for each in masks]


def _independent(n: int, samples: int, seed: int, sample_index: Tensor, sizes: Tensor) -> Tensor:
    """Return [batch, samples, n] bool, uniformly random subsets of the given sizes."""
    index = (sample_index[:, None] * samples + torch.arange(samples)).flatten()
    u = keyed_uniform(seed, Stream.ANSWER, index, n)
    masks = k_smallest_mask(u, torch.ones_like(u, dtype=torch.bool), sizes.flatten())
    return masks.view(len(sample_index), samples, n)


def bound_and_error(nll: Tensor, masks: MaskSet) -> tuple[float, float]:
    """Return the score of a text (see `MaskSet`) and its standard error, in nats.

    If every mask was computed, the error is 0. That of m independent masks is sqrt(m / 2) times the root mean square
    of the differences between the terms of successive masks, which are in the order of their noise. The error of
    balanced masks has two parts. With y_ij the cross-entropy of token i under mask j, w_ij its weight,
    kappa_j = k_j / n, a line a_i + b_i kappa for each token, and residuals e_ij:

        y_ij = a_i + b_i kappa_j + e_ij                              least squares for each token i
        error^2 = Var[ sum_ij w_ij (a_i + b_i kappa_j) ]  +  sum_j ( sum_i w_ij e_ij )^2

    The variance is over 64 other mask sets. The second part allows for correlated residuals of one mask;
    e_ij is scaled by sqrt(N_i / (N_i - 2)) for the N_i passes in which token i is masked.

    Args:
        nll: [m, n] float, nats of token i in pass j; read where it is masked.
        masks: what was masked.
    """
    is_masked, weight = masks.is_masked, masks.weight[:, None]
    y = torch.where(is_masked, nll.double(), 0.0)
    bound = float((weight * y).sum())
    samples, n = is_masked.shape
    if masks.kind == "every":
        return bound, 0.0
    if masks.kind == "independent":
        difference = (weight * y).sum(dim=1).diff()
        return bound, float((difference.square().mean() / 2 * samples).sqrt())
    masked = is_masked.double()
    level = masked.sum(dim=1) / n
    count = masked.sum(dim=0)
    basis = torch.stack([torch.ones_like(level), level], dim=1)
    gram = torch.einsum("ji,ja,jb->iab", masked, basis, basis) + 1e-9 * torch.eye(2, dtype=torch.float64)
    lines = torch.linalg.solve(gram, torch.einsum("ji,ja->ia", y, basis))
    residual = (y - basis @ lines.T) * masked * (count / (count - 2).clamp(min=1)).sqrt()
    redrawn = torch.einsum("bia,ia->b", _redrawn_sums(n, samples), lines)
    return bound, float((redrawn.var() + (weight * residual).sum(dim=1).square().sum()).sqrt())


@functools.lru_cache(maxsize=256)
def _redrawn_sums(n: int, samples: int) -> Tensor:
    """Return [64, n, 2] float64, sums over j of w_ij and of w_ij kappa_j, for 64 mask sets with other numbers."""
    masks = _balanced(n, samples, 0, torch.arange(_REDRAWN_FROM, _REDRAWN_FROM + _REDRAWN)).double()
    k = masks.sum(dim=2, keepdim=True)
    return torch.stack([(masks * n / k).sum(dim=1), masks.sum(dim=1)], dim=2) / samples


def _balanced(n: int, samples: int, seed: int, sample_index: Tensor) -> Tensor:
    """Return [batch, samples, n] bool, the masks of `balanced_masks`."""
    batch = len(sample_index)
    u = keyed_uniform(seed, Stream.ANSWER_LEVEL, sample_index, samples).double()
    sizes = ((torch.arange(samples) + u) / samples * n).floor().long() + 1
    share = torch.zeros(batch, n, dtype=torch.float64)
    together = torch.zeros(batch, n, n, dtype=torch.float64) if n <= _LARGEST_PAIRED else None
    masks = []
    for j, k in enumerate(sizes.T):
        tie = keyed_uniform(seed, Stream.ANSWER, sample_index * samples + j, n).double() * _TIE
        chosen = _least_used(share + tie, together, k)
        masks.append(chosen)
        weight = chosen.double() / k[:, None]
        share = share + weight
        if together is not None:
            together = together + weight[:, :, None] * chosen[:, None, :] / (k - 1).clamp(min=1)[:, None, None]
    return torch.stack(masks, dim=1)


def _least_used(score: Tensor, together: Tensor | None, k: Tensor) -> Tensor:
    """Return [batch, n] bool, k tokens of least score, counting for each token those chosen before it."""
    if together is None:
        return k_smallest_mask(score, torch.ones_like(score, dtype=torch.bool), k)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    rows = torch.arange(len(score))
    for number in range(int(k.max())):
        best = score.masked_fill(chosen, torch.inf).argmin(dim=1)
        chosen[rows, best] |= number < k
        score = score + _PAIR_WEIGHT * together[rows, best]
    return chosen
