"""Generation from YAML: every kind, its files and metrics, interruption, and several processes."""

import json
import re
import tracemalloc

import pytest

from llamafactory_ddm.integration.predict import runner
from support.cli import ROOT, predictions, run, train_in_processes

KINDS = {
    "prefix": "tiny_gpt2_prefix_inference.yaml",
    "infill": "tiny_gpt2_infill_inference.yaml",
    "prompt": "tiny_gpt2_prompt_inference.yaml",
}
SMALL = {"max_samples": 5, "diffusion_steps": 12, "overwrite_cache": True}


def read_records(folder):
    return [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]


def metrics(folder):
    return json.loads((folder / "predict_results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_writes_texts_labels_and_metrics(kind, generate, tmp_path):
    out = tmp_path / "out"
    generate(out, recipe=KINDS[kind], cutoff_len=90, **SMALL)
    records, got = read_records(out), metrics(out)
    assert len(records) == 5 == got["predict_samples"]
    for record in records:
        assert set(record) == {"prompt", "predict", "text", "label", "tokens", "forwards", "computed"}
        assert 1 <= record["forwards"] <= 12
    tokens, forwards = (sum(record[key] for record in records) for key in ("tokens", "forwards"))
    assert got["predict_tokens_per_forward"] == pytest.approx(tokens / forwards)
    assert got["predict_tokens_per_second"] == pytest.approx(tokens / got["predict_runtime"], rel=1e-3)
    assert 0 <= got["predict_exact_match"] <= 100 and 0 <= got["predict_rouge-l"] <= 100
    assert (out / "generated_predictions.html").is_file() == (kind != "prompt")
    assert not (out / "generated_predictions.unfinished").exists()
    if kind == "infill":
        source = (ROOT / "data" / "tiny_infill_eval.jsonl").read_text().splitlines()[:5]
        for record, example in zip(records, map(json.loads, source), strict=True):
            assert (record["prompt"], record["label"]) == (example["instruction"], example["output"])
            assert record["text"] == record["prompt"].replace("<|infill|>", record["predict"])
    elif kind == "prefix":
        texts = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_stories_eval.jsonl").open()][:5]
        assert [record["prompt"] + record["label"] for record in records] == texts
        assert all(record["text"] == record["prompt"] + record["predict"] for record in records)
    else:
        source = (ROOT / "data" / "tiny_prompts_eval.jsonl").read_text().splitlines()[:5]
        for record, example in zip(records, map(json.loads, source), strict=True):
            assert (record["prompt"], record["label"]) == (example["instruction"], example["output"])


def test_answers_are_counted_as_in_gsm8k(generate, tmp_path):
    examples = [{"instruction": "What is 2 + 3?", "output": f"2 + 3 = 5\n#### {n}"} for n in ("5", "1,000")]
    (tmp_path / "sums.json").write_text(json.dumps(examples))
    info = {"sums": {"file_name": "sums.json", "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"recipe": KINDS["prompt"], "eval_dataset": "sums", "dataset_dir": tmp_path, "cutoff_len": 60}
    generate(tmp_path / "out", **keys, **SMALL)
    assert metrics(tmp_path / "out")["predict_gsm8k_accuracy"] == 0.0


def test_a_right_answer_counts(generate, tmp_path, monkeypatch):
    from llamafactory_ddm.generation.generator import Generated, TextGenerator

    def answering(self, canvases, *args, **rest):
        answers = ("so #### 1000", "so #### 7")
        return [Generated(answers[i], answers[i], 3, 2, 10) for i in rest["sample_indices"]]

    monkeypatch.setattr(TextGenerator, "sample_batch", answering)
    examples = [{"instruction": "What?", "output": f"thus #### {n}"} for n in ("1,000", "5")]
    (tmp_path / "sums.json").write_text(json.dumps(examples))
    info = {"sums": {"file_name": "sums.json", "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    generate(tmp_path / "out", recipe=KINDS["prompt"], eval_dataset="sums", dataset_dir=tmp_path, **SMALL)
    got = metrics(tmp_path / "out")
    assert (got["predict_gsm8k_accuracy"], got["predict_exact_match"]) == (50.0, 0.0)
    assert got["predict_tokens_per_forward"] == 1.5


def test_line_separators_of_a_text_are_kept(generate, tmp_path):
    """Python splits lines at U+2028 and U+0085, JSON does not."""
    text = "Tom saw\u2028a cat.\u0085\u2029"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    info = {"texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"generate_from": "prefix", "eval_dataset": "texts", "dataset_dir": tmp_path, "max_new_tokens": 4}
    seen = []
    compute_metrics = runner.compute_metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "compute_metrics", lambda records: seen.extend(records) or compute_metrics(records))
        generate(tmp_path / "out", **keys)
    assert [record["prompt"] for record in seen] == [text]


def test_infilling_markers_in_prompts_are_plain_text_and_logged(generate, tmp_path, caplog):
    examples = [{"instruction": text, "output": "x"} for text in ("A cat.", "A <|infill:2|> cat.")]
    (tmp_path / "marked.json").write_text(json.dumps(examples))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"marked": {"file_name": "marked.json"}}))
    generate(
        tmp_path / "out", recipe=KINDS["prompt"], eval_dataset="marked", dataset_dir=tmp_path, cutoff_len=40, **SMALL
    )
    assert len(read_records(tmp_path / "out")) == 2
    assert re.search(r"1 prompts .*<\|infill:8\|>.* example 1\b.*generate_from: infill", caplog.text)


def test_nothing_of_a_long_conversation_is_cut_off(generate, tmp_path):
    talk = [("human", "Tom saw a cat. " * 6), ("gpt", " a cat. " * 6), ("human", " Max saw"), ("gpt", " a small dog.")]
    turns = {"conversations": [{"from": who, "value": value} for who, value in talk]}
    (tmp_path / "talk.json").write_text(json.dumps([turns]))
    info = {"talk": {"file_name": "talk.json", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"recipe": KINDS["prompt"], "eval_dataset": "talk", "dataset_dir": tmp_path, **SMALL}
    generate(tmp_path / "out", **keys, max_new_tokens=6, cutoff_len=30, train_on_prompt=True)
    (record,) = read_records(tmp_path / "out")
    assert record["prompt"].endswith(" Max saw") and record["label"] == " a small dog."
    with pytest.raises(ValueError, match=r"example 0: .*cutoff_len: 30"):
        generate(tmp_path / "no", **keys, cutoff_len=30)


def test_max_new_tokens_from_noise(generate, tmp_path):
    generate(tmp_path / "out", max_new_tokens=5)
    assert all(record["tokens"] <= 5 for record in read_records(tmp_path / "out"))


def test_wrong_keys_of_generation_are_found_before_training(train_small, tmp_path):
    out = tmp_path / "out"
    for keys, pattern in (
        ({"suppress_tokens": "nonsuch"}, "^suppress_tokens.*'nonsuch'"),
        ({"temperature": 0.3, "logits_temp": 0.4}, "temperature: 0.3 .*logits_temp: 0.4"),
        ({"diffusion_steps": 2, "block_length": 4}, r"\b2 .*\b8 .*diffusion_steps"),
        ({"generate_from": "infill"}, r"text 0: .*<\|infill"),
        ({"max_new_tokens": 0}, "^max_new_tokens .*0"),
    ):
        with pytest.raises(ValueError, match=pattern):
            train_small(out, do_predict=True, **keys)
        assert not out.exists() or not list(out.iterdir())


def test_the_page_of_an_earlier_run_is_removed(generate, tmp_path):
    generate(tmp_path / "out", save_trace=True)
    generate(tmp_path / "out")
    assert not (tmp_path / "out" / "generated_predictions.html").exists()


def test_the_last_of_several_turns_is_answered(generate, tmp_path):
    talk = {
        "conversations": [
            {"from": "human", "value": "Tom saw"},
            {"from": "gpt", "value": " a cat."},
            {"from": "human", "value": " Max saw"},
            {"from": "gpt", "value": " a dog."},
        ]
    }
    (tmp_path / "talk.json").write_text(json.dumps([talk]))
    info = {"talk": {"file_name": "talk.json", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"recipe": KINDS["prompt"], "eval_dataset": "talk", "dataset_dir": tmp_path, "max_new_tokens": 6}
    generate(tmp_path / "out", **keys, **SMALL)
    (record,) = read_records(tmp_path / "out")
    assert record["prompt"].startswith("Tom saw a cat.") and record["prompt"].endswith(" Max saw")
    assert (record["label"], record["tokens"]) == (" a dog.", 6)


def test_save_trace_writes_a_page(generate, tmp_path):
    generate(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generated_predictions.html").exists()
    texts = generate(tmp_path / "traced", save_trace=True)
    assert "sample 2" in (tmp_path / "traced" / "generated_predictions.html").read_text()
    assert texts == predictions(tmp_path / "plain")


def test_edits_are_counted_and_shown_on_the_page(generate, tmp_path):
    """A model of three training steps is unsure, so a low threshold edits many tokens of a high temperature."""
    out = tmp_path / "out"
    keys = {"edit_threshold": 0.001, "edit_steps": 2, "logits_temp": 30.0, "topp_temp": 1.0, "block_length": 4}
    texts = generate(out, save_trace=True, **keys)
    records = read_records(out)
    page = (out / "generated_predictions.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    for record, sample in zip(records, data["samples"], strict=True):
        num_events = len(sample["events"]) // 3
        assert record["edits"] == num_events - sample["start"].count(-1) > 0
        # Each of three blocks may take two further steps.
        assert sample["steps"] <= 4 + 3 * 2
    assert metrics(out)["predict_edits_per_sample"] == pytest.approx(sum(record["edits"] for record in records) / 3)
    assert ["edits", "from probability 0.001, 2 further steps"] in data["facts"]
    generate(tmp_path / "plain", **{key: keys[key] for key in ("logits_temp", "topp_temp", "block_length")})
    assert "edits" not in read_records(tmp_path / "plain")[0]
    assert "predict_edits_per_sample" not in metrics(tmp_path / "plain")
    assert predictions(tmp_path / "plain") != texts


def test_remasking_is_shown_on_the_page(generate, tmp_path):
    out = tmp_path / "out"
    keys = {"denoising_strategy": "remdm", "remask_cap": 0.6, "diffusion_steps": 16}
    generate(out, save_trace=True, kv_cache="dual", cache_refresh=4, **keys)
    page = (out / "generated_predictions.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert all(-1 in sample["events"][2::3] for sample in data["samples"])
    assert all(fact in data["facts"] for fact in (["remask cap", "0.6"], ["KV cache", "dual, refresh 4"]))
    assert "edits" not in read_records(out)[0]


def test_more_steps_than_tokens_is_logged_and_costs_nothing(generate, tmp_path, caplog):
    generate(tmp_path / "out", diffusion_steps=500)
    assert re.search(r"diffusion_steps: 500 .*\b11 tokens", caplog.text)
    assert [record["forwards"] for record in read_records(tmp_path / "out")] == [11] * 3


@pytest.mark.slow
def test_an_interrupted_run_resumes(generate, tmp_path, monkeypatch):
    from llamafactory_ddm.generation.generator import TextGenerator

    keys = {"num_samples": 6, "per_device_eval_batch_size": 2}
    whole = generate(tmp_path / "whole", **keys)
    out, calls, sample_batch = tmp_path / "out", [], TextGenerator.sample_batch

    def counted(self, canvases, *args, **rest):
        calls.append(list(rest["sample_indices"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_batch(self, canvases, *args, **rest)

    monkeypatch.setattr(TextGenerator, "sample_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        generate(out, **keys)
    assert not (out / "generated_predictions.jsonl").exists()
    (part,) = (out / "generated_predictions.unfinished").glob("*.jsonl")
    assert len(part.read_text().splitlines()) == 5
    part.write_text(part.read_text()[:-9])  # as if the process was killed while it wrote the line
    assert generate(out, **keys) == whole
    assert calls[3:] == [[3, 4], [5]]

    # Another seed is another run, which reuses no text of the first.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "other", **keys)
    calls.clear()
    calls += [[]] * 3
    generate(tmp_path / "other", **keys, seed=7)
    assert calls[3:] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.slow
def test_a_billion_texts_start_at_once(generate, tmp_path, monkeypatch):
    """No memory is allocated per pending text."""
    from llamafactory_ddm.generation.generator import TextGenerator

    calls, sample_batch = [], TextGenerator.sample_batch

    def counted(self, canvases, *args, **rest):
        calls.append(list(rest["sample_indices"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_batch(self, canvases, *args, **rest)

    monkeypatch.setattr(TextGenerator, "sample_batch", counted)
    tracemalloc.start()
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "out", num_samples=10**9, per_device_eval_batch_size=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert calls == [[0, 1], [2, 3], [4, 5]] and peak < 200_000_000


@pytest.mark.slow
def test_two_processes_generate_the_texts_of_one(generate, checkpoint, tmp_path):
    keys = {"recipe": KINDS["prefix"], "max_samples": 5, "diffusion_steps": 12, "cutoff_len": 40}
    one = generate(tmp_path / "one", **keys)
    both = tmp_path / "both"
    words = [f"{key}={value}" for key, value in keys.items() if key != "recipe"]
    words += [f"output_dir={both}", f"model_name_or_path={checkpoint}", "use_cpu=true", "per_device_eval_batch_size=1"]
    train_in_processes(2, f"examples/{KINDS['prefix']}", *words)
    assert predictions(both) == one
    assert metrics(both)["predict_samples"] == 5


@pytest.mark.slow
def test_the_generate_command(checkpoint, tmp_path):
    def command(*options, **rest):
        return run("generate", checkpoint, "--max-new-tokens", "6", "--steps", "6", *options, program=PROGRAM, **rest)

    first = command("--prompt", "Tom saw", "--seed", "3", fresh=True).stdout
    assert command("--prompt", "Tom saw", "--seed", "3").stdout == first
    filled = command("--infill", "Tom saw<|infill:2|> cat.", "--infill", "A<|infill:1|>", "--temperature", "0").stdout
    assert filled.startswith("- Tom saw") and filled.count("\n- A") == 1
    assert len(command("--num-samples", "3", "--block-length", "2").stdout.strip().splitlines()) >= 3
    assert "\x1b" not in command("--show").stdout  # not a terminal: the text alone
    failed = run("generate", tmp_path / "no", program=PROGRAM, check=False)
    assert failed.returncode == 1 and str(tmp_path / "no") in failed.stderr
    assert "Traceback" not in failed.stderr
    hot = ("--temperature", "30", "--top-p", "1")
    plain = command(*hot).stdout
    assert command(*hot, "--edit-threshold", "0.001", "--edit-steps", "1").stdout != plain
    assert (
        command(*hot, "--strategy", "remdm", "--remask-cap", "0.9").stdout
        != command(*hot, "--strategy", "random").stdout
    )
    failed = command("--edit-steps", "1", "--edit-ratio", "0", check=False)
    assert failed.returncode == 1 and "edit_steps: 1 " in failed.stderr
    failed = command("--remask-cap", "0.5", check=False)
    assert failed.returncode == 1 and "remask_cap" in failed.stderr and "remdm" in failed.stderr
    assert command(*hot, "--early-stop", "none").returncode == 0
    failed = command("--strategy", "topp", check=False)
    assert failed.returncode == 1 and "denoising_strategy" in failed.stderr and "'topk'" in failed.stderr


PROGRAM = "llamafactory-ddm"
