"""Texts of block models: against forward passes over whole prefixes, and through every way to ask for one."""

import dataclasses

import pytest
import torch

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.generation.block_models import in_whole_blocks
from llamafactory_ddm.data.canvas import canvas_of
from support.tiny import save_model

B = 4
GREEDY = SamplingSettings(logits=LogitsConfig(0.0), diffusion_steps=2)
SAMPLED = SamplingSettings(logits=LogitsConfig(1.3, 0.9), diffusion_steps=3)
PROMPTS = ["dog", "cat dog cat dog", "a", "dog dog dog dog dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("block")
    return {
        (family, shift): save_model(
            root / f"{family}-{shift}", family=family, shift=shift, block_length=B, seed=5, positions=64
        )
        for family in ("gpt2", "llama")
        for shift in (True, False)
    }


@pytest.fixture(params=[("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)], ids=str)
def model(request, folders):
    return load(folders[request.param])


def logits_of_prefix(model, ids, sources):
    """Logits at columns, one forward pass over all of `ids`, whose tokens see the blocks up to their own."""
    block = torch.arange(len(ids)) // B
    mask = torch.zeros(len(ids), len(ids)).masked_fill(block[None, :] > block[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits[0]
    logits[:, model.config.mask_token_id :] = -torch.inf  # [MASK] is never drawn
    return logits[sources].log_softmax(dim=1)


def by_plain_forwards(model, prompt_ids, n_tokens, steps):
    """Greedy low_confidence: of each block the most probable tokens first, an equal number in each step."""
    shift, mask_id, eos = model.config.shift, model.config.mask_token_id, model.eos_ids
    ids, end, passes = list(prompt_ids), len(prompt_ids) + n_tokens, 0
    while len(ids) < end:
        if shift and len(ids) % B == 0:
            ids.append(int(logits_of_prefix(model, ids, [len(ids) - 1])[0].argmax()))
            passes += 1
        else:
            start = len(ids)
            masked = list(range(start, (start // B + 1) * B))
            ids += [mask_id] * len(masked)
            n_steps = steps if len(masked) > 1 else 1
            shares = [len(masked) // n_steps + (step < len(masked) % n_steps) for step in range(n_steps)]
            for share in filter(None, shares):
                best, token = logits_of_prefix(model, ids, [at - shift for at in masked]).max(dim=1)
                passes += 1
                for index in best.argsort(descending=True, stable=True)[:share].tolist():
                    ids[masked[index]] = int(token[index])
                masked = [at for at in masked if ids[at] == mask_id]
                if any(ids[at] in eos and all(m > at for m in masked) for at in range(start, len(ids))):
                    break
        new = ids[len(prompt_ids) : end]
        first = next((at for at, token in enumerate(new) if token in eos), None)
        if first is not None:
            return new[:first], passes
    return ids[len(prompt_ids) : end], passes


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_greedy_texts_are_those_of_plain_forward_passes(model, steps):
    settings = dataclasses.replace(GREEDY, diffusion_steps=steps)
    results = list(model.stream(PROMPTS, max_new_tokens=11, settings=settings))
    for prompt, result in zip(PROMPTS, results, strict=True):
        canvas = model.from_prompt(prompt, 11)
        fixed = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
        ids, passes = by_plain_forwards(model, fixed, 11, steps)
        assert result.predict == model.codec.decode(ids, follows=True)
        assert (result.n_tokens, result.num_forward_passes) == (len(ids), passes)
    assert any(result.n_tokens == 11 for result in results)
