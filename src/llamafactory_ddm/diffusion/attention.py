"""The attention mask that is annealed from causal to full."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Stream
from .rng import keyed_uniform


def annealing_ratio(step: int, anneal_steps: int) -> float:
    """Return the probability that a query sees a later key at step s: r(s) = min(1, (s + 1) / anneal_steps).

    Args:
        step: s, the number of finished optimiser steps.
        anneal_steps: steps until attention is full; 0 and 1 give full attention from the start.
    Raises:
        ValueError: if either is negative.
    Source: DiffuLLaMA (arXiv 2410.17891), section 3.2.
    """
    if step < 0 or anneal_steps < 0:
        raise ValueError(f"step and anneal_steps must not be negative, got {step} and {anneal_steps}")
    return 1.0 if anneal_steps <= 1 else min(1.0, (step + 1) / anneal_steps)


def annealed_visibility(length: int, ratio: float, *, seed: int, draw: int, device: torch.device) -> Tensor:
    """Draw which keys each query sees: visible[i, j] = (j <= i) or u_ij < ratio, with u_ij uniform in [0, 1).

    Args:
        length: sequence length.
        ratio: probability that a query sees a later key, in [0, 1].
        seed: the run's seed.
        draw: index of this draw in the run (the optimiser step).
        device: device of the result.
    Returns:
        [1, 1, length, length] bool, True where query (dim 2) sees key (dim 3); shared by batch, heads and layers.
    Raises:
        ValueError: if `ratio` is outside [0, 1].
    Source: DiffuLLaMA (arXiv 2410.17891), section 3.2.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    position = torch.arange(length, device=device, dtype=torch.int64)
    visible = keyed_uniform(seed, Stream.ATTENTION, position, length, steps=torch.full_like(position, draw)) < ratio
    position = torch.arange(length, device=device)
    return (visible | (position[None, :] <= position[:, None]))[None, None]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to attention scores: 0 where `visible`, the smallest finite number of `dtype` elsewhere.

    Eager attention adds whatever mask it gets, so a boolean mask would be silently wrong. Minus infinity would give
    NaN for a query that sees no key.
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def full_pairs(lengths: Tensor, window: int | None = None) -> int:
    """Return how many pairs of query and key full attention within documents has.

    Args:
        lengths: [n] int64, tokens of each document.
        window: only pairs with |query - key| < window count; None for all.
    """
    if window is None:
        return int(lengths.square().sum())
    reach = lengths.clamp(max=window)
    return int((lengths * (2 * reach - 1) - reach * (reach - 1)).sum())
