"""The keys of prepare-data, and the filters."""

import pytest

from llamafactory_ddm.data.corpus.filters import Filters
from llamafactory_ddm.data.corpus.keys import PrepareKeys, split_own

GIVEN = {"sources": "a.jsonl", "tokenized_path": "rows"}
TWO = {"sources": {"a": "a.jsonl", "b": "b.jsonl"}, "mix_strategy": "interleave_under"}


def test_entries_of_sources_take_precedence():
    entry = {"path": ["b.parquet", "c/*.parquet"], "text_column": "content", "min_length": 5, "filters": "lang == py"}
    keys = PrepareKeys(**GIVEN | {"sources": {"a": "a.jsonl", "b": entry}, "filters": ["score > 1"], "max_length": 9})
    a, b = keys.all_sources()
    assert (a.name, a.paths, a.text_column) == ("a", ("a.jsonl",), "text")
    assert (b.name, b.paths, b.text_column) == ("b", ("b.parquet", "c/*.parquet"), "content")
    assert (a.filters.min_length, b.filters.min_length, b.filters.max_length) == (1, 5, 9)
    assert (a.filters.columns, b.filters.columns) == (["score"], ["lang"])


def test_other_keys_are_upstreams():
    keys, others = split_own({**GIVEN, "model_name_or_path": "gpt2", "cutoff_len": "64"})
    assert keys.cutoff_len == 64 and others == {"model_name_or_path": "gpt2"}


def test_probabilities_may_be_a_list_or_a_text():
    for given in ("0.69,0.31", [0.69, 0.31], " 0.69 , 0.31"):
        assert PrepareKeys(**GIVEN | TWO, interleave_probs=given).probabilities() == [0.69, 0.31]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": None}, "sources is missing"),
        ({"sources": {"a": {"text_column": "x"}}}, "sources.a lacks path"),
        ({"sources": {"a": {"path": "x", "text_colum": "y"}}}, r"sources\.a\.text_colum .*'text_column'"),
        ({"sources": {"a/b": "x"}}, "sources.a/b"),
        ({"sources": 3}, "sources must be"),
        ({"tokenized_path": None}, "tokenized_path is missing"),
        ({"filters": ["language en"]}, "filter 'language en'"),
        ({"cutoff_len": 1}, "cutoff_len must be at least 2"),
        ({"val_size": 1}, "val_size must lie in"),
        ({"shard_size": 0}, "shard_size must lie in"),
        ({"min_length": 9, "max_length": 3}, "max_length: 3 .*min_length: 9"),
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs .*mix_strategy"),
        ({"mix_strategy": "mixed"}, "mix_strategy.*interleave_under"),
        (TWO, "mix_strategy: interleave_under needs interleave_probs"),
        (TWO | {"interleave_probs": "0.5,0.6"}, "interleave_probs: 0.5,0.6 must"),
        (TWO | {"interleave_probs": "1"}, "interleave_probs names 1"),
        (TWO | {"interleave_probs": "a,b"}, "interleave_probs: a,b must be numbers"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers must be at least 1"),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(ValueError, match=words):
        PrepareKeys(**GIVEN | changes)


@pytest.mark.parametrize(
    ("line", "kept", "dropped"),
    [
        ("language == en", ["en"], ["de", None]),
        ("language=='en'", ["en"], ["'en'"]),
        ("score >= 0.65", [0.65, 3, "0.7"], [0.64, None, -1]),
        ("score<2", [1.9, 1], [2, 2.5]),
        ("kind != a b", ["b", "a"], ["a b"]),
        ("flag == true", [True], [False]),
        ("id == '12'", ["12"], ["12.0"]),
    ],
)
def test_comparisons(line, kept, dropped):
    filters = Filters.parse([line], 0, None, "filters")
    column = filters.columns[0]
    assert [filters.reason_to_drop("", {column: value}) for value in kept] == [None] * len(kept)
    assert [filters.reason_to_drop("", {column: value}) for value in dropped] == [line] * len(dropped)
    assert filters.reason_to_drop("", {}) == line


def test_values_that_cannot_be_compared():
    for line, value in (("score > 1", "many"), ("language == en", 3)):
        with pytest.raises(ValueError, match=f"filters: '{line}' .*{value!r}"):
            Filters.parse([line], 0, None, "filters").reason_to_drop("", {line.split()[0]: value})


def test_lengths():
    filters = Filters.parse([], 2, 3, "filters")
    assert [filters.reason_to_drop("x" * n, {}) for n in range(1, 5)] == ["min_length", None, None, "max_length"]
