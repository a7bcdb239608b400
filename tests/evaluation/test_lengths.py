"""How good predicted lengths are, counted one text at a time."""

import math

import pytest
import torch

from llamafactory_ddm.evaluation.lengths import FOLDS, as_table, least_margins, length_metrics
from llamafactory_ddm.sampling.length_predictors import PREDICTORS, FirstStep, calibrated_margin

PLACES = 12


def batches(sizes=(8, 8, 7)):
    """Texts of 1 to 10 places, of which a forward says roughly where they end."""
    generator = torch.Generator().manual_seed(3)
    steps, needed = [], []
    for size in sizes:
        n = torch.randint(1, 11, (size,), generator=generator)
        place = torch.arange(PLACES)[None] - (n[:, None] - 1)
        seen = (place + torch.randn(size, PLACES, generator=generator)).sigmoid()
        guess = n + torch.randn(size, generator=generator)
        steps.append(FirstStep(torch.ones(size, PLACES, dtype=torch.bool), seen, guess.clamp(min=0.5), seen.sqrt()))
        needed.append(n)
    return steps, needed


def single(steps, needed):
    """One text at a time."""
    for step, n in zip(steps, needed, strict=True):
        for row in range(len(n)):
            one = slice(row, row + 1)
            yield FirstStep(step.editable[one], step.ended[one], step.length[one], step.behind[one]), n[one]


@pytest.mark.parametrize("coverage", [0.5, 0.9])
@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_the_metrics_by_hand(name, coverage):
    steps, needed = batches()
    predictor, rows = PREDICTORS[name], list(single(steps, needed))
    margins = [float(predictor.least_margin(step, n)) for step, n in rows]
    enough, excess, square, saved = [], [], [], []
    for number, (step, n) in enumerate(rows):
        others = sorted(m for index, m in enumerate(margins) if index % FOLDS != number % FOLDS)
        rank = math.ceil((len(others) + 1) * coverage)
        margin = math.inf if rank > len(others) else others[rank - 1]
        if name == "belief":
            margin = max(margin, coverage)
        given = int(predictor.places(step, margin))
        enough.append(given >= int(n))
        excess.append(max(given - int(n), 0))
        square.append((given - int(n)) ** 2)
        saved.append(PLACES - given)
    n = len(rows)
    assert length_metrics(steps, needed, coverage)[name] == pytest.approx(
        {
            "not_too_short": sum(enough) / n,
            "mean_excess": sum(excess) / n,
            "rmse": math.sqrt(sum(square) / n),
            "tokens_saved": sum(saved) / n,
            "canvas": PLACES,
        }
    )


def test_places_are_rounded_as_generation_does():
    """A canvas of 3 given tokens and 12 places ends at 4, 8, 12 or 15 tokens."""
    steps, needed = batches()
    given = [torch.full_like(n, 3) for n in needed]
    plain = length_metrics(steps, needed, 0.9)
    found = length_metrics(steps, needed, 0.9, given=given, block=4)
    for name in PREDICTORS:
        assert found[name]["tokens_saved"] < plain[name]["tokens_saved"]
        assert found[name]["not_too_short"] >= plain[name]["not_too_short"]
        saved = found[name]["tokens_saved"] * sum(map(len, needed))
        assert saved == pytest.approx(round(saved))
    nothing = torch.zeros(5, PLACES)
    one = FirstStep(torch.ones(5, PLACES, dtype=torch.bool), nothing, torch.ones(5), nothing)
    everything = length_metrics([one], [torch.full((5,), 2)], 1.0, given=[torch.zeros(5, dtype=torch.int64)], block=5)
    assert everything["belief"]["tokens_saved"] == 0.0  # never beyond the canvas


def test_what_calibrates_is_in_the_order_of_the_texts():
    steps, needed = batches()
    found = least_margins(steps, needed)
    for name, predictor in PREDICTORS.items():
        expected = [float(predictor.least_margin(step, n)) for step, n in single(steps, needed)]
        assert found[name].tolist() == pytest.approx(expected)


def test_the_belief_is_corrected_one_way_only():
    few = torch.full((40,), 0.2, dtype=torch.float64)
    assert calibrated_margin("belief", few, 0.9) == 0.9 and calibrated_margin("token_classifier", few, 0.9) == 0.2
    assert calibrated_margin("belief", few + 0.79, 0.9) == pytest.approx(0.99)


def test_too_few_texts():
    steps, needed = batches((4,))
    with pytest.raises(ValueError, match=r"4 held-out texts are too few.* at least 5"):
        length_metrics(steps, needed, 0.5)


def test_the_table_has_a_line_for_each_predictor():
    lines = as_table(length_metrics(*batches(), 0.9)).splitlines()
    assert [line.split()[0] for line in lines] == ["predictor", *PREDICTORS]
    assert len({len(line) for line in lines}) == 1
