"""Which positions the strategies commit, and the registry that holds them."""

import math

import pytest
import torch
from toy_sampling import MASK, LeftToRight, V, run, toy

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, get_strategy
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


def test_random_needs_logits_only_where_it_commits():
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
    """Filters leave one token of probability 1 at each position; the order is that of the model's probabilities."""

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
    with pytest.raises(ValueError, match="'left_to_right' left 1 positions"):
        run(x, x == 0, steps=2, strategy=LeftToRight())


def test_a_strategy_cannot_change_what_is_not_masked():
    class Greedy(LeftToRight):
        def candidates(self, view):
            return torch.ones_like(view.is_masked)

        def commit(self, view, candidate, score):
            return torch.ones_like(candidate)

    x, editable = torch.tensor([[1, MASK, 3]]), torch.tensor([[False, False, True]])
    output = run(x, editable, strategy=Greedy(), steps=3)
    assert output.sequences[0, :2].tolist() == [1, MASK]
    assert output.committed.tolist() == [[-1, -1, 0]]


def test_unknown_and_taken_strategies():
    with pytest.raises(ValueError, match=r"denoising_strategy .*'low_confidence'"):
        get_strategy("low-confidence")
    with pytest.raises(ValueError, match="denoising_strategy 'random'"):
        STRATEGIES.register(RandomOrder)


def test_parameters_of_a_strategy():
    assert get_strategy("entropy_bound", entropy_bound=0.5).entropy_bound == 0.5
    with pytest.raises(ValueError, match=r"strategy_args.*'entropy_bond'.*'entropy_bound'"):
        get_strategy("entropy_bound", entropy_bond=0.5)
    with pytest.raises(ValueError, match=r"strategy_args.*'measure'"):
        get_strategy("margin", measure="entropy")


def test_a_step_without_budget_needs_no_logits():
    """Cosine, four tokens in nine steps: five steps have nothing to commit."""
    x = torch.zeros(1, 4, dtype=torch.int64)
    schedule = get_schedule("cosine")
    budget = schedule.transfer_budget(torch.tensor([4]), 9)[0]
    output = run(x, x == 0, steps=9, name="entropy", schedule=schedule)
    assert output.nfe == int((budget > 0).sum()) < 9


def certain(probabilities):
    """A denoiser that gives token 2 the stated probability at each position, and other tokens equal ones."""

    def denoiser(z, select):
        p = torch.tensor(probabilities, dtype=torch.float64)[None, :, None].expand(len(z), -1, V).clone()
        p = (1 - p) / (MASK - 1)
        p[..., 2] = torch.tensor(probabilities, dtype=torch.float64)
        return p.log().float()[select]

    return denoiser


def committed(probabilities, *, editable=None, **options):
    x = torch.zeros(1, len(probabilities), dtype=torch.int64)
    editable = x == 0 if editable is None else editable
    return run(x, editable, denoiser=certain(probabilities), config=LogitsConfig(0.0), **options)


def test_confidence_threshold_by_hand():
    """All tokens that reach 0.9 at once; then one at a time, the most probable first."""
    output = committed([0.95, 0.5, 0.91, 0.7, 0.3], steps=10, name="confidence_threshold")
    assert output.committed.tolist() == [[0, 2, 0, 1, 3]]
    assert (output.steps, output.nfe) == (4, 4)
    loose = committed([0.95, 0.5, 0.91, 0.7, 0.3], steps=10, name="confidence_threshold", confidence_threshold=0.499)
    assert loose.committed.tolist() == [[0, 0, 0, 0, 1]]


def test_a_threshold_finishes_within_the_steps():
    output = committed([0.2, 0.3, 0.4, 0.5, 0.6, 0.7], steps=3, name="confidence_threshold")
    assert output.committed.tolist() == [[2, 2, 1, 1, 0, 0]]


def entropy_of(p):
    rest = (1 - p) / (MASK - 1)
    return -p * math.log(p) - (MASK - 1) * rest * math.log(rest)


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 2.5, 50.0])
def test_entropy_bound_by_hand(bound):
    """Of the positions in order of entropy the longest run in which all but the last stay within the bound."""
    p = [0.97, 0.6, 0.9, 0.75, 0.4]
    expected, left = [-1] * 5, list(range(5))
    for step in range(5):
        order = sorted(left, key=lambda i: entropy_of(p[i]))
        chosen = [i for n, i in enumerate(order) if sum(entropy_of(p[j]) for j in order[:n]) <= bound + 1e-9]
        for i in chosen:
            expected[i] = step
        left = [i for i in left if i not in chosen]
        if not left:
            break
    assert committed(p, steps=9, name="entropy_bound", entropy_bound=bound).committed.tolist() == [expected]


