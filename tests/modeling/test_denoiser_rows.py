"""Denoisers of one row each, stacked: the questions and passes of each are those that it has alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.denoiser_rows import DenoiserRows
from llamafactory_ddm.modeling.model_runner import ModelRunner

LENGTHS, MASK, BLOCK = (8, 12, 5, 12, 9), 39, 4
KINDS = {
    "blocks": ["block"] * 5,
    "blocks, two of them without a cache": ["block", "uncached", "block", "uncached", "block"],
    "full attention between blocks": ["dual", "block", "full", "block", "block"],
}


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    make_bidirectional(model)
    runner = ModelRunner(model)
    yield runner
    runner.close()


def denoiser_of(kind, runner, shift):
    options = {"shift": shift, "runner": runner}
    if kind in ("block", "uncached"):
        return BlockDenoiser(runner.model, block_length=BLOCK, cached=kind == "block", **options)
    return (
        CachedDenoiser(runner.model, kind="dual", **options)
        if kind == "dual"
        else ModelDenoiser(runner.model, **options)
    )


def steps_of(generator):
    """Yield canvases that are decoded from left to right, what is asked of each, and the rows that are left."""
    canvases = [torch.full((1, length), MASK) for length in LENGTHS]
    for step in range(12):
        rows = [number for number in range(len(LENGTHS)) if step < 6 or number != 1]
        asked = [torch.zeros(1, length, dtype=torch.bool) for length in LENGTHS]
        for number in rows:
            columns = range(1, LENGTHS[number])
            masked = [column for column in columns if canvases[number][0, column] == MASK]
            if masked and torch.rand((), generator=generator) < 0.8:
                block = [column for column in masked if column // BLOCK == masked[0] // BLOCK]
                asked[number][0, block] = True
        yield canvases, asked, rows
        for canvas, wanted in zip(canvases, asked, strict=True):
            commit = wanted & (torch.rand(wanted.shape, generator=generator) < 0.6)
            canvas[commit] = int(torch.randint(0, MASK, (), generator=generator))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_each_row_has_the_pass_that_it_has_alone(runner, kinds, shift):
    alone, stacked = ([denoiser_of(kind, runner, shift) for kind in kinds] for _ in range(2))
    rows, members, n_compared = None, None, 0
    for canvases, asked, numbers in steps_of(torch.Generator().manual_seed(3)):
        if numbers != members:
            lengths = [LENGTHS[number] for number in numbers]
            rows = DenoiserRows([stacked[number] for number in numbers], lengths, torch.device("cpu"))
            members = numbers
        width = max(LENGTHS[number] for number in numbers)
        z, wanted = torch.zeros(len(numbers), width, dtype=torch.int64), torch.zeros(len(numbers), width).bool()
        for row, number in enumerate(numbers):
            z[row, : LENGTHS[number]], wanted[row, : LENGTHS[number]] = canvases[number], asked[number]
        answers = rows.questions(z, wanted, wanted, 0).tolist()
        passes = rows.passes(z, wanted.flatten().nonzero()[:, 0], wanted, 0, answers)
        for row, number in enumerate(numbers):
            own = alone[number].questions(canvases[number], asked[number], asked[number])
            if not asked[number].any():
                assert passes[row] is None
                continue
            assert answers[row][: own.shape[1]] == own[0].tolist()
            [one], _ = alone[number].passes(
                canvases[number], asked[number][0].nonzero()[:, 0], asked[number], 0, own.tolist()
            )
            assert passes[row].n_keys == one.n_keys and torch.equal(passes[row].ids, one.ids)
            assert torch.equal(runner.run(passes[row])[0], runner.run(one)[0])
            n_compared += 1
    assert n_compared > 25
