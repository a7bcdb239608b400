"""Accuracy against tokens per forward pass: the score AUP, and the plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ..utils.files import replacing

ALPHA = 3.0  # of the weight
LARGEST_DROP = 5.0  # points of accuracy below the first


@dataclass(frozen=True)
class Point:
    """An evaluation under one value of the swept key.

    Attributes:
        tokens_per_pass: generated tokens per forward pass, at least 0.
        accuracy: in percent.
        error: standard error of the accuracy, in percent; None if unknown.
        label: the value.
    """

    tokens_per_pass: float
    accuracy: float
    error: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """The points of a model, and its score."""

    name: str
    points: tuple[Point, ...]
    score: float


def accuracy_under_parallelism(points: Sequence[Point], best: float) -> float:
    """Return AUP, the weighted area under accuracy as a function of tokens per forward pass.

    With points (r_i, y_i) in ascending order of tokens per forward pass r, accuracies y in percent, of which those
    below y_1 - 5 are dropped,

        AUP = r_1 y_1 + sum over i >= 2 of (r_i - r_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-alpha (1 - y / y_max)), 1), alpha = 3

    Args:
        points: at least one; of equal r, the more accurate comes first.
        best: y_max, the highest accuracy of any model on the task, in percent. If it is 0, so is the area.
    Raises:
        ValueError: if there are no points, or tokens per forward pass are negative.
    Source: Qian et al. 2026, d3LLM (arXiv 2601.07568), and AUP_leaderboard of its code.
    Deviates: its code stops if the last point is below y_1 - 5; here it is dropped, as the paper says. r may be 0, if
        every text is empty.
    """
    if not points or min(point.tokens_per_pass for point in points) < 0:
        raise ValueError(f"AUP needs points with tokens per forward pass of at least 0, got {list(points)}")
    if best <= 0:
        return 0.0
    ordered = sorted(points, key=lambda point: (point.tokens_per_pass, -point.accuracy))
    first = ordered[0]
    kept = [point for point in ordered if point.accuracy >= first.accuracy - LARGEST_DROP]
    area = first.tokens_per_pass * first.accuracy
    for left, right in itertools.pairwise(kept):
        heights = [_weighted(point.accuracy, best) for point in (left, right)]
        area += (right.tokens_per_pass - left.tokens_per_pass) * sum(heights) / 2
    return area


def _weighted(accuracy: float, best: float) -> float:
    return accuracy * min(math.exp(-ALPHA * (1 - accuracy / best)), 1.0)


def plot(panels: Sequence[tuple[str, Sequence[Curve]]], swept: str, path: Path) -> None:
    """Draw accuracy against tokens per forward pass: a panel a task, a line a model, with error bars.

    Args:
        panels: title and curves of each task.
        swept: name of the key whose values label the points.
        path: the PNG.
    """
    figure = Figure(figsize=(6.4, 3.8 * len(panels)))
    for axes, (title, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for curve in curves:
            ordered = sorted(curve.points, key=lambda point: point.tokens_per_pass)
            x, y = [point.tokens_per_pass for point in ordered], [point.accuracy for point in ordered]
            errors = [point.error or 0.0 for point in ordered]
            axes.errorbar(x, y, errors, marker="o", ms=4, capsize=3, label=f"{curve.name} (AUP {curve.score:.1f})")
            for point in ordered:
                place = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7, "color": "dimgray"}
                axes.annotate(point.label, (point.tokens_per_pass, point.accuracy), **place)
        low, high = (pick(point.accuracy for each in curves for point in each.points) for pick in (min, max))
        axes.set_ylim(max(low - 6, -3), min(high + 4, 103))
        axes.set(title=title, xlabel=f"tokens per forward pass (points: {swept})", ylabel="accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
