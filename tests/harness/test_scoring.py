"""Scores of answers against forward passes of the model, one mask at a time."""

import dataclasses
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import LogitsConfig, SamplingSettings
from llamafactory_ddm.generation.generator import TextGenerator
from llamafactory_ddm.harness.scoring import Answer, AnswerScorer
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer


@pytest.fixture(params=[True, False], ids=["shift", "no-shift"])
def generator(request):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 1, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4
    )
    model = GPT2LMHeadModel(config).eval()
    make_bidirectional(model)
    return TextGenerator(
        model,
        tokenizer,
        DiffusionConfig(
            mask_token="<|mask|>",
            mask_token_id=len(tokenizer),
            shift=request.param,
            noise_process="masked",
            uniform_ratio=0.0,
            noise_schedule="linear",
            attention_ratio=1.0,
        ),
    )


def answers_of(generator, *pairs):
    """Answers (question, context, text); the start token comes first where the model needs one."""
    start = () if generator.start_id is None else (generator.start_id,)
    encode = generator.codec.encode
    return [Answer((*start, *encode(context)), tuple(encode(text)), question) for question, context, text in pairs]


@torch.inference_mode()
def log_prob(generator, z, position, token):
    """Return log p of a token at a position of one row, from the model's own forward."""
    model, shift = generator.model, int(generator.config.shift)
    mask = full_attention_mask(
        model, batch=1, length=len(z), is_padding=None, visible=None, dtype=torch.float32, device="cpu"
    )
    logits = model(input_ids=torch.tensor([z]), attention_mask=mask, use_cache=False).logits[0, position - shift]
    return float(logits[: generator.config.mask_token_id].double().log_softmax(dim=0)[token])


def bound(generator, answer):
    """Return the evidence bound by its definition: the mean over k and over all masks of k tokens."""
    n, first, total = len(answer.ids), len(answer.context), 0.0
    for k in range(1, n + 1):
        masks = list(itertools.combinations(range(n), k))
        for mask in masks:
            z = list(answer.context + answer.ids)
            for i in mask:
                z[first + i] = generator.config.mask_token_id
            total -= sum(log_prob(generator, z, first + i, answer.ids[i]) for i in mask) / (k * len(masks))
    return total


PAIRS = [(0, "dog", "cat"), (0, "dog", " dogcat"), (1, "a", "bcd"), (2, "", "dog dog"), (3, "cat dog", "cab")]


def test_short_answers_are_exact(generator):
    pairs = PAIRS if generator.config.shift else [pair for pair in PAIRS if pair[1]]
    answers = answers_of(generator, *pairs)
    for answer, score in zip(answers, AnswerScorer(generator, samples=32).score(answers), strict=True):
        assert score.log_likelihood == pytest.approx(-bound(generator, answer), abs=2e-4)
        assert score.standard_error == 0 and score.passes == 2 ** len(answer.ids) - 1


def test_longer_answers_lie_within_their_errors_and_rank_as_the_bound_does(generator):
    texts = ["abcdefg", "abcxefg", "gfedcba", "abcdefh"]
    answers = answers_of(generator, *((7, "dog", text) for text in texts))
    exact = [-bound(generator, answer) for answer in answers]
    scores = list(AnswerScorer(generator, samples=48).score(answers))
    for score, value in zip(scores, exact, strict=True):
        assert 0 < score.standard_error < 2
        assert abs(score.log_likelihood - value) < 4 * score.standard_error
    order = sorted(range(4), key=exact.__getitem__)
    assert sorted(range(4), key=[score.log_likelihood for score in scores].__getitem__) == order


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_changes_nothing(generator, batch_size):
    pairs = [(0, "dog", "abcdefg"), (0, "dog", "abcx"), (1, "a long context of dogs", "dog"), (2, "a", "xyzuvw")]
    answers = answers_of(generator, *pairs)
    together = list(AnswerScorer(generator, samples=8, batch_size=batch_size).score(answers))
    for answer, score in zip(answers, together, strict=True):
        (alone,) = AnswerScorer(generator, samples=8, batch_size=7).score([answer])
        assert dataclasses.astuple(alone) == pytest.approx(dataclasses.astuple(score), abs=1e-4)


def test_equal_rows_are_computed_once(generator):
    """Choices that differ in one token share the rows in which it is masked; single tokens share their only row."""
    scorer = AnswerScorer(generator, samples=32)
    list(scorer.score(answers_of(generator, *((0, "dog", letter) for letter in "abcd"))))
    assert scorer.forward_rows == 1
    scorer = AnswerScorer(generator, samples=32)
    list(scorer.score(answers_of(generator, (0, "dog", "abc"), (0, "dog", "abd"))))
    assert scorer.forward_rows == 7 + 7 - 4


def test_parts_keep_a_question_together(generator, monkeypatch):
    monkeypatch.setattr("llamafactory_ddm.harness.scoring._TOKENS_AT_ONCE", 60)
    answers = answers_of(generator, *((question, "dog", text) for question in range(5) for text in ("abc", "abd")))
    parts = list(AnswerScorer(generator)._parts(answers))
    assert len(parts) > 1 and [answer for part in parts for answer in part] == answers
    assert all(len(part) % 2 == 0 for part in parts)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_is_what_the_sampler_writes(generator, batch_size):
    right, wrong = [], []
    for context, n in (("dog", 1), ("dog", 3), ("a cat", 5)):
        canvas = generator.from_prompt(context, n)
        settings = SamplingSettings(diffusion_steps=n, logits=LogitsConfig(0.0), early_stop="none")
        filled = generator.writer.write([canvas], settings, sample_indices=[0])[0]
        ids = tuple(filled.ids[-n:])
        context_ids = tuple(canvas.ids[:-n])
        right.append(Answer(context_ids, ids, 0))
        wrong.append(Answer(context_ids, (*ids[:-1], (ids[-1] + 1) % 50), 0))
    scorer = AnswerScorer(generator, batch_size=batch_size)
    found = scorer.are_greedy([*right, *wrong])
    assert found[:3] == [(True, 1), (True, 3), (True, 5)]
    assert [is_right for is_right, _ in found[3:]] == [False] * 3
    assert scorer.forward_rows == sum(passes for _, passes in found)
    assert scorer.are_greedy([]) == []


@pytest.mark.parametrize("scoring", ["llada", "diffullama"])
def test_the_published_ways_draw_each_choice_on_its_own(generator, scoring):
    scorer = AnswerScorer(generator, scoring=scoring)
    one, other, again = answers_of(generator, (0, "dog", "abcdef"), (0, "dog", "abcdeg"), (0, "dog", "abcdef"))
    first, second, third = scorer.masks([one, other, again])
    assert torch.equal(first.is_masked, third.is_masked) and not torch.equal(first.is_masked, second.is_masked)
    assert len(first.is_masked) == {"llada": 128, "diffullama": 32}[scoring]
    (score,) = scorer.score([one])
    assert score.standard_error > 0
    exact = -bound(generator, one)
    if scoring == "llada":
        assert abs(score.log_likelihood - exact) < 4 * score.standard_error
    else:  # per token, and no bound
        assert exact < score.log_likelihood < 0
