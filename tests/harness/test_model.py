"""The model type of lm-evaluation-harness, asked as the harness asks it."""

import json
import logging
import shutil

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.harness.model import DiffusionLM, _in_turn, read_generation_keys
from llamafactory_ddm.harness.scoring import Answer, AnswerScorer
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate
from support.published import write_llada
from support.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusion model of 48 positions with the word template `dog PROMPT cat`, which no prompt needs."""
    return save_model(tmp_path_factory.mktemp("model"))


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
    model = DiffusionLM(str(folder), likelihood_samples=16)
    generator = load(folder)
    found = model.loglikelihood(likelihoods(*DOCUMENTS))
    assert len(found) == 6
    encode = generator.codec.encode
    (score,) = AnswerScorer(generator, samples=16).score(
        [Answer((generator.start_id, *encode("cat")), tuple(encode(" dog")), 0)]
    )
    assert found[3][0] == pytest.approx(score.log_likelihood, abs=1e-4)  # one token: exact
    assert [greedy for _, greedy in found[:3] + found[4:]] == [False] * 5  # one of several choices: not computed


@pytest.mark.parametrize("batch_size", [1, 5])
def test_results_do_not_depend_on_batch_order_or_company(folder, batch_size):
    requests = likelihoods(*DOCUMENTS)
    expected = DiffusionLM(str(folder), likelihood_samples=16).loglikelihood(requests)
    model = DiffusionLM(str(folder), likelihood_samples=16, batch_size=batch_size)
    backwards = model.loglikelihood(requests[::-1])[::-1]
    for one, other in zip(expected, backwards, strict=True):
        assert one == (pytest.approx(other[0], abs=2e-4), other[1])
    few = DiffusionLM(str(folder), likelihood_samples=16).loglikelihood(requests[4:])
    assert [value for value, _ in few] == pytest.approx([value for value, _ in expected[4:]], abs=2e-4)


def test_a_repeated_request_is_one_choice(folder, monkeypatch):
    """The harness repeats a request to give all processes as many; greedy decoding is still computed for it, once."""
    model, asked = DiffusionLM(str(folder)), []
    monkeypatch.setattr(
        model.scorer, "are_greedy", lambda answers: asked.extend(answers) or [(True, 3)] * len(answers)
    )
    found = model.loglikelihood(likelihoods(("dog", " cat")) * 2)
    assert [flag for _, flag in found] == [True, True] and len(asked) == 1
    assert model.get_model_info()["forward_passes"] == {"task": 2 ** len(asked[0].ids) - 1 + 3}
    asked.clear()
    model.loglikelihood(likelihoods(("dog", " dog", " a")))
    assert not asked


def test_documents_of_equal_content_are_two_documents(folder, monkeypatch):
    """With other examples before them, the twins have two prompts; each is asked as if it were alone."""
    model = DiffusionLM(str(folder))
    monkeypatch.setattr(model.scorer, "are_greedy", lambda answers: [(True, 1)] * len(answers))
    twins = [
        Instance("loglikelihood", {"text": "x"}, (context, " cat"), 0, ("task", row, 1))
        for row, context in enumerate(("dog", "a dog"))
    ]
    assert [flag for _, flag in model.loglikelihood(twins)] == [True, True]


def joined(model, context, continuation):
    answer = model._answer(likelihoods((context, continuation))[0])
    return list(answer.context), list(answer.ids)


def test_spaces_between_belong_to_the_continuation(folder):
    model = DiffusionLM(str(folder))
    encode, start = model.generator.codec.encode, model.generator.start_id
    assert joined(model, "dog ", "dog") == joined(model, "dog", " dog") == ([start, *encode("dog")], encode(" dog"))
    assert joined(model, "", "dog") == ([start], encode("dog"))


def test_a_token_that_reaches_over_both_belongs_to_the_continuation(folder):
    """Alone, "do" is a token and "g" follows; together they are the token "dog"."""
    model = DiffusionLM(str(folder))
    encode, start = model.generator.codec.encode, model.generator.start_id
    assert encode("a do") == encode("a")[:1] + encode(" do")
    assert joined(model, "ado", "g") == ([start, *encode("a")], encode("dog"))
    for context, continuation in (("dog", ""), ("", "")):
        with pytest.raises(ValueError, match="task: task, document 0"):
            joined(model, context, continuation)


def test_rolling_likelihoods_cover_every_token_once(folder, monkeypatch):
    model = DiffusionLM(str(folder), likelihood_samples=16)
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
    errors = [score.standard_error for score in score(asked)]
    stated = model.get_model_info()["likelihood_standard_error"]["task"]
    assert stated == pytest.approx(sum(error**2 for error in errors) ** 0.5, rel=1e-3)


def test_texts_are_those_of_the_generator(folder):
    model = DiffusionLM(str(folder), diffusion_steps=5)
    found = model.generate_until(texts("dog", "a cat dog", max_gen_toks=6, do_sample=False, until=["b"]))
    settings = SamplingSettings(diffusion_steps=5, logits=LogitsConfig(0.0))
    expected = load(folder).generate(["dog", "a cat dog"], max_new_tokens=6, settings=settings)
    assert found == [text.partition("b")[0] for text in expected]
    assert model.get_model_info()["forward_passes"] == {"task": 10}


def test_texts_with_a_cache(folder):
    """Texts of models with kv_cache are the generator's; likelihoods are computed without one."""
    keys = {"diffusion_steps": 6, "block_length": 3, "kv_cache": "dual"}
    model, exact = DiffusionLM(str(folder), **keys), DiffusionLM(str(folder), **keys, cache_refresh=1)
    asked = texts("dog", "a cat dog", max_gen_toks=6, do_sample=False)
    settings = SamplingSettings(logits=LogitsConfig(0.0), **keys)
    assert model.generate_until(asked) == load(folder).generate(
        ["dog", "a cat dog"], max_new_tokens=6, settings=settings
    )
    plain = DiffusionLM(str(folder), **{**keys, "kv_cache": "none"})
    assert exact.generate_until(asked) == plain.generate_until(asked)
    assert model.loglikelihood(likelihoods(*DOCUMENTS)) == plain.loglikelihood(likelihoods(*DOCUMENTS))


