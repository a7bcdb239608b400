"""Differences between two models on the same documents, with their standard error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.registry import get_aggregation

Statistic = Callable[[Sequence[Any]], float]
MEAN: Statistic = get_aggregation("mean")  # the harness's function
# Groups of documents that the jackknife leaves out in turn. With no more documents than that, each is a group.
_GROUPS = 1000


def paired_difference(
    baseline: Sequence[Any], other: Sequence[Any], statistic: Statistic
) -> tuple[float, float | None]:
    """Return statistic(other) - statistic(baseline) with its standard error over documents.

    The documents are a random sample, and both models answered each of them, so what makes a document easy or hard for
    both cancels. With d_i the difference on document i of n, the error of a difference of means is

        error^2 = sum over i of (d_i - mean d)^2 / (n (n - 1))

    For any other statistic it is that of `jackknife_error`, which for the mean is the same.

    Args:
        baseline: value of each document.
        other: value of each of the same documents, in the same order.
        statistic: from the values to one number; `MEAN` for the mean.
    Returns:
        The difference, and its error; None for a single document.
    Raises:
        ValueError: if there are no documents, or not the same number.
    """
    n = len(baseline)
    if n != len(other) or n == 0:
        raise ValueError(f"{n} and {len(other)} documents; both models need values for the same documents")
    pairs = list(zip(baseline, other, strict=True))
    if statistic is MEAN:
        differences = [float(second) - float(first) for first, second in pairs]
        return MEAN(differences), standard_error(differences, MEAN)

    def difference(part: Sequence[Any]) -> float:
        return statistic([second for _, second in part]) - statistic([first for first, _ in part])

    return difference(pairs), jackknife_error(pairs, difference)


def standard_error(values: Sequence[Any], statistic: Statistic) -> float | None:
    """Return the standard error of a statistic over documents; None for a single document.

    For the mean it is the sample's standard deviation over sqrt(n), else that of `jackknife_error`.
    """
    n = len(values)
    if statistic is not MEAN or n < 2:
        return jackknife_error(values, statistic)
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n * (n - 1)))


def jackknife_error(values: Sequence[Any], statistic: Statistic, *, groups: int = _GROUPS) -> float | None:
    """Return the standard error of a statistic over documents, by leaving out documents.

    With theta the statistic of all n values, theta_j the same without the m_j values of group j of g, h_j = n / m_j
    and p_j = h_j theta - (h_j - 1) theta_j,

        error^2 = (1 / g) sum_j (p_j - c)^2 / (h_j - 1), c = g theta - sum_j (1 - m_j / n) theta_j

    With groups of one value it is the jackknife, exact for the mean. Value i belongs to group i mod g.

    Args:
        values: of the documents.
        statistic: a smooth function of them: a mean, a perplexity, a ratio of sums.
        groups: largest number of groups.
    Returns:
        The error; None for a single document.
    Source: Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m", Statistics and Computing 9.
    """
    n = len(values)
    if n < 2:
        return None
    g = min(n, groups)
    theta = statistic(values)
    without = [statistic([value for i, value in enumerate(values) if i % g != j]) for j in range(g)]
    sizes = [n // g + (j < n % g) for j in range(g)]
    center = g * theta - math.fsum((1 - m / n) * value for m, value in zip(sizes, without, strict=True))
    pseudo = [(n / m, n / m * theta - (n / m - 1) * value) for m, value in zip(sizes, without, strict=True)]
    return math.sqrt(math.fsum((value - center) ** 2 / (h - 1) for h, value in pseudo) / g)


def values_by_document(
    samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str
) -> dict[tuple[str, int], Any]:
    """Return the value of a metric for each document.

    Args:
        samples: records of one task, as the harness writes them.
        metric: name of the metric; documents without it are left out.
        filter_name: the harness's filter.
    Returns:
        Values by the digest of the document and, of documents of equal content, their number.
    """
    seen: Counter[str] = Counter()
    values = {}
    for sample in samples:
        if sample["filter"] == filter_name and metric in sample:
            digest = sample["doc_hash"]
            values[digest, seen[digest]] = sample[metric]
            seen[digest] += 1
    return values


def matched(
    baseline: Mapping[tuple[str, int], Any], other: Mapping[tuple[str, int], Any], names: tuple[str, str], what: str
) -> tuple[list[Any], list[Any]]:
    """Return the values of both models in the same order of documents.

    Args:
        baseline: from `values_by_document`.
        other: the same.
        names: of both, for the message.
        what: task and metric, for the message.
    Raises:
        ValueError: if they are not of the same documents.
    """
    if baseline.keys() != other.keys():
        first, second = len(baseline.keys() - other.keys()), len(other.keys() - baseline.keys())
        raise ValueError(
            f"{what}: {names[0]} and {names[1]} have different documents ({first} in the first alone, {second} in the "
            "second alone), so their difference has no paired error; evaluate both on the same data, or remove the "
            "folder of the older results"
        )
    return list(baseline.values()), [other[key] for key in baseline]
