"""`sample_steps` and `eval_tasks` in whole runs: what they write, that training does not notice, and their errors."""

import importlib.util
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_ddm.integration import workflow
from llamafactory_ddm.integration.resolve import checks
from support.cli import ABSENT, ROOT, evaluations, history, run, train_in_processes
from support.harness import UNSAFE_TASK

SAMPLES = {"sample_steps": 1, "sample_length": 6, "diffusion_steps": 3}
TASK_DIR = str(ROOT / "examples" / "eval" / "tasks")
TASKS = {"eval_tasks": "tiny_last_word", "eval_task_dir": TASK_DIR, "eval_task_samples": 2}
EVALUATIONS = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "eval_time_samples": 1}


def samples(folder):
    with open(folder / "samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


def assert_same_training(one, two):
    for key in ("loss", "nll", "grad_norm", "masked_fraction", "attention_ratio"):
        assert [log[key] for log in history(one)] == [log[key] for log in history(two)], key
    assert [log["eval_loss"] for log in evaluations(one)] == [log["eval_loss"] for log in evaluations(two)]
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name]), name


@pytest.fixture(autouse=True)
def _no_record_of_the_machine(monkeypatch):
    """Spare each evaluation the harness's record of the machine, for which it starts pip and other programs."""
    if importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """The built-in model with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(ROOT / "data" / "tiny_gpt2", folder)
    config = json.loads((folder / "config.json").read_text())
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    (folder / "config.json").write_text(json.dumps({**config, **dropout}))
    return folder


@pytest.mark.slow
def test_adaptation_is_the_same_bit_for_bit(train_small, dropping, tmp_path):
    """With dropout and annealed attention; texts and tasks at every step."""
    keys = {**EVALUATIONS, "model_name_or_path": dropping, "anneal_steps": 50, "max_steps": 2}
    without = train_small(tmp_path / "without", **keys)
    both = train_small(tmp_path / "both", **keys, **SAMPLES, **TASKS, sample_count=2)
    assert_same_training(without, both)
    assert [(line["step"], line["index"]) for line in samples(both)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for log in evaluations(both):
        assert {"eval_tiny_last_word_acc", "eval_tiny_last_word_acc_stderr", "eval_loss"} <= log.keys()
    saved = json.loads((both / "eval_results.json").read_text())
    assert saved["eval_tiny_last_word_perplexity"] == evaluations(both)[-1]["eval_tiny_last_word_perplexity"]
    assert not (without / "samples.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny_gpt2_full_ddm_sft.yaml", "tiny_gpt2_lora_ddm_sft.yaml"])
def test_finetuning_is_the_same_bit_for_bit(recipe, finetune, tmp_path):
    keys = {**EVALUATIONS, "recipe": recipe, "max_steps": 2}
    if "lora" in recipe:
        keys["lora_dropout"] = 0.1
    without = finetune(tmp_path / "without", **keys)
    both = finetune(tmp_path / "both", **keys, **SAMPLES, **{**TASKS, "eval_tasks": ["tiny_problems"]})
    assert_same_training(without, both)
    first = samples(both)[0]
    row = json.loads((ROOT / "data" / "tiny_problems_eval.jsonl").read_text().splitlines()[0])
    assert row["instruction"] in first["prompt"] and first["label"].strip() == row["output"]
    assert "eval_tiny_problems_exact_match" in evaluations(both)[0]


@pytest.mark.slow
def test_metrics_and_texts_are_those_of_the_saved_model(finetune, tmp_path, monkeypatch):
    """As `llamafactory-ddm eval` and `load` give them."""
    from llamafactory_ddm import load
    from llamafactory_ddm.harness.keys import read_keys
    from llamafactory_ddm.harness.run import evaluate

    prompts = ["Tom has 3 apples.", "Mia has 2 eggs."]
    tasks = {**TASKS, "eval_tasks": "tiny_last_word,tiny_problems", "max_new_tokens": 5, "diffusion_steps": 3}
    keys = {"sample_steps": 2, "sample_prompts": prompts, "max_steps": 2, "temperature": 0.5}
    folder = finetune(tmp_path / "out", **EVALUATIONS, **tasks, **keys)
    monkeypatch.chdir(ROOT)
    values = {
        **{"model_name_or_path": str(folder), "task": tasks["eval_tasks"], "task_dir": TASK_DIR, "max_samples": 2},
        **{"template": "diffullama", "max_new_tokens": 5, "diffusion_steps": 3, "temperature": 0.5},
    }
    results = evaluate(*read_keys(values))["results"]
    log = evaluations(folder)[-1]
    for name in ("acc", "acc_stderr", "perplexity", "perplexity_stderr"):
        assert log[f"eval_tiny_last_word_{name}"] == pytest.approx(results["tiny_last_word"][f"{name},none"], rel=1e-3)
    assert log["eval_tiny_problems_exact_match"] == results["tiny_problems"]["exact_match,number"]
    options = {"max_new_tokens": 5, "diffusion_steps": 3, "temperature": 0.5, "seed": 42}
    assert [line["text"] for line in samples(folder)] == load(folder).generate(prompts, **options)
    assert [line["prompt"] for line in samples(folder)] == prompts


@pytest.mark.slow
def test_the_best_model_by_a_task(train_small, tmp_path):
    """Perplexity is better when lower, which the task says and the YAML need not."""
    keys = {**EVALUATIONS, **TASKS, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    name = "eval_tiny_last_word_perplexity"
    out = train_small(tmp_path / "out", **keys, metric_for_best_model=name, learning_rate=0.03)
    values = {log["step"]: log[name] for log in evaluations(out)}
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == min(values.values())
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{min(values, key=values.get)}")
    wrong = {"metric_for_best_model": "eval_tiny_last_word_ac"}
    with pytest.raises(ValueError, match=r"metric_for_best_model: eval_tiny_last_word_ac .*eval_tiny_last_word_acc'"):
        train_small(tmp_path / "wrong", **keys, **wrong, model_name_or_path="data/tiny_gpt2")


@pytest.fixture(scope="module")
def shared(train_small, checkpoint, tmp_path_factory):
    """Three texts and three documents, which two processes share unequally: keys, and a run of one process."""
    keys = {
        **{**EVALUATIONS, **SAMPLES, **TASKS, "model_name_or_path": str(checkpoint), "learning_rate": 1e-6},
        **{"eval_tasks": "tiny_last_word,tiny_problems", "eval_task_samples": 3, "sample_count": 3, "max_steps": 1},
        **{"temperature": 1.0, "max_new_tokens": 4},
    }
    return keys, train_small(tmp_path_factory.mktemp("shared") / "one", **keys)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero2"])
def test_two_processes_give_the_texts_and_metrics_of_one(way, shared, small_data, tmp_path):
    if way == "zero2":
        pytest.importorskip("deepspeed")
    keys, one = shared
    small = {
        **{"warmup_steps": 0, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"},
        **{"plot_loss": False, "cutoff_len": 32, "packing": True, "overwrite_cache": True, "disable_tqdm": True},
        **{"dataset_dir": str(small_data), "output_dir": str(tmp_path / "two"), "per_device_eval_batch_size": 8},
        **({"use_cpu": True} if way == "ddp" else {"deepspeed": "examples/deepspeed/ds_z2_config.json"}),
        **keys,
    }
    words = (f"{name}={json.dumps(value)}" for name, value in small.items())
    train_in_processes(2, "examples/tiny_gpt2_full_ddm.yaml", *words, env={"DS_ACCELERATOR": "cpu"})
    assert samples(tmp_path / "two") == samples(one)
    (expected,), (found,) = evaluations(one), evaluations(tmp_path / "two")
    names = [name for name in expected if name.startswith("eval_tiny")]
    assert len(names) == 6
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name


@pytest.mark.slow
def test_half_precision(train_small, tmp_path):
    few = {**SAMPLES, **TASKS, **EVALUATIONS, "sample_count": 1, "eval_task_samples": 1}
    out = train_small(tmp_path / "out", **few, bf16=True, max_steps=1)
    assert samples(out) and evaluations(out)[0]["eval_tiny_last_word_perplexity"] > 1


@pytest.mark.slow
def test_the_command_line_takes_lists(checkpoint, small_data, tmp_path):
    words = ("max_steps=1", "eval_strategy=no", "do_eval=false", "save_strategy=no", "plot_loss=false")
    words += ("sample_steps=1", "sample_prompts=[Tom had, 'One day, Mia']", "sample_length=4", "disable_tqdm=true")
    words += (
        f"dataset_dir={small_data}",
        f"output_dir={tmp_path}",
        "cutoff_len=32",
        f"model_name_or_path={checkpoint}",
    )
    done = run("train", "examples/tiny_gpt2_full_ddm.yaml", *words)
    assert [line["prompt"] for line in samples(tmp_path)] == ["Tom had", "One day, Mia"]
    assert "Samples at step 1:\n  0: Tom had >>> " in done.stdout + done.stderr


INFILLING = """
task: tiny_gaps
dataset_path: json
dataset_kwargs: {data_files: {test: data/tiny_stories_eval.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text[:8]}}<|infill:3|>{{text[16:24]}}"
doc_to_target: "{{text}}"
generation_kwargs: {infill: true, max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_a_task_with_gaps_under_a_template_is_refused_before_the_model_is_loaded(finetune, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "gaps.yaml").write_text(INFILLING)
    keys = {**EVALUATIONS, "eval_tasks": "tiny_gaps", "eval_task_dir": tmp_path / "tasks"}
    monkeypatch.setattr(workflow, "load_diffusion_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"eval_tasks: tiny_gaps: .*template: diffullama"):
        finetune(tmp_path / "out", **keys)


@pytest.mark.slow
def test_generated_code_runs_with_the_switch_alone(train_small, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "unsafe.yaml").write_text(UNSAFE_TASK)
    keys = {**EVALUATIONS, "eval_tasks": "tiny_unsafe", "eval_task_dir": tmp_path / "tasks", "max_steps": 1}
    with pytest.raises(ValueError, match=r"eval_tasks: tiny_unsafe .*run_generated_code"):
        train_small(tmp_path / "out", **keys)
    out = train_small(tmp_path / "out", **keys, run_generated_code=True, eval_task_samples=2)
    assert "eval_tiny_unsafe_acc" in evaluations(out)[0]


NO_SAMPLES = {"sample_steps": ABSENT, "sample_length": ABSENT}  # the recipe has both
WRONG = [
    ({"sample_steps": -1}, "sample_steps.*-1"),
    ({**NO_SAMPLES, **{"sample_prompts": ["a"]}}, "sample_prompts: .*sample_steps"),
    ({**NO_SAMPLES, **{"sample_count": 3}}, "sample_count: .*sample_steps"),
    ({**NO_SAMPLES, "sample_length": 3}, "sample_length: .*sample_steps"),
    ({"sample_steps": 1, "sample_count": 0}, "sample_count.*0"),
    ({"sample_steps": 1, "sample_prompts": []}, r"sample_prompts.*\[\]"),
    ({"sample_steps": 1, "sample_prompts": [3]}, r"sample_prompts.*\[3\]"),
    ({"sample_steps": 1, "sample_prompts": "a", "sample_count": 2}, "sample_count: 2 .*sample_prompts"),
    ({"sample_steps": 1, "do_sample": False}, "do_sample.*logits_temp"),
    ({"eval_task_samples": 2}, "eval_task_samples: .*eval_tasks"),
    ({"eval_task_dir": TASK_DIR}, "eval_task_dir: .*eval_tasks"),
    ({"run_generated_code": True}, "run_generated_code: .*eval_tasks"),
    (TASKS, "eval_tasks: tiny_last_word .*eval_strategy"),
    ({**TASKS, **EVALUATIONS, "eval_task_samples": 0}, "eval_task_samples.*0"),
    ({**TASKS, **EVALUATIONS, "eval_task_dir": "nowhere"}, "eval_task_dir: nowhere "),
    ({**TASKS, **EVALUATIONS, "eval_tasks": ","}, "eval_tasks"),
]


@pytest.mark.parametrize(("keys", "error"), WRONG, ids=[error for _, error in WRONG])
def test_mistakes_that_the_keys_show(keys, error, train_small, tmp_path):
    """Before the tokenizer is loaded, as the model does not exist."""
    folder = tmp_path / "none"
    shutil.copytree(ROOT / "data" / "tiny_gpt2", folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=error) as raised:
        train_small(tmp_path / "out", model_name_or_path=folder, **keys)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("sample_steps", 5), ("eval_tasks", "tiny_stories")])
