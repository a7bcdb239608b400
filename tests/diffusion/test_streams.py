"""Training, evaluation and sampling draw numbers of their own, whatever seed they have in common."""

import itertools

import pytest
import torch

from llamafactory_ddm.data.collators import VariableLengthCollator
from llamafactory_ddm.diffusion import attention, likelihood, noise
from llamafactory_ddm.diffusion import eos_noise as ends
from llamafactory_ddm.diffusion import rng as philox
from llamafactory_ddm.diffusion.blocks import block_of, mask_blocks
from llamafactory_ddm.diffusion.schedules import LinearSchedule
from llamafactory_ddm.evaluation.eos import EosRows, statistics
from llamafactory_ddm.integration.predict.fit_length import length_examples
from llamafactory_ddm.objectives.base import CleanBatch
from llamafactory_ddm.objectives.block import BlockObjective
from llamafactory_ddm.objectives.mixed import MixedObjective
from llamafactory_ddm.sampling.state import start
from support.numbers import Ledger

ROWS, LENGTH, MASK = torch.arange(2, 6), 8, 9
X = torch.full((len(ROWS), LENGTH), 3)
ALL, END = torch.ones_like(X, dtype=torch.bool), torch.full((len(ROWS),), 5)
KEYS = {"seed": 0, "sample_index": ROWS}
MIXED = MixedObjective(mask_id=MASK, shift=False, schedule=LinearSchedule(), uniform_ratio=0.5, n_ids=9)
BLOCKS = BlockObjective(mask_id=MASK, shift=False, schedule=LinearSchedule(), block_length=3)
CLEAN = CleanBatch(X, ALL)
DOCUMENTS, COLLATOR = [{"input_ids": [3] * 6}] * 6, VariableLengthCollator(1, (1,), LENGTH)


def masks(_):
    t = torch.full((len(ROWS),), 0.5)
    ends.draw_masks(
        ends.EosNoise(0.5, eos_window_ratio=0.5), ALL, ALL, END, t, LinearSchedule(), weighting="elbo", step=0, **KEYS
    )


def plan(steps, steps_taken=0):
    options = {"editable": ALL, "mask_id": MASK, "steps": steps, "steps_taken": torch.full_like(ROWS, steps_taken)}
    return start(X, **options, seed=0, sample_index=ROWS)[1]


def sampled(steps, steps_taken=0):
    for stream in (noise.Stream.SAMPLE_TOKEN, noise.Stream.SAMPLE_ORDER, noise.Stream.REMASK):
        for step in range(steps):
            plan(steps, steps_taken).uniform(stream, torch.full_like(ROWS, step))


def measured(_):
    table = lambda masked: torch.zeros(int(masked.sum()), MASK)  # noqa: E731
    statistics(EosRows(ALL, ~ALL, END, 0, ROWS), table, eos_ids=[1], pad_ids=[])


USES = {
    "training, masked": masks,
    "training, time": lambda _: noise.draw_time(0, ROWS),
    "training, mixed": lambda _: MIXED._mix(CLEAN, torch.full((len(ROWS),), 0.5), **KEYS),
    "training, cut": lambda _: CLEAN.truncated(0.5, **KEYS),
    "training, blocks": lambda _: mask_blocks(
        ALL,
        block_of(torch.arange(LENGTH).repeat(len(ROWS), 1), 3),
        "counts",
        schedule=LinearSchedule(),
        time_epsilon=0,
        **KEYS,
    ),
    "evaluation, blocks": lambda _: list(BLOCKS.evaluations(CLEAN, torch.full((len(ROWS), 1), 0.5), **KEYS)),
    "attention, step 3 of length 4": lambda _: attention.annealed_visibility(4, 0.5, seed=0, draw=3, device="cpu"),
    "attention, step 2 of length 6": lambda _: attention.annealed_visibility(6, 0.5, seed=0, draw=2, device="cpu"),
    "evaluation, masked": lambda _: likelihood.mask_exactly(ALL, torch.full((len(ROWS),), 0.5), **KEYS),
    "evaluation, mixed": lambda _: list(MIXED.evaluations(CLEAN, torch.full((len(ROWS), 1), 0.5), **KEYS)),
    "evaluation, ends": measured,
    "length fit, training": lambda _: list(length_examples(DOCUMENTS, COLLATOR, 0, 0)),
    "length fit, held out": lambda _: list(length_examples(DOCUMENTS, COLLATOR, 0, 1)),
    "sampling, first part": lambda _: sampled(4),
    "sampling, second part": lambda _: sampled(6, steps_taken=4),
}
ONE_IN_A_RUN = [
    {f"{use}, {one}", f"{use}, {other}"}
    for use in ("training", "evaluation")
    for one, other in itertools.combinations(("masked", "mixed", "blocks"), 2)
]


def numbers_of(use, ledger):
    """Return the counters that a use draws from."""
    seen = set()

    def philox4x32(counter, key):
        before = ledger.philox(counter, key)
        counter = torch.broadcast_tensors(*counter)
        seen.update((key, *one) for one in zip(*(part.flatten().tolist() for part in counter), strict=True))
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "philox4x32", philox4x32)
        USES[use](None)
    assert seen
    return seen


def test_no_two_streams_share_random_numbers():
    ledger = Ledger()
    found = {use: numbers_of(use, ledger) for use in USES}
    for use in found:
        for other in found:
            if use != other and {use, other} not in ONE_IN_A_RUN:
                assert not found[use] & found[other], f"{use} and {other}"


def test_revealing_and_cutting_use_independent_numbers():
    """In one evaluation, for the same rows."""
    ledger, counters = Ledger(), []

    def philox4x32(counter, key):
        counters.append(int(counter[3].unique()))
        return ledger.philox(counter, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "philox4x32", philox4x32)
        measured(None)
    assert set(counters) == {noise.Stream.EVALUATION_REVEAL, noise.Stream.EVALUATION_CUT}


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_indices_and_steps_have_32_bits(wrong):
    for key in ("sample_index", "steps_taken"):
        indices = {"sample_index": ROWS, "steps_taken": ROWS} | {key: ROWS.masked_fill(ROWS == 3, wrong)}
        with pytest.raises(ValueError, match=r"sample_index and steps_taken must lie in \[0, 2\*\*32\)"):
            start(X, editable=ALL, mask_id=MASK, steps=4, **indices)


def test_sample_index_and_step_are_independent_keys():
    """Sample indices and steps up to 2**32 - 1, and columns of a long canvas."""
    ledger = Ledger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "philox4x32", ledger.philox)
        pairs = [(row, step) for row in (0, 1, 2**16, 2**32 - 1) for step in (0, 1, 2**16, 2**32 - 1)]
        rows, steps = torch.tensor(pairs).unbind(dim=1)
        u = philox.keyed_uniform(7, noise.Stream.SAMPLE_TOKEN, rows, 40_000, steps=steps)
    assert u.unique().numel() == u.numel()
