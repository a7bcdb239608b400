"""How often the host would wait for an accelerator: once a step, whatever the denoiser, the strategy and the rows."""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.modeling import kv_cache
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.joint_pass import run_joint
from llamafactory_ddm.modeling.model_runner import ModelRunner
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, get_strategy, nucleus, sample, start, tokens
from llamafactory_ddm.sampling.budget import split_by_position
from llamafactory_ddm.sampling.edits import Edits
from llamafactory_ddm.sampling.loop import denoising_step
from llamafactory_ddm.sampling.prediction import Context
from llamafactory_ddm.serving.joint_step import JointSteps, StepRequest
from support.device_costs import Waits

MASK, LENGTH, BLOCK = 39, 16, 4
PADDING = torch.arange(LENGTH) < torch.tensor([0, 4, 2])[:, None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    make_bidirectional(model)
    return model


@pytest.fixture
def waits(monkeypatch):
    monkeypatch.setattr(kv_cache, "_looks_for_ranges", lambda device: False)
    return Waits(monkeypatch)


def denoiser_of(model, kind, **rest):
    if kind == "model":
        return ModelDenoiser(model, **rest)
    if kind == "block":
        return BlockDenoiser(model, block_length=BLOCK, **rest)
    return CachedDenoiser(model, kind=kind, refresh=3, **rest)


def editable_of(x):
    """All but padding and the first token, and less of the last row, so that it is finished earlier."""
    editable = ~PADDING & ~PADDING.roll(1, dims=1)
    editable[:, 0] = False
    editable[-1, 10:] = False
    return editable


def blocks_of(editable, is_padding, shift):
    return split_by_position(editable, ((~is_padding).cumsum(dim=1) - 1).clamp(min=0), BLOCK, shift=shift)


@pytest.mark.parametrize(
    ("kind", "shift", "strategy"),
    [*itertools.product(["model", "prefix", "dual", "block"], [False, True], ["low_confidence"])]
    + [("dual", True, name) for name in sorted(STRATEGIES) if name != "low_confidence"],
)
def test_a_step_waits_once(model, waits, kind, shift, strategy):
    x, by_step = torch.randint(3, 30, (3, LENGTH), generator=torch.Generator().manual_seed(1)), []
    editable = editable_of(x)
    rest = {"prompt": ~editable & ~PADDING, "no_text": PADDING}
    config = LogitsConfig(0.8, repetition_penalty=1.3, guidance_scale=1.0 if kind == "block" else 1.5, eos_penalty=0.1)
    edits = Edits(threshold=0.05, steps=1) if strategy not in ("random", "remdm") else None

    def step(*args, **rest):
        waits.take()
        with waits:
            state = denoising_step(*args, **rest)
        by_step.append(waits.take())
        return state

    output = sample(
        denoiser_of(model, kind, shift=shift, is_padding=PADDING),
        x,
        editable=editable,
        mask_id=MASK,
        steps=12,
        strategy=get_strategy(strategy),
        logits=config,
        eos_ids=(1, 2),
        eos_last=True,
        block_length=BLOCK,
        block=blocks_of(editable, PADDING, shift) if kind == "block" else None,
        edits=edits,
        context=Context(**rest),
        step_function=step,
    )
    assert output.steps > 5 and int(output.sample_nfe.min()) < output.nfe, "no row is finished before the others"
    # Only the first step tries how the model computes its logits.
    assert all(len(places) == 1 and places[0].startswith("loop.py") for places in by_step[1:]), by_step


def test_a_nucleus_on_an_accelerator_waits_once_more(model, waits, monkeypatch):
    for module in (nucleus, tokens):
        monkeypatch.setattr(module, "is_sequential", lambda device: False)
    monkeypatch.setattr(tokens, "_N_CANDIDATES", 8)
    x = torch.randint(3, 30, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    by_step = []

    def step(*args, **rest):
        with waits:
            state = denoising_step(*args, **rest)
        by_step.append([place.split(":")[0] for place in waits.take()])
        return state

    sample(
        ModelDenoiser(model, shift=True),
        x,
        editable=editable_of(x),
        mask_id=MASK,
        steps=5,
        strategy=get_strategy("low_confidence"),
        logits=LogitsConfig(top_p=0.8),
        step_function=step,
    )
    assert all(places in (["loop.py", "tokens.py"], ["loop.py"]) for places in by_step[1:]), by_step


@pytest.mark.parametrize("kinds", [["model"], ["model", "dual", "prefix"] * 2, ["block"] * 7])
def test_a_joint_step_waits_twice_for_any_number_of_rows(model, waits, kinds):
    runner, requests = ModelRunner(model), []
    x = torch.randint(3, 30, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    strategy, editable = get_strategy("low_confidence"), torch.arange(LENGTH)[None] > 3
    for number, kind in enumerate(kinds):
        block = blocks_of(editable, ~editable & editable, True) if kind == "block" else None
        state, plan = start(x, editable=editable, mask_id=MASK, steps=8, block_length=4, block=block, seed=number)
        denoiser = denoiser_of(model, kind, shift=True, runner=runner)
        requests.append(StepRequest(denoiser, state, plan, strategy, LogitsConfig(), None, None))
    steps, counts = JointSteps(None, runner.logits), []
    for _ in range(5):
        with waits:
            results = steps.take(requests, lambda passes: run_joint(runner, passes))
        counts.append(len(waits.take()))
        for request, result in zip(requests, results, strict=True):
            assert torch.equal(result.state.on_host, result.state.z)
            object.__setattr__(request, "state", result.state)
    assert counts[1:] == [2] * 4, waits.places
    runner.close()
