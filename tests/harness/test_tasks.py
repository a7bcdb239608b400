"""Tasks that are loaded once, and the names and directions of their metrics."""

import pytest

pytest.importorskip("lm_eval")

from llamafactory_ddm.harness.model import DiffusionLM
from llamafactory_ddm.harness.run import load_tasks
from support.cli import ROOT
from support.harness import random_model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/tiny_problems_eval.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{instruction}}}}"
doc_to_target: "{{{{output}}}}"
generation_kwargs: {{max_gen_toks: 4}}
filter_list:
  - name: strict
    filter: [{{function: take_first}}]
  - name: loose
    filter: [{{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: {name}
task: [one, two]
"""
MEANS = """aggregate_metric_list:
  - {metric: exact_match, aggregation: mean, weight_by_size: true}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name))
    (tmp_path / "mean.yaml").write_text(GROUP.format(name="mean") + MEANS)
    (tmp_path / "plain.yaml").write_text(GROUP.format(name="plain"))
    return tmp_path


def tasks_of(folder, *names):
    return load_tasks(names, folder=str(folder), run_generated_code=False)


def rows(value):
    """A row of the harness's results."""
    return {
        **{f"exact_match,{name}": value for name in ("strict", "loose")},
        **{f"exact_match_stderr,{name}": "N/A" if value > 1 else value / 10 for name in ("strict", "loose")},
        "alias": "x",
        "sample_len": 3,
    }


def test_metrics_are_named_by_task_metric_and_filter(folder):
    results = {"results": {"one": rows(0.5), "two": rows(2), "mean": rows(0.75)}}
    assert tasks_of(folder, "one").metrics(results) == {
        "one_exact_match_strict": 0.5,
        "one_exact_match_loose": 0.5,
        "one_exact_match_strict_stderr": 0.05,
        "one_exact_match_loose_stderr": 0.05,
    }
    assert set(tasks_of(folder, "mean").metrics(results)) == {
        f"mean_exact_match_{name}{end}" for name in ("strict", "loose") for end in ("", "_stderr")
    }
    plain = tasks_of(folder, "plain")
    names = {f"{task}_exact_match_{name}" for task in ("one", "two") for name in ("strict", "loose")}
    assert names <= set(plain.metrics(results)) and "two_exact_match_strict_stderr" not in plain.metrics(results)
    assert plain.higher_is_better() == dict.fromkeys(names, True)
    assert list(tasks_of(folder, "mean").higher_is_better()) == ["mean_exact_match_strict", "mean_exact_match_loose"]


def test_directions_are_those_of_the_tasks(monkeypatch):
    monkeypatch.chdir(ROOT)
    tasks = tasks_of(ROOT / "examples" / "eval" / "tasks", "tiny_last_word", "tiny_stories")
    assert tasks.higher_is_better() == {
        "tiny_last_word_acc": True,
        "tiny_last_word_perplexity": False,
        "tiny_stories_bits_per_byte": False,
    }


def test_a_task_by_itself_and_in_a_group(folder):
    with pytest.raises(ValueError, match=r"task: one, mean: .*once"):
        tasks_of(folder, "one", "mean")


def test_messages_name_the_users_key(folder):
    with pytest.raises(ValueError, match=r"eval_tasks: onne does not exist.*'one'"):
        load_tasks(["onne"], folder=str(folder), run_generated_code=False, key="eval_tasks")


def test_a_task_of_which_no_metric_is_computed(folder, tmp_path):
    text = TASK.format(name="one").replace("generate_until", "loglikelihood").split("generation_kwargs")[0]
    text += "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    (folder / "one.yaml").write_text(text)
    model = DiffusionLM(str(random_model(tmp_path / "model", 512)), likelihood_samples=16)
    with pytest.raises(ValueError, match=r"task: one: .*exact_match.*output_type: loglikelihood.*metric_list"):
        tasks_of(folder, "one").run(model, max_samples=1)


def test_bars_can_be_hidden_and_the_machine_is_described_once(folder, tmp_path, monkeypatch, capfd):
    described = []
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: described.append(1) or "a machine")
    path, tasks = random_model(tmp_path / "model", 512), tasks_of(folder, "one")
    model = DiffusionLM(str(path), diffusion_steps=1, max_new_tokens=2, hide_progress=True)
    capfd.readouterr()
    results = [tasks.run(model, max_samples=2, hide_progress=True) for _ in range(2)]
    assert "it/s" not in capfd.readouterr().err
    assert [each["pretty_env_info"] for each in results] == ["a machine"] * 2 and len(described) == 1
    shown = DiffusionLM(str(path), diffusion_steps=1, max_new_tokens=2)
    tasks.run(shown, max_samples=2)
    assert capfd.readouterr().err.count("requests:") > 0
