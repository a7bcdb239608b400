"""Rows of prompts and responses, by hand."""

import pytest

from llamafactory_ddm.data.collators import ResponseCollator

SHORT = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
LONG = {"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4, "labels": [-100, -100, -100, 4]}
PACKED = {
    "input_ids": [1, 2, 3, 4, 5, 0],
    "attention_mask": [1, 1, 2, 2, 2, 0],
    "position_ids": [0, 1, 0, 1, 2, 0],
    "labels": [1, 2, -100, 4, 5, -100],
}


def as_lists(batch):
    return {key: value.int().tolist() for key, value in batch.items()}


def test_padding_that_is_not_seen():
    assert as_lists(ResponseCollator(pad_id=9, shift=True)([SHORT, LONG])) == {
        "input_ids": [[5, 6, 7, 9], [1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "maskable": [[0, 1, 1, 0], [0, 0, 0, 1]],
    }


def test_padding_that_is_a_target():
    assert as_lists(ResponseCollator(pad_id=9, shift=True, target_length=5)([SHORT, LONG])) == {
        "input_ids": [[5, 6, 7, 9, 9], [1, 2, 3, 4, 9]],
        "attention_mask": [[1] * 5, [1] * 5],
        "maskable": [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]],
    }


@pytest.mark.parametrize(("shift", "maskable"), [(True, [0, 1, 0, 1, 1, 0]), (False, [1, 1, 0, 1, 1, 0])])
def test_packed_rows(shift, maskable):
    batch = as_lists(ResponseCollator(pad_id=9, shift=shift)([PACKED]))
    assert batch["document"] == [[1, 1, 2, 2, 2, 3]]
    assert batch["position_ids"] == [[0, 1, 0, 1, 2, 0]]
    assert batch["attention_mask"] == [[1, 1, 1, 1, 1, 0]]
    assert batch["maskable"] == [maskable]


def test_without_neat_packing_documents_are_told_apart_too():
    plain = {**PACKED, "attention_mask": [1] * 6}
    one, two = (as_lists(ResponseCollator(pad_id=9, shift=True)([row])) for row in (PACKED, plain))
    assert one["document"] == two["document"]
    assert one["maskable"] == two["maskable"]


# As LLaMA-Factory labels turns whose template has no end of its own: the next turn's first token, 8, has it as label.
TURNS = {"input_ids": [8, 1, 5, 8, 2, 6, 0], "labels": [-100, -100, 5, 0, -100, 6, 0]}


def test_the_label_is_the_target_where_it_is_another_token():
    batch = as_lists(ResponseCollator(pad_id=9, shift=True)([TURNS, SHORT]))
    assert batch["input_ids"] == [[8, 1, 5, 0, 2, 6, 0], [5, 6, 7, 9, 9, 9, 9]]
    assert batch["shown"] == [[8, 1, 5, 8, 2, 6, 0], [5, 6, 7, 9, 9, 9, 9]]
    assert batch["maskable"] == [[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    packed = {
        "input_ids": [*TURNS["input_ids"], *TURNS["input_ids"], 9],
        "attention_mask": [1] * 7 + [2] * 7 + [0],
        "position_ids": [*range(7), *range(7), 0],
        "labels": [*TURNS["labels"], *TURNS["labels"], -100],
    }
    batch = as_lists(ResponseCollator(pad_id=9, shift=False)([packed]))
    assert batch["input_ids"] == [[8, 1, 5, 0, 2, 6, 0] * 2 + [9]]
    assert batch["shown"] == [packed["input_ids"]]
    assert batch["maskable"] == [[0, 0, 1, 1, 0, 1, 1] * 2 + [0]]


def test_the_first_token_of_a_document_is_not_a_target():
    """With mask_history LLaMA-Factory labels it with EOS."""
    first = {**TURNS, "labels": [0, -100, -100, -100, -100, 6, 0]}
    batch = as_lists(ResponseCollator(pad_id=9, shift=False)([first]))
    assert batch["input_ids"] == [TURNS["input_ids"]] and "shown" not in batch
    assert batch["maskable"] == [[0, 0, 0, 0, 0, 1, 1]]
    itself = {**TURNS, "labels": TURNS["input_ids"]}  # train_on_prompt
    assert as_lists(ResponseCollator(pad_id=9, shift=False)([itself]))["maskable"] == [[1] * 7]


def test_incompatible_settings():
    with pytest.raises(ValueError, match=r"4 tokens .*cutoff_len: 3"):
        ResponseCollator(pad_id=9, shift=True, target_length=3)([SHORT, LONG])
    with pytest.raises(ValueError, match=r"train_on_padding.*packing"):
        ResponseCollator(pad_id=9, shift=True, target_length=8)([PACKED])
