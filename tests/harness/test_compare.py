"""Comparisons: their keys, what is evaluated again, and what is written."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
from transformers import AutoModelForCausalLM

from llamafactory_ddm.harness import compare as module
from llamafactory_ddm.harness.compare import as_markdown, compare
from llamafactory_ddm.harness.compare_keys import read_comparison
from support.cli import ROOT
from support.harness import random_model
from support.tiny import save_model

TASKS = str(ROOT / "examples" / "eval" / "tasks")
ONE = {"a": {"model_name_or_path": "x"}}
BASE = {"task": "tiny_problems", "task_dir": TASKS, "save_dir": "out", "models": ONE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"), positions=400)


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("autoregressive"), kind="ar", positions=400, width=16, layers=1)


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
        ({"temperature": 1, "logits_temp": 1}, "logits_temp .*under its other name"),
        (
            {"models": {"a": {"model_name_or_path": "x", "temperature": 1, "logits_temp": 1}}},
            "models: a: logits_temp .*under its other name",
        ),
        ({"sweep": {"diffusion_stps": [1]}}, "sweep: diffusion_stps.*diffusion_steps"),
        ({"sweep": {"max_new_tokens": [1]}}, "sweep: max_new_tokens"),
        ({"sweep": {"diffusion_steps": [1], "block_length": [1]}}, "diffusion_steps, block_length"),
        ({"sweep": {}}, "sweep: nothing"),
        ({"sweep": "diffusion_steps"}, "sweep: 'diffusion_steps'"),
        ({"sweep": {"diffusion_steps": 4}}, "sweep: diffusion_steps: 4"),
        ({"sweep": {"diffusion_steps": []}}, "sweep: diffusion_steps"),
        ({"sweep": {"diffusion_steps": [4, 0]}}, "diffusion_steps.*0"),
        ({"sweep": {"diffusion_steps": [4, 4.0]}}, "twice"),
        ({"sweep": {"top_k": [None, 5]}}, "sweep: top_k: .*empty value"),
        ({"sweep": {"confidence_threshold": [0, 0.5]}}, r"sweep: confidence_threshold .*\(0, 1\], got 0"),
        (
            {"sweep": {"temperature": [0.5]}, "models": {"a": {"model_name_or_path": "x", "temperature": 1}}},
            "set by sweep",
        ),
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
    signed = read_comparison({**BASE, "sweep": {"seed": [-1, 1]}})
    assert [each.keys.save_dir for each in signed.evaluations] == ["out/a/seed--1", "out/a/seed-1"]
    assert [dict(each.sampling) for each in comparison.evaluations] == [{"logits_temp": 0.0}, {"logits_temp": 0.5}, {}]


@pytest.mark.parametrize(
    ("entry", "keys", "error"),
    [
        ({"kind": "ar"}, {}, "models: a: .*kind: ar"),
        ({"autoregressive": True}, {}, "models: a: .*kind: ar"),
        ({"model_name_or_path": "/absent"}, {}, "models: a: /absent"),
        ({"model_name_or_path": "absent", "kind": "ar"}, {}, "models: a: absent .*Hub"),
        ({"template": "qwenn"}, {}, "models: a: template: qwenn does not exist.*qwen"),
        ({"template": "qwenn", "autoregressive": True, "kind": "ar"}, {}, "models: a: template: qwenn"),
        ({"suppress_tokens": ["no token"]}, {}, "models: a: suppress_tokens.*no token"),
        (
            {},
            {"save_dir": "README.md/out"},
            r"models: a: save_dir: README\.md/out/a cannot be written, as .*README\.md is not a folder",
        ),
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
        run(**{"save_dir": tmp_path, **keys}, models={"a": {"model_name_or_path": str(path), **entry}})
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
    text = as_markdown(record)
    assert "tiny_problems (version 1.0, 0 shots, 3 of 200 documents)" in text
    assert "| bound, 16 masks |" in text and "| exact |" in text and "max_new_tokens: 6" in text
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


def test_results_that_were_changed_are_computed_again(folder, tmp_path):
    models = {"a": {"model_name_or_path": str(folder), "diffusion_steps": 2}}
    record = run(tmp_path, models, task="tiny_problems")
    path = tmp_path / "a" / "samples.jsonl"
    whole = path.read_text()
    for wrong in ("", whole.splitlines()[0] + "\n", "{"):
        path.write_text(wrong)
        assert run(tmp_path, models, task="tiny_problems") == record
        assert path.read_text() == whole


def test_a_plot_of_an_earlier_sweep_does_not_stay(folder, tmp_path):
    models = {"a": {"model_name_or_path": str(folder)}}
    run(tmp_path, models, task="tiny_problems", sweep={"diffusion_steps": [2]})
    assert (tmp_path / "parallelism.png").is_file()
    run(tmp_path, models, task="tiny_problems", diffusion_steps=2)
    assert not (tmp_path / "parallelism.png").exists()


# Groups, and scores that are no accuracies.


class Reported:
    """An evaluation of tasks with these values of `acc` by document."""

    def __init__(self, model, group, **values):
        names = {name: [float(value) for value in each] for name, each in values.items()}
        self.evaluation = SimpleNamespace(model=model, value=None)
        self.samples = {
            name: [{"doc_hash": f"{name}{i}", "filter": "none", "acc": value} for i, value in enumerate(each)]
            for name, each in names.items()
        }
        self.values = {name: sum(each) / len(each) for name, each in names.items()} | {"both": group}

    def metrics(self, task):
        return [("acc", "none")] if task in self.values else []

    def value(self, task, metric, filter_name):
        return self.values[task], None

    def cost(self, task):
        return 10, 2.0


class Task:
    """A task with an accuracy."""

    def __init__(self, name):
        self.task_name = name

    def aggregation(self):
        return {"acc": module.MEAN}

    def higher_is_better(self):
        return {"acc": True}


def group_of(weight_by_size):
    config = SimpleNamespace(metric="acc", weight_by_size=weight_by_size)
    tasks = [Task("one"), Task("two"), Task("without")]
    return SimpleNamespace(name="both", aggregate_metric_list=[config], get_all_tasks=lambda: tasks)


def test_the_difference_of_a_group():
    """By hand. Differences 1, 0 and 0, 0, 1, 1: means 1/2 and 1/2, squared errors 1/4 and 1 / 12.

    Weighted by size, over 6 documents: error^2 = ((2/6)^2 / 4 + (4/6)^2 / 12); else with weights 1/2 each.
    """
    values = {"one": (0, 1), "two": (0, 1, 0, 0)}, {"one": (1, 1), "two": (0, 1, 1, 1)}
    weighted = [Reported(name, mean, **each) for name, mean, each in zip("ab", (2 / 6, 5 / 6), values, strict=True)]
    found = module._group_difference(group_of(True), "acc", "none", tuple(weighted))
    assert (found.value, found.documents) == (pytest.approx(1 / 2), 6)
    assert found.error == pytest.approx(((2 / 6) ** 2 / 4 + (4 / 6) ** 2 / 12) ** 0.5)
    even = [Reported(name, mean, **each) for name, mean, each in zip("ab", (3 / 8, 7 / 8), values, strict=True)]
    found = module._group_difference(group_of(False), "acc", "none", tuple(even))
    assert (found.value, found.error) == (pytest.approx(1 / 2), pytest.approx((1 / 4 / 4 + 1 / 4 / 12) ** 0.5))
    assert module._group_difference(group_of(False), "acc", "none", tuple(weighted)) is None  # no such mean
    one = {"one": (0,), "two": (0, 1, 0, 0)}
    pair = Reported("a", 1 / 5, **one), Reported("b", 1 / 5, **one)
    assert module._group_difference(group_of(True), "acc", "none", pair).error is None


def test_a_mean_that_is_no_accuracy_has_no_curve():
    tasks = SimpleNamespace(single=lambda: {"one": Task("one")})
    (panel,) = module._parallelism([Reported("a", 0, one=(0, 1))], tasks)
    assert panel["curves"][0]["points"][0]["accuracy"] == 50
    assert module._parallelism([Reported("a", 0, one=(0, 40))], tasks) == []
