"""The noise of blocks: in expectation the bound of each block, keyed by seed, sample and block."""

import itertools
import math

import pytest
import torch

from llamafactory_ddm.diffusion.blocks import (
    block_levels,
    block_of,
    draw_block_level,
    mask_block_counts,
    mask_blocks,
    mask_blocks_exactly,
    positions_of,
)
from llamafactory_ddm.diffusion.likelihood import evaluation_times, mask_exactly, share_of
from llamafactory_ddm.diffusion.schedules import get_schedule

LENGTH, B = 10, 4
ROWS = torch.arange(2)
BLOCK = block_of(torch.arange(LENGTH).repeat(2, 1), B)
NOISABLE = torch.ones(2, LENGTH, dtype=torch.bool)
NOISABLE[0, [1, 8]] = False  # blocks of 3, 4 and 1 noisable tokens in row 0
SIZES = [[3, 4, 1], [4, 4, 2]]


def draw(kind, rows=ROWS, noisable=NOISABLE, block=BLOCK, schedule="linear", seed=0, epsilon=1e-3):
    return mask_blocks(
        noisable, block, kind, schedule=get_schedule(schedule), time_epsilon=epsilon, seed=seed, sample_index=rows
    )


def cost(masked):
    """A cost of the masked tokens of a block that depends on which are masked together."""
    return sum((1.0 + i) * (1.0 + 0.1 * len(masked)) for i in masked)


def bound(tokens):
    """Return the bound of a block by enumeration: the mean over c and over the choices of n / c times the cost."""
    n = len(tokens)
    means = []
    for c in range(1, n + 1):
        chosen = list(itertools.combinations(tokens, c))
        means.append(n / c * sum(map(cost, chosen)) / len(chosen))
    return sum(means) / n


def estimates(masks, noisable=NOISABLE):
    """Return [batch, 3], the estimate of each block's bound."""
    result = torch.zeros(len(masks.is_masked), 3, dtype=torch.float64)
    for row, block in itertools.product(range(len(result)), range(3)):
        columns = [i for i in range(block * B, min(block * B + B, LENGTH)) if masks.is_masked[row, i]]
        if columns:
            result[row, block] = float(masks.weight[row, columns[0]]) * cost(columns)
    return result


def expected():
    tokens = [[[i for i in range(k * B, min(k * B + B, LENGTH)) if NOISABLE[r, i]] for k in range(3)] for r in (0, 1)]
    return torch.tensor([[bound(each) for each in row] for row in tokens], dtype=torch.float64)


@pytest.mark.parametrize(("kind", "schedule"), [("counts", "linear"), ("times", "linear"), ("times", "cosine")])
def test_both_kinds_of_noise_estimate_the_bound_of_each_block(kind, schedule):
    draws = 6000
    rows, noisable, block = (torch.cat([each] * draws) for each in (ROWS, NOISABLE, BLOCK))
    masks = draw(kind, torch.arange(2 * draws), noisable, block, schedule, epsilon=0.0)
    found = estimates(masks).view(draws, 2, 3)
    error = found.std(dim=0) / math.sqrt(draws)
    assert ((found.mean(dim=0) - expected()).abs() <= 4 * error + 1e-12).all()
    assert rows.shape == (2 * draws,)


def test_counts_leave_no_block_clean_and_every_count_is_as_likely():
    draws = 4000
    masks = draw("counts", torch.arange(2 * draws), NOISABLE.repeat(draws, 1), BLOCK.repeat(draws, 1))
    assert not bool((masks.is_masked & ~NOISABLE.repeat(draws, 1)).any())
    counts = torch.zeros(2 * draws, 3, dtype=torch.int64).scatter_add_(
        1, BLOCK.repeat(draws, 1), masks.is_masked.long()
    )
    for row, block in itertools.product((0, 1), range(3)):
        n = SIZES[row][block]
        found = counts[row::2, block].bincount(minlength=n + 1).double() / draws
        assert found[0] == 0 and torch.allclose(found[1:], torch.full((n,), 1 / n, dtype=torch.float64), atol=0.04)


