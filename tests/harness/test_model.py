"""The model type of lm-evaluation-harness, asked as the harness asks it."""

import json
import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.harness.model import DiffusionLM, _in_turn
from llamafactory_ddm.harness.scoring import Answer, AnswerScorer
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate
from support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusion model of 48 positions with the word template `dog PROMPT cat`, which no prompt needs."""
    return save(tmp_path_factory.mktemp("model"))


def save(folder, template=None):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 1, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4
    )
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DiffusionConfig(
        mask_token="<|mask|>",
        mask_token_id=len(tokenizer) - 1,
        shift=True,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=1.0,
        template=template,
    ).save(folder)
    return folder


def likelihoods(*documents):
    """Requests of documents, each a context with its choices."""
    return [
        Instance("loglikelihood", {"text": context}, (context, choice), number, ("task", row, 1))
        for row, (context, *choices) in enumerate(documents)
        for number, choice in enumerate(choices)
    ]


def texts(*contexts, **options):
    return [
        Instance("generate_until", {"text": context}, (context, options), 0, ("task", row, 1))
        for row, context in enumerate(contexts)
    ]


DOCUMENTS = (("dog cat", " dog", " cat", " a long answer"), ("cat", " dog"), ("a b c d", " e f g h", " e f g x"))


def test_likelihoods_are_those_of_the_scorer(folder):
    model = DiffusionLM(str(folder), likelihood_samples=8)
    generator = load(folder)
    found = model.loglikelihood(likelihoods(*DOCUMENTS))
    assert len(found) == 6
    encode = generator.codec.encode
    (score,) = AnswerScorer(generator, samples=8).score(
        [Answer((generator.start_id, *encode("cat")), tuple(encode(" dog")), 0)]
    )
    assert found[3][0] == pytest.approx(score.log_likelihood, abs=1e-4)  # one token: exact
    assert [greedy for _, greedy in found[:3] + found[4:]] == [False] * 5  # one of several choices: not computed


@pytest.mark.parametrize("batch_size", [1, 5])
def test_results_do_not_depend_on_batch_order_or_company(folder, batch_size):
    requests = likelihoods(*DOCUMENTS)
    expected = DiffusionLM(str(folder), likelihood_samples=8).loglikelihood(requests)
    model = DiffusionLM(str(folder), likelihood_samples=8, batch_size=batch_size)
    backwards = model.loglikelihood(requests[::-1])[::-1]
    for one, other in zip(expected, backwards, strict=True):
        assert one == (pytest.approx(other[0], abs=2e-4), other[1])
    few = DiffusionLM(str(folder), likelihood_samples=8).loglikelihood(requests[4:])
    assert [value for value, _ in few] == pytest.approx([value for value, _ in expected[4:]], abs=2e-4)


def test_a_repeated_request_is_one_choice(folder, monkeypatch):
    """The harness repeats a request to give all processes as many; greedy decoding is still computed for it, once."""
    model, asked = DiffusionLM(str(folder)), []
    monkeypatch.setattr(model.scorer, "is_greedy", lambda answer: (asked.append(answer), (True, 3))[1])
    found = model.loglikelihood(likelihoods(("dog", " cat")) * 2)
    assert [flag for _, flag in found] == [True, True] and len(asked) == 1
    assert model.get_model_info()["forward_passes"] == {"task": 2 ** len(asked[0].ids) - 1 + 3}


def test_spaces_between_belong_to_the_continuation(folder):
    model = DiffusionLM(str(folder))
    assert model._encode_pair("dog ", "dog") == model._encode_pair("dog", " dog")
    assert model._encode_pair("", "dog") == ([], model.generator.codec.encode("dog"))


def test_rolling_likelihoods_cover_every_token_once(folder, monkeypatch):
    model = DiffusionLM(str(folder), likelihood_samples=8)
    asked = []
    score = model.scorer.score
    monkeypatch.setattr(model.scorer, "score", lambda answers: (asked.extend(answers), score(answers))[1])
    text = "dog cat " * 20
    request = Instance("loglikelihood_rolling", {"text": text}, (text,), 0, ("task", 0, 1))
    (value,) = model.loglikelihood_rolling([request])
    ids = model.generator.codec.encode(text)
    assert [token for answer in asked for token in answer.ids] == ids and len(asked) > 1
    assert all(len(answer.context) + len(answer.ids) <= 48 for answer in asked)
    assert value < 0


def test_texts_are_those_of_the_generator(folder):
    model = DiffusionLM(str(folder), diffusion_steps=5)
    found = model.generate_until(texts("dog", "a cat dog", max_gen_toks=6, do_sample=False, until=["b"]))
    settings = SamplingSettings(diffusion_steps=5, logits=LogitsConfig(0.0))
    expected = load(folder).generate(["dog", "a cat dog"], max_new_tokens=6, settings=settings)
    assert found == [text.partition("b")[0] for text in expected]
    assert model.get_model_info()["forward_passes"] == {"task": 10}


def test_the_users_keys_come_before_those_of_the_task(folder):
    by_task = DiffusionLM(str(folder), diffusion_steps=4)
    by_user = DiffusionLM(str(folder), diffusion_steps=4, temperature=0.0, max_new_tokens=4)
    asked = texts("dog", max_gen_toks=9, do_sample=True, temperature=2.0)
    assert by_user.generate_until(asked) != by_task.generate_until(asked)
    assert by_user.generate_until(asked) == by_task.generate_until(texts("dog", max_gen_toks=4, until=[]))


def test_repeats_are_further_samples_and_the_same_in_any_batch(folder):
    request = texts("dog", max_gen_toks=8, do_sample=True, temperature=2.0)
    three = DiffusionLM(str(folder), diffusion_steps=4).generate_until(request * 3)
    assert len(set(three)) == 3
    assert DiffusionLM(str(folder), diffusion_steps=4, batch_size=1).generate_until(request * 3) == three


def test_an_interrupted_evaluation_goes_on(folder, tmp_path, monkeypatch):
    """The second run computes what is missing alone, also after a line that was cut; other settings share nothing."""
    requests = likelihoods(*DOCUMENTS)
    kept = {"likelihood_samples": 8, "results_folder": str(tmp_path)}
    first = DiffusionLM(str(folder), **kept).loglikelihood(requests)
    path = tmp_path / "requests-0.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 6
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    model = DiffusionLM(str(folder), **kept)
    score, n_scored = model.scorer.score, []
    monkeypatch.setattr(model.scorer, "score", lambda answers: (n_scored.append(len(answers)), score(answers))[1])
    assert model.loglikelihood(requests) == first and n_scored == [3]
    other = DiffusionLM(str(folder), **{**kept, "likelihood_samples": 9})
    other.loglikelihood(requests)
    settings = {json.loads(line)["settings"] for line in path.read_text().splitlines() if line.endswith("}")}
    assert len(settings) == 2
    assert DiffusionLM(str(folder), **kept).loglikelihood(requests) == first


def test_a_context_that_is_too_long_loses_its_beginning_and_a_choice_is_never_cut(folder, caplog):
    model = DiffusionLM(str(folder))
    long = "dog cat " * 30
    with caplog.at_level(logging.WARNING):
        ((value, _),) = model.loglikelihood(likelihoods((long, " dog")))
    assert value < 0 and any("task, document 0" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match=r"task, document 0.* 48 "):
        model.loglikelihood(likelihoods(("dog", long)))
    with pytest.raises(ValueError, match=r"task, document 0.*max_new_tokens"):
        model.generate_until(texts("dog", max_gen_toks=64))


def test_the_template_is_applied_or_missed(tmp_path, caplog):
    """A finetuned model whose prompts come bare says so; with its template, context and answer are as in training."""
    template = PromptTemplate("mine", (Part(None, ("dog ", " cat")),))
    folder = save(tmp_path / "tuned", template)
    with caplog.at_level(logging.WARNING):
        DiffusionLM(str(folder)).loglikelihood(likelihoods(("a", " b")))
    assert any("template: mine" in record.getMessage() for record in caplog.records)
    model = DiffusionLM(str(folder), template="mine")
    encode = model.generator.codec.encode
    assert model._encode_pair("a", " b") == (encode("dog a cat"), encode("b"))


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"batch_size": "auto"}, "batch_size: auto"),
        ({"likelihood_samples": 4}, "likelihood_samples: 4"),
        ({"diffusion_stps": 4}, "diffusion_stps.*diffusion_steps"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
    ],
)
def test_wrong_keys(folder, keys, error):
    with pytest.raises((TypeError, ValueError), match=error):
        DiffusionLM(str(folder), **keys)


def test_a_key_of_a_task_that_has_no_effect_is_an_error(folder):
    with pytest.raises(ValueError, match="generation_kwargs: num_beams"):
        DiffusionLM(str(folder)).generate_until(texts("dog", max_gen_toks=4, num_beams=4))


def test_an_autoregressive_model_is_refused():
    with pytest.raises(ValueError, match=r"diffusion_config\.json"):
        DiffusionLM("data/tiny_gpt2")


def test_documents_of_several_processes_are_joined_in_their_order():
    """Of seven documents, rank 0 has every third from the first, and so on."""
    parts = [{"task": list(range(rank, 7, 3)), "other": {"acc": list(range(rank, 7, 3))}} for rank in range(3)]
    first, *others = _in_turn(parts)
    assert first == {"task": list(range(7)), "other": {"acc": list(range(7))}}
    assert others == [{"task": [], "other": {"acc": []}}] * 2


def test_the_harness_knows_the_name():
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    assert get_model("llamafactory_ddm") is DiffusionLM