def test_the_users_keys_come_before_those_of_the_task(folder):
    by_task = DiffusionLM(str(folder), diffusion_steps=4)
    by_user = DiffusionLM(str(folder), diffusion_steps=4, temperature=0.0, max_new_tokens=4)
    asked = texts("dog", max_gen_toks=9, do_sample=True, temperature=2.0)
    assert by_user.generate_until(asked) != by_task.generate_until(asked)
    assert by_user.generate_until(asked) == by_task.generate_until(texts("dog", max_gen_toks=4, until=[]))


def test_keys_under_both_names(folder):
    """A task's keys and the user's may name one setting differently."""
    model = DiffusionLM(str(folder), diffusion_steps=4, logits_temp=2.0)
    other = DiffusionLM(str(folder), diffusion_steps=4, temperature=2.0)
    asked = texts("dog", max_gen_toks=6, do_sample=False, top_p=0.5)
    assert model.generate_until(asked) == other.generate_until(asked)


def test_what_a_task_may_say(folder):
    """temperature alone samples, as in the harness; other decoders' keys are not used."""
    assert read_generation_keys({"temperature": 0.8, "max_tokens": 7}) == (7, [], {"logits_temp": 0.8})
    assert read_generation_keys({"until": None, "num_beams": 4}) == (256, [], {"logits_temp": 0.0})
    assert read_generation_keys({"until": "x", "do_sample": False, "temperature": 2})[1:] == (
        ["x"],
        {"logits_temp": 0},
    )
    for wrong, error in (
        ({"do_sample": "false"}, "do_sample"),
        ({"max_gen_toks": "a"}, "max_gen_toks"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"diffusion_stps": 3}, "diffusion_stps.*diffusion_steps"),
    ):
        with pytest.raises(ValueError, match=error):
            read_generation_keys(wrong)


def test_an_empty_prompt_is_a_text_from_noise(folder):
    model = DiffusionLM(str(folder), diffusion_steps=4)
    assert model.generate_until(texts("", max_gen_toks=5))[0]


def test_the_seed_reaches_likelihoods_and_texts(folder):
    one, other = (DiffusionLM(str(folder), likelihood_samples=16, seed=seed, diffusion_steps=4) for seed in (0, 1))
    asked = likelihoods(("dog", " a long answer"))
    assert one.loglikelihood(asked) != other.loglikelihood(asked)
    sampled = texts("dog", max_gen_toks=8, do_sample=True, temperature=2.0)
    assert one.generate_until(sampled) != other.generate_until(sampled)


def test_logits_that_are_not_finite_are_an_error(folder):
    model = DiffusionLM(str(folder))
    with torch.no_grad():
        model.generator.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="infer_dtype"):
        model.loglikelihood(likelihoods(("dog", " cat")))


def test_what_is_added_for_equal_numbers_is_no_further_sample(folder):
    (request,) = texts("dog", max_gen_toks=8, do_sample=True, temperature=2.0)
    first, added = DiffusionLM(str(folder), diffusion_steps=4).generate_until([request, request])
    assert first == added


