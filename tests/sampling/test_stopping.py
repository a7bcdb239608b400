"""Stopping at the end of a text: the same text, for less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample

MASK, END, PAD, VOCAB = 7, 0, 1, 8
NAMES = ["random", "topk", "low_confidence", "margin", "entropy", "confidence_threshold", "entropy_bound"]


class Scripted:
    """A model whose logits depend on the position and on the decoded tokens; it records its inputs."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(length, VOCAB, generator=generator) * 2
        self.mix = torch.randn(VOCAB, VOCAB, generator=generator)
        self.calls = []

    def __call__(self, z, position):
        self.calls.append(position.tolist())
        length = z.shape[1]
        row, column = position // length, position % length
        seen = torch.nn.functional.one_hot(z, VOCAB).float().mean(dim=1) @ self.mix
        return self.table[column] + seen[row]


def strategy_of(name):
    return get_strategy(name, **{"confidence_threshold": {name: 0.6}, "entropy_bound": {name: 1.0}}.get(name, {}))


def run(name, seed, batch, editable, *, eos_ids, block=None, temperature=0.0, steps=6):
    model = Scripted(seed, editable.shape[1])
    output = sample(
        model,
        torch.full(editable.shape, 5),
        editable=editable,
        mask_id=MASK,
        steps=steps,
        strategy=strategy_of(name),
        logits=LogitsConfig(temperature=temperature),
        block_length=block,
        seed=seed,
        eos_ids=eos_ids,
    )
    return output, model


