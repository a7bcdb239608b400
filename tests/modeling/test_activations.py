"""GELU in one kernel is the formula, keeps less for the backward pass, and is in every model that is loaded."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import FastGELUActivation, NewGELUActivation

from llamafactory_ddm.generation.load import load
from llamafactory_ddm.modeling.activations import fuse_gelu
from support.tiny import save_model


def formula(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def kept(module, x):
    """Return the number of values that a module keeps for its backward pass."""
    sizes = {}

    def pack(value):
        sizes[value.untyped_storage()._cdata] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = module(x)
    del result
    return sum(sizes.values())


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_the_kernel_is_the_formula(kind):
    parent = torch.nn.Sequential(kind(), torch.nn.ReLU())
    fuse_gelu(parent)
    x = torch.linspace(-6, 6, 401, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(formula(x).sum(), x)[0]
    actual = parent[0](x)
    torch.testing.assert_close(actual, formula(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), x)[0], expected, rtol=1e-12, atol=1e-12)
    assert isinstance(parent[1], torch.nn.ReLU)
    assert kept(parent[0], x) == x.numel()
    assert kept(kind(), x) >= 4 * x.numel()


def test_a_model_is_the_same_function():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_layer=2, n_embd=16, n_head=2)).eval()
    ids = torch.arange(12)[None]
    expected, names = model(ids).logits, list(model.state_dict())
    fuse_gelu(model)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names


def test_loaded_models_have_the_kernel(tmp_path):
    folder = save_model(tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["activation_function"] == "gelu_new"
    modules = list(load(folder, device="cpu").model.modules())
    assert not any(isinstance(module, NewGELUActivation) for module in modules)
    assert sum(isinstance(module, torch.nn.GELU) for module in modules) == 2
