"""A block looks in training as it does in generation: the same logits from both, packed, padded, after a prompt."""

import pytest
import torch

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.diffusion.blocks import block_of, completion, positions_of
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.block_attention import two_stream_inputs
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.objectives.block import BlockObjective
from support.blocks import noised_ids
from support.tiny import MASK_ID, tiny_model

# Tokens of a prompt, and of its answer: within the prompt's block, in the next blocks, at a block's end, one token.
TURNS = [(3, 2), (3, 7), (6, 2), (5, 4), (8, 5), (4, 1), (7, 1), (3, 1)]


def answers():
    generator = torch.Generator().manual_seed(5)
    for prompt, answer in TURNS:
        ids = torch.randint(1, MASK_ID, (prompt + answer,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def packed(rows):
    """Return the rows as one."""
    keys = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    for number, row in enumerate(rows, 1):
        n = len(row["input_ids"])
        extra = {"position_ids": list(range(n)), "attention_mask": [number] * n}
        for key, values in {**row, **extra}.items():
            keys[key] += values
    return keys


def generated(model, canvas, columns, block_length, shift, n_left):
    """Return the denoiser's logits of the tokens at these columns, with padding on the left, block by block."""
    ids = torch.cat([canvas.new_zeros(n_left), canvas])[None]
    is_padding = (torch.arange(ids.shape[1]) < n_left)[None] if n_left else None
    denoiser = BlockDenoiser(model, block_length=block_length, shift=shift, is_padding=is_padding)
    try:
        return torch.cat(list(denoiser(ids, torch.tensor(columns) + n_left)))
    finally:
        denoiser.close()


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("block_length", [4, 8])
def test_training_and_generation_compute_the_same_logits(shift, is_packed, block_length):
    ours = BlockObjective(
        mask_id=MASK_ID, shift=shift, schedule=get_schedule("linear"), block_length=block_length, n_positions=32
    )
    rows = list(answers())
    batch = [packed(rows[:4]), packed(rows[4:])] if is_packed else rows
    clean = ours.clean(ResponseCollator(pad_id=0, shift=shift)(batch))
    index = torch.arange(len(batch))
    noised, model = ours.noise(clean, sample_index=index, group_size=len(batch)), tiny_model().eval()
    inputs = two_stream_inputs(model, noised.z_t, dtype=torch.float32, **noised.placement)
    logits = model(input_ids=noised.z_t, use_cache=False, **inputs).logits.flatten(0, 1)[noised.head_index]
    z, parts = noised_ids(ours, clean, index), ours.parts(clean)
    scored = (((z == MASK_ID) & parts.noisable) | parts.is_first).nonzero().tolist()
    assert len(scored) == len(logits) > 8
    documents = clean.document if is_packed else torch.zeros_like(clean.x_0)
    for found, (row, token) in zip(logits, scored, strict=True):
        first = int((documents[row] == documents[row, token]).nonzero()[0])
        low = token - (token - first) % block_length
        before, here = clean.x_0[row, first:low], z[row, low : min(low + block_length, z.shape[1])]
        is_answer = (parts.block[row, low : low + len(here)] == parts.block[row, token]) & (
            documents[row, low : low + len(here)] == documents[row, token]
        )
        block = torch.full((block_length,), MASK_ID)
        if not bool(parts.is_first[row, token]):
            block[: len(here)][is_answer] = here[is_answer]
        canvas = torch.cat([before, block])
        same = generated(model, canvas, [token - first], block_length, shift, n_left=3)[0]
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)


def test_last_blocks_are_completed_within_the_models_positions():
    document = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]])
    is_padding = document == 0
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]])
    block = block_of(position, 4, is_padding=is_padding)
    found = completion(block, position, 4, document=document, limit=None)
    assert found.block.tolist() == [[1, 1, 1, 3, 3, 3], [0, -1, -1, -1, -1, -1]]
    assert found.position.tolist() == [[5, 6, 7, 1, 2, 3], [3, 0, 0, 0, 0, 0]]
    assert found.document.tolist() == [[1, 1, 1, 3, 3, 3], [1, 0, 0, 0, 0, 0]]
    short = completion(block, position, 4, document=document, limit=6)
    assert short.position.tolist() == [[5, 1, 2, 3], [3, 0, 0, 0]] and short.block[0].tolist() == [1, 3, 3, 3]
    left = torch.tensor([[True, True, False, False, False], [False] * 5])
    position = positions_of(left, is_padding=left)
    found = completion(block_of(position, 4, is_padding=left), position, 4, document=None, limit=None)
    assert found.position.tolist() == [[3, 0, 0], [5, 6, 7]] and found.block.tolist() == [[0, -1, -1], [1, 1, 1]]
