"""The parts of an output embedding with adapters, against PEFT's own forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamafactory_ddm.modeling.lora import low_rank_parts, trained_copy, why_not_low_rank


def adapted_layer(*settings, dtype=torch.float64, bias=True):
    """Return a LoRA layer on a linear one, with an active adapter for each of the settings."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 11, bias=bias).to(dtype))
    names = [f"adapter_{number}" for number in range(len(settings))]
    for name, kwargs in zip(names, settings, strict=True):
        config = LoraConfig(target_modules=["0"], init_lora_weights=False, **kwargs)
        if name == names[0]:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    return model.base_model.model[0]


def gradients_of(layer, hidden, output):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaves = [hidden, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return torch.autograd.grad((output * weights).sum(), leaves)


DROPOUT = {"r": 2, "lora_alpha": 7, "lora_dropout": 0.4}
RS = {"r": 4, "lora_alpha": 3, "use_rslora": True}


@pytest.mark.parametrize("settings", [({"r": 2},), (DROPOUT,), (RS,), (DROPOUT, {"r": 1}, RS)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_parts_of_a_lora_layer_give_its_output_and_gradients(settings, bias):
    """Against PEFT's own forward with the same random state: dropout draws the same."""
    layer = adapted_layer(*settings, bias=bias)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert why_not_low_rank(layer) == ""
    torch.manual_seed(2)
    expected = layer(hidden)
    torch.manual_seed(2)
    linear, (inner, outer) = low_rank_parts(layer, hidden)
    output = linear(hidden) + inner @ outer.T
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients_of(layer, hidden, output), gradients_of(layer, hidden, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_adapters_of_another_precision_than_the_layer():
    layer = adapted_layer({"r": 2}, dtype=torch.bfloat16)  # PEFT keeps adapters in float32
    hidden = torch.randn(5, 6).to(torch.bfloat16)
    linear, (inner, outer) = low_rank_parts(layer, hidden)
    assert (inner.dtype, outer.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close((linear(hidden) + inner @ outer.T).to(torch.bfloat16), layer(hidden))


def test_adapters_that_add_nothing():
    layer, hidden = adapted_layer({"r": 2}, RS), torch.randn(5, 6, dtype=torch.float64)
    original = layer.base_layer(hidden)
    layer.enable_adapters(False)
    assert low_rank_parts(layer, hidden) == (layer.base_layer, None)
    layer.enable_adapters(True)
    changed = layer(hidden)
    layer.merge()
    linear, low_rank = low_rank_parts(layer, hidden)
    assert low_rank is None
    torch.testing.assert_close(linear(hidden), changed)
    layer.enable_adapters(False)  # as PEFT's own forward, it takes the merged adapters out of the weight
    linear, low_rank = low_rank_parts(layer, hidden)
    assert low_rank is None and not layer.merged
    torch.testing.assert_close(linear(hidden), original)


def test_the_trained_copy_is_what_the_wrapper_calls():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 4)), config)
    wrapper, hidden = model.base_model.model[1], torch.randn(2, 3)
    torch.nn.init.normal_(wrapper.modules_to_save["default"].weight)
    copies = []
    for enabled in (True, False):
        wrapper.enable_adapters(enabled)
        copies.append(trained_copy(wrapper))
        torch.testing.assert_close(copies[-1](hidden), wrapper(hidden), rtol=0.0, atol=0.0)
    assert copies == [wrapper.modules_to_save["default"], wrapper.original_module]
