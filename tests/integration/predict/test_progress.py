"""Texts of an interrupted run, more than the memory holds, and requests that take no memory of their own."""

import itertools
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.integration.predict.progress import Numbers, Unfinished, write_predictions
from llamafactory_ddm.integration.predict.requests import Repeated, Request, distinct
from llamafactory_ddm.integration.predict.runner import _numbers, _Progress, metrics_of

RECORD = {"predict": "a\u2028b\u0085", "tokens": 2, "forwards": 4, "computed": 8}


def record(number):
    return {"number": number, **RECORD}


@given(st.lists(st.integers(0, 300)), st.integers(1, 3))
def test_numbers_are_a_set(numbers, world):
    done = Numbers(numbers)
    assert len(done) == len(set(numbers)) and all((n in done) == (n in set(numbers)) for n in range(400))
    left = [n for n in range(310) if n not in set(numbers)]
    shares = [list(_numbers(310, done, rank, world)) for rank in range(world)]
    assert shares == [left[rank::world] for rank in range(world)]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(12)), cut=st.integers(0, 11), torn=st.booleans())
def test_texts_come_in_order_whatever_the_order_they_were_written_in(tmp_path_factory, order, cut, torn):
    """By a run that was interrupted, and one that went on in another number of processes."""
    folder = tmp_path_factory.mktemp("unfinished")
    first, second = Unfinished(folder, "it", 1, 2), Unfinished(folder, "it", 0, 1)
    first.world = 1  # nobody to wait for
    assert len(first.open(resume=True)) == 0
    for number in order[:cut]:
        first.add(record(number))
    if torn:
        with open(first.path, "a") as file:
            file.write('{"number": 99, "pre')
    done = second.open(resume=True)
    assert sorted(n for n in range(12) if n in done) == sorted(order[:cut])
    with pytest.raises(RuntimeError, match=rf"{12 - cut} texts are missing"):
        second.collect(12)
    for number in order[cut:]:
        second.add(record(number))
    found = second.collect(12)
    assert len(found) == 12
    for _ in range(2):
        assert list(found) == [record(number) for number in range(12)]
    again = Unfinished(folder, "it", 0, 1)
    assert len(again.open(resume=True)) == 12 and list(again.collect(12)) == list(found)
    assert len(Unfinished(folder, "another", 0, 1).open(resume=True)) == 0


def test_a_run_that_was_interrupted_keeps_what_it_has(tmp_path):
    one = Unfinished(tmp_path / "unfinished", "it", 0, 1)
    one.open(resume=True)
    one.add(record(3))
    again = Unfinished(tmp_path / "unfinished", "it", 0, 1)
    assert 3 in again.open(resume=True) and 3 not in again.open(resume=False)


def test_a_billion_requests_take_no_memory():
    """Neither do those that are to be done, and the first comes at once."""
    tracemalloc.start()
    asked = Repeated(Request(("a canvas",)), 10**9)
    todo = _numbers(len(asked), Numbers(range(1000)), 1, 2)
    assert list(itertools.islice(todo, 3)) == [1001, 1003, 1005]
    assert (len(asked), asked[10**9 - 1], len(distinct(asked))) == (10**9, asked.request, 1)
    with pytest.raises(IndexError):
        asked[10**9]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_publishing_keeps_no_text(tmp_path):
    """20,000 texts of 200 characters are 4 MB; a hundredth of it is held."""
    one = Unfinished(tmp_path / "unfinished", "it", 0, 1)
    one.open(resume=True)
    with open(one.path, "a") as file:
        for number in range(20_000):
            file.write(json.dumps({"number": number, **RECORD, "predict": "x" * 200}) + "\n")
    tracemalloc.start()
    found = one.collect(20_000)
    measured = metrics_of(found)
    write_predictions(tmp_path / "out.jsonl", found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000
    assert measured["predict_samples"] == 20_000 and measured["predict_tokens_per_forward"] == 0.5
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 20_000


def test_the_bar_counts_steps():
    progress = _Progress(5, 2, 4, disable=False)
    assert progress.bar.total == 12
    seen = []
    for size in (2, 2, 1):
        for step in (0, 1, 6):
            progress.step(step)
            seen.append(progress.bar.n)
        progress.finish(size, 7)
    assert seen == [1, 2, 4, 5, 6, 8, 9, 10, 12] and progress.bar.n == 12
    assert progress.bar.postfix.startswith("5 of 5 texts, ")
    short = _Progress(2, 2, 4, disable=False)
    short.step(0)
    short.finish(2, 3)
    assert short.bar.n == 4
