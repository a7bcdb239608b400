"""The bound of a text from the cross-entropies of its masks, against enumeration."""

import itertools
import math

import pytest
import torch

from llamafactory_ddm.diffusion.answer_bound import (
    balanced_masks,
    bound_and_error,
    diffullama_masks,
    every_mask,
    llada_masks,
)


def costs_of(n, seed=0):
    """Costs of every mask of n tokens, [2^n, n]: tokens differ, and the more is masked the more they cost."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.rand(n, dtype=torch.float64, generator=generator) * 6
    codes = torch.arange(2**n)
    masked = ((codes[:, None] >> torch.arange(n)) & 1).double()
    context = masked @ torch.rand(n, n, dtype=torch.float64, generator=generator)
    return token + context + torch.rand(2**n, n, dtype=torch.float64, generator=generator)


def read(costs, masks):
    return costs[(masks.is_masked.long() * 2 ** torch.arange(costs.shape[1])).sum(dim=1)]


def by_definition(costs):
    """Mean over k, and over the masks of k tokens, of n / k times their cost."""
    n, total = costs.shape[1], 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        total += sum(float(costs[sum(1 << i for i in s), list(s)].sum()) / k for s in subsets) / len(subsets)
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_every_mask_gives_the_bound(n):
    masks = every_mask(n)
    assert len(masks.is_masked) == 2**n - 1 == len({tuple(row) for row in masks.is_masked.tolist()})
    bound, error = bound_and_error(read(costs_of(n), masks), masks)
    assert bound == pytest.approx(by_definition(costs_of(n)), rel=1e-12) and error == 0


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("samples", [16, 32])
def test_balanced_masks_are_unbiased_and_their_error_is_honest(n, samples):
    """200 repetitions: no bias, the stated errors are as large as the real ones, and the 95 % intervals cover."""
    costs = costs_of(n)
    exact, errors, stated = by_definition(costs), [], []
    for masks in balanced_masks(n, samples, seed=3, sample_index=torch.arange(200)):
        assert masks.is_masked.shape == (samples, n) and masks.kind == "balanced"
        bound, error = bound_and_error(read(costs, masks), masks)
        errors.append(bound - exact)
        stated.append(error)
    error, stated = torch.tensor(errors), torch.tensor(stated)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(200)
    covered = float((error.abs() <= 1.96 * stated).double().mean())
    ratio = float(stated.square().mean().sqrt() / error.std())
    assert covered >= 0.93 and 0.9 < ratio < 2.5, (covered, ratio)


def test_balanced_masks_need_fewer_passes_than_independent_ones():
    """16 balanced masks have less error than 64 whose sizes are stratified and whose tokens are independent."""
    n, costs = 8, costs_of(8)
    exact = by_definition(costs)
    balanced, independent = [], []
    generator = torch.Generator().manual_seed(0)
    for masks in balanced_masks(n, 16, seed=0, sample_index=torch.arange(200)):
        balanced.append(bound_and_error(read(costs, masks), masks)[0] - exact)
        k = ((torch.arange(64) + torch.rand(64, generator=generator)) / 64 * n).long() + 1
        rank = torch.rand(64, n, generator=generator).argsort(dim=1).argsort(dim=1)
        is_masked = rank < k[:, None]
        code = (is_masked.long() * 2 ** torch.arange(n)).sum(dim=1)
        independent.append(float((n / k * (costs[code] * is_masked).sum(dim=1)).mean()) - exact)
    assert torch.tensor(balanced).std() < torch.tensor(independent).std()


def test_the_draws_of_a_question_are_shared_and_those_of_two_are_not():
    one, other = balanced_masks(6, 16, seed=0, sample_index=torch.tensor([4, 5]))
    (again,) = balanced_masks(6, 16, seed=0, sample_index=torch.tensor([4]))
    (reseeded,) = balanced_masks(6, 16, seed=1, sample_index=torch.tensor([4]))
    assert torch.equal(one.is_masked, again.is_masked)
    assert not torch.equal(one.is_masked, other.is_masked) and not torch.equal(one.is_masked, reseeded.is_masked)


@pytest.mark.parametrize("n", [4, 70])
def test_each_mask_alone_is_a_uniform_subset(n):
    """Every token is in mask j with probability k / n, and the sizes are spread evenly."""
    masks = torch.stack([each.is_masked for each in balanced_masks(n, 6, seed=2, sample_index=torch.arange(3000))])
    for j in range(6):
        k = masks[:, j].sum(dim=1).double()
        assert ((k - 1) / n >= j / 6 - 1 / n).all() and ((k - 1) / n < (j + 1) / 6).all()
        chance = float((k / n).mean())
        spread = math.sqrt(chance * (1 - chance) / 3000)
        assert ((masks[:, j].double().mean(dim=0) - chance).abs() < 5 * spread + 1e-9).all()
    pairs = masks[:, 2].double().T @ masks[:, 2].double() / 3000
    off = pairs[~torch.eye(n, dtype=torch.bool)]
    assert float((off - off.mean()).abs().max()) < 5 * math.sqrt(float(off.mean()) / 3000)


def test_lladas_masks_estimate_the_bound_and_state_their_error():
    n, costs = 6, costs_of(6)
    exact, found = by_definition(costs), []
    for masks in llada_masks(n, 128, seed=0, sample_index=torch.arange(400)):
        found.append(bound_and_error(read(costs, masks), masks))
        assert torch.bincount(masks.is_masked.sum(dim=1), minlength=n + 1)[1:].tolist() == pytest.approx(
            [128 / n] * n, abs=1.01
        )
    value, error = torch.tensor(found, dtype=torch.float64).T
    assert abs(float(value.mean()) - exact) < 4 * float(value.std()) / 20
    assert ((value - exact).abs() <= 1.96 * error).double().mean() >= 0.9
    assert float(error.square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.25)


def test_diffullamas_value_is_the_mean_cross_entropy_at_each_rate():
    """Against the expectation over independent masks; a mask of no token counts as 0."""
    n, rates, costs = 4, 32, costs_of(4)
    expected = 0.0
    for t in range(1, rates + 1):
        for bits in itertools.product([0, 1], repeat=n):
            k, code = sum(bits), sum(bit << i for i, bit in enumerate(bits))
            chance = (t / rates) ** k * (1 - t / rates) ** (n - k)
            expected += chance * float((costs[code] * torch.tensor(bits)).sum()) / max(k, 1) / rates
    found = []
    for masks in diffullama_masks(n, rates, seed=0, sample_index=torch.arange(600)):
        assert masks.is_masked[-1].all()  # t = T masks everything
        found.append(bound_and_error(read(costs, masks), masks)[0])
    value = torch.tensor(found)
    assert abs(float(value.mean()) - expected) < 4 * float(value.std()) / math.sqrt(600)
