"""Blocks, prompts of different lengths, guidance, penalty and suppression in the loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sampling import MASK, NAMES, V, by_selection, ragged, relative, run

from llamafactory_ddm.sampling import Context, LogitsConfig, sample, start
from llamafactory_ddm.sampling.budget import (
    split_by_position,
    split_into_blocks,
    steps_of_blocks,
    steps_of_each_block,
)
from llamafactory_ddm.sampling.strategies import get_strategy

GREEDY = LogitsConfig(0.0)


@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=40),
    block_length=st.none() | st.integers(1, 12),
    extra=st.integers(0, 9),
)
def test_blocks_count_editable_positions_and_divide_steps_evenly(flags, block_length, extra):
    editable = torch.tensor([flags])
    block = split_into_blocks(editable, block_length)
    positions = [i for i, flag in enumerate(flags) if flag]
    expected = {position: n // (block_length or len(flags)) for n, position in enumerate(positions)}
    assert block[0].tolist() == [expected.get(i, -1) for i in range(len(flags))]
    n_blocks = max(expected.values(), default=-1) + 1
    steps = n_blocks + extra
    shares = steps_of_blocks(block, steps)[0].tolist()
    if n_blocks:
        assert sum(shares) == steps and len(shares) == n_blocks
        assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


def test_steps_of_rows_with_different_numbers_of_blocks():
    block = torch.tensor([[0, 0, 1, 1, 2], [-1, 0, 0, 1, -1], [-1] * 5])
    assert steps_of_blocks(block, 7).tolist() == [[3, 2, 2], [4, 3, 0], [0, 0, 0]]


def test_more_blocks_than_steps_is_an_error():
    x = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"diffusion_steps: 4 .*5 blocks.*block_length"):
        run(x, x == 0, steps=4, block_length=2)
    with pytest.raises(ValueError, match="block_length"):
        run(x, x == 0, steps=4, block_length=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 50])
def test_a_block_is_finished_before_the_next_begins(name, block_length):
    x = torch.zeros(3, 10, dtype=torch.int64)
    editable = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.7
    output = run(x, editable, steps=11, name=name, block_length=block_length)
    block = split_into_blocks(editable, block_length)
    for row in range(3):
        ends = [output.committed[row][block[row] == b] for b in range(int(block[row].max()) + 1)]
        for earlier, later in itertools.pairwise(ends):
            assert earlier.max() < later.min()


def test_budgets_of_blocks_by_hand():
    """Ten tokens in blocks of four, eight steps: three, three and two steps for 4, 4 and 2 tokens."""
    x = torch.zeros(1, 10, dtype=torch.int64)
    output = run(x, x == 0, denoiser=lambda z, s: torch.zeros(int(s.sum()), V), steps=8, name="margin", block_length=4)
    assert output.tokens_per_step.tolist() == [2, 1, 1, 2, 1, 1, 1, 1]
    assert output.committed[0].tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(NAMES), block_length=st.none() | st.integers(1, 5))
def test_rows_of_different_lengths_equal_each_row_alone(seed, name, block_length):
    """Left padding and editable positions anywhere; greedy and sampled."""
    x, editable, parts = ragged(seed, 0.6)
    for config in (GREEDY, LogitsConfig(0.9, 0.8)):
        options = {"denoiser": relative, "name": name, "steps": 12, "block_length": block_length, "config": config}
        together = run(x, editable, **options)
        for row, own in enumerate(parts):
            alone = run(
                x[row : row + 1, own], editable[row : row + 1, own], sample_index=torch.tensor([row]), **options
            )
            assert torch.equal(alone.sequences[0], together.sequences[row, own])
            assert torch.equal(alone.committed[0], together.committed[row, own])
            assert alone.sample_nfe[0] == together.sample_nfe[row] == alone.nfe


def test_kept_masked_truncates_in_float32():
    assert get_linear().kept_masked(torch.tensor([10]), torch.tensor([2]), torch.tensor([3])).tolist() == [6]
    n = torch.arange(1, 500)
    for steps in (3, 7, 30):
        for left in range(steps):
            expected = [int(torch.tensor(int(i) * left, dtype=torch.float32) / steps) for i in n]
            got = get_linear().kept_masked(n, torch.full_like(n, left), torch.full_like(n, steps))
            assert got.tolist() == expected


def get_linear():
    from llamafactory_ddm.diffusion.schedules import get_schedule

    return get_schedule("linear")


def test_guidance_sees_the_prompt_masked_and_follows_the_formula():
    """One step, greedy: the argmax of unconditional + w (conditional - unconditional)."""
    tables, calls = {}, []

    def denoiser(z, select):
        calls.append(1)
        generator = torch.Generator().manual_seed(int((z[0] * torch.tensor([1, 3, 5, 7])).sum()))
        tables[tuple(z[0].tolist())] = table = torch.randn(1, 4, V, generator=generator)
        return table[select]

    x = torch.tensor([[7, 4, 0, 0]])
    editable = torch.tensor([[False, False, True, True]])
    prompt = torch.tensor([[False, True, False, False]])  # the first token is the start token
    output = run(
        x,
        editable,
        denoiser=denoiser,
        steps=1,
        name="low_confidence",
        config=LogitsConfig(0.0, guidance_scale=2.5),
        context=Context(prompt=prompt),
    )
    conditional, unconditional = tables[7, 4, MASK, MASK], tables[7, MASK, MASK, MASK]
    expected = (unconditional + 2.5 * (conditional - unconditional))[0, 2:, :MASK].argmax(dim=1)
    assert output.sequences[0, 2:].tolist() == expected.tolist()
    assert (len(calls), output.nfe, output.sample_nfe.tolist()) == (2, 2, [2])
    with pytest.raises(ValueError, match="guidance_scale"):  # one row of two has none
        two, none = x.expand(2, 4), torch.stack([prompt[0], prompt[0] & False])
        run(two, editable.expand(2, 4), config=LogitsConfig(guidance_scale=2.0), context=Context(prompt=none))
    with pytest.raises(ValueError, match=r"guidance_scale: 2.0"):
        run(x, editable, config=LogitsConfig(guidance_scale=2.0))


def test_guided_logits_come_in_matching_parts():
    x = torch.tensor([[3, 0, 0, 0, 0]])
    editable = x == 0
    options = {
        "editable": editable,
        "mask_id": MASK,
        "steps": 2,
        "strategy": get_strategy("entropy"),
        "logits": LogitsConfig(0.7, guidance_scale=1.5),
        "context": Context(prompt=~editable),
    }

    def whole(z, select):
        return torch.sin(z.sum() + torch.arange(5)[:, None] * 3.1 + torch.arange(V) * 1.3)[None][select]

    def in_parts(z, position):
        yield from by_selection(whole)(z, position).split(2)

    one, two = (sample(d, x, **options) for d in (by_selection(whole), in_parts))
    assert torch.equal(one.sequences, two.sequences)


def test_the_penalty_counts_text_tokens_of_the_same_row_only():
    """Token 2 is best, then 4. Row 0 holds a 2; row 1 has one as padding; a [MASK] is no token."""

    def denoiser(z, select):
        logits = torch.zeros(2, 4, V)
        logits[..., 2], logits[..., 4] = 3.0, 2.0
        return logits[select]

    x = torch.tensor([[2, 7, 0, 0], [2, 7, 0, 0]])
    editable = torch.tensor([[False, False, True, True]] * 2)
    is_padding = torch.tensor([[False] * 4, [True, False, False, False]])
    output = run(
        x,
        editable,
        denoiser=denoiser,
        steps=2,
        name="low_confidence",
        config=LogitsConfig(0.0, repetition_penalty=4.0),
        context=Context(no_text=is_padding),
    )
    # Once written, 4 is penalised as well, and 2 with 0.75 is ahead again.
    assert output.sequences[:, 2:].tolist() == [[4, 2], [2, 4]]


def test_a_decoded_position_is_not_its_own_repetition():
    """topk scores it again; its own token must not lower its score."""
    scores = {}

    def denoiser(z, select):
        logits = torch.zeros(1, 2, V)
        logits[..., 2] = 4.0
        return logits[select]

    plain = get_strategy("topk")

    class Watching:
        name, measures, candidates = "watching", plain.measures, plain.candidates

        def commit(self, view, candidate, score):
            scores[int(view.step[0])] = score("log_prob")[0].tolist()
            return view.is_masked & (torch.arange(2) == view.step[:, None])

    x = torch.zeros(1, 2, dtype=torch.int64)
    run(x, x == 0, denoiser=denoiser, steps=2, strategy=Watching(), config=LogitsConfig(0.0, repetition_penalty=2.0))
    assert scores[1][0] == pytest.approx(scores[0][0])  # position 0 holds the only 2
    assert scores[1][1] < scores[0][1]


def test_suppressed_tokens_are_never_generated():
    x = torch.zeros(4, 8, dtype=torch.int64)
    output = run(x, x == 0, config=LogitsConfig(3.0, suppress=tuple(range(9))))
    assert set(output.sequences.flatten().tolist()) <= {9, 10}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "confidence_threshold", "confidence_threshold": 0.0}, "confidence_threshold"),
        ({"name": "confidence_threshold", "confidence_threshold": 1.5}, "confidence_threshold"),
        ({"name": "entropy_bound", "entropy_bound": -0.1}, "entropy_bound"),
        ({"name": "entropy_bound", "entropy_bound": float("nan")}, "entropy_bound"),
        ({"context": Context(no_text=torch.zeros(1, 3))}, "no_text"),
        ({"context": Context(prompt=torch.zeros(2, 2, dtype=torch.bool))}, "prompt"),
    ],
)
def test_wrong_arguments(change, words):
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        run(x, x == 0, **change)


def test_defaults_are_enough_to_sample_and_to_step_by_hand():
    x = torch.zeros(2, 3, dtype=torch.int64)
    options = {"editable": x == 0, "mask_id": MASK, "steps": 3}
    denoiser = by_selection(relative)
    assert not (sample(denoiser, x, strategy=get_strategy("random"), **options).sequences == MASK).any()
    state, plan = start(x, **options)
    assert plan.block_steps.tolist() == [[3], [3]] and bool(state.is_masked.all())


def by_hand(flags, positions, block_length, *, shift):
    """The blocks of one row, numbered as they are met; with shift a block's first token is one of its own."""
    numbers, result = {}, []
    for flag, position in zip(flags, positions, strict=True):
        if not flag:
            result.append(-1)
            continue
        place = (position // block_length, shift and position % block_length > 0)
        result.append(numbers.setdefault(place, len(numbers)))
    return result


@given(
    n_padding=st.integers(0, 9),
    flags=st.lists(st.booleans(), min_size=1, max_size=30),
    block_length=st.integers(1, 9),
    shift=st.booleans(),
    steps=st.integers(1, 6),
)
def test_blocks_by_position(n_padding, flags, block_length, shift, steps):
    flags = [False] * n_padding + flags
    positions = [max(0, column - n_padding) for column in range(len(flags))]
    block = split_by_position(torch.tensor([flags]), torch.tensor([positions]), block_length, shift=shift)
    expected = by_hand(flags, positions, block_length, shift=shift)
    assert block[0].tolist() == expected
    sizes = [expected.count(number) for number in range(max(expected) + 1)]
    assert steps_of_each_block(block, steps)[0].tolist() == ([1 if n == 1 else steps for n in sizes] or [0])


def test_a_row_takes_its_steps_in_each_block_by_position():
    """A prompt of 3 tokens, blocks of 4 with shift: blocks of 1, 1, 3, 1 and 2 tokens, two steps for 3 and 2."""
    x = torch.zeros(1, 10, dtype=torch.int64)
    position = torch.arange(10)[None]
    block = split_by_position(position >= 3, position, 4, shift=True)
    output = run(
        x, position >= 3, denoiser=lambda z, s: torch.zeros(int(s.sum()), V), steps=2, name="margin", block=block
    )
    assert block[0].tolist() == [-1, -1, -1, 0, 1, 2, 2, 2, 3, 4]
    assert output.tokens_per_step.tolist() == [1, 1, 2, 1, 1, 1]
    assert output.committed[0].tolist() == [-1, -1, -1, 0, 1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("name", NAMES)
def test_draws_do_not_depend_on_the_first_tokens_of_other_rows(name):
    """Rows whose blocks begin at other columns alternate otherwise between first tokens and the rest."""
    x = torch.zeros(3, 14, dtype=torch.int64)
    n_padding = torch.tensor([[0], [3], [5]])
    position = (torch.arange(14) - n_padding).clamp(min=0)
    editable = position >= torch.tensor([[2], [1], [4]])
    block = split_by_position(editable, position, 4, shift=True)
    options = {"denoiser": relative, "name": name, "steps": 3, "config": LogitsConfig(0.9, 0.8)}
    together = run(x, editable, block=block, **options)
    for row in range(3):
        part = slice(int(n_padding[row]), None)
        alone = run(
            x[row : row + 1, part],
            editable[row : row + 1, part],
            block=block[row : row + 1, part],
            sample_index=torch.tensor([row]),
            **options,
        )
        assert torch.equal(alone.sequences[0], together.sequences[row, part])


class Told:
    """A caching denoiser that notes what it is told in each step, and says that it computes 5 tokens of each row."""

    def __init__(self):
        self.steps, self.now = [], []

    def questions(self, z, asked, scope, branch=0):
        return torch.stack([asked.sum(dim=1), scope.sum(dim=1)], dim=1)

    def step(self, scope, branch=0, answers=None):
        assert [n for _, n in answers] == scope.sum(dim=1).tolist()

        def logits(z, position):
            self.now.append((branch, scope, z))
            return torch.zeros(len(position), V)

        return logits

    def take_computed(self):
        self.steps.append(self.now)
        self.now = []
        return torch.full((len(self.steps[-1][0][2]),), 5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_caching_denoiser_is_told_the_block_of_each_row(scale):
    x, editable = torch.ones(2, 8, dtype=torch.int64), torch.arange(8).expand(2, -1) >= 2
    denoiser = Told()
    output = sample(
        denoiser,
        x,
        editable=editable,
        mask_id=MASK,
        steps=6,
        block_length=3,
        strategy=get_strategy("low_confidence"),
        logits=LogitsConfig(0.0, guidance_scale=scale),
        context=Context(prompt=~editable),
    )
    block = split_into_blocks(editable, 3)
    assert len(denoiser.steps) == 6 and output.sample_computed.tolist() == [30, 30]
    for number, step in enumerate(denoiser.steps):
        assert [branch for branch, _, _ in step] == [0, 1][: int(scale)]
        for branch, scope, z in step:
            assert torch.equal(scope, block == number // 3)
            assert bool((z[~editable] == (MASK if branch else 1)).all())
