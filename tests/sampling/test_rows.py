"""Rows of several calls of the sampler in one step, against a step of each alone."""

import dataclasses

import pytest
import torch

from llamafactory_ddm.diffusion.rng import keyed_uniform
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import STRATEGIES, Context, Edits, LogitsConfig, get_strategy
from llamafactory_ddm.sampling.loop import denoising_step
from llamafactory_ddm.sampling.rows import own_steps, split_states, stack_contexts, stack_plans, stack_states
from llamafactory_ddm.sampling.state import start
from support.tiny import MASK_ID, tiny_model

SEEDS = (3, 2**63 + 5, 2**64 - 1)


def call(number, length, steps, seed, *, eos_ids=(2,), edit_steps=0):
    """A call with a prompt of `number + 1` tokens, and what it needs beside its state."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(0, MASK_ID, (1, length), generator=generator)
    editable = torch.arange(length)[None] > number
    state, plan = start(
        x,
        editable=editable,
        mask_id=MASK_ID,
        steps=steps,
        seed=seed,
        sample_index=torch.tensor([number]),
        block_length=5,
        eos_ids=eos_ids,
        edit_steps=edit_steps,
    )
    return state, plan, Context(no_text=torch.arange(length)[None] < 1, prompt=~editable)


def calls(**options):
    return [
        call(number, length, 4 + length // 2, seed, **options)
        for number, length, seed in zip(range(3), (9, 16, 12), SEEDS, strict=True)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_for_each_row(seed):
    rows = torch.tensor([0, 7])
    as_int64 = torch.tensor([seed - 2**64 if seed >= 2**63 else seed] * 2)
    one = keyed_uniform(seed, 5, rows, 11, steps=rows)
    assert torch.equal(keyed_uniform(as_int64, 5, rows, 11, steps=rows), one)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("edits", [None, Edits(ratio=0.3, steps=2)], ids=["plain", "edits"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_step_of_several_calls_is_that_of_each(name, edits, guidance):
    """All fields of the state, after every step to the end, though the calls differ in length, steps and blocks."""
    model = tiny_model().double().eval()
    options = {
        "strategy": get_strategy(name),
        "logits": LogitsConfig(0.9, 0.8, repetition_penalty=1.3, guidance_scale=guidance),
        "edits": edits,
    }
    together = calls(edit_steps=0 if edits is None else edits.steps)
    plan = stack_plans([plan for _, plan, _ in together])
    states = [state for state, _, _ in together]
    alone = list(states)
    context = stack_contexts([context for _, _, context in together], states)
    width = max(state.z.shape[1] for state in states)
    is_open = [True] * 3

    def padded(z, flat_index):
        """Each row through the model without its padding, which a mask would hide."""
        row, column = flat_index // width, flat_index % width
        for number, state in enumerate(states):
            here = column[row == number]
            if len(here):
                denoiser = ModelDenoiser(model, shift=True)
                yield from denoiser(z[number : number + 1, : state.z.shape[1]], here)
                denoiser.close()

    for _ in range(60):
        denoiser = ModelDenoiser(model, shift=True)
        alone = [
            denoising_step(denoiser, state, plan, context=one, **options)
            for state, (_, plan, one) in zip(alone, together, strict=True)
        ]
        denoiser.close()
        after = denoising_step(padded, stack_states(states), plan, context=context, **options)
        states = split_states(own_steps(after, states), states)
        for number, (one, other) in enumerate(zip(alone, states, strict=True)):
            is_open[number] &= not one.finished
            if not is_open[number]:
                continue
            for field in dataclasses.fields(one):
                if field.name not in ("nfe", "finished", "sample_computed"):  # the plain denoiser counts the padding
                    left, right = getattr(one, field.name), getattr(other, field.name)
                    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
                    assert same, (field.name, number, left, right)
        if not any(is_open):
            break
    assert not any(is_open)


def test_plans_are_stacked_once():
    plan = stack_plans([plan for _, plan, _ in calls()])
    with pytest.raises(TypeError, match="stacked already"):
        stack_plans([plan, plan])