def test_repeats_are_further_samples_and_the_same_in_any_batch(folder):
    request = texts("dog", max_gen_toks=8, do_sample=True, temperature=2.0)
    request[0].repeats = 3
    three = DiffusionLM(str(folder), diffusion_steps=4).generate_until(request * 3)
    assert len(set(three)) == 3
    assert DiffusionLM(str(folder), diffusion_steps=4, batch_size=1).generate_until(request * 3) == three


def test_an_interrupted_evaluation_goes_on(folder, tmp_path, monkeypatch):
    """The second run computes what is missing alone, also after a line that was cut; other settings share nothing."""
    requests = likelihoods(*DOCUMENTS)
    kept = {"likelihood_samples": 16, "results_folder": str(tmp_path)}
    first = DiffusionLM(str(folder), **kept).loglikelihood(requests)
    path = tmp_path / "requests-0.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 6
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    model = DiffusionLM(str(folder), **kept)
    score, n_scored = model.scorer.score, []
    monkeypatch.setattr(model.scorer, "score", lambda answers: (n_scored.append(len(answers)), score(answers))[1])
    assert model.loglikelihood(requests) == first and n_scored == [3]
    other = DiffusionLM(str(folder), **{**kept, "likelihood_samples": 17})
    other.loglikelihood(requests)
    settings = {json.loads(line)["settings"] for line in path.read_text().splitlines() if line.endswith("}")}
    assert len(settings) == 2
    assert DiffusionLM(str(folder), **kept).loglikelihood(requests) == first


@pytest.mark.parametrize(
    ("file", "key", "value"), [("diffusion_config.json", "shift", False), ("config.json", "n_head", 1)]
)
def test_results_of_a_model_with_another_config_are_not_read(file, key, value, tmp_path):
    folder, kept = save_model(tmp_path / "model"), str(tmp_path / "kept")
    asked = likelihoods(("dog", " cat"))
    first = DiffusionLM(str(folder), results_folder=kept).loglikelihood(asked)
    config = json.loads((folder / file).read_text())
    assert config[key] != value
    (folder / file).write_text(json.dumps({**config, key: value}))
    assert DiffusionLM(str(folder), results_folder=kept).loglikelihood(asked) != first


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
    folder = save_model(tmp_path / "tuned", template=template)
    with caplog.at_level(logging.WARNING):
        DiffusionLM(str(folder)).loglikelihood(likelihoods(("a", " b")))
    assert any("template: mine" in record.getMessage() for record in caplog.records)
    model = DiffusionLM(str(folder), template="mine")
    encode = model.generator.codec.encode
    assert joined(model, "a", " b") == (encode("dog a cat"), encode("b"))
    context, ids = joined(model, "xyz" * 30, " b")
    opening, closing = encode("dog "), encode(" cat")
    assert len(context) + len(ids) == 48
    assert context[: len(opening)] == opening and context[-len(closing) :] == closing


def test_a_published_instruct_model_without_a_template_is_warned_of(folder, tmp_path, caplog):
    """Where the tokenizer has a chat template; a checkpoint of this package says itself whether it has one."""
    path = write_llada(tmp_path / "llada")
    asked = likelihoods(("dog", " cat"))
    with caplog.at_level(logging.WARNING):
        DiffusionLM(str(path), likelihood_samples=16).loglikelihood(asked)
        assert "chat template" not in caplog.text
        (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        DiffusionLM(str(path), likelihood_samples=16).loglikelihood(asked)
        assert f"{path} has a chat template" in caplog.text
        caplog.clear()
        shutil.copytree(folder, tmp_path / "ours")
        (tmp_path / "ours" / "chat_template.jinja").write_text("{{ messages[0].content }}")
        DiffusionLM(str(tmp_path / "ours"), likelihood_samples=16).loglikelihood(asked)
        assert "chat template" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"likelihood_samples": 4}, "likelihood_samples"),
        ({"likelihood_samples": "x"}, "likelihood_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"dtype": "fp99"}, "dtype"),
        ({"scoring": "lada"}, "scoring.*llada"),
        ({"diffusion_stps": 4}, "diffusion_stps.*diffusion_steps"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
    ],
)
def test_wrong_keys(folder, keys, error):
    with pytest.raises((TypeError, ValueError), match=error):
        DiffusionLM(str(folder), **keys)


def test_a_key_of_a_task_that_has_no_effect_is_an_error(folder):
    with pytest.raises(ValueError, match="task: task: generation_kwargs: no_such_key"):
        DiffusionLM(str(folder)).generate_until(texts("dog", max_gen_toks=4, no_such_key=4))


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
