"""Stopping at the end of a text: the same text, for less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample

MASK, END, PAD, VOCAB = 7, 0, 1, 8
NAMES = ["random", "topk", "low_confidence", "margin", "entropy", "confidence_threshold", "entropy_bound"]


class Scripted:
    """A model whose logits depend on the place and on what is decided already; it notes what it is given."""

    def __init__(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(length, VOCAB, generator=generator) * 2
        self.mix = torch.randn(VOCAB, VOCAB, generator=generator)
        self.calls = []

    def __call__(self, z, place):
        self.calls.append(place.tolist())
        length = z.shape[1]
        row, column = place // length, place % length
        seen = torch.nn.functional.one_hot(z, VOCAB).float().mean(dim=1) @ self.mix
        return self.table[column] + seen[row]


def run(name, seed, batch, editable, *, end_ids, block=None, temperature=0.0, steps=6):
    model = Scripted(seed, editable.shape[1])
    output = sample(
        model,
        torch.full(editable.shape, 5),
        editable=editable,
        mask_id=MASK,
        steps=steps,
        strategy=get_strategy(name, confidence_threshold=0.6, entropy_bound=1.0),
        logits=LogitsConfig(temperature=temperature),
        block_length=block,
        seed=seed,
        end_ids=end_ids,
    )
    return output, model


def texts(output, editable):
    """What stands before the first end, row by row."""
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
@settings(max_examples=150, deadline=None)
def test_the_text_is_the_one_of_the_full_run(seed, name, block, temperature):
    editable = torch.ones(3, 9, dtype=torch.bool)
    editable[0, :4] = editable[1, :1] = False
    keys = {"block": block, "temperature": temperature}
    full, _ = run(name, seed, 3, editable, end_ids=(), **keys)
    stopped, _ = run(name, seed, 3, editable, end_ids=(END, PAD), **keys)
    assert texts(stopped, editable) == texts(full, editable)
    assert bool((stopped.row_forwards <= full.row_forwards).all())
    assert stopped.computed <= full.computed
    assert not bool((stopped.sequences == MASK).any())
    # What is left out holds the end, and says that nothing wrote it.
    left = editable & (stopped.committed < 0)
    assert bool((stopped.sequences[left] == END).all())


class Certain(Scripted):
    """Writes 3 3 END 4 4 4 …, the surer the further left."""

    def __init__(self, length, end):
        super().__init__(0, length)
        self.table = torch.zeros(length, VOCAB)
        for column in range(length):
            token = 3 if column < end else END if column == end else 4
            self.table[column, token] = 20.0 - column
        self.mix = torch.zeros(VOCAB, VOCAB)


def certain(editable, end, *, end_ids, steps):
    model = Certain(editable.shape[1], end)
    x = torch.full(editable.shape, 5)
    keys = {"mask_id": MASK, "steps": steps, "strategy": get_strategy("low_confidence")}
    output = sample(model, x, editable=editable, logits=LogitsConfig(temperature=0.0), end_ids=end_ids, **keys)
    return output, model


def test_a_row_that_is_finished_is_asked_for_no_more():
    editable = torch.ones(2, 8, dtype=torch.bool)
    editable[1, :5] = False  # three tokens to write, without an end
    output, model = certain(editable, 2, end_ids=(END,), steps=8)
    assert output.sequences[0].tolist() == [3, 3, END, END, END, END, END, END]
    assert output.committed[0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert output.row_forwards.tolist() == [3, 3]
    assert len(model.calls) == 3
    assert output.computed == 3 * 2 * 8
    alone, model = certain(editable[:1], 2, end_ids=(), steps=8)
    assert alone.sequences[0].tolist() == [3, 3, END, 4, 4, 4, 4, 4]
    assert len(model.calls) == 8


def test_an_end_is_not_the_end_while_something_before_it_is_open():
    class Backwards(Certain):
        def __call__(self, z, place):
            return super().__call__(z, place) * (1 + place[:, None] % z.shape[1])

    editable = torch.ones(1, 6, dtype=torch.bool)
    model = Backwards(6, 2)
    keys = {"mask_id": MASK, "steps": 6, "strategy": get_strategy("low_confidence"), "end_ids": (END,)}
    output = sample(
        model, torch.zeros(1, 6, dtype=torch.int64), editable=editable, logits=LogitsConfig(temperature=0.0), **keys
    )
    assert output.sequences[0, :3].tolist() == [3, 3, END]
    open_at_the_end = output.committed[0, :3].max()
    assert output.committed[0].max() == open_at_the_end  # nothing was written after the text was complete


@pytest.mark.parametrize("given", [3, 5])
def test_rows_with_given_tokens_behind_go_on(given):
    editable = torch.ones(1, 6, dtype=torch.bool)
    editable[0, given] = False
    output, _ = certain(editable, 1, end_ids=(END,), steps=6)
    assert output.committed[0].ge(0).equal(editable[0])


def test_a_given_end_is_none():
    editable = torch.ones(1, 5, dtype=torch.bool)
    editable[0, 0] = False
    x = torch.zeros(1, 5, dtype=torch.int64)  # begins with the end-of-text token, as GPT-2's texts do
    model = Certain(5, 3)
    keys = {"mask_id": MASK, "steps": 5, "strategy": get_strategy("low_confidence"), "end_ids": (END,)}
    output = sample(model, x, editable=editable, logits=LogitsConfig(temperature=0.0), **keys)
    assert output.sequences[0].tolist() == [END, 3, 3, END, END]
