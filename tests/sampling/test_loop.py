"""The laws of the denoising loop on random input, and its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sampling import MASK, NAMES, V, by_selection, run, toy

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling import LogitsConfig, denoising_step, get_strategy, start


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
    if name != "remdm":
        assert torch.equal(seen, editable.long())  # each position was committed exactly once
    assert torch.equal(output.committed >= 0, editable)
    assert output.committed.max() < steps
    assert output.nfe <= output.steps <= steps
    assert output.tokens_per_step.sum() == editable.sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    x = torch.randint(0, MASK, (6, 8), generator=torch.Generator().manual_seed(3))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = False
    together = run(x, editable, name=name, config=LogitsConfig(0.9, 0.8), seed=7).sequences
    for row in range(6):
        alone = run(
            x[row : row + 1],
            editable[:1],
            name=name,
            config=LogitsConfig(0.9, 0.8),
            seed=7,
            sample_index=torch.tensor([row]),
        )
        assert torch.equal(alone.sequences[0], together[row])
    assert not torch.equal(
        run(x, editable, name=name, seed=8).sequences, run(x, editable, name=name, seed=7).sequences
    )


def test_ids_at_editable_positions_do_not_matter():
    editable = torch.tensor([[False, True, True, True]])
    one, two = (run(torch.tensor([[4, a, a, a]]), editable).sequences for a in (0, 9))
    assert torch.equal(one, two)


def test_nothing_to_generate_needs_no_forward_pass():
    x = torch.tensor([[1, 2, MASK]])
    output = run(x, torch.zeros_like(x, dtype=torch.bool))
    assert output.nfe == 0
    assert torch.equal(output.sequences, x)


def test_greedy_in_one_step_is_the_argmax():
    x = torch.zeros(2, 5, dtype=torch.int64)
    editable = torch.ones_like(x, dtype=torch.bool)
    table = toy(torch.full_like(x, MASK), editable).reshape(2, 5, V)[..., :MASK]
    output = run(x, editable, steps=1, name="low_confidence", config=LogitsConfig(0.0))
    assert torch.equal(output.sequences, table.argmax(dim=-1))


@pytest.mark.parametrize("name", ["random", "low_confidence", "margin", "entropy"])
def test_steps_that_select_nothing_need_no_forward_pass(name):
    calls = []

    def counting(z, select):
        assert bool(select.any())
        calls.append(1)
        return toy(z, select)

    x = torch.zeros(1, 3, dtype=torch.int64)
    output = run(x, x == 0, denoiser=counting, steps=50, name=name)
    assert output.steps <= (50 if name == "random" else 3)
    assert output.nfe == len(calls) == len(output.committed.unique()) <= 3


def test_a_row_with_nothing_to_generate_does_not_change_other_rows():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    editable = torch.tensor([[False] * 3, [True] * 3])
    for name in NAMES:
        output = run(x, editable, name=name)
        assert output.sequences[0].tolist() == [1, 2, 3] and output.committed[0].tolist() == [-1] * 3
        alone = run(x[1:], editable[1:], name=name, sample_index=torch.tensor([1]))
        assert torch.equal(output.sequences[1:], alone.sequences)


@pytest.mark.parametrize("name", NAMES)
def test_denoising_steps_equal_sample_and_do_not_change_the_old_state(name):
    x = torch.randint(0, MASK, (3, 6), generator=torch.Generator().manual_seed(5))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[1, :4] = False
    given_x, given_editable = x.clone(), editable.clone()
    schedule, rows = get_schedule("linear"), torch.arange(3)
    state, plan = start(x, editable=editable, mask_id=MASK, steps=4, seed=9, sample_index=rows, schedule=schedule)
    trace = [(state, state.z.clone(), state.is_masked.clone(), state.committed.clone())]
    while not state.finished:
        state = denoising_step(by_selection(toy), state, plan, strategy=get_strategy(name), logits=LogitsConfig())
        trace.append((state, state.z.clone(), state.is_masked.clone(), state.committed.clone()))
    output = run(x, editable, name=name, steps=4, seed=9)
    assert torch.equal(state.z, output.sequences) and torch.equal(state.committed, output.committed)
    assert (state.step, state.nfe) == (output.steps, output.nfe)
    for old, z, is_masked, committed in trace:
        assert torch.equal(old.z, z) and torch.equal(old.is_masked, is_masked)
        assert torch.equal(old.committed, committed)
    assert torch.equal(x, given_x) and torch.equal(editable, given_editable)
    after = denoising_step(by_selection(toy), state, plan, strategy=get_strategy(name), logits=LogitsConfig())
    assert after.finished and after.step == state.step and torch.equal(after.z, state.z)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_fixed_positions_to_its_right(name):
    """Fixed positions to the right change neither the draws nor the order, if the model does not look at them."""

    def local(z, select):
        position = torch.arange(z.shape[1])[None, :, None]
        return torch.sin(position + torch.arange(V) * 1.7).expand(len(z), -1, -1)[select]

    x = torch.zeros(2, 6, dtype=torch.int64)
    short = run(x, x == 0, denoiser=local, name=name)
    wide = torch.zeros(2, 11, dtype=torch.int64)
    editable = torch.zeros_like(wide, dtype=torch.bool)
    editable[:, :6] = True
    assert torch.equal(run(wide, editable, denoiser=local, name=name).sequences[:, :6], short.sequences)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"sample_index": torch.arange(3)}, "sample_index"),
        ({"sample_index": torch.zeros(1)}, "sample_index"),
        ({"mask_id": -1}, "mask_id"),
        ({"x": torch.zeros(4, dtype=torch.int64)}, "x must be"),
        ({"x": torch.zeros(1, 0, dtype=torch.int64)}, "length at least 1"),
        ({"x": torch.zeros(1, 4)}, "int64"),
        ({"editable": torch.ones(1, 4)}, "bool"),
        ({"editable": torch.ones(1, 3, dtype=torch.bool)}, "editable"),
    ],
)
def test_wrong_arguments(change, words):
    arguments = {"x": torch.zeros(1, 4, dtype=torch.int64), **change}
    arguments.setdefault("editable", arguments["x"] == 0)
    with pytest.raises(ValueError, match=words):
        run(**arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("denoiser", "words"),
    [
        (lambda z, select: torch.full((int(select.sum()), V), math.nan), "NaN"),
        (
            lambda z, select: torch.full((int(select.sum()), V), -math.inf).index_fill(1, torch.tensor(MASK), 0.0),
            "NaN",
        ),
        (lambda z, select: torch.zeros(int(select.sum()) + 1, V), "vocab"),
        (lambda z, select: torch.zeros(*z.shape, V), "vocab"),
        (lambda z, select: [torch.zeros(1, V)] * 9, "vocab"),
    ],
)
def test_unusable_logits_are_an_error_and_never_a_text_with_masks(name, denoiser, words):
    x = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        run(x, x == 0, denoiser=denoiser, name=name)


def test_a_mask_token_outside_the_models_vocabulary_needs_no_suppression():
    x = torch.zeros(1, 4, dtype=torch.int64)
    output = run(x, x == 0, denoiser=lambda z, select: torch.zeros(int(select.sum()), 5), mask_id=MASK)
    assert bool((output.sequences < 5).all())


def test_no_gradients_are_kept():
    weight = torch.zeros(V, requires_grad=True)
    seen = []

    def learning(z, select):
        seen.append((weight * 2).requires_grad)
        return weight.expand(int(select.sum()), V)

    x = torch.zeros(1, 4, dtype=torch.int64)
    run(x, x == 0, denoiser=learning)
    assert seen and not any(seen)
