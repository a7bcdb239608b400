"""Budgets and reveal probabilities against their laws and values worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.schedules import SCHEDULES, get_schedule
from llamafactory_ddm.sampling.budget import reveal_probability


@given(
    n=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    steps=st.integers(1, 80),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_budgets_sum_to_the_number_of_masked_tokens(n, steps, name):
    budget = get_schedule(name).transfer_budget(torch.tensor(n), steps)
    assert budget.shape == (len(n), steps)
    assert budget.sum(dim=1).tolist() == n
    assert (budget >= 0).all()


@given(n=st.integers(0, 300), steps=st.integers(1, 80))
def test_linear_budgets_are_even_with_the_larger_shares_first(n, steps):
    budget = get_schedule("linear").transfer_budget(torch.tensor([n]), steps)[0].tolist()
    assert budget == sorted(budget, reverse=True)
    assert budget[0] - budget[-1] <= 1


def test_a_linear_budget_by_hand():
    budget = get_schedule("linear").transfer_budget(torch.tensor([10, 3, 0]), 4)
    assert budget.tolist() == [[3, 3, 2, 2], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert budget.dtype == torch.int64


def test_a_cosine_budget_by_hand():
    # alpha(0.5) = 1 - cos(pi/4) = 0.2929
    assert get_schedule("cosine").transfer_budget(torch.tensor([10]), 2).tolist() == [[3, 7]]


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_linear_reveal_is_one_over_the_steps_left(steps):
    for step in range(steps):
        assert reveal_probability(step, steps, get_schedule("linear")) == pytest.approx(1 / (steps - step))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_reveal_probabilities_leave_the_fraction_of_the_schedule(name):
    """The product of (1 - reveal) over the first steps is the share still masked, 1 - alpha."""
    schedule, left = get_schedule(name), 1.0
    for step in range(9):
        left *= 1 - reveal_probability(step, 10, schedule)
        expected = 1 - schedule.alpha(torch.tensor(1 - (step + 1) / 10, dtype=torch.float64)).item()
        assert left == pytest.approx(expected)


def test_steps_out_of_range():
    with pytest.raises(ValueError, match="step "):
        reveal_probability(4, 4, get_schedule("linear"))
    with pytest.raises(ValueError, match="steps "):
        get_schedule("linear").transfer_budget(torch.tensor([3]), 0)
