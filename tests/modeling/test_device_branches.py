"""The branches that only a GPU takes, forced on the CPU: the results are those of the CPU's own."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.diffusion import losses
from llamafactory_ddm.modeling import bidirectional, kv_cache, model_runner, pass_widths
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.objectives.mixed import MixedObjective
from llamafactory_ddm.sampling import LogitsConfig, get_strategy, nucleus, sample, start, tokens
from llamafactory_ddm.sampling.budget import split_by_position
from llamafactory_ddm.utils.devices import check_float64
from support.device_costs import NoFloat64

MASK, LENGTH = 39, 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    make_bidirectional(model)
    return model


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that switches every branch of the sampler to that of a GPU."""

    def switch():
        for module in (nucleus, tokens):
            monkeypatch.setattr(module, "is_sequential", lambda device: False)
        monkeypatch.setattr(tokens, "_N_CANDIDATES", 8)
        monkeypatch.setattr(tokens, "_ELEMENTS_AT_ONCE", {})
        monkeypatch.setattr(losses, "_ELEMENTS_AT_ONCE", {})
        monkeypatch.setattr(kv_cache, "_looks_for_ranges", lambda device: False)
        monkeypatch.setattr(model_runner, "_projects_into_buffers", lambda device: False)
        monkeypatch.setattr(pass_widths, "_COLUMNS_OF_A_PASS", {})

    return switch


@pytest.mark.parametrize("kind", ["model", "dual", "prefix", "block"])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_gpu_generates_the_same_texts(model, gpu, kind, top_p):
    x = torch.randint(3, 30, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    editable = torch.arange(LENGTH) > torch.tensor([3, 5, 8, 2, 15])[:, None]
    block = None
    if kind == "block":
        block = split_by_position(editable, torch.arange(LENGTH).expand(5, -1), 4, shift=True)

    def texts():
        if kind == "block":
            denoiser = BlockDenoiser(model, block_length=4, shift=True)
        elif kind == "model":
            denoiser = ModelDenoiser(model, shift=True)
        else:
            denoiser = CachedDenoiser(model, kind=kind, shift=True)
        config = LogitsConfig(0.9, top_p, score_distribution="filtered")
        rest = {"block_length": 8, "block": block, "eos_ids": (1,), "seed": 3}
        strategy = get_strategy("low_confidence")
        output = sample(
            denoiser, x, editable=editable, mask_id=MASK, steps=24, strategy=strategy, logits=config, **rest
        )
        denoiser.close()
        return output.sequences

    expected = texts()
    gpu()
    assert torch.equal(texts(), expected)


def test_losses_do_not_depend_on_how_much_is_computed_at_once(gpu):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 30, generator=generator), torch.randint(0, 30, (50,), generator=generator)

    def gradient():
        values = logits.clone().requires_grad_()
        loss = losses.masked_cross_entropy(values, targets)
        loss.sum().backward()
        return loss.detach(), values.grad

    expected = gradient()
    gpu()
    for one, other in zip(gradient(), expected, strict=True):
        assert torch.equal(one, other)


def test_the_probe_of_attention_runs_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        bidirectional.probe_bidirectional(model)


def test_a_device_without_float64_is_named():
    x = torch.zeros(1, 4, dtype=torch.int64)
    check_float64(x.device, "this")
    with NoFloat64(), pytest.raises(ValueError, match="float64") as error:
        start(x, editable=x == 0, mask_id=1, steps=2)
    assert "device 'cpu'" in str(error.value)
    with NoFloat64(), pytest.raises(ValueError, match="noise_process"):
        MixedObjective.loss(None, torch.zeros(1, 4), {}, torch.ones(()))


def test_the_masked_loss_needs_no_float64():
    logits = torch.randn(6, 9, requires_grad=True)
    with NoFloat64():
        losses.masked_cross_entropy(logits, torch.arange(6)).sum().backward()
    assert isinstance(logits.grad, Tensor)
