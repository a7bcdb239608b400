import itertools
import math

import pytest
import torch

from llamafactory_ddm.diffusion.likelihood import bound_per_row, evaluation_times, mask_exactly, share_of
from llamafactory_ddm.diffusion.schedules import get_schedule


def test_times_are_stratified_and_depend_on_the_row_alone():
    times = evaluation_times(torch.arange(100), 4)
    assert torch.equal((times * 4).floor(), torch.arange(4).expand(100, 4).double())
    assert torch.equal(evaluation_times(torch.tensor([17]), 4)[0], times[17])


def test_times_cover_each_stratum_evenly():
    within = (evaluation_times(torch.arange(64), 1)[:, 0]).sort().values
    expected = (torch.arange(64) + 0.5) / 64
    assert (within - expected).abs().max() < 0.03


def test_times_need_a_sample():
    with pytest.raises(ValueError, match="samples"):
        evaluation_times(torch.arange(2), 0)


def test_exact_counts():
    maskable = torch.ones(5, 10, dtype=torch.bool)
    maskable[:, 0] = False
    maskable[4] = False
    level = torch.tensor([0.0, 0.5, 0.999, 0.12, 0.5], dtype=torch.float64)
    masked = mask_exactly(maskable, level, seed=1, sample_index=torch.arange(5))
    assert masked.sum(dim=1).tolist() == [1, 5, 9, 2, 0]
    assert not (masked & ~maskable).any()


def test_every_subset_is_equally_likely():
    rows = torch.arange(6000)
    masked = mask_exactly(
        torch.ones(6000, 4, dtype=torch.bool), torch.full((6000,), 0.3).double(), seed=3, sample_index=rows
    )
    code = (masked.long() * torch.tensor([1, 2, 4, 8])).sum(dim=1)
    counts = torch.bincount(code, minlength=16)
    subsets = [sum(1 << i for i in pair) for pair in itertools.combinations(range(4), 2)]
    assert counts[subsets].sum() == 6000
    assert (counts[subsets] - 1000).abs().max() < 5 * math.sqrt(1000)


def balanced(n, samples, copies, *, balance=True):
    """Return the masks of `copies` rows of n tokens, [copies, samples, n]."""
    rows, share, masks = torch.arange(copies), torch.zeros(copies, n, dtype=torch.float64), []
    for sample, level in enumerate(evaluation_times(rows, samples).T):
        draw = {"seed": 5, "sample_index": rows * samples + sample, "share": share if balance else None}
        masks.append(mask_exactly(torch.ones(copies, n, dtype=torch.bool), level, **draw))
        share = share + share_of(masks[-1])
    return torch.stack(masks, dim=1)


def test_draws_that_balance_the_tokens_are_unbiased_and_vary_less():
    """Arbitrary costs of every mask of 5 tokens: the mean of 8 draws against the bound by enumeration."""
    n, samples, copies = 5, 8, 4000
    costs = torch.rand(2**n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = costs + torch.arange(n) * 2  # tokens differ
    exact = 0.0
    for bits in itertools.product([0, 1], repeat=n):
        k, code = sum(bits), sum(bit << i for i, bit in enumerate(bits))
        if k:
            exact += float((costs[code] * torch.tensor(bits)).sum()) / (k * math.comb(n, k))
    spread = {}
    for balance in (True, False):
        masks = balanced(n, samples, copies, balance=balance)
        cost = (costs[(masks.long() * 2 ** torch.arange(n)).sum(dim=2)] * masks).sum(dim=2)
        estimate = (n / masks.sum(dim=2) * cost).mean(dim=1)
        spread[balance] = float(estimate.std())
        assert abs(float(estimate.mean()) - exact) < 4 * spread[balance] / copies**0.5
    assert spread[True] < spread[False] / 4, spread


def test_each_balanced_draw_alone_is_a_uniform_subset():
    masks = balanced(4, 6, 12000)
    code = (masks.long() * torch.tensor([1, 2, 4, 8])).sum(dim=2)
    for sample in range(6):
        for k in range(1, 5):
            subsets = [sum(1 << i for i in some) for some in itertools.combinations(range(4), k)]
            counts = torch.bincount(code[:, sample], minlength=16)[subsets].double()
            if counts.sum():
                assert (counts - counts.mean()).abs().max() < 5 * counts.mean().sqrt() + 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_estimator_equals_the_continuous_time_bound(name):
    """Brute force: average n/k * sum over subsets against the integral of loss_weight(t) E[sum CE] over t."""
    torch.manual_seed(0)
    n = 3
    # nll[subset][i]: an arbitrary denoiser's cross-entropy of token i when `subset` is masked.
    nll = {s: torch.rand(n, dtype=torch.float64) * 3 for s in itertools.product([False, True], repeat=n)}
    maskable = torch.ones(1, n, dtype=torch.bool)
    by_count = 0.0
    for k in range(1, n + 1):
        subsets = [s for s in nll if sum(s) == k]
        values = [bound_per_row(nll[s][list(s)].float(), torch.tensor([s]), maskable).item() for s in subsets]
        by_count += sum(values) / len(values) / n
    schedule = get_schedule(name)
    t = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    p, weight = 1 - schedule.alpha(t), schedule.loss_weight(t)
    integral = 0.0
    for s in nll:
        chance = p ** sum(s) * (1 - p) ** (n - sum(s))
        integral += (weight * chance).mean().item() * nll[s][list(s)].sum().item()
    assert by_count == pytest.approx(integral, rel=2e-4)


def test_the_bound_lies_above_the_true_likelihood():
    """A joint over two binary tokens with its exact conditionals: the bound holds, and with equality for one token."""
    joint = torch.tensor([[0.5, 0.1], [0.15, 0.25]], dtype=torch.float64)
    first, second = joint.sum(dim=1), joint.sum(dim=0)
    worst = 0.0
    for a, b in itertools.product(range(2), repeat=2):
        maskable = torch.ones(1, 2, dtype=torch.bool)
        both = torch.stack([-first[a].log(), -second[b].log()]).float()
        one = bound_per_row(both, maskable, maskable).item()
        left = bound_per_row((-(joint[a, b] / second[b]).log())[None].float(), torch.tensor([[True, False]]), maskable)
        right = bound_per_row((-(joint[a, b] / first[a]).log())[None].float(), torch.tensor([[False, True]]), maskable)
        bound = (one + (left.item() + right.item()) / 2) / 2
        worst += joint[a, b].item() * (bound + joint[a, b].log().item())
    assert worst == pytest.approx(0.0, abs=1e-6)  # exact conditionals in a random order: equality in expectation


def test_a_row_without_tokens_counts_nothing():
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert bound_per_row(torch.empty(0), none, none).tolist() == [0.0, 0.0]
