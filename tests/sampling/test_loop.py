import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, get_strategy, sample
from llamafactory_ddm.sampling.strategies import RandomOrder, register

V, MASK = 12, 11
NAMES = sorted(STRATEGIES)


def toy(z, select):
    """Logits that depend on the whole row, and like [MASK] best, which must never be drawn."""
    value = (z * (torch.arange(z.shape[1]) + 3)).sum(dim=1, keepdim=True) % 7
    table = torch.sin(
        value[..., None] + torch.arange(z.shape[1])[None, :, None] + torch.arange(V)[None, None, :] * 1.7
    )
    table[..., MASK] = 50.0
    return table[select]


def run(x, editable, *, denoiser=toy, steps=5, name="random", config=None, seed=0, rows=None, **rest):
    return sample(
        denoiser,
        x,
        editable=editable,
        mask_id=MASK,
        steps=steps,
        strategy=get_strategy(name),
        logits=config or LogitsConfig(),
        seed=seed,
        rows=torch.arange(len(x)) if rows is None else rows,
        schedule=get_schedule("linear"),
        **rest,
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    steps=st.integers(1, 12),
    name=st.sampled_from(NAMES),
)
def test_prompts_never_change_and_no_mask_survives(seed, batch, length, steps, name):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, V, (batch, length), generator=generator)  # [MASK] may stand in a prompt
    editable = torch.rand(batch, length, generator=generator) < 0.6
    seen = torch.zeros_like(editable, dtype=torch.int64)

    def watch(step, z, fresh):
        seen.add_(fresh.long())
        assert torch.equal(z[~editable], x[~editable])

    output = run(x, editable, steps=steps, name=name, seed=seed, callback=watch)
    assert torch.equal(output.sequences[~editable], x[~editable])
    assert not (output.sequences[editable] == MASK).any()
    assert torch.equal(seen, editable.long())  # each position was committed exactly once
    assert torch.equal(output.committed >= 0, editable)
    assert output.committed.max() < steps
    assert output.forwards <= output.steps == steps


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    x = torch.randint(0, MASK, (6, 8), generator=torch.Generator().manual_seed(3))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = False
    together = run(x, editable, name=name, config=LogitsConfig(0.9, 0.8), seed=7).sequences
    for row in range(6):
        alone = run(
            x[row : row + 1], editable[:1], name=name, config=LogitsConfig(0.9, 0.8), seed=7, rows=torch.tensor([row])
        )
        assert torch.equal(alone.sequences[0], together[row])
    assert not torch.equal(
        run(x, editable, name=name, seed=8).sequences, run(x, editable, name=name, seed=7).sequences
    )


def test_ids_at_editable_positions_do_not_matter():
    editable = torch.tensor([[False, True, True, True]])
    one, two = (run(torch.tensor([[4, a, a, a]]), editable).sequences for a in (0, 9))
    assert torch.equal(one, two)


def test_nothing_to_edit_needs_no_forward():
    x = torch.tensor([[1, 2, MASK]])
    output = run(x, torch.zeros_like(x, dtype=torch.bool))
    assert output.forwards == 0
    assert torch.equal(output.sequences, x)


def test_greedy_in_one_step_is_the_argmax():
    x = torch.zeros(2, 5, dtype=torch.int64)
    editable = torch.ones_like(x, dtype=torch.bool)
    table = toy(torch.full_like(x, MASK), editable).reshape(2, 5, V)[..., :MASK]
    output = run(x, editable, steps=1, name="low_confidence", config=LogitsConfig(0.0))
    assert torch.equal(output.sequences, table.argmax(dim=-1))


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


def test_random_reveals_evenly_over_the_steps():
    x = torch.zeros(400, 10, dtype=torch.int64)
    committed = run(x, x == 0, steps=8).committed
    counts = torch.bincount(committed.flatten(), minlength=8)
    assert (counts - 500).abs().max() < 5 * math.sqrt(500)


JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.01, 0.04, 0.25]])


def exact(z, select):
    """The true conditionals of JOINT, over three values and [MASK] (id 11)."""
    logits = torch.full((*z.shape, V), -torch.inf)
    for row, (a, b) in enumerate(z.tolist()):
        first = JOINT.sum(dim=1) if b == MASK else JOINT[:, b] / JOINT[:, b].sum()
        second = JOINT.sum(dim=0) if a == MASK else JOINT[a] / JOINT[a].sum()
        logits[row, 0, :3], logits[row, 1, :3] = first.log(), second.log()
    return logits[select]


def test_one_token_at_a_time_with_true_conditionals_gives_the_joint():
    n = 4000
    x = torch.zeros(n, 2, dtype=torch.int64)
    output = run(x, x == 0, denoiser=exact, steps=2, name="low_confidence")
    # Which position goes first depends on the draw itself, which biases the joint; a fixed order does not.
    assert output.forwards == 2
    fixed = sample(
        exact,
        x,
        editable=x == 0,
        mask_id=MASK,
        steps=2,
        strategy=LeftToRight(),
        logits=LogitsConfig(),
        seed=1,
        rows=torch.arange(n),
        schedule=get_schedule("linear"),
    ).sequences
    for a, b in itertools.product(range(3), repeat=2):
        share = ((fixed[:, 0] == a) & (fixed[:, 1] == b)).float().mean().item()
        p = JOINT[a, b].item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n), (a, b)


class LeftToRight:
    """The first masked position of each row."""

    name = "left_to_right"

    def candidates(self, is_masked, step, plan):
        return is_masked & (is_masked.cumsum(dim=1) == 1)

    def commit(self, candidate, confidence, step, plan):
        return candidate


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"rows": torch.arange(3)}, "rows"),
        ({"editable": torch.ones(1, 4)}, "bool"),
        ({"editable": torch.ones(1, 3, dtype=torch.bool)}, "editable"),
    ],
)
def test_wrong_arguments(change, words):
    x = torch.zeros(1, 4, dtype=torch.int64)
    editable = change.pop("editable", x == 0)
    with pytest.raises(ValueError, match=words):
        run(x, editable, **change)


def test_unknown_and_taken_strategies():
    with pytest.raises(ValueError, match="did you mean 'low_confidence'"):
        get_strategy("low-confidence")
    with pytest.raises(ValueError, match="exists already"):
        register(RandomOrder())