def test_counts_vary_less_than_times():
    draws = 1000
    both = (
        estimates(draw(kind, torch.arange(2 * draws), NOISABLE.repeat(draws, 1), BLOCK.repeat(draws, 1)))
        for kind in ("counts", "times")
    )
    counts, times = (each.sum(dim=1).view(draws, 2).std(dim=0) for each in both)
    assert (counts < times / 2).all()


@pytest.mark.parametrize("kind", ["counts", "times"])
def test_noise_depends_on_seed_sample_and_block_alone(kind):
    whole = draw(kind, torch.arange(8), NOISABLE.repeat(4, 1), BLOCK.repeat(4, 1))
    for low in (0, 4):
        rows = slice(low, low + 4)
        part = draw(kind, torch.arange(8)[rows], NOISABLE.repeat(2, 1), BLOCK.repeat(2, 1))
        assert torch.equal(part.is_masked, whole.is_masked[rows]) and torch.equal(part.weight, whole.weight[rows])
    other = draw(kind, torch.arange(8), NOISABLE.repeat(4, 1), BLOCK.repeat(4, 1), seed=1)
    assert not torch.equal(other.is_masked, whole.is_masked)
    assert len({tuple(row.tolist()) for row in whole.is_masked}) > 4
    # More columns, as in a batch with a longer row, change nothing.
    wide = torch.cat([NOISABLE, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    block = torch.cat([BLOCK, torch.full((2, 3), -1)], dim=1)
    assert torch.equal(draw(kind, noisable=wide, block=block).is_masked[:, :LENGTH], whole.is_masked[:2])


def test_blocks_of_a_row_have_levels_of_their_own():
    level = draw_block_level(BLOCK, seed=0, sample_index=ROWS)
    for row in level:
        assert len(row.unique()) == 3
    assert torch.equal(level[:, :B], level[:, :1].expand(2, B))
    levels = block_levels(evaluation_times(torch.arange(500), 4)[:, 2], 4, BLOCK[:1].expand(500, LENGTH))
    assert bool(((levels >= 0.5) & (levels < 0.75)).all())
    for column in (0, 4, 8):
        spread = ((levels[:, column] - 0.5) * 4).sort().values
        assert float((spread - (torch.arange(500) + 0.5) / 500).abs().max()) < 0.01


def test_one_block_is_masked_as_a_row_of_full_attention():
    one = torch.zeros_like(BLOCK)
    share_of_block = share_of_row = torch.zeros(2, LENGTH, dtype=torch.float64)
    for number in range(4):
        level, index = evaluation_times(ROWS, 4)[:, number], ROWS * 4 + number
        masks = mask_blocks_exactly(
            NOISABLE, one, level[:, None].expand(2, LENGTH), share=share_of_block, seed=3, sample_index=index
        )
        row = mask_exactly(NOISABLE, level, seed=3, sample_index=index, share=share_of_row)
        assert torch.equal(masks.is_masked, row)
        n = NOISABLE.sum(dim=1, keepdim=True)
        assert torch.allclose(masks.weight, n / row.sum(dim=1, keepdim=True).double())
        share_of_block = share_of_block + masks.is_masked * masks.weight / n
        share_of_row = share_of_row + share_of(row)


def test_scores_choose_within_each_block():
    score = torch.tensor([[0.9, 0.0, 0.1, 0.5, 0.2, 0.4, 0.3, 0.1, 0.0, 0.7]])
    masks = mask_block_counts(NOISABLE[:1], BLOCK[:1], torch.full((1, LENGTH), 0.5), score)
    # Of 3, 4 and 1 tokens floor(n / 2) + 1 are masked: 2, 3 and 1; token 1 and token 8 are not noisable.
    assert masks.is_masked[0].nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7, 9]
    assert masks.weight[0, [0, 4, 9]].tolist() == [3 / 2, 4 / 3, 1.0]


def test_a_row_of_padding_has_no_noise():
    padding = torch.full_like(BLOCK, -1)
    masks = draw("counts", noisable=torch.zeros_like(NOISABLE), block=padding)
    assert not bool(masks.is_masked.any()) and bool(masks.weight.isfinite().all())
    is_padding = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert positions_of(is_padding, is_padding=is_padding).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
