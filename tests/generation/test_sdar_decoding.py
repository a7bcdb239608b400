"""Texts of a published SDAR: as its published script decodes them, with every forward pass written out."""

import pytest
import torch

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from support.published_sdar import MASK, sdar_by_formula, sdar_weights, write_sdar

PROMPTS = ["dog", "cat dog", "abcdef", "dog dog dog"]


def as_published(tokenizer, prompt, n_tokens, block, steps, threshold):
    """Greedy decoding of the published script: block / steps tokens a pass, and one more in each of the first.

    With a threshold all tokens above it, if these are more ("low_confidence_dynamic"). [MASK] and rows of the
    embedding without a token are left out, which the published script does not do.
    """
    ids, mask_id = tokenizer.encode(prompt, add_special_tokens=False), tokenizer.convert_tokens_to_ids(MASK)
    end, start, passes = len(ids) + n_tokens, len(ids), 0
    while len(ids) < end:
        first = len(ids)
        ids += [mask_id] * (block - first % block)
        shares = [block // steps + (step < block % steps) for step in range(steps)]
        for share in shares:
            masked = [at for at in range(first, len(ids)) if ids[at] == mask_id]
            if not masked:
                break
            logits = sdar_by_formula(sdar_weights(), ids, block)[masked]
            logits[:, mask_id:] = -torch.inf
            confidence, token = logits.softmax(dim=1).max(dim=1)
            passes += 1
            chosen = [index for index in range(len(masked)) if confidence[index] > threshold]
            if len(chosen) < share:
                chosen = confidence.argsort(descending=True)[:share].tolist()
            for index in chosen:
                ids[masked[index]] = int(token[index])
        if tokenizer.eos_token_id in ids[start:]:
            break
    new = ids[start:end]
    return new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new


@pytest.mark.parametrize(
    ("keys", "block", "steps", "threshold"),
    [
        ({"denoising_strategy": "low_confidence"}, 4, 4, 2.0),
        ({"denoising_strategy": "low_confidence"}, 8, 8, 2.0),
        ({"denoising_strategy": "confidence_threshold", "confidence_threshold": 0.3}, 4, 4, 0.3),
    ],
)
def test_a_published_sdar_writes_what_its_script_writes(tmp_path, keys, block, steps, threshold):
    model = load(write_sdar(tmp_path / "published", block_size=block))
    settings = SamplingSettings(logits=LogitsConfig(0.0), diffusion_steps=steps)
    texts = model.generate(PROMPTS, max_new_tokens=9, settings=settings, **keys)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = as_published(model.tokenizer, prompt, 9, block, steps, threshold)
        assert text == model.codec.decode(ids, follows=True), prompt
