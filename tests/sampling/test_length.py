"""How long a text will be, by hand."""

import pytest
import torch

from llamafactory_ddm.sampling.length import end_probability, places_needed

MASK, END, PAD, VOCAB = 5, 0, 1, 6


def test_the_probability_of_an_end_or_a_pad():
    """Against the softmax written out, [MASK] left out of it."""
    editable = torch.tensor([[False, True, True], [True, False, True]])
    scores = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    seen = []

    def denoiser(z, place):
        seen.append(z)
        yield scores.flatten(0, 1)[place[:1]]  # in parts, as a model gives them
        yield scores.flatten(0, 1)[place[1:]]

    found = end_probability(denoiser, torch.full((2, 3), 3), editable=editable, mask_id=MASK, end_ids=[END, PAD])
    assert seen[0].tolist() == [[3, MASK, MASK], [MASK, 3, MASK]]
    for row in range(2):
        for column in range(3):
            weights = scores[row, column, :MASK].exp()
            expected = (weights[END] + weights[PAD]) / weights.sum() if editable[row, column] else 0.0
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("ended", "coverage", "needed"),
    [
        ([0.9, 0.1, 0.2, 0.8, 0.9], 0.7, 3),  # the given token at the beginning does not count
        ([0.0, 0.1, 0.2, 0.8, 0.9], 0.1, 1),
        ([0.0, 0.1, 0.2, 0.8, 0.9], 0.95, 4),  # never so sure: the whole canvas
        ([0.0, 0.6, 0.1, 0.1, 0.1], 0.5, 1),  # what has ended stays ended
    ],
)
def test_how_many_places(ended, coverage, needed):
    editable = torch.tensor([[False, True, True, True, True]])
    assert places_needed(torch.tensor([ended]), editable, coverage).tolist() == [needed]


@pytest.mark.parametrize("coverage", [0.0, 1.5, float("nan")])
def test_a_coverage_out_of_range(coverage):
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\]"):
        places_needed(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), coverage)
