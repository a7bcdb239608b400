"""Which positions the strategies commit, and the registry that holds them."""

import pytest
import torch
from toy_sampling import MASK, LeftToRight, V, run, toy

from llamafactory_ddm.sampling import LogitsConfig, get_strategy, register
from llamafactory_ddm.sampling.strategies import RandomOrder


def test_low_confidence_commits_the_most_confident_first():
    sharpness = torch.tensor([0.5, 3.0, 1.0, 2.0, 4.0, 0.1])

    def denoiser(z, select):
        logits = torch.zeros(1, 6, V)
        logits[0, :, 2] = sharpness
        return logits[select]

    x = torch.zeros(1, 6, dtype=torch.int64)
    output = run(x, x == 0, denoiser=denoiser, steps=3, name="low_confidence", config=LogitsConfig(0.0))
    assert output.committed.tolist() == [[2, 0, 1, 1, 0, 2]]


def test_random_projects_only_what_it_commits():
    projected = []

    def counting(z, select):
        projected.append(int(select.sum()))
        return toy(z, select)

    x = torch.zeros(1, 50, dtype=torch.int64)
    run(x, x == 0, denoiser=counting, steps=10)
    assert sum(projected) == 50


def test_low_confidence_follows_the_budget_and_breaks_ties_by_position():
    def indifferent(z, select):
        return torch.zeros(int(select.sum()), V)

    x = torch.zeros(2, 5, dtype=torch.int64)
    editable = torch.tensor([[True] * 5, [False, True, False, True, True]])
    output = run(x, editable, denoiser=indifferent, steps=3, name="low_confidence", config=LogitsConfig(0.0))
    assert output.committed.tolist() == [[0, 0, 1, 1, 2], [-1, 0, -1, 1, 2]]


def test_low_confidence_ranks_by_the_models_own_confidence_under_greedy_filters():
    """After a filter to one token each would be certain; the order must still be that of the model."""

    def denoiser(z, select):
        table = torch.zeros(1, 3, V)
        table[0, :, 2] = torch.tensor([1.0, 3.0, 2.0])
        return table[select]

    x = torch.zeros(1, 3, dtype=torch.int64)
    for config in (LogitsConfig(0.0), LogitsConfig(1.0, 1.0, 1), LogitsConfig(1.0, 1e-6)):
        output = run(x, x == 0, denoiser=denoiser, steps=3, name="low_confidence", config=config)
        assert output.committed.tolist() == [[2, 0, 1]]


def test_a_strategy_that_leaves_positions_masked_is_an_error():
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'left_to_right' left 1 positions masked after 2 steps"):
        run(x, x == 0, steps=2, strategy=LeftToRight())


def test_a_strategy_cannot_change_what_is_not_masked():
    class Greedy(LeftToRight):
        def candidates(self, is_masked, step, plan):
            return torch.ones_like(is_masked)

        def commit(self, candidate, confidence, step, plan):
            return torch.ones_like(candidate)

    x, editable = torch.tensor([[1, MASK, 3]]), torch.tensor([[False, False, True]])
    output = run(x, editable, strategy=Greedy(), steps=3)
    assert output.sequences[0, :2].tolist() == [1, MASK]
    assert output.committed.tolist() == [[-1, -1, 0]]


def test_unknown_and_taken_strategies():
    with pytest.raises(ValueError, match="did you mean 'low_confidence'"):
        get_strategy("low-confidence")
    with pytest.raises(ValueError, match="exists already"):
        register(RandomOrder())
