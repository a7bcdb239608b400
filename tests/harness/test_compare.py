"""Comparisons: their keys, what is evaluated again, and what is written."""

import json
import math

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from llamafactory_ddm.harness import compare as module
from llamafactory_ddm.harness.autoregressive import AutoregressiveLM
from llamafactory_ddm.harness.compare import as_markdown, compare
from llamafactory_ddm.harness.compare_keys import read_comparison
from support.cli import ROOT
from support.harness import random_model

TASKS = str(ROOT / "examples" / "eval" / "tasks")
ONE = {"a": {"model_name_or_path": "x"}}
BASE = {"task": "tiny_problems", "task_dir": TASKS, "save_dir": "out", "models": ONE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"), positions=400)


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory, folder):
    """The same weights, without diffusion_config.json."""
    copy = tmp_path_factory.mktemp("autoregressive")
    for path in folder.iterdir():
        if path.name != "diffusion_config.json":
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """The harness asks other programs about the machine, for each evaluation, which takes seconds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def run(save_dir, models, **keys):
    values = {
        "task": "tiny_problems,tiny_last_word",
        "task_dir": TASKS,
        "max_samples": 3,
        "max_new_tokens": 6,
        "likelihood_samples": 16,
        "save_dir": str(save_dir),
        "models": models,
        **keys,
    }
    return compare(read_comparison(values))


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"models": None}, "models is missing"),
        ({"models": {}}, "models is missing"),
        ({"models": "a"}, "models: 'a'"),
        ({"models": {"a": "x"}}, "models: a: 'x'"),
        ({"models": {7: {"model_name_or_path": "x"}}}, "models: .*7"),
        ({"models": {"a b": {}, "A-b": {}}}, "a b and A-b"),
        ({"models": {"//": {}}}, "'//'"),
        ({"models": {"comparison.md": {}}}, r"comparison\.md"),
        ({"models": {"a": {}}}, "models: a: model_name_or_path"),
        ({"models": {"a": {"model_name_or_path": "x", "diffusion_stps": 3}}}, "models: a: .*diffusion_steps"),
        ({"models": {"a": {"model_name_or_path": "x", "task": "y"}}}, "models: a: task"),
        ({"models": {"a": {"model_name_or_path": "x", "max_samples": 3}}}, "models: a: max_samples"),
        ({"models": {"a": {"model_name_or_path": "x", "diffusion_steps": 0}}}, "models: a: diffusion_steps"),
        ({"models": {"a": {"model_name_or_path": "x", "entropy_bound": 0.1}}}, "models: a: entropy_bound"),
        ({"models": {"a": {"model_name_or_path": "x", "kind": "AR"}}}, "models: a: kind.*ar"),
        ({"models": {"a": {"model_name_or_path": "x", "kind": "ar", "diffusion_steps": 3}}}, "diffusion_steps.*kind"),
        ({"models": {"a": {"model_name_or_path": "x", "kind": "ar", "scoring": "llada"}}}, "scoring.*kind"),
        ({"save_dir": None}, "save_dir is missing"),
        ({"save_dir": "README.md"}, "save_dir.*README"),
        ({"task": None}, "task is missing"),
        ({"modells": {}}, "modells.*models"),
        ({"kind": "ar"}, "kind .*models"),
        ({"temperature": 1, "logits_temp": 1}, "temperature and logits_temp"),
        ({"sweep": {"diffusion_stps": [1]}}, "sweep: diffusion_stps.*diffusion_steps"),
        ({"sweep": {"max_new_tokens": [1]}}, "sweep: max_new_tokens"),
        ({"sweep": {"diffusion_steps": [1], "block_length": [1]}}, "diffusion_steps, block_length"),
        ({"sweep": {}}, "sweep: nothing"),
        ({"sweep": "diffusion_steps"}, "sweep: 'diffusion_steps'"),
        ({"sweep": {"diffusion_steps": 4}}, "sweep: diffusion_steps: 4"),
        ({"sweep": {"diffusion_steps": []}}, "sweep: diffusion_steps"),
        ({"sweep": {"diffusion_steps": [4, 0]}}, "diffusion_steps.*0"),
        ({"sweep": {"diffusion_steps": [4, 4.0]}}, "twice"),
        ({"sweep": {"diffusion_steps": [4]}, "diffusion_steps": 4}, "diffusion_steps is set by sweep"),
        (
            {"sweep": {"diffusion_steps": [4]}, "models": {"a": {"model_name_or_path": "x", "diffusion_steps": 4}}},
            "models: a: diffusion_steps",
        ),
        (
            {"sweep": {"diffusion_steps": [4]}, "models": {"a": {"model_name_or_path": "x", "kind": "ar"}}},
            "sweep: diffusion_steps.*kind: ar",
        ),
        ({"sweep": {"confidence_threshold": [0.5]}}, "models: a: confidence_threshold.*denoising_strategy"),
    ],
)
def test_wrong_keys(keys, error):
    with pytest.raises(ValueError, match=error) as raised:
        read_comparison({name: value for name, value in {**BASE, **keys}.items() if value is not None})
    assert "\n" not in str(raised.value)


def test_entries_take_the_place_of_common_keys():
    """Under either name of a key; null takes a common key away; kind: ar takes what it has a use for."""
    comparison = read_comparison(
        {
            **BASE,
            "temperature": 1.0,
            "template": "qwen",
            "diffusion_steps": 8,
            "models": {
                "base": {"model_name_or_path": "x"},
                "my own": {"model_name_or_path": "y", "logits_temp": 0.5, "template": None, "diffusion_steps": None},
                "ar": {"model_name_or_path": "z", "kind": "ar", "top_p": 0.9},
            },
        }
    )
    base, own, ar = comparison.evaluations
    assert (base.keys.template, dict(base.sampling)) == ("qwen", {"logits_temp": 1.0, "diffusion_steps": 8})
    assert (own.keys.template, dict(own.sampling)) == (None, {"logits_temp": 0.5})
    assert (ar.keys.template, dict(ar.sampling)) == ("qwen", {"logits_temp": 1.0, "topp_temp": 0.9})
    assert own.keys.save_dir == "out/my-own"


def test_a_sweep_is_an_evaluation_a_value():
    comparison = read_comparison(
        {**BASE, "sweep": {"temperature": [0, 0.5]}, "models": {**ONE, "b": {"model_name_or_path": "y", "kind": "ar"}}}
    )
    found = [(each.model, each.value, each.keys.save_dir) for each in comparison.evaluations]
    assert found == [
        ("a", 0.0, "out/a/logits_temp-0.0"),
        ("a", 0.5, "out/a/logits_temp-0.5"),
        ("b", None, "out/b"),
    ]
    assert [dict(each.sampling) for each in comparison.evaluations] == [{"logits_temp": 0.0}, {"logits_temp": 0.5}, {}]


@pytest.mark.parametrize(
    ("entry", "keys", "error"),
    [
        ({"kind": "ar"}, {}, "models: a: .*kind: ar"),
        ({"autoregressive": True}, {}, "models: a: .*kind: ar"),
        ({"model_name_or_path": "/absent"}, {}, "models: a: /absent"),
        ({"model_name_or_path": "/absent", "kind": "ar"}, {}, "models: a: /absent"),
        ({"adapter_name_or_path": "/absent"}, {}, "models: a: adapter_name_or_path"),
        ({}, {"sweep": {"diffusion_steps": [2]}}, "sweep: diffusion_steps.*tiny_last_word.*likelihoods"),
    ],
)
def test_what_cannot_run_is_known_before_a_model_is_loaded(
    entry, keys, error, folder, autoregressive, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "run_tasks", None)
    monkeypatch.setattr(module, "load_model", None)
    path = autoregressive if entry.pop("autoregressive", False) else folder
    with pytest.raises(ValueError, match=error) as raised:
        run(tmp_path, {"a": {"model_name_or_path": str(path), **entry}}, **keys)
    assert "\n" not in str(raised.value)


def test_a_comparison(folder, autoregressive, tmp_path, monkeypatch):
    """Values, costs and differences are those of the single evaluations; a second run computes and changes nothing."""
    models = {
        "first": {"model_name_or_path": str(folder), "diffusion_steps": 6},
        "second": {"model_name_or_path": str(folder), "diffusion_steps": 2},
        "ar": {"model_name_or_path": str(autoregressive), "kind": "ar"},
    }
    record = run(tmp_path / "out", models)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / "out" / "comparison.md").read_text() == as_markdown(record) + "\n"
    assert "20" + "26" not in json.dumps(record["results"])  # no date
    rows = {(row["model"], row["task"], row["metric"]): row for row in record["results"]}
    assert rows["first", "tiny_problems", "exact_match"]["forward_passes"] == 18
    assert rows["second", "tiny_problems", "exact_match"]["forward_passes"] == 6
    assert rows["ar", "tiny_problems", "exact_match"]["tokens_per_forward_pass"] == 1
    assert rows["ar", "tiny_last_word", "acc"]["forward_passes"] is None
    kept = [json.loads(line) for line in (tmp_path / "out" / "second" / "requests-0.jsonl").read_text().splitlines()]
    texts = [line["result"] for line in kept if "tokens" in line["result"]]
    tokens = sum(result["tokens"] for result in texts)
    assert rows["second", "tiny_problems", "exact_match"]["tokens_per_forward_pass"] == tokens / 6
    perplexity = {name: rows[name, "tiny_last_word", "perplexity"]["value"] for name in models}
    assert perplexity["first"] == perplexity["second"] != perplexity["ar"]
    differences = {(row["model"], row["metric"]): row for row in record["differences"]}
    assert {(row["model"], row["baseline"]) for row in record["differences"]} == {("second", "first"), ("ar", "first")}
    row = differences["ar", "perplexity"]
    assert row["difference"] == pytest.approx(perplexity["ar"] - perplexity["first"])
    assert row["documents"] == 3 and row["standard_error"] > 0
    assert differences["second", "perplexity"]["standard_error"] == 0
    (settings, *_) = record["evaluations"]
    assert settings["model_settings"]["weights"] and settings["seeds"]["fewshot_seed"] == 1234
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_tasks", None)
        assert run(tmp_path / "out", models) == record
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    models["second"]["diffusion_steps"] = 3
    ran, run_tasks = [], module.run_tasks
    monkeypatch.setattr(module, "run_tasks", lambda *words: ran.append(words[2].save_dir) or run_tasks(*words))
    other = run(tmp_path / "out", models)
    assert ran == [str(tmp_path / "out" / "second")]
    (row,) = (row for row in other["results"] if (row["model"], row["metric"]) == ("second", "exact_match"))
    assert row["forward_passes"] == 9


@pytest.mark.slow
def test_other_weights_are_evaluated_again(folder, tmp_path, monkeypatch):
    model = random_model(tmp_path / "model", positions=400)
    models = {"a": {"model_name_or_path": str(model)}}
    before = run(tmp_path / "out", models, task="tiny_last_word")
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.transformer.wte.weight.data.mul_(1.5)
    weights.save_pretrained(model)
    after = run(tmp_path / "out", models, task="tiny_last_word")
    assert before["results"] != after["results"]
    assert (
        before["evaluations"][0]["model_settings"]["weights"] != after["evaluations"][0]["model_settings"]["weights"]
    )


def test_a_sweep(folder, autoregressive, tmp_path, monkeypatch):
    """The model is loaded once; the texts are those of separate evaluations, and the plot and the score are there."""
    loads, load_model = [], module.load_model
    monkeypatch.setattr(module, "load_model", lambda *words: loads.append(words) or load_model(*words))
    models = {
        "swept": {"model_name_or_path": str(folder)},
        "ar": {"model_name_or_path": str(autoregressive), "kind": "ar"},
    }
    record = run(tmp_path / "out", models, task="tiny_problems", sweep={"diffusion_steps": [6, 3]})
    assert len(loads) == 1
    passes = {row["sweep_value"]: row["forward_passes"] for row in record["results"]}
    assert passes == {6: 18, 3: 9, None: None}
    (panel,) = record["parallelism"]
    swept, ar = panel["curves"]
    assert [point["label"] for point in swept["points"]] == ["6", "3"]
    assert [point["tokens_per_pass"] for point in ar["points"]] == [1]
    assert (swept["score"], ar["score"], panel["best"]) == (0, 0, 0)  # random weights solve nothing
    assert (tmp_path / "out" / "parallelism.png").stat().st_size > 5000
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "diffusion_steps 6 | diffusion_steps 3" in text and "| AUP |" in text
    pairs = {(row["model"], row["baseline"]) for row in record["differences"]}
    assert pairs == {("swept, 3", "swept, 6"), ("ar", "swept, 6"), ("ar", "swept, 3")}
    alone = {"swept": {"model_name_or_path": str(folder), "diffusion_steps": 3}}
    run(tmp_path / "alone", alone, task="tiny_problems")
    one, other = (
        [json.loads(line)["resps"] for line in (path / "samples.jsonl").read_text().splitlines()]
        for path in (tmp_path / "out" / "swept" / "diffusion_steps-3", tmp_path / "alone" / "swept")
    )
    assert one == other


@pytest.mark.slow
def test_documents_that_differ_are_an_error(folder, tmp_path):
    models = {name: {"model_name_or_path": str(folder), "diffusion_steps": n} for name, n in (("a", 2), ("b", 3))}
    run(tmp_path, models, task="tiny_problems")
    path = tmp_path / "b" / "samples.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    with pytest.raises(ValueError, match=r"tiny_problems.* a and b .*different documents"):
        run(tmp_path, models, task="tiny_problems")


# Autoregressive models.


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
