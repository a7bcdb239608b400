from types import SimpleNamespace

import pytest

from llamafactory_ddm.data.collators import StartTokenCollator, start_token_id


def test_rows_get_the_start_token_once():
    collate = StartTokenCollator(list, 0)
    rows = collate([{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [0, 7]}, {"input_ids": []}])
    assert [row["input_ids"] for row in rows] == [[0, 5, 6], [0, 7], [0]]
    assert [row["attention_mask"] for row in rows] == [[1, 1, 1], [1, 1], [1]]


def test_rows_stay_within_the_models_positions():
    rows = StartTokenCollator(list, 0, max_length=3)([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}])
    assert rows == [{"input_ids": [0, 5, 6], "attention_mask": [1, 1, 1]}]


def test_the_start_token_is_bos_else_eos():
    assert start_token_id(SimpleNamespace(bos_token_id=3, eos_token_id=4)) == 3
    assert start_token_id(SimpleNamespace(bos_token_id=None, eos_token_id=4)) == 4
    with pytest.raises(ValueError, match="shift: false"):
        start_token_id(SimpleNamespace(bos_token_id=None, eos_token_id=None))
