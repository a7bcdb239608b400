"""The harness's class for autoregressive models, with templates, kept results and keyed draws."""

import logging
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm.harness.autoregressive import AutoregressiveLM, KeyedDraws
from support.tiny import save_model


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), kind="ar", positions=400, width=16, layers=1)


def texts(*contexts, kind="generate_until", **options):
    return [
        Instance(kind, {"text": context}, (context, options), 0, ("task", row, 1))
        for row, context in enumerate(contexts)
    ]


def test_an_autoregressive_model_is_that_of_the_harness(autoregressive):
    """Likelihoods are the sum of log-probabilities; the texts are greedy decoding, up to the stop string."""
    model = AutoregressiveLM(str(autoregressive))
    asked = [Instance("loglikelihood", {}, ("dog", " cat dog"), 0, ("task", 0, 1))]
    ((value, is_greedy),) = model.loglikelihood(asked)
    weights = AutoModelForCausalLM.from_pretrained(autoregressive)
    before, whole = (
        model.tokenizer("dog")["input_ids"],
        model.tokenizer("dog cat dog", return_tensors="pt")["input_ids"],
    )
    scores = weights(whole).logits[0].log_softmax(dim=-1)
    scores = scores.detach()
    expected = sum(float(scores[i - 1, whole[0, i]]) for i in range(len(before), whole.shape[1]))
    assert value == pytest.approx(expected, abs=1e-3) and not is_greedy
    (text,) = model.generate_until(texts("dog", max_gen_toks=5, do_sample=False, until=[]))
    prompt = model.tokenizer("dog", return_tensors="pt")
    ids = weights.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(before) :]
    assert text == model.tokenizer.decode(ids, skip_special_tokens=True)
    shorter = AutoregressiveLM(str(autoregressive), max_new_tokens=2).generate_until(texts("dog", max_gen_toks=5))
    assert text.startswith(shorter[0]) and len(shorter[0]) < len(text)


def test_prompts_of_an_autoregressive_model_have_the_template(autoregressive, monkeypatch):
    """The answer is scored from its first token, without what the template ends with."""
    model = AutoregressiveLM(str(autoregressive), template="default")
    from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate

    model._prompt_template = PromptTemplate("mine", (Part(None, ("dog ", " cat\n")),))
    request = Instance("loglikelihood", {}, ("a", " b"), 0, ("task", 0, 1))
    assert model._framed(request) == ("dog a cat\n", "b")
    assert model._encode_pair(*model._framed(request)) == tuple(
        model.tokenizer(part)["input_ids"] for part in ("dog a cat\n", "b")
    )
    prompt, options = model._framed_prompt(texts("a", max_gen_toks=4, until=["\n"])[0])
    assert prompt == "dog a cat\n" and options["max_gen_toks"] == 4
    assert options["until"] == ["\n", "<|endoftext|>"]


def test_keys_of_an_autoregressive_model(autoregressive, tmp_path, monkeypatch):
    """Sampling keys take precedence over the task's, and the seed counts; an interrupted evaluation goes on."""
    asked = texts("dog", "a cat", max_gen_toks=8, do_sample=False)
    greedy = AutoregressiveLM(str(autoregressive)).generate_until(asked)
    drawn = [
        AutoregressiveLM(str(autoregressive), logits_temp=2.0, seed=seed).generate_until(asked) for seed in (0, 0, 1)
    ]
    assert greedy != drawn[0] == drawn[1] != drawn[2]
    narrow = AutoregressiveLM(str(autoregressive), logits_temp=2.0, top_k=1).generate_until(asked)
    assert narrow == greedy
    kept = AutoregressiveLM(str(autoregressive), results_folder=str(tmp_path))
    assert kept.generate_until(asked) == greedy
    again = AutoregressiveLM(str(autoregressive), results_folder=str(tmp_path))
    monkeypatch.setattr(again, "_model_generate", None)
    assert again.generate_until(asked) == greedy
    other = AutoregressiveLM(str(autoregressive), results_folder=str(tmp_path), max_new_tokens=2)
    assert other.generate_until(asked) != greedy
    rolling = [Instance("loglikelihood_rolling", {}, ("dog cat",), 0, ("task", 0, 1))]
    assert math.isfinite(again.loglikelihood_rolling(rolling)[0])


def test_a_sampled_text_does_not_depend_on_its_batch(autoregressive, tmp_path, monkeypatch):
    """Whatever the batch, the order and an interruption; texts of one prompt differ from each other."""
    words = {"max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    asked = [*texts("dog", "a cat", "dog dog cat", "cat", **words), *texts("dog", "a cat", **words)]
    found = [AutoregressiveLM(str(autoregressive), batch_size=size).generate_until(asked) for size in (1, 2, 16)]
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][4] and found[0][1] != found[0][5]
    turned = AutoregressiveLM(str(autoregressive), batch_size=4).generate_until(asked[3::-1])
    assert turned == found[0][3::-1]
    kept = AutoregressiveLM(str(autoregressive), batch_size=1, results_folder=str(tmp_path))
    kept.generate_until(asked[:3])
    other = AutoregressiveLM(str(autoregressive), batch_size=3, results_folder=str(tmp_path))
    assert other.generate_until(asked) == found[0]


def test_draws_have_the_given_probabilities():
    """Frequencies of 20000 rows lie within five standard errors; rows are independent of their number."""
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    n = 20_000
    with KeyedDraws(3, range(n)):
        first, second = (torch.multinomial(probabilities.expand(n, -1), num_samples=1)[:, 0] for _ in range(2))
    for draws in (first, second):
        for token, count in Counter(draws.tolist()).items():
            p = float(probabilities[token])
            assert p > 0 and abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))
    agreement = float((first == second).double().mean())
    assert agreement == pytest.approx(float(probabilities.square().sum()), abs=0.02)
    with KeyedDraws(3, [7, 5]):
        assert torch.multinomial(probabilities.expand(2, -1), 1)[:, 0].tolist() == [int(first[7]), int(first[5])]
    with KeyedDraws(4, range(n)):
        assert (torch.multinomial(probabilities.expand(n, -1), 1)[:, 0] != first).any()


def test_a_text_that_does_not_fit_is_an_error_of_one_line(autoregressive):
    model = AutoregressiveLM(str(autoregressive), max_new_tokens=400)
    with pytest.raises(ValueError, match=r"task: task, document 0: 400 tokens .*400 positions.*max_new_tokens"):
        model.generate_until(texts("dog", max_gen_toks=5))


def test_an_instruct_model_without_its_template_is_warned_of(autoregressive, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(autoregressive)
    tokenizer.chat_template = "{{ messages[0].content }}"
    path = save_model(tmp_path, kind="ar", positions=400, width=16, layers=1)
    asked = texts("dog", max_gen_toks=2)
    with caplog.at_level(logging.WARNING):
        AutoregressiveLM(str(path)).generate_until(asked)
        tokenizer.save_pretrained(path)
        AutoregressiveLM(str(path), template="default").generate_until(asked)
        assert "chat template" not in caplog.text
        model = AutoregressiveLM(str(path))
        model.generate_until(asked)
        model.loglikelihood([Instance("loglikelihood", {}, ("dog", " cat"), 0, ("task", 0, 1))])
    warnings = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert len(warnings) == 1 and str(path) in warnings[0] and "set template" in warnings[0]
