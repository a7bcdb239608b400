"""Rows of prompts and responses, by hand."""

import pytest

from llamafactory_ddm.data.responses import ResponseCollator

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


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="a row of 4 tokens does not fit cutoff_len: 3"):
        ResponseCollator(pad_id=9, shift=True, target_length=3)([SHORT, LONG])
    with pytest.raises(ValueError, match="packed rows have no padding to learn"):
        ResponseCollator(pad_id=9, shift=True, target_length=8)([PACKED])
