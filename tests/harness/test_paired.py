"""Errors of differences over documents: by hand, by every resample, by resampling, and over repeated data sets."""

import itertools
import math
import random

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.registry import get_aggregation

from llamafactory_ddm.harness.paired import (
    MEAN,
    jackknife_error,
    matched,
    paired_difference,
    standard_error,
    values_by_document,
)

PERPLEXITY, BITS_PER_BYTE = get_aggregation("perplexity"), get_aggregation("bits_per_byte")


def test_by_hand():
    """Differences 0, 1, 0, -1: mean 0, squares 2, error sqrt(2 / (4 * 3)); unpaired it would be larger."""
    difference, error = paired_difference([1, 0, 1, 1], [1, 1, 1, 0], MEAN)
    assert (difference, error) == (0, pytest.approx(math.sqrt(2 / 12)))
    assert paired_difference([1, 0, 1], [0, 0, 1], MEAN) == (pytest.approx(-1 / 3), pytest.approx(1 / 3))
    assert paired_difference([2.0], [3.0], MEAN) == (1.0, None)
    for wrong in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="documents"):
            paired_difference(*wrong, MEAN)


def test_every_bootstrap_sample():
    """The variance over all n^n resamples of n documents is (n - 1) / n of the squared error."""
    baseline, other = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.5, 1.0, 0.0]
    means = [sum(other[i] - baseline[i] for i in drawn) / 5 for drawn in itertools.product(range(5), repeat=5)]
    _, error = paired_difference(baseline, other, MEAN)
    assert np.var(means) == pytest.approx(error**2 * 4 / 5)


def answers(n, seed=0):
    """Log-likelihoods and bytes of n documents under two models that find the same documents hard."""
    generator = np.random.default_rng(seed)
    hard, n_bytes = generator.gamma(4, 1, n), generator.integers(20, 60, n)
    first = [(-float(h), int(b)) for h, b in zip(hard, n_bytes, strict=True)]
    second = [(-float(h), int(b)) for h, b in zip(hard * 1.1 + generator.normal(0, 0.2, n), n_bytes, strict=True)]
    return first, second


@pytest.mark.parametrize("statistic", [MEAN, PERPLEXITY, BITS_PER_BYTE], ids=["mean", "perplexity", "bits_per_byte"])
def test_resampled_documents_have_this_error(statistic):
    first, second = answers(60)
    if statistic is not BITS_PER_BYTE:
        first, second = [a / 4 for a, _ in first], [a / 4 for a, _ in second]
    difference, error = paired_difference(first, second, statistic)
    assert difference == pytest.approx(statistic(second) - statistic(first))
    draws = random.Random(0)
    resampled = []
    for _ in range(2000):
        drawn = draws.choices(range(60), k=60)
        resampled.append(statistic([second[i] for i in drawn]) - statistic([first[i] for i in drawn]))
    assert error == pytest.approx(np.std(resampled) * math.sqrt(60 / 59), rel=0.1)


def test_for_the_mean_the_jackknife_is_the_formula():
    values = [float(value) for value, _ in answers(37)[0]]
    formula = np.std(values, ddof=1) / math.sqrt(37)
    assert standard_error(values, MEAN) == pytest.approx(formula)
    assert jackknife_error(values, MEAN) == pytest.approx(formula)
    assert standard_error([1.0], MEAN) is None


def test_groups_of_unequal_size_estimate_the_same_error():
    """Over repeated data sets the squared error is, on average, the variance of the mean; 9 groups of 4 or 5."""
    generator = np.random.default_rng(1)
    squares = [jackknife_error(list(generator.normal(size=40)), np.mean, groups=9) ** 2 for _ in range(600)]
    assert np.mean(squares) == pytest.approx(1 / 40, rel=0.08)


def sample(digest, value, filter_name="none"):
    return {"doc_hash": digest, "filter": filter_name, "acc": value}


def test_documents_are_matched_by_content():
    first = values_by_document([sample("a", 1), sample("b", 2), sample("a", 3), sample("a", 9, "x")], "acc", "none")
    second = values_by_document(
        [sample("b", 20), sample("a", 10), sample("a", 30), {**sample("c", 0, "x")}], "acc", "none"
    )
    assert matched(first, second, ("one", "two"), "task: t, acc") == ([1, 2, 3], [10, 20, 30])
    fewer = values_by_document([sample("b", 20), sample("a", 10), sample("c", 1)], "acc", "none")
    with pytest.raises(ValueError, match=r"task: t, acc: one and two .*documents \(1 .*1 "):
        matched(first, fewer, ("one", "two"), "task: t, acc")
