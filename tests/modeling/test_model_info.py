"""The digest of weights."""

import copy

import pytest
import torch
from torch import nn

from llamafactory_ddm.modeling.model_info import weights_digest


def swap(model):
    model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data


@pytest.mark.parametrize(
    "change",
    [
        swap,
        lambda model: model[0].weight.data.copy_(model[0].weight.data.flatten().flip(0).view(3, 3)),
        lambda model: model[0].weight.data.copy_(model[0].weight.data.T.clone()),
        lambda model: model[0].weight.data[0, 0].nextafter_(torch.tensor(9.0)),
        lambda model: model.half(),
    ],
    ids=["swapped", "permuted", "transposed", "one bit", "type"],
)
def test_other_weights_have_another_digest(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other = copy.deepcopy(model)
    assert weights_digest(other) == weights_digest(model) and len(weights_digest(model)) == 16
    change(other)
    assert weights_digest(other) != weights_digest(model)


def test_types_that_numpy_lacks():
    model = nn.Linear(3, 2).bfloat16()
    before = weights_digest(model)
    model.weight.data = model.weight.data.T.contiguous().T  # the same values in other memory
    assert weights_digest(model) == before
