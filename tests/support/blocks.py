"""Block diffusion computed the slow way: each block of each document by a forward pass of its own, a row at a time.

And a checkpoint as a block model.
"""

import json
import shutil

import torch

from llamafactory_ddm.diffusion.blocks import mask_blocks
from llamafactory_ddm.modeling.bidirectional import full_attention_mask
from llamafactory_ddm.modeling.block_attention import two_stream_inputs
from llamafactory_ddm.modeling.diffusion_config import FILE_NAME


def forward(model, ids, block_length):
    """Return the logits of one text, [length, vocab], each token seeing its block and the blocks before it."""
    block = torch.arange(len(ids)) // block_length
    visible = (block[:, None] >= block[None, :])[None, None]
    shape = {"batch": 1, "length": len(ids), "dtype": model.dtype, "device": ids.device}
    mask = full_attention_mask(model, is_padding=None, visible=visible, **shape)
    return model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]


def nll(logits, token):
    return -logits.float().log_softmax(dim=-1)[token]


def loss_by_blocks(model, x_0, z, maskable, *, block_length, shift, mask_id, weighted=True):
    """Return the sum of weighted cross-entropies of one document, [length] each, whose noised ids are z."""
    total = torch.zeros(())
    for low in range(0, len(x_0), block_length):
        high = min(low + block_length, len(x_0))
        columns = range(low + shift, high)
        noisable = [i for i in columns if maskable[i]]
        masked = [i for i in noisable if z[i] == mask_id and x_0[i] != mask_id]
        if shift and low and maskable[low]:
            total = total + nll(forward(model, x_0[:low], block_length)[-1], x_0[low])
        if masked:
            behind = z.new_full((low + block_length - high,), mask_id)  # generation decodes whole blocks
            logits = forward(model, torch.cat([x_0[:low], z[low:high], behind]), block_length)
            weight = len(noisable) / len(masked) if weighted else 1.0
            total = total + weight * sum(nll(logits[i - shift], x_0[i]) for i in masked)
    return total


def noised_ids(objective, clean, rows):
    """Return the ids of the noisy stream, [batch, length], from the same random numbers as the batch's."""
    parts = objective.parts(clean)
    rule = {"schedule": objective.schedule, "time_epsilon": objective.time_epsilon, "seed": objective.seed}
    masks = mask_blocks(parts.noisable, parts.block, objective.block_noise, sample_index=rows, **rule)
    return clean.x_0.masked_fill(masks.is_masked | parts.behind, objective.mask_id)


def two_streams(model, objective, batch):
    """Return the loss of a noised batch times its denominator, computed as the trainer does."""
    inputs = two_stream_inputs(model, batch.z_t, dtype=model.dtype, **batch.placement)
    logits = model(input_ids=batch.z_t, use_cache=False, **inputs).logits.flatten(0, 1)
    loss, _ = objective.loss(logits[batch.head_index], batch.scored, torch.ones(()))
    return loss


def as_block_model(folder, target, length=4):
    """Copy a checkpoint to `target`, where it is a block model of the same weights; returns that folder."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((target / FILE_NAME).read_text())
    (target / FILE_NAME).write_text(json.dumps({**config, "attention": "block", "train_block_length": length}))
    return target
