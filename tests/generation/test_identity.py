"""What identifies a model."""

import copy

import torch

from llamafactory_ddm.generation.identity import lengths_digest
from llamafactory_ddm.modeling.length_heads import LengthHeads, LengthPredictors


def test_length_heads_fitted_again_are_other_predictors():
    thresholds = {"regressor": torch.arange(2000, dtype=torch.float64)}
    one = LengthPredictors(LengthHeads(8), thresholds, 16)
    changed = {"regressor": thresholds["regressor"] + (thresholds["regressor"] == 1000)}
    assert lengths_digest(one) == lengths_digest(copy.deepcopy(one))
    for other in (LengthPredictors(LengthHeads(8), thresholds, 16), LengthPredictors(one.heads, changed, 16)):
        assert lengths_digest(one) != lengths_digest(other)
