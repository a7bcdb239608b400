"""lm-evaluation-harness with block models: texts, and likelihoods block by block against forward passes by hand."""

import itertools
import math

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from llamafactory_ddm import load
from llamafactory_ddm.harness.model import DiffusionLM
from llamafactory_ddm.harness.scoring import Answer, AnswerScorer, parts_of
from support.tiny import save_model

B = 4


@pytest.fixture(scope="module", params=[True, False], ids=["shift", "no-shift"])
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("block"), shift=request.param, block_length=B, seed=4)


@torch.inference_mode()
def log_probs(model, z, source):
    """log p at a column of one row; a token sees the blocks up to its own."""
    block = torch.arange(len(z)) // B
    mask = torch.zeros(len(z), len(z)).masked_fill(block[None] > block[:, None], torch.finfo(torch.float32).min)
    logits = model.model(input_ids=torch.tensor([z]), attention_mask=mask[None, None], use_cache=False).logits
    return logits[0, source].double().log_softmax(dim=0)


def bound(model, context, ids):
    """The sum over blocks: a mean over k and over all masks of k of its tokens, given the clean text before it."""
    shift, mask_id, whole = model.config.shift, model.config.mask_token_id, [*context, *ids]
    total, start = 0.0, len(context)
    while start < len(whole):
        if shift and start % B == 0:
            total -= float(log_probs(model, whole[:start], start - 1)[whole[start]])
            start += 1
            continue
        end = min((start // B + 1) * B, len(whole))
        behind = [mask_id] * ((start // B + 1) * B - end)
        for k in range(1, end - start + 1):
            masks = list(itertools.combinations(range(start, end), k))
            for mask in masks:
                z = [mask_id if at in mask else token for at, token in enumerate(whole[:end])] + behind
                terms = sum(float(log_probs(model, z, at - shift)[whole[at]]) for at in mask)
                total -= terms / (k * len(masks))
        start = end
    return total


CASES = [("dog", "cat"), ("cat dog", " dogcat dog"), ("a", "bcdefghijk"), ("dog dog d", "o")]


def test_likelihoods_are_sums_over_blocks(folder):
    model = load(folder)
    start = [] if model.start_id is None else [model.start_id]
    answers = [
        Answer((*start, *model.codec.encode(context)), tuple(model.codec.encode(text)), number)
        for number, (context, text) in enumerate(CASES)
    ]
    for answer, score in zip(answers, AnswerScorer(model).score(answers), strict=True):
        assert score.log_likelihood == pytest.approx(-bound(model, answer.context, answer.ids), abs=1e-4)
        assert score.standard_error == 0
    # Masks that are drawn are drawn for each block by itself, so the errors add up in squares.
    (few,) = AnswerScorer(model, samples=2).score(answers[2:3])
    exact = -bound(model, answers[2].context, answers[2].ids)
    assert 0 < abs(few.log_likelihood - exact) < 5 * few.standard_error
    parts = AnswerScorer(model, samples=2)._score(parts_of(answers[2], model.config, 48))
    assert few.standard_error == pytest.approx(math.hypot(*(part.standard_error for part in parts)))


def test_the_model_type_of_the_harness(folder):
    model = load(folder)
    lm = DiffusionLM(str(folder), diffusion_steps=2)
    request = Instance(
        "generate_until", {}, ("dog cat", {"max_gen_toks": 9, "do_sample": False, "until": []}), 0, ("task", 0, 1)
    )
    (text,) = lm.generate_until([request])
    assert text == model.generate("dog cat", max_new_tokens=9, temperature=0, diffusion_steps=2, raw=True)[0]
    # What greedy decoding generates is called greedy, up to the end of a block.
    n = B - (len(model.codec.encode("dog cat")) + (model.start_id is not None)) % B
    filled = model.writer.write(
        [model.from_prompt("dog cat", n)], model.settings(temperature=0, early_stop="none"), sample_indices=[0]
    )[0]
    answer = Answer(tuple(filled.ids[:-n]), tuple(filled.ids[-n:]), 0)
    wrong = Answer(answer.context, (*answer.ids[:-1], (answer.ids[-1] + 1) % 50), 0)
    right, other = lm.scorer.are_greedy([answer, wrong])
    assert right == (True, n) and not other[0]
    requests = [
        Instance("loglikelihood", {}, ("dog cat", choice), number, ("task", 0, 1))
        for number, choice in enumerate("ab")
    ]
    assert all(value < 0 for value, _ in lm.loglikelihood(requests))
