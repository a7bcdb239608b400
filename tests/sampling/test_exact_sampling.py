"""What the sampler generates, and when, against exact enumeration and closed forms."""

import itertools
import math

import pytest
import torch
from toy_sampling import MASK, LeftToRight, V, run

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling.budget import reveal_probability


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_random_reveals_with_the_closed_form_probability(schedule):
    """Of the tokens still masked a step reveals a binomial number; with the linear schedule of chance 1 / (t + 1)."""
    x, steps = torch.zeros(800, 10, dtype=torch.int64), 8
    committed = run(x, x == 0, steps=steps, schedule=get_schedule(schedule)).committed
    left = committed.numel()
    for step in range(steps):
        revealed = int((committed == step).sum())
        chance = reveal_probability(step, steps, get_schedule(schedule))
        if schedule == "linear":
            countdown = steps - 1 - step
            assert chance == pytest.approx(1 / (countdown + 1))
        assert abs(revealed - left * chance) <= 4.5 * math.sqrt(left * chance * (1 - chance)) + 1e-9
        left -= revealed
    assert left == 0


def test_random_reveals_positions_independently():
    """Two positions of a row fall into the same of T linear steps with chance 1 / T."""
    x, steps, n = torch.zeros(4000, 2, dtype=torch.int64), 5, 4000
    committed = run(x, x == 0, steps=steps).committed
    same = float((committed[:, 0] == committed[:, 1]).float().mean())
    assert abs(same - 1 / steps) < 4.5 * math.sqrt(1 / steps * (1 - 1 / steps) / n)


JOINT_3 = torch.softmax(torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(12)), dim=0) / 4


def exact_3(z, select):
    """The true conditionals of JOINT_3: given the ids known, sum the joint over the ones that are not."""
    logits = torch.full((*z.shape, V), -torch.inf)
    for pattern in itertools.product([0, 1, MASK], repeat=3):
        table = JOINT_3
        for dim, value in enumerate(pattern):
            if value != MASK:
                table = table.index_select(dim, torch.tensor([value]))
        here = (z == torch.tensor(pattern)).all(dim=1)
        for position in range(3):
            if pattern[position] == MASK:
                marginal = table.sum(dim=[d for d in range(3) if d != position])
                logits[here, position, :2] = marginal.log()
    return logits[select]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_fixed_order_with_true_conditionals_gives_the_joint_over_three_tokens(order):
    class Fixed(LeftToRight):
        def candidates(self, view):
            return view.is_masked & (torch.arange(3) == torch.tensor(order)[view.step.clamp(max=2)][:, None])

    n = 3000
    x = torch.zeros(n, 3, dtype=torch.int64)
    got = run(x, x == 0, denoiser=exact_3, steps=3, strategy=Fixed(), seed=order[0] * 3 + order[1]).sequences
    counts = torch.bincount((got * torch.tensor([4, 2, 1])).sum(dim=1), minlength=8).double()
    expected = JOINT_3.flatten().double() * n
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.9  # chi-square, 7 degrees of freedom, p = 1e-4


JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.01, 0.04, 0.25]])


def exact(z, select):
    """The true conditionals of JOINT, over three values and [MASK]."""
    logits = torch.full((*z.shape, V), -torch.inf)
    by_row = torch.cat([JOINT, JOINT.sum(dim=0, keepdim=True)])  # entry 3: the first token is not known
    by_column = torch.cat([JOINT.T, JOINT.sum(dim=1)[None]])
    logits[:, 0, :3] = by_column[z[:, 1].clamp(max=3)].log()
    logits[:, 1, :3] = by_row[z[:, 0].clamp(max=3)].log()
    return logits[select]


def test_one_token_at_a_time_with_true_conditionals_gives_the_joint():
    n = 4000
    x = torch.zeros(n, 2, dtype=torch.int64)
    fixed = run(x, x == 0, denoiser=exact, steps=2, strategy=LeftToRight(), seed=1).sequences
    for a, b in itertools.product(range(3), repeat=2):
        share = ((fixed[:, 0] == a) & (fixed[:, 1] == b)).float().mean().item()
        p = JOINT[a, b].item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n), (a, b)


def test_many_random_steps_approach_the_joint_and_one_step_gives_the_marginals():
    n = 4000
    x = torch.zeros(n, 2, dtype=torch.int64)
    many = run(x, x == 0, denoiser=exact, steps=64).sequences
    once = run(x, x == 0, denoiser=exact, steps=1).sequences
    independent = JOINT.sum(dim=1)[:, None] * JOINT.sum(dim=0)[None, :]
    # Two tokens fall into the same of 64 steps with probability 1/64, and are then independent.
    for got, expected in ((many, JOINT * 63 / 64 + independent / 64), (once, independent)):
        table = torch.zeros(3, 3).index_put_((got[:, 0], got[:, 1]), torch.ones(n), accumulate=True) / n
        assert (table - expected).abs().max() < 4.5 * math.sqrt(0.25 / n)
