"""`llamafactory-ddm eval` and `lm_eval --model llamafactory_ddm`, on models of a few steps."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval")

from llamafactory_ddm.harness.keys import EvalKeys, read_keys
from llamafactory_ddm.harness.run import evaluate
from support.cli import ROOT, SCRIPTS, in_processes, run
from support.harness import UNSAFE_TASK

TINY = sorted((ROOT / "examples" / "eval").glob("tiny_*.yaml"))  # the others: test_evaluation_tasks.py
RECIPES = [path for path in TINY if "llamafactory-ddm eval" in path.read_text()]
PERPLEXITY = "perplexity,none"
SMALL = {"task_dir": str(ROOT / "examples" / "eval" / "tasks"), "max_samples": 4, "likelihood_samples": 16}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def results_of(model, sampling=None, **keys):
    """Return the results of an evaluation in this process, without what differs by machine and time."""
    values = {
        "model_name_or_path": model and str(model),
        **SMALL,
        "task": "tiny_last_word",
        **(sampling or {}),
        **keys,
    }
    return evaluate(*read_keys({name: value for name, value in values.items() if value is not None}))


def samples(folder):
    """Return the texts and likelihoods of an evaluation by task and document.

    The harness appends a second result where it repeated a request to give all processes as many.
    """
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return {(line["task"], line["doc_id"]): [results[0] for results in line["resps"]] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipe_runs(recipe, checkpoint, finetuned, tmp_path):
    model = finetuned if "ddm_sft" in recipe.read_text() else checkpoint
    small = ("max_samples=3", "likelihood_samples=16", f"model_name_or_path={model}", f"save_dir={tmp_path}")
    done = run("eval", recipe, *small, program="llamafactory-ddm")
    assert ("tokens, " in done.stdout) == ("problems" in recipe.name)
    assert "forward passes" in done.stdout and "| Tasks" in done.stdout.replace("|    Tasks", "| Tasks")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["config"]["model_settings"]["weights"] and record["versions_of_packages"]["lm_eval"]
    again = run("eval", recipe, *small, program="llamafactory-ddm")
    assert done.stdout == again.stdout
    assert json.loads((tmp_path / "results.json").read_text())["results"] == record["results"]


@pytest.mark.slow
def test_the_harnesss_own_command_knows_the_model(checkpoint):
    words = ("--model", "llamafactory_ddm", "--model_args", f"pretrained={checkpoint},likelihood_samples=16")
    tasks = ("--tasks", "tiny_last_word", "--include_path", SMALL["task_dir"], "--limit", "2")
    done = run("run", *words, *tasks, program="lm_eval", cwd=str(ROOT))
    assert "tiny_last_word" in done.stdout and "llamafactory_ddm" in done.stdout


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(checkpoint, tmp_path):
    """Likelihoods, greedy decoding and sampled texts of an odd number of documents."""
    words = ["eval", RECIPES[-1], f"model_name_or_path={checkpoint}", "max_samples=5", "likelihood_samples=16"]
    words += ["task=tiny_last_word,tiny_stories,tiny_problems", "temperature=1", "diffusion_steps=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*words, f"save_dir={one}", program="llamafactory-ddm")
    in_processes(2, SCRIPTS / "llamafactory-ddm", *words, f"save_dir={two}")
    assert (one / "table.md").read_text() == (two / "table.md").read_text()
    assert samples(one) == samples(two)
    assert {path.name for path in two.glob("requests-*")} == {"requests-0.jsonl", "requests-1.jsonl"}


@pytest.mark.slow
def test_each_key_changes_the_evaluation(checkpoint, adapter, finetuned, tmp_path):
    def values(results, task="tiny_last_word"):
        return {name: value for name, value in results["results"][task].items() if name in ("acc,none", PERPLEXITY)}

    base = results_of(checkpoint)
    assert values(results_of(checkpoint)) == values(base)
    assert values(results_of(checkpoint, batch_size=3)) == pytest.approx(values(base), rel=1e-4)
    assert values(results_of(checkpoint, max_samples=6)) != values(base)
    assert values(results_of(checkpoint, n_shot=1)) != values(base)
    assert values(results_of(checkpoint, infer_dtype="bfloat16")) != values(base)
    assert values(results_of(None, adapter_name_or_path=str(adapter))) != values(base)
    assert values(results_of(finetuned, template="diffullama")) != values(results_of(finetuned))
    stories = {"task": "tiny_stories"}
    few, more = (results_of(checkpoint, **stories, likelihood_samples=n)["results"]["tiny_stories"] for n in (16, 32))
    assert few != more
    published = results_of(checkpoint, **stories, scoring="llada")["results"]["tiny_stories"]
    assert published not in (few, more)
    problems = {"task": "tiny_problems", "sampling": {"diffusion_steps": 2}}
    passes = [
        results_of(checkpoint, **problems, **more)["config"]["forward_passes"]["tiny_problems"]
        for more in ({}, {"max_new_tokens": 1})
    ]
    assert passes == [8, 4]
    (tmp_path / "mine.py").write_text("raise ValueError('the plugin ran')")
    with pytest.raises(ValueError, match="the plugin ran"):
        results_of(checkpoint, plugins=str(tmp_path / "mine.py"))


@pytest.mark.slow
def test_generated_code_runs_with_the_switch_alone(checkpoint, tmp_path):
    (tmp_path / "unsafe.yaml").write_text(UNSAFE_TASK)
    keys = {"task": "tiny_unsafe", "task_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="run_generated_code"):
        results_of(checkpoint, **keys)
    assert results_of(checkpoint, **keys, run_generated_code=True)["results"]["tiny_unsafe"]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({}, "task is missing"),
        ({"task": "x"}, "model_name_or_path"),
        ({"task": ["x"], "model_name_or_path": "a", "template": ["b"]}, "template"),
        ({"task": "x", "model_name_or_path": "a", "task_dir": "/absent"}, "task_dir.*/absent"),
        ({"task": "x", "model_name_or_path": "a", "save_dir": "README.md"}, "save_dir.*README"),
        ({"task": "x", "model_name_or_path": "a", "n_shots": 3}, "n_shots.*n_shot"),
        ({"task": "x", "model_name_or_path": "a", "batch_size": 0}, "batch_size"),
        ({"task": "x", "model_name_or_path": "a", "infer_dtype": "int8"}, "infer_dtype"),
        ({"task": "x", "model_name_or_path": "a", "scoring": "lada"}, "scoring.*llada"),
        ({"task": "x", "model_name_or_path": "a", "likelihood_samples": 4}, "likelihood_samples"),
    ],
)
def test_wrong_keys(keys, error):
    with pytest.raises(ValueError, match=error):
        read_keys(keys)


@pytest.mark.parametrize(
    ("task", "error"),
    [
        # Reads the names of all tasks of the harness.
        pytest.param("tiny_last_wrd", "task: tiny_last_wrd.*tiny_last_word", marks=pytest.mark.slow),
        ("absent", r"task: absent.*data\b.*task_data={absent: FOLDER}"),
    ],
)
def test_a_task_that_cannot_run(task, error, tmp_path):
    """Before the model is loaded, which does not exist here."""
    shutil.copytree(SMALL["task_dir"], tmp_path / "tasks")
    text = (tmp_path / "tasks" / "tiny_stories.yaml").read_text()
    text = text.replace("tiny_stories\n", "absent\n", 1).replace("data/tiny_stories_eval.jsonl", "data/absent.jsonl")
    (tmp_path / "tasks" / "absent.yaml").write_text(text)
    with pytest.raises(ValueError, match=error):
        evaluate(EvalKeys(model_name_or_path="absent", task=task, task_dir=str(tmp_path / "tasks")), {})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("doc_to_text", 'doc_to_text: "{{ text"'), "task: broken"),
        (("metric_list", "nokey: 3\nmetric_list"), "task: broken.*nokey"),
        (("test_split: test", "test_split: absent"), "task: broken.*absent"),
        (("metric: acc\n", "metric: acd\n"), "task: broken: acd .*'acc'.*metric_list"),
        (("output_type: loglikelihood", "output_type: multiple_choice\ndoc_to_choice: [a, b]"), None),
    ],
)
def test_a_task_with_a_fault(change, error, tmp_path):
    text = (ROOT / "examples" / "eval" / "tasks" / "tiny_last_word.yaml").read_text()
    text = text.replace("task: tiny_last_word", "task: broken").replace("metric: perplexity", "metric: exact_match")
    text = text.replace("    aggregation: perplexity\n", "    aggregation: mean\n")
    text = "".join(
        change[1] + "\n" if line.startswith("doc_to_text") and "doc_to_text" in change else line
        for line in text.splitlines(keepends=True)
    ).replace(*change)
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ValueError, match=error or "task: broken.*exact_match"):
        evaluate(EvalKeys(model_name_or_path="absent", task="broken", task_dir=str(tmp_path)), {})


def test_an_adapter_is_one_and_names_its_model(tmp_path):
    keys = {"task": "tiny_stories", "task_dir": SMALL["task_dir"]}
    with pytest.raises(ValueError, match=r"adapter_name_or_path.*adapter_config"):
        evaluate(EvalKeys(adapter_name_or_path=str(tmp_path), **keys), {})
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "saves/mine"}')
    with pytest.raises(ValueError, match=r"model_name_or_path: other.*saves/mine"):
        evaluate(EvalKeys(model_name_or_path="other", adapter_name_or_path=str(tmp_path), **keys), {})


@pytest.mark.slow
def test_the_command_line():
    done = run("eval", program="llamafactory-ddm", check=False)
    assert done.returncode == 2 and "x.yaml" in done.stderr
    done = run("eval", "--help", program="llamafactory-ddm")
    assert "docs/keys.md" in done.stdout
    for words, error in (((RECIPES[0], "task=absent"), "task: absent"), (("absent.yaml",), "absent.yaml")):
        done = run("eval", *words, program="llamafactory-ddm", check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"llamafactory-ddm eval: {error}")