def test_sharded_weights_are_refused(key, value, monkeypatch):
    training_args = SimpleNamespace(do_train=True, do_eval=True, fsdp=["full_shard"])
    parsed = SimpleNamespace(user_keys=frozenset())
    finetuning_args = SimpleNamespace(**{"sample_steps": 0, "eval_tasks": None, key: value}, parsed=parsed)
    with pytest.raises(ValueError, match=f"{key}: {value} .*FSDP"):
        checks.check_monitoring(training_args, finetuning_args)
    training_args.fsdp = ""
    monkeypatch.setattr(checks, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=f"{key}: {value} .*ZeRO-3"):
        checks.check_monitoring(training_args, finetuning_args)


def test_without_lm_eval(train_small, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"eval_tasks: tiny_last_word needs lm-eval.*\[eval\]"):
        train_small(tmp_path / "out", **TASKS, **EVALUATIONS)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (
            {"sample_steps": 1, "sample_length": ABSENT, "sample_prompts": "Tom " * 40},
            "sample_prompts: text 0: .*cutoff_len: 32",
        ),
        ({"sample_steps": 1, "sample_length": 999}, "sample_length: 999: .*256"),
    ],
)
def test_mistakes_are_found_before_training(keys, error, train_small, tmp_path):
    with pytest.raises(ValueError, match=error):
        train_small(tmp_path / "out", **keys)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_a_task_that_cannot_be_read_is_found_before_the_model_is_loaded(train_small, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "load_diffusion_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "tasks").mkdir()
    text = UNSAFE_TASK.replace("data/tiny_stories_eval.jsonl", "data/absent.jsonl")
    (tmp_path / "tasks" / "unsafe.yaml").write_text(text)
    keys = {**EVALUATIONS, "eval_tasks": "tiny_unsafe", "eval_task_dir": tmp_path / "tasks"}
    with pytest.raises(ValueError, match=r"eval_tasks: tiny_unsafe: .*data.* eval_task_dir"):
        train_small(tmp_path / "out", **keys)


@pytest.mark.slow
def test_packed_rows_and_a_streamed_data_set_give_prompts(finetune, tmp_path):
    keys = {"sample_steps": 1, "sample_length": 4, "sample_count": 2, "max_steps": 1, "diffusion_steps": 2}
    packed = finetune(tmp_path / "packed", packing=True, eval_dataset=ABSENT, **keys)
    streamed = finetune(tmp_path / "streamed", streaming=True, dataloader_num_workers=1, eval_dataset=ABSENT, **keys)
    for folder in (packed, streamed):
        assert len(samples(folder)) == 2 and all("label" in line for line in samples(folder))
    assert samples(packed)[0]["prompt"].count("?") == 1


def test_the_log_has_one_block(train_small, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        out = train_small(tmp_path / "out", **SAMPLES, sample_prompts="Tom had", max_steps=1)
    (line,) = samples(out)
    text = " ".join(line["text"].split())
    blocks = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Samples at step")]
    assert blocks == [f"Samples at step 1:\n  0: Tom had >>> {text}"]
