"""From causal to full attention: the annealed mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Stream
from .rng import keyed_uniform


def annealing_ratio(step: int, anneal_steps: int) -> float:
    """Return the share of future keys that is visible at optimiser step `step`, min(1, (step + 1) / anneal_steps).

    Args:
        step: optimiser steps finished so far, from 0.
        anneal_steps: steps until attention is full; 0 or 1 means full from the start.
    Raises:
        ValueError: if either is negative.
    Source: DiffuLLaMA (arXiv 2410.17891), section 3.2.
    """
    if step < 0 or anneal_steps < 0:
        raise ValueError(f"step and anneal_steps must not be negative, got {step} and {anneal_steps}")
    return 1.0 if anneal_steps <= 1 else min(1.0, (step + 1) / anneal_steps)


def annealed_visibility(length: int, ratio: float, *, seed: int, draw: int, device: torch.device) -> Tensor:
    """Return which key each query may see: keys at or before it always, a later one with probability `ratio`.

    Args:
        length: of the sequence.
        ratio: in [0, 1].
        seed: of the run.
        draw: which matrix of the run this is (the optimiser step).
        device: where to make it.
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
    """Return 0 where `visible` and the smallest finite number of `dtype` elsewhere, in `dtype`.

    A boolean mask is silently wrong under eager attention, and minus infinity gives NaN in a row without a visible
    key.
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
