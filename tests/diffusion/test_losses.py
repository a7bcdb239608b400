"""The losses against exact enumeration on a tiny vocabulary."""

import itertools
import math

import pytest
import torch

from llamafactory_ddm.diffusion import losses as objectives
from llamafactory_ddm.diffusion.loss_weights import denominator, row_weight, token_weight
from llamafactory_ddm.diffusion.losses import masked_cross_entropy
from llamafactory_ddm.diffusion.noise import draw_time, mask_tokens
from llamafactory_ddm.diffusion.schedules import SCHEDULES, get_schedule
from support.schedules import time_of

VOCAB, LENGTH, MASK = 3, 3, 3


def toy_logits(seed):
    """Return a lookup table: for each of the 4**3 noised sequences, logits [length, vocab] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((VOCAB + 1,) * LENGTH + (LENGTH, VOCAB), generator=generator, dtype=torch.float64)


def any_order_bound(table, x_0):
    """Return the mean over all reveal orders of -log p(x_0), one token at a time: what the bound equals exactly."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        z = [MASK] * LENGTH
        for position in order:
            total -= float(table[tuple(z)][position].log_softmax(-1)[x_0[position]])
            z[position] = x_0[position]
    return total / math.factorial(LENGTH)


def likelihood(table, x_0):
    """Return log p(x_0) of the generative process that reveals one token at a time in a uniformly random order."""
    terms = []
    for order in itertools.permutations(range(LENGTH)):
        z, log_p = [MASK] * LENGTH, -math.log(math.factorial(LENGTH))
        for position in order:
            log_p += float(table[tuple(z)][position].log_softmax(-1)[x_0[position]])
            z[position] = x_0[position]
        terms.append(log_p)
    return float(torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_weighted_loss_integrates_to_the_any_order_bound_and_bounds_the_likelihood(name):
    table, x_0, schedule = toy_logits(0), (0, 2, 1), get_schedule(name)
    # Exact expectation over the 2**3 masks at each t, then Gauss-Legendre quadrature over alpha, which removes the
    # weight's pole.
    nodes, weights = (torch.from_numpy(a) for a in __import__("numpy").polynomial.legendre.leggauss(40))
    alphas, bound = (nodes + 1) / 2, 0.0
    for alpha, weight in zip(alphas, weights / 2, strict=True):
        t = time_of(schedule, alpha)
        factor = float(schedule.loss_weight(t) / -schedule.dalpha(t))  # dt = dalpha / alpha'
        for pattern in itertools.product([False, True], repeat=LENGTH):
            n = sum(pattern)
            z = tuple(MASK if m else x for m, x in zip(pattern, x_0, strict=True))
            rows = table[z][torch.tensor(pattern)]
            if n:
                ce = masked_cross_entropy(rows, torch.tensor(x_0)[torch.tensor(pattern)]).sum()
                bound += float(weight) * float((1 - alpha) ** n * alpha ** (LENGTH - n)) * factor * float(ce)
    assert bound == pytest.approx(any_order_bound(table, x_0), rel=1e-5)
    assert bound >= -likelihood(table, x_0)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_monte_carlo_loss_converges_to_the_bound(antithetic):
    table, x_0, n = toy_logits(1), torch.tensor([2, 0, 1]), 40000
    rows, schedule = torch.arange(n), get_schedule("linear")
    x, maskable = x_0.expand(n, 3), torch.ones(n, 3, dtype=torch.bool)
    t = draw_time(1, rows, time_epsilon=1e-3, antithetic=antithetic, group_size=64)
    noised = mask_tokens(x, maskable, t, schedule, seed=1, sample_index=rows, mask_id=MASK)
    logits = table[noised.z_t[:, 0], noised.z_t[:, 1], noised.z_t[:, 2]]
    ce = masked_cross_entropy(logits[noised.is_masked], x[noised.is_masked])
    weight = token_weight(t, maskable, schedule, "elbo", "tokens")[noised.is_masked]
    per_row = torch.zeros(n).index_add_(0, noised.is_masked.nonzero()[:, 0], weight * ce)
    exact = any_order_bound(table, x_0.tolist())
    assert abs(float(per_row.mean()) - exact) < 4.5 * float(per_row.std()) / n**0.5 + 2e-3 * exact


def test_cross_entropy_against_its_definition_and_in_half_precision():
    logits, x_0 = torch.randn(5, 7, dtype=torch.bfloat16), torch.tensor([0, 6, 3, 3, 1])
    expected = [float(torch.logsumexp(r.double(), 0) - r.double()[i]) for r, i in zip(logits, x_0, strict=True)]
    out = masked_cross_entropy(logits, x_0)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="vocab"):
        masked_cross_entropy(logits, x_0[:3])


def test_weights_and_denominators_by_hand():
    t, schedule = torch.tensor([0.5, 0.25]), get_schedule("linear")
    maskable = torch.tensor([[True, True, False, False], [True, True, True, True]])
    is_masked = torch.tensor([[True, False, False, False], [True, True, False, True]])
    assert row_weight(t, schedule, "elbo").tolist() == [2.0, 4.0]
    assert row_weight(t, schedule, "uniform").tolist() == [1.0, 1.0]
    for norm, weights, below in [("tokens", [2.0, 4.0], 6), ("masked", [2.0, 4.0], 4), ("sequence", [1.0, 1.0], 2)]:
        assert token_weight(t, maskable, schedule, "elbo", norm)[:, 0].tolist() == weights
        assert int(denominator(is_masked, maskable, norm)) == below
    nothing = torch.zeros_like(maskable)
    assert all(int(denominator(nothing, nothing, norm)) == 0 for norm in ("tokens", "masked", "sequence"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_cross_entropy_and_its_gradient_equal_pytorchs(monkeypatch, dtype, rows_at_once):
    monkeypatch.setattr(objectives, "_ELEMENTS_AT_ONCE", {"cpu": rows_at_once * 11})
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(7, 11, generator=generator) * 20).to(dtype)
    x_0 = torch.randint(0, 11, (7,), generator=generator)
    weight = torch.rand(7, generator=generator)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    nll = objectives.masked_cross_entropy(ours, x_0)
    expected = torch.nn.functional.cross_entropy(theirs.float(), x_0, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    (nll * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours.detach(), values)  # the caller's logits are left alone
