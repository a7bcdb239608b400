"""How good predicted lengths are, counted one text at a time."""

import math

import pytest
import torch

from llamafactory_ddm.evaluation.lengths import FOLDS, as_table, length_metrics, min_thresholds
from llamafactory_ddm.sampling.length_predictors import PREDICTORS, FirstStep, calibrated_threshold

CANVAS = 12


def batches(sizes=(8, 8, 7)):
    """Texts of 1 to 10 tokens, and statistics that tell roughly where they end."""
    generator = torch.Generator().manual_seed(3)
    steps, needed = [], []
    for size in sizes:
        n = torch.randint(1, 11, (size,), generator=generator)
        offset = torch.arange(CANVAS)[None] - (n[:, None] - 1)
        seen = (offset + torch.randn(size, CANVAS, generator=generator)).sigmoid()
        guess = n + torch.randn(size, generator=generator)
        steps.append(FirstStep(torch.ones(size, CANVAS, dtype=torch.bool), seen, guess.clamp(min=0.5), seen.sqrt()))
        needed.append(n)
    return steps, needed


def single(steps, needed):
    """One text at a time."""
    for step, n in zip(steps, needed, strict=True):
        for row in range(len(n)):
            one = slice(row, row + 1)
            yield FirstStep(step.editable[one], step.p_eos[one], step.expected_length[one], step.p_ended[one]), n[one]


@pytest.mark.parametrize("coverage", [0.5, 0.9])
@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_the_metrics_by_hand(name, coverage):
    steps, needed = batches()
    predictor, rows = PREDICTORS[name], list(single(steps, needed))
    thresholds = [float(predictor.min_threshold(step, n)) for step, n in rows]
    enough, excess, square, saved = [], [], [], []
    for number, (step, n) in enumerate(rows):
        others = sorted(m for index, m in enumerate(thresholds) if index % FOLDS != number % FOLDS)
        rank = math.ceil((len(others) + 1) * coverage)
        threshold = math.inf if rank > len(others) else others[rank - 1]
        if name == "eos_cdf":
            threshold = max(threshold, coverage)
        length = int(predictor.lengths(step, threshold))
        enough.append(length >= int(n))
        excess.append(max(length - int(n), 0))
        square.append((length - int(n)) ** 2)
        saved.append(CANVAS - length)
    n = len(rows)
    assert length_metrics(steps, needed, coverage)[name] == pytest.approx(
        {
            "not_too_short": sum(enough) / n,
            "mean_excess": sum(excess) / n,
            "rmse": math.sqrt(sum(square) / n),
            "tokens_saved": sum(saved) / n,
            "canvas": CANVAS,
        }
    )


def test_lengths_are_rounded_as_generation_does():
    """A canvas of 3 fixed tokens and 12 positions to generate has 4, 8, 12 or 15 tokens."""
    steps, needed = batches()
    n_fixed = [torch.full_like(n, 3) for n in needed]
    plain = length_metrics(steps, needed, 0.9)
    found = length_metrics(steps, needed, 0.9, n_fixed=n_fixed, block=4)
    for name in PREDICTORS:
        assert found[name]["tokens_saved"] < plain[name]["tokens_saved"]
        assert found[name]["not_too_short"] >= plain[name]["not_too_short"]
        saved = found[name]["tokens_saved"] * sum(map(len, needed))
        assert saved == pytest.approx(round(saved))
    nothing = torch.zeros(5, CANVAS)
    one = FirstStep(torch.ones(5, CANVAS, dtype=torch.bool), nothing, torch.ones(5), nothing)
    everything = length_metrics(
        [one], [torch.full((5,), 2)], 1.0, n_fixed=[torch.zeros(5, dtype=torch.int64)], block=5
    )
    assert everything["eos_cdf"]["tokens_saved"] == 0.0  # never beyond the canvas


def test_min_thresholds_are_in_the_order_of_the_texts():
    steps, needed = batches()
    found = min_thresholds(steps, needed)
    for name, predictor in PREDICTORS.items():
        expected = [float(predictor.min_threshold(step, n)) for step, n in single(steps, needed)]
        assert found[name].tolist() == pytest.approx(expected)


def test_calibration_never_lowers_the_threshold_of_eos_cdf():
    few = torch.full((40,), 0.2, dtype=torch.float64)
    assert (
        calibrated_threshold("eos_cdf", few, 0.9) == 0.9 and calibrated_threshold("token_classifier", few, 0.9) == 0.2
    )
    assert calibrated_threshold("eos_cdf", few + 0.79, 0.9) == pytest.approx(0.99)


def test_too_few_texts():
    steps, needed = batches((4,))
    with pytest.raises(ValueError, match="eval_dataset holds 4 texts"):
        length_metrics(steps, needed, 0.5)


def test_the_table_has_a_line_for_each_predictor():
    lines = as_table(length_metrics(*batches(), 0.9)).splitlines()
    assert [line.split()[0] for line in lines] == ["predictor", *PREDICTORS]
    assert len({len(line) for line in lines}) == 1