def texts(output, editable):
    """Return the tokens before the first EOS of each row."""
    result = []
    for ids, own in zip(output.sequences.tolist(), editable.tolist(), strict=True):
        written = [token for token, is_own in zip(ids, own, strict=True) if is_own]
        ends = [n for n, token in enumerate(written) if token in (END, PAD)]
        result.append(written[: ends[0]] if ends else written)
    return result


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(NAMES),
    block=st.sampled_from([None, 2, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_the_text_is_the_one_of_the_full_run(seed, name, block, temperature):
    editable = torch.ones(3, 9, dtype=torch.bool)
    editable[0, :4] = editable[1, :1] = False
    keys = {"block": block, "temperature": temperature}
    full, _ = run(name, seed, 3, editable, eos_ids=(), **keys)
    stopped, _ = run(name, seed, 3, editable, eos_ids=(END, PAD), **keys)
    assert texts(stopped, editable) == texts(full, editable)
    assert bool((stopped.sample_nfe <= full.sample_nfe).all())
    assert stopped.computed <= full.computed
    assert not bool((stopped.sequences == MASK).any())
    # What is left out holds the end, and says that nothing wrote it.
    left = editable & (stopped.committed < 0)
    assert bool((stopped.sequences[left] == END).all())


class Certain(Scripted):
    """Predicts 3 3 END 4 4 4 …, with more confidence further left."""

    def __init__(self, length, end):
        super().__init__(0, length)
        self.table = torch.zeros(length, VOCAB)
        for column in range(length):
            token = 3 if column < end else END if column == end else 4
            self.table[column, token] = 20.0 - column
        self.mix = torch.zeros(VOCAB, VOCAB)


def certain(editable, end, *, eos_ids, steps):
    model = Certain(editable.shape[1], end)
    x = torch.full(editable.shape, 5)
    keys = {"mask_id": MASK, "steps": steps, "strategy": get_strategy("low_confidence")}
    output = sample(model, x, editable=editable, logits=LogitsConfig(temperature=0.0), eos_ids=eos_ids, **keys)
    return output, model


def test_a_finished_row_needs_no_logits():
    editable = torch.ones(2, 8, dtype=torch.bool)
    editable[1, :5] = False  # three tokens to write, without an end
    output, model = certain(editable, 2, eos_ids=(END,), steps=8)
    assert output.sequences[0].tolist() == [3, 3, END, END, END, END, END, END]
    assert output.committed[0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert output.sample_nfe.tolist() == [3, 3]
    assert len(model.calls) == 3
    assert output.computed == 3 * 2 * 8
    alone, model = certain(editable[:1], 2, eos_ids=(), steps=8)
    assert alone.sequences[0].tolist() == [3, 3, END, 4, 4, 4, 4, 4]
    assert len(model.calls) == 8


def test_an_eos_after_a_masked_position_does_not_stop_the_row():
    class Backwards(Certain):
        def __call__(self, z, position):
            return super().__call__(z, position) * (1 + position[:, None] % z.shape[1])

    editable = torch.ones(1, 6, dtype=torch.bool)
    model = Backwards(6, 2)
    keys = {"mask_id": MASK, "steps": 6, "strategy": get_strategy("low_confidence"), "eos_ids": (END,)}
    output = sample(
        model, torch.zeros(1, 6, dtype=torch.int64), editable=editable, logits=LogitsConfig(temperature=0.0), **keys
    )
    assert output.sequences[0, :3].tolist() == [3, 3, END]
    open_at_the_end = output.committed[0, :3].max()
    assert output.committed[0].max() == open_at_the_end  # nothing was written after the text was complete


@pytest.mark.parametrize("given", [3, 5])
def test_rows_with_fixed_tokens_after_eos_do_not_stop(given):
    editable = torch.ones(1, 6, dtype=torch.bool)
    editable[0, given] = False
    output, _ = certain(editable, 1, eos_ids=(END,), steps=6)
    assert output.committed[0].ge(0).equal(editable[0])


def test_an_eos_in_the_prompt_does_not_stop_the_row():
    editable = torch.ones(1, 5, dtype=torch.bool)
    editable[0, 0] = False
    x = torch.zeros(1, 5, dtype=torch.int64)  # begins with the end-of-text token, as GPT-2's texts do
    model = Certain(5, 3)
    keys = {"mask_id": MASK, "steps": 5, "strategy": get_strategy("low_confidence"), "eos_ids": (END,)}
    output = sample(model, x, editable=editable, logits=LogitsConfig(temperature=0.0), **keys)
    assert output.sequences[0].tolist() == [END, 3, 3, END, END]


def test_eos_penalty_changes_eos_logits_only():
    """Greedy, EOS wins by 1 nat at one position; a larger penalty gives the second best token."""
    table = torch.zeros(3, VOCAB)
    table[0, END], table[0, 5] = 3.0, 2.0
    table[1, 4], table[1, PAD] = 3.0, 2.5
    table[2, PAD] = 9.0

    def written(penalty):
        output = sample(
            lambda z, position: table[position % 3],
            torch.full((1, 3), 6),
            editable=torch.ones(1, 3, dtype=torch.bool),
            mask_id=MASK,
            steps=3,
            strategy=get_strategy("low_confidence"),
            logits=LogitsConfig(temperature=0.0, eos_penalty=penalty),
            eos_ids=(END, PAD),
            stop_at_eos=False,
        )
        return output.sequences[0].tolist()

    assert [written(penalty) for penalty in (0.0, 0.9, 1.1, -0.6)] == [
        [END, 4, PAD],
        [END, 4, PAD],
        [5, 4, PAD],
        [END, PAD, PAD],
    ]
    assert table[0, END] == 3.0  # the model's logits are left as they are
    with pytest.raises(ValueError, match="eos_penalty"):
        LogitsConfig(eos_penalty=float("nan"))


def test_a_penalty_makes_the_softmax_of_the_shifted_logits():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    shifted = logits.clone()
    shifted[0, [END, PAD]] -= 0.7
    shifted[0, MASK] = float("-inf")
    expected = shifted.softmax(dim=1)[0]
    n = 20_000
    output = sample(
        lambda z, position: logits.expand(len(position), -1),
        torch.full((n, 1), 6),
        editable=torch.ones(n, 1, dtype=torch.bool),
        mask_id=MASK,
        steps=1,
        strategy=get_strategy("random"),
        logits=LogitsConfig(eos_penalty=0.7),
        eos_ids=(END, PAD),
    )
    found = torch.bincount(output.sequences[:, 0], minlength=VOCAB) / n
    assert float((found - expected).abs().max()) < 0.015


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from([name for name in NAMES if name != "random"]),
    block=st.sampled_from([None, 3]),
)
@settings(max_examples=100, deadline=None)
def test_eos_last_commits_eos_last(seed, name, block):
    """In each step an end is committed only if every other candidate of the block that the model sees is one too, or
    all of those are committed in the same step."""
    editable = torch.ones(1, 9, dtype=torch.bool)
    model = Scripted(seed, 9)
    state = {"z": torch.full((1, 9), MASK), "masked": editable.clone()}

    def look(step, z, fresh):
        logits = model(state["z"], torch.arange(9)).index_fill(1, torch.tensor([MASK]), float("-inf"))
        best = logits.argmax(dim=1)[None]
        is_end = (best == END) | (best == PAD)
        inside = torch.ones(9, dtype=torch.bool)
        if block is not None:
            current = int(state["masked"][0].nonzero()[0, 0]) // block
            inside = torch.arange(9) // block == current
        others = state["masked"] & ~is_end & inside
        if bool((fresh & is_end).any()):
            assert not bool((others & ~fresh).any())
        state["z"], state["masked"] = z.clone(), state["masked"] & ~fresh

    sample(
        model,
        torch.full((1, 9), 5),
        editable=editable,
        mask_id=MASK,
        steps=9,
        strategy=strategy_of(name),
        logits=LogitsConfig(temperature=0.0),
        block_length=block,
        eos_ids=(END, PAD),
        stop_at_eos=False,
        eos_last=True,
        callback=look,
    )