@pytest.mark.parametrize("name", ["margin", "entropy"])
def test_margin_and_entropy_go_by_their_own_order(name):
    """Position 0 has the larger top probability, position 1 the larger margin, position 2 the smallest entropy."""
    p = torch.full((3, V), 1e-9, dtype=torch.float64)
    p[0, :2] = torch.tensor([0.52, 0.48])
    p[1, :11] = torch.tensor([0.45, *[0.055] * 10])
    p[2, :3] = torch.tensor([0.50, 0.495, 0.005])
    margins = [sorted(row)[-1] - sorted(row)[-2] for row in p[:, :MASK].tolist()]
    entropies = [-sum(q * math.log(q) for q in row) for row in p[:, :MASK].tolist()]
    keys = margins if name == "margin" else [-e for e in entropies]
    order = sorted(range(3), key=lambda i: -keys[i])
    x = torch.zeros(1, 3, dtype=torch.int64)
    output = run(
        x,
        x == 0,
        denoiser=lambda z, select: p.log().float()[None][select],
        steps=3,
        name=name,
        config=LogitsConfig(0.0),
    )
    assert [order.index(i) for i in range(3)] == output.committed[0].tolist()


def published_topk(n, steps, scores_at):
    """DiffuLLaMA's decoding on one row, written out: `scores_at(step)` gives the score of each maskable position."""
    is_masked, when = [True] * n, [None] * n
    for step, t in enumerate(range(steps - 1, -1, -1)):
        scores = scores_at(step)
        k = int(torch.tensor(n * t, dtype=torch.float32) / steps)
        cutoff = sorted(scores)[k] if k < n else math.inf
        for i in range(n):
            if is_masked[i] and not scores[i] < cutoff:
                is_masked[i], when[i] = False, step
    return when


@pytest.mark.parametrize(("n", "steps"), [(7, 3), (10, 10), (5, 1), (9, 4), (12, 5)])
def test_topk_follows_the_published_decoding(n, steps):
    """Scores that change from step to step, so that decoded positions are among the k lowest."""
    table = torch.rand(steps, n, generator=torch.Generator().manual_seed(n * steps)).double() * 0.8 + 0.1
    calls = []

    def denoiser(z, select):
        assert bool(select[0, 1:].all()) and not bool(select[0, 0])  # decided ones are scored too
        logits = torch.full((1, n + 1, V), -torch.inf, dtype=torch.float64)
        p = torch.cat([torch.ones(1, dtype=torch.float64), table[len(calls)]])
        logits[0, :, 2], logits[0, :, 3] = p.log(), (1 - p).log()
        calls.append(1)
        return logits.float()[select]

    x = torch.zeros(1, n + 1, dtype=torch.int64)
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = False
    output = run(x, editable, denoiser=denoiser, steps=steps, name="topk", config=LogitsConfig(0.0))
    scores = torch.maximum(table, 1 - table)
    assert output.committed[0, 1:].tolist() == published_topk(n, steps, lambda step: scores[step].tolist())


def test_topk_commits_ties_together():
    output = committed([0.5] * 6, steps=3, name="topk")
    assert output.committed.tolist() == [[0] * 6]  # none lies strictly below the cutoff


@pytest.mark.parametrize("name", ["topk", "low_confidence"])
def test_another_schedule_gives_its_own_pace(name):
    """Cosine: alpha(3/4), alpha(1/2), alpha(1/4) of 100 tokens are revealed after three of four steps."""
    p = torch.linspace(0.3, 0.9, 100).tolist()
    output = committed(p, steps=4, name=name, schedule=get_schedule("cosine"))
    done = [sum(c <= step for c in output.committed[0].tolist()) for step in range(4)]
    expected = [100 * (1 - math.cos(math.pi / 2 * (1 - t))) for t in (0.75, 0.5, 0.25, 0.0)]
    assert done == pytest.approx(expected, abs=1)


def test_a_strategy_gets_only_the_measures_that_it_names():
    class Curious(LeftToRight):
        def commit(self, view, candidate, score):
            return score("entropy") > 0

    x = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="'entropy'"):
        run(x, x == 0, strategy=Curious())
