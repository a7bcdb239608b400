"""Accuracy under parallelism: by hand, against a numerical integral, and its plot."""

import math

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from llamafactory_ddm.harness.parallelism import Curve, Point, accuracy_under_parallelism, plot


def area(pairs, best):
    return accuracy_under_parallelism([Point(*pair) for pair in pairs], best)


def test_by_hand():
    """A point without drop; two, the second weighed by exp(-3 / 40); a third, 6 points below the first, is dropped."""
    assert area([(1.0, 81.2)], 81.2) == pytest.approx(81.2)
    expected = 80 + (2 - 1) * (80 + 78 * 0.927743486) / 2
    assert area([(1, 80), (2, 78)], 80) == pytest.approx(expected, rel=1e-8)
    assert area([(4, 74), (2, 78), (1, 80)], 80) == pytest.approx(expected, rel=1e-8)
    assert area([(1, 80), (2, 75)], 80) > 80  # 5 points below is kept


def test_without_a_loss_it_is_the_area():
    assert area([(0.5, 60), (2, 60), (8, 60)], 60) == pytest.approx(8 * 60)


def test_a_better_model_lowers_the_weight():
    """With y_max = 100 and accuracy 50, W is exp(-1.5); the first term has no weight."""
    assert area([(1, 50), (3, 50)], 100) == pytest.approx(50 + 2 * 50 * math.exp(-1.5))


def test_a_dropped_point_in_the_middle_is_bridged():
    kept = [(1, 90.0), (4, 88.0)]
    assert area([*kept, (2, 10.0)], 90) == area(kept, 90)


def test_it_is_the_integral_of_the_weighted_heights():
    generator = np.random.default_rng(0)
    r, y = np.sort(generator.uniform(0.5, 9, 7)), generator.uniform(86, 90, 7)
    y[0] = 90
    heights = y * np.minimum(np.exp(-3 * (1 - y / 91)), 1)
    expected = r[0] * y[0] + np.trapezoid(heights, r)
    assert area(list(zip(r, y, strict=True)), 91) == pytest.approx(expected)


def test_points_that_have_no_area():
    assert area([(1, 0.0), (2, 0.0)], 0.0) == 0
    assert area([(0, 0.0)], 0.0) == area([(0, 50.0)], 50) == 0  # texts of no token
    for wrong in ([], [(-1.0, 50)]):
        with pytest.raises(ValueError, match="AUP"):
            area(wrong, 50)


def test_the_plot_is_the_same_each_time(tmp_path):
    curve = Curve("mine", (Point(2, 70, 1.5, "8"), Point(1, 80, 1.0, "16")), 123.4)
    other = Curve("autoregressive", (Point(1, 85, None, ""),), 85.0)
    for name in ("one.png", "two.png"):
        plot([("task, acc", [curve, other]), ("another, acc", [curve])], "diffusion_steps", tmp_path / name)
    first = (tmp_path / "one.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    assert first == (tmp_path / "two.png").read_bytes()
