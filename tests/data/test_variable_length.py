"""Rows with their end and padding behind it, by hand."""

import pytest

from llamafactory_ddm.data.collators import VariableLengthCollator

EOS = 0
ANSWER = {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, 0]}
EMPTY = {"input_ids": [0, 5, 0], "labels": [-100, -100, 0]}


def as_lists(batch):
    return {key: value.int().tolist() for key, value in batch.items()}


def test_a_document_with_start_token_eos_and_padding():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=7, start_id=EOS)
    rows = [{"input_ids": [5, 6, EOS]}, {"input_ids": [5, 6, 7, 8, 4, EOS]}, {"input_ids": [EOS]}]
    assert as_lists(collator(rows)) == {
        "input_ids": [[0, 5, 6, 0, 9, 9, 9], [0, 5, 6, 7, 8, 4, 0], [0, 0, 9, 9, 9, 9, 9]],
        "attention_mask": [[1] * 7] * 3,
        "maskable": [[1] * 7] * 3,
        "is_pad": [[0, 0, 0, 0, 1, 1, 1], [0] * 7, [0, 0, 1, 1, 1, 1, 1]],
        "end": [3, 6, 1],
    }


def test_without_a_start_token():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=3)
    assert as_lists(collator([{"input_ids": [5, EOS]}, {"input_ids": [5]}])) == {
        "input_ids": [[5, 0, 9], [5, 0, 9]],
        "attention_mask": [[1] * 3] * 2,
        "maskable": [[1] * 3] * 2,
        "is_pad": [[0, 0, 1]] * 2,
        "end": [1, 1],
    }


def test_only_the_answer_its_eos_and_padding_are_maskable():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(1, 2, 3), canvas=9)
    assert as_lists(collator([ANSWER, EMPTY])) == {
        "input_ids": [[0, 5, 6, 7, 0, 1, 2, 3, 1], [0, 5, 0, 1, 2, 3, 1, 2, 3]],
        "attention_mask": [[1] * 9] * 2,
        "maskable": [[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]],
        "is_pad": [[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1]],
        "end": [4, 2],
    }


def test_a_template_with_text_after_eos_or_without_eos():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=6)
    chat = {"input_ids": [5, 6, EOS, 8], "labels": [-100, 6, EOS, 8]}
    bare = {"input_ids": [EOS, 6], "labels": [-100, 6]}  # the end in the prompt is none
    batch = as_lists(collator([chat, bare]))
    assert batch["end"] == [2, 2]
    assert batch["input_ids"] == [[5, 6, 0, 9, 9, 9], [0, 6, 0, 9, 9, 9]]
    assert batch["is_pad"] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_the_last_eos_of_several_turns_counts():
    turns = {"input_ids": [5, 6, EOS, 5, 7, EOS], "labels": [-100, 6, EOS, -100, 7, EOS]}
    batch = as_lists(VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=7)([turns]))
    assert batch["end"] == [5] and batch["maskable"] == [[0, 1, 1, 0, 1, 1, 1]]


def test_template_text_after_eos_is_dropped():
    """ChatML ends an answer with <|im_end|> and a line break; the last answer of a chat may also lack its end."""
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=8)
    broken = {"input_ids": [5, 6, EOS, 4], "labels": [-100, 6, EOS, 4]}
    assert collator.row(broken) == ([5, 6, EOS], [False, True, True], 2)
    unended = {"input_ids": [5, 6, EOS, 5, 7], "labels": [-100, 6, EOS, -100, 7]}
    assert collator.row(unended) == ([5, 6, EOS, 5, 7, EOS], [False, True, True, False, True, True], 5)
    quoted = {"input_ids": [5, EOS, 6]}  # a document that speaks of the token goes on behind it
    assert collator.row(quoted) == ([5, EOS, 6, EOS], [True] * 4, 3)


def test_the_label_is_the_target_where_it_is_another_token():
    """The first token of the second turn, 8, has the end of the first answer as its label."""
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=8)
    turns = {"input_ids": [8, 1, 5, 8, 2, 6, EOS], "labels": [-100, -100, 5, EOS, -100, 6, EOS]}
    batch = as_lists(collator([turns, ANSWER]))
    assert batch["input_ids"] == [[8, 1, 5, EOS, 2, 6, EOS, 9], [0, 5, 6, 7, 0, 9, 9, 9]]
    assert batch["shown"] == [[8, 1, 5, 8, 2, 6, EOS, 9], [0, 5, 6, 7, 0, 9, 9, 9]]
    assert batch["maskable"] == [[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch["end"] == [6, 4]
    unended = {key: value[:-1] for key, value in turns.items()}
    assert collator.shown(unended, collator.row(unended)[0]) == [8, 1, 5, 8, 2, 6, EOS]


def test_positions_outside_the_canvas_are_hidden():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=10, block=4, extra=0)
    batch = as_lists(collator([ANSWER, EMPTY]))
    assert batch["input_ids"] == [[0, 5, 6, 7, 0, 9, 9, 9], [0, 5, 0, 9, 9, 9, 9, 9]]
    assert batch["attention_mask"] == [[1] * 8, [1] * 4 + [0] * 4]
    assert batch["maskable"] == [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert batch["is_pad"] == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert collator.width([5] * 9) == 10  # the canvas is the most


@pytest.mark.parametrize(("extra", "widths"), [(0, {4}), (1, {4, 8}), (None, {4, 8, 10}), (7, {4, 8, 10})])
def test_a_canvas_may_be_larger_than_its_row_needs(extra, widths):
    """The number of extra blocks is uniform and depends on the row alone, in any collator, epoch or process."""
    collator, again = (VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=10, block=4, extra=extra) for _ in "ab")
    drawn = [collator.width([first, second, EOS]) for first in range(5, 65) for second in range(5, 15)]
    assert set(drawn) == widths
    assert all(drawn.count(width) == pytest.approx(len(drawn) / len(widths), rel=0.2) for width in widths)
    assert drawn == [again.width([first, second, EOS]) for first in range(5, 65) for second in range(5, 15)]


def test_a_row_as_long_as_the_canvas_fits_and_a_longer_one_does_not():
    exact, short = (VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=canvas) for canvas in (5, 4))
    assert exact.fits(ANSWER) and not short.fits(ANSWER)
    assert as_lists(exact([ANSWER]))["is_pad"] == [[0] * 5]
    assert not VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=4).fits({"input_ids": [5, 6, 7, 8]})
    with pytest.raises(ValueError, match=r"5 tokens.* cutoff_len: 4.*drop_overlong"):
        short([ANSWER])


def test_a_stop_token_ends_an_answer_but_not_a_document():
    collator = VariableLengthCollator(eos_id=EOS, pad_ids=(9,), canvas=6, stop_ids=(8,))
    assert collator.row({"input_ids": [8, 6, 8, 4], "labels": [-100, 6, 8, 4]}) == (
        [8, 6, 8],
        [False, True, True],
        2,
    )
    assert collator.row({"input_ids": [6, 8]})[0] == [6, 8, EOS]
