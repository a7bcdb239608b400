"""The log of finished texts: resuming, order and memory; and memory of requests that are all equal."""

import itertools
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.integration.predict.prediction_log import IndexSet, PredictionLog, write_predictions
from llamafactory_ddm.integration.predict.requests import Repeated, Request, distinct
from llamafactory_ddm.integration.predict.runner import _pending_indices, _Progress, compute_metrics

RECORD = {"predict": "a\u2028b\u0085", "tokens": 2, "forwards": 4, "computed": 8}


def record(index):
    return {"number": index, **RECORD}


@given(st.lists(st.integers(0, 300)), st.integers(1, 3))
def test_an_index_set_is_a_set_and_its_complement_is_sharded(indices, world):
    finished = IndexSet(indices)
    assert len(finished) == len(set(indices)) and all((n in finished) == (n in set(indices)) for n in range(400))
    pending = [n for n in range(310) if n not in set(indices)]
    shares = [list(_pending_indices(310, finished, rank, world)) for rank in range(world)]
    assert shares == [pending[rank::world] for rank in range(world)]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(12)), cut=st.integers(0, 11), torn=st.booleans())
def test_records_are_read_in_order_of_the_index_whatever_order_they_were_written_in(
    tmp_path_factory, order, cut, torn
):
    """By an interrupted run of two processes, and by the one process that resumes it."""
    folder = tmp_path_factory.mktemp("unfinished")
    first, second = PredictionLog(folder, "it", 1, 2), PredictionLog(folder, "it", 0, 1)
    first.world = 1  # there is no other process to wait for
    assert len(first.open(resume=True)) == 0
    for index in order[:cut]:
        first.add(record(index))
    if torn:
        with open(first.path, "a") as file:
            file.write('{"number": 99, "pre')
    finished = second.open(resume=True)
    assert sorted(n for n in range(12) if n in finished) == sorted(order[:cut])
    with pytest.raises(RuntimeError, match=rf"{12 - cut} of 12 .*{folder.name}"):
        second.collect(12)
    for index in order[cut:]:
        second.add(record(index))
    records = second.collect(12)
    assert len(records) == 12
    for _ in range(2):
        assert list(records) == [record(index) for index in range(12)]
    third = PredictionLog(folder, "it", 0, 1)
    assert len(third.open(resume=True)) == 12 and list(third.collect(12)) == list(records)
    assert len(PredictionLog(folder, "another", 0, 1).open(resume=True)) == 0


def test_an_interrupted_run_resumes_unless_told_otherwise(tmp_path):
    log = PredictionLog(tmp_path / "unfinished", "it", 0, 1)
    log.open(resume=True)
    log.add(record(3))
    resumed = PredictionLog(tmp_path / "unfinished", "it", 0, 1)
    assert 3 in resumed.open(resume=True) and 3 not in resumed.open(resume=False)


def test_a_billion_requests_take_no_memory():
    """Neither do the pending sample indices, of which the first come at once."""
    tracemalloc.start()
    requests = Repeated(Request(("a canvas",)), 10**9)
    pending = _pending_indices(len(requests), IndexSet(range(1000)), 1, 2)
    assert list(itertools.islice(pending, 3)) == [1001, 1003, 1005]
    assert (len(requests), requests[10**9 - 1], len(distinct(requests))) == (10**9, requests.request, 1)
    with pytest.raises(IndexError):
        requests[10**9]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_writing_the_results_keeps_no_text_in_memory(tmp_path):
    """20,000 texts of 200 characters are 4 MB; a tenth of it is the limit."""
    log = PredictionLog(tmp_path / "unfinished", "it", 0, 1)
    log.open(resume=True)
    with open(log.path, "a") as file:
        for index in range(20_000):
            file.write(json.dumps({"number": index, **RECORD, "predict": "x" * 200}) + "\n")
    tracemalloc.start()
    records = log.collect(20_000)
    metrics = compute_metrics(records)
    write_predictions(tmp_path / "out.jsonl", records)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000
    assert metrics["predict_samples"] == 20_000 and metrics["predict_tokens_per_forward"] == 0.5
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
