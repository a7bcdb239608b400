"""How long a text will be: statistics by hand, thresholds against brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ddm.sampling.length_predictors import (
    PREDICTORS,
    FirstStep,
    conformal_threshold,
    eos_probability,
    uncalibrated_threshold,
)

MASK, END, PAD, VOCAB = 5, 0, 1, 6


def test_eos_probability_against_the_softmax():
    """Against the softmax written out, [MASK] left out of it."""
    editable = torch.tensor([[False, True, True], [True, False, True]])
    scores = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    seen = []

    def denoiser(z, position):
        seen.append(z)
        yield scores.flatten(0, 1)[position[:1]]  # in parts, as a model gives them
        yield scores.flatten(0, 1)[position[1:]]

    found = eos_probability(denoiser, torch.full((2, 3), 3), editable=editable, mask_id=MASK, eos_ids=[END, PAD])
    assert seen[0].tolist() == [[3, MASK, MASK], [MASK, 3, MASK]]
    for row in range(2):
        for column in range(3):
            weights = scores[row, column, :MASK].exp()
            expected = (weights[END] + weights[PAD]) / weights.sum() if editable[row, column] else 0.0
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-5)


def test_eos_probability_with_penalty_and_suppression():
    """Against the softmax of logits that were changed by hand."""
    scores = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    found = eos_probability(
        lambda z, position: scores[position],
        torch.zeros(1, 2, dtype=torch.int64),
        editable=torch.ones(1, 2, dtype=torch.bool),
        mask_id=MASK,
        eos_ids=[END, PAD],
        suppress=[PAD, 3],
        eos_penalty=0.8,
    )
    changed = scores.clone()
    changed[:, END] -= 0.8
    changed[:, [PAD, 3, MASK]] = float("-inf")
    torch.testing.assert_close(found[0], changed.softmax(dim=1)[:, END])


def step(p_eos, expected_length=None, p_ended=None):
    """A text of one fixed token and four positions to generate."""
    editable = torch.tensor([[False, True, True, True, True]])
    return FirstStep(
        editable,
        torch.tensor([p_eos]),
        None if expected_length is None else torch.tensor([expected_length]),
        None if p_ended is None else torch.tensor([p_ended]),
    )


@pytest.mark.parametrize(
    ("p_eos", "threshold", "length"),
    [
        ([0.9, 0.1, 0.2, 0.8, 0.9], 0.7, 3),  # the given token at the beginning does not count
        ([0.0, 0.1, 0.2, 0.8, 0.9], 0.05, 1),
        ([0.0, 0.1, 0.2, 0.8, 0.9], 0.95, 4),  # never so sure: the whole canvas
        ([0.0, 0.6, 0.1, 0.1, 0.1], 0.5, 1),  # what has ended stays ended
        ([0.0, 1.0, 1.0, 1.0, 1.0], 1.0, 4),  # nothing exceeds certainty
        ([0.0, 1.0, 1.0, 1.0, 1.0], math.inf, 4),
    ],
)
def test_lengths_by_eos_cdf(p_eos, threshold, length):
    assert PREDICTORS["eos_cdf"].lengths(step(p_eos), threshold).tolist() == [length]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_how_a_quantile_deviates_from_an_interpolated_one(share):
    """By the rank j of n: ours ends where j > q n, the published one where j > q (n - 1), so never later than ours."""
    for seed in range(20):
        ended = torch.rand(1, 17, generator=torch.Generator().manual_seed(seed))
        positions = int(
            PREDICTORS["eos_quantile"].lengths(FirstStep(torch.ones(1, 17, dtype=torch.bool), ended), share)
        )
        rank = ended[0].argsort().argsort()
        first = next((n + 1 for n in range(17) if rank[n] > share * 17), 17)
        published = next((n + 1 for n in range(17) if ended[0, n] > ended[0].quantile(share)), 17)
        assert positions == first >= published == next((n + 1 for n in range(17) if rank[n] > share * 16), 17)


def test_lengths_by_a_quantile_of_the_row():
    """EOS is less probable at 1, 0, 3, 2 of the four positions than at the 1st, 2nd, 3rd, 4th."""
    seen = step([0.9, 0.2, 0.1, 0.8, 0.4])
    found = {
        threshold: PREDICTORS["eos_quantile"].lengths(seen, threshold).tolist()[0]
        for threshold in (0.2, 0.25, 0.5, 0.75)
    }
    assert found == {0.2: 1, 0.25: 3, 0.5: 3, 0.75: 4}


def test_lengths_by_the_expected_length():
    """P(ended by 1, 2, 3, 4) = 0.1, 0.1 (running maximum), 0.8, 1, so P(n) = 0.1, 0, 0.7, 0.2, whose mean is 3."""
    seen = step([0.9, 0.1, 0.05, 0.8, 1.0])
    assert float(PREDICTORS["expected"].estimate(seen)) == pytest.approx(0.1 * 1 + 0.7 * 3 + 0.2 * 4)
    assert PREDICTORS["expected"].lengths(seen, 0.0).tolist() == [3]
    assert PREDICTORS["expected"].lengths(seen, math.log(4.5 / 4.0)).tolist() == [4]  # 1 + positions is 4, then 4.5
    assert PREDICTORS["expected"].lengths(seen, -math.inf).tolist() == [1]


def test_a_threshold_for_each_row():
    two = FirstStep(torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0.1, 0.5, 0.9]] * 2))
    assert PREDICTORS["eos_cdf"].lengths(two, torch.tensor([0.2, 0.6])).tolist() == [2, 3]
    assert PREDICTORS["expected"].lengths(two, torch.tensor([0.0, -0.5])).tolist() == [3, 2]


def test_lengths_of_trained_heads():
    assert PREDICTORS["regressor"].lengths(step([0.0] * 5, expected_length=2.4), 0.0).tolist() == [3]
    classified = step([0.0] * 5, p_ended=[0.9, 0.1, 0.6, 0.2, 0.2])
    assert PREDICTORS["token_classifier"].lengths(classified, 0.5).tolist() == [2]
    for name in ("regressor", "token_classifier"):
        with pytest.raises(ValueError, match=rf"length_predictor: {name} .*fit-length"):
            PREDICTORS[name].lengths(step([0.0] * 5), 0.0)


texts = st.tuples(
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.30001, 0.7, 1.0]), min_size=5, max_size=5), st.integers(1, 4)
)


@given(text=texts, name=st.sampled_from(sorted(PREDICTORS)), more=st.floats(0.0, 2.0))
def test_the_min_threshold_is_the_smallest_that_suffices(text, name, more):
    """With it, and with any larger one, the length is at least `needed`; with a smaller one it is not."""
    values, needed = text
    seen = step(values, expected_length=1.0 + 3 * values[0], p_ended=values)
    predictor = PREDICTORS[name]
    least = float(predictor.min_threshold(seen, torch.tensor([needed])))
    assert int(predictor.lengths(seen, least)) >= needed
    assert int(predictor.lengths(seen, least + more)) >= int(predictor.lengths(seen, least))
    if needed > 1:  # one position is always given
        assert int(predictor.lengths(seen, least - 2e-3)) < needed


@given(
    thresholds=st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=30),
    coverage=st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]),
)
def test_the_threshold_covers_by_brute_force(thresholds, coverage):
    """The smallest candidate that covers ceil((n + 1) coverage) of n, or infinity if that exceeds n."""
    n, asked = len(thresholds), round((len(thresholds) + 1) * coverage, 6)
    fitting = [m for m in thresholds if sum(other <= m for other in thresholds) >= asked]
    expected = min(fitting) if asked <= n else math.inf
    assert conformal_threshold(torch.tensor(thresholds, dtype=torch.float64), coverage) == expected


def test_a_calibrated_threshold_covers_new_texts():
    """Over many draws of 39 texts and a new, exchangeable one, the new one is covered in 90 % of cases."""
    draws = torch.randn(4000, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covered = [float(row[-1]) <= conformal_threshold(row[:-1], 0.9) for row in draws]
    assert sum(covered) / len(covered) == pytest.approx(0.9, abs=0.015)


def test_thresholds_without_calibration():
    assert uncalibrated_threshold("eos_cdf", 0.9, "why") == uncalibrated_threshold("eos_quantile", 0.9, "why") == 0.9
    with pytest.raises(ValueError, match=r"length_predictor: expected .*no texts.*fit-length.*eos_cdf"):
        uncalibrated_threshold("expected", 0.9, "there are no texts")


@pytest.mark.parametrize("coverage", [0.0, 1.5, float("nan")])
def test_a_coverage_out_of_range(coverage):
    for check in (
        lambda: uncalibrated_threshold("eos_cdf", coverage, "why"),
        lambda: conformal_threshold(torch.zeros(3), coverage),
    ):
        with pytest.raises(ValueError, match="length_coverage"):
            check()
