import pytest
import torch

from llamafactory_ddm.modeling.quantization import evaluation_mode, is_quantized

Linear4bit = type("Linear4bit", (torch.nn.Identity,), {"__module__": "bitsandbytes.nn.modules"})


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(fails):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()), Linear4bit())
    model[1].eval()
    before = modes(model)
    assert len(set(before)) == 2
    try:
        with evaluation_mode(model):
            assert not (model.training or model[0].training or model[1].training)
            assert model[2].training  # it would be packed for good
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert modes(model) == before


def test_a_layer_of_bitsandbytes_is_a_quantised_model():
    assert is_quantized(torch.nn.Sequential(Linear4bit()))
    assert not is_quantized(torch.nn.Sequential(torch.nn.Linear(1, 1)))
