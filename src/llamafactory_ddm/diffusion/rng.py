"""A counter-based random generator (Philox) in integer tensor operations.

A draw is a pure function of (seed, stream, sample index, step, column), and no state is consumed. A resumed run,
another rank, another batch size and another device draw the same numbers, so training noise does not depend on
resuming, gradient accumulation or data parallelism. Each of the five has its own bits of the key or the counter, so no
two draws share a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def _multiply_high_low(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a product of two 32-bit unsigned numbers; int64 overflow keeps all 64 bits."""
    product = value * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int] | tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32-10 for each counter.

    Args:
        counter: four int64 tensors of one broadcastable shape, each value in [0, 2**32).
        key: two integers in [0, 2**32), or int64 tensors of them that broadcast with the counter.
    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2**32).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; tests check its known answers.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0: int | Tensor
    k1: int | Tensor
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply_high_low(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply_high_low(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def keyed_uniform(
    seed: int | Tensor,
    stream: int,
    sample_index: Tensor,
    length: int,
    *,
    steps: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Return uniform numbers in [0, 1) that depend only on (seed, stream, sample index, step, column).

    Args:
        seed: any integer in [0, 2**64); or [n_rows] int64, that of each row, modulo 2**64.
        stream: purpose of the numbers, in [0, 2**32); streams are independent.
        sample_index: [n_rows] int64 >= 0, index of each sample in the run's global order; below 2**32 if `steps` is
            given, as `steps` takes the word of the counter that otherwise holds the upper half of the index.
        length: how many numbers each row gets.
        steps: [n_rows] int64 in [0, 2**32), index of a row's repeated draw. Draw from a stream always with `steps` or
            always without.
        first: [n_rows] int64, the column of each row's first number; None for 0.
    Returns:
        [n_rows, length] float32, a multiple of 2**-24, on the device of `sample_index`.
    Raises:
        ValueError: if `seed`, `stream` or `length` is out of range.
    """
    if isinstance(seed, int) and not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    if not 0 <= stream <= _MASK32:
        raise ValueError(f"stream must lie in [0, 2**32), got {stream}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    n_blocks = (length + 3) // 4 if first is None else (length + 6) // 4  # of four numbers
    blocks = torch.arange(n_blocks, device=sample_index.device, dtype=torch.int64)[None]
    if first is not None:
        blocks = blocks + (first >> 2)[:, None]
    row = sample_index.to(torch.int64)[:, None]
    third = row >> 32 if steps is None else steps.to(torch.int64)[:, None]
    counter = (blocks, row & _MASK32, third & _MASK32, torch.full_like(row, stream))
    if isinstance(seed, Tensor):
        key: Any = (seed[:, None] & _MASK32, (seed[:, None] >> 32) & _MASK32)
    else:
        key = (seed & _MASK32, seed >> 32)
    words = philox4x32(counter, key)
    bits = torch.stack(words, dim=-1).flatten(start_dim=1)
    if first is None:
        bits = bits[:, :length]
    else:
        bits = bits.gather(1, (first & 3)[:, None] + torch.arange(length, device=first.device))
    return (bits >> 8).to(torch.float32) * 2.0**-24
