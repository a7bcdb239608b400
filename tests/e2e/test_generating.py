"""Generation from YAML: every kind, its files and metrics, interruption, and several processes."""

import json
import os

import pytest

from support.cli import ROOT, predictions, run

KINDS = {
    "prefix": "tiny_gpt2_prefix_inference.yaml",
    "infill": "tiny_gpt2_infill_inference.yaml",
    "prompt": "tiny_gpt2_prompt_inference.yaml",
}
SMALL = {"max_samples": 5, "diffusion_steps": 12, "overwrite_cache": True}


def lines(folder):
    return [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]


def metrics(folder):
    return json.loads((folder / "predict_results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_writes_texts_labels_and_metrics(kind, generate, tmp_path):
    out = tmp_path / "out"
    generate(out, recipe=KINDS[kind], cutoff_len=90, **SMALL)
    rows, got = lines(out), metrics(out)
    assert len(rows) == 5 == got["predict_samples"]
    for row in rows:
        assert set(row) == {"prompt", "predict", "text", "label", "tokens", "forwards"}
        assert 1 <= row["forwards"] <= 12
    tokens, forwards = (sum(row[key] for row in rows) for key in ("tokens", "forwards"))
    assert got["predict_tokens_per_forward"] == pytest.approx(tokens / forwards)
    assert got["predict_tokens_per_second"] == pytest.approx(tokens / got["predict_runtime"], rel=1e-3)
    assert 0 <= got["predict_exact_match"] <= 100 and 0 <= got["predict_rouge-l"] <= 100
    assert (out / "generated_predictions.html").is_file() == (kind != "prompt")
    assert not (out / "generated_predictions.unfinished").exists()
    if kind == "infill":
        source = (ROOT / "data" / "tiny_infill_eval.jsonl").read_text().splitlines()[:5]
        for row, line in zip(rows, map(json.loads, source), strict=True):
            assert (row["prompt"], row["label"]) == (line["instruction"], line["output"])
            assert row["text"] == row["prompt"].replace("<|infill|>", row["predict"])
    elif kind == "prefix":
        texts = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_corpus_eval.jsonl").open()][:5]
        assert [row["prompt"] + row["label"] for row in rows] == texts
        assert all(row["text"] == row["prompt"] + row["predict"] for row in rows)
    else:
        source = (ROOT / "data" / "tiny_prompts_eval.jsonl").read_text().splitlines()[:5]
        for row, line in zip(rows, map(json.loads, source), strict=True):
            assert (row["prompt"], row["label"]) == (line["instruction"], line["output"])


def test_answers_are_counted_as_in_gsm8k(generate, tmp_path):
    examples = [{"instruction": "What is 2 + 3?", "output": f"2 + 3 = 5\n#### {n}"} for n in ("5", "1,000")]
    (tmp_path / "sums.json").write_text(json.dumps(examples))
    info = {"sums": {"file_name": "sums.json", "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"recipe": KINDS["prompt"], "eval_dataset": "sums", "dataset_dir": tmp_path, "cutoff_len": 60}
    generate(tmp_path / "out", **keys, **SMALL)
    assert metrics(tmp_path / "out")["predict_gsm8k_accuracy"] == 0.0


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
    (row,) = lines(tmp_path / "out")
    assert row["prompt"].startswith("Tom saw a cat.") and row["prompt"].endswith(" Max saw")
    assert (row["label"], row["tokens"]) == (" a dog.", 6)


def test_save_trace_writes_a_page(generate, tmp_path):
    generate(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generated_predictions.html").exists()
    texts = generate(tmp_path / "traced", save_trace=True)
    assert "sample 2" in (tmp_path / "traced" / "generated_predictions.html").read_text()
    assert texts == predictions(tmp_path / "plain")


def test_an_interrupted_run_goes_on_where_it_stopped(generate, tmp_path, monkeypatch):
    from llamafactory_ddm.generation import TextGenerator

    keys = {"num_samples": 6, "per_device_eval_batch_size": 2}
    whole = generate(tmp_path / "whole", **keys)
    out, calls, plain = tmp_path / "out", [], TextGenerator.sample_batch

    def counted(self, canvases, *args, **rest):
        calls.append(list(rest["ordinals"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, canvases, *args, **rest)

    monkeypatch.setattr(TextGenerator, "sample_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        generate(out, **keys)
    assert not (out / "generated_predictions.jsonl").exists()
    (part,) = (out / "generated_predictions.unfinished").glob("*.jsonl")
    assert len(part.read_text().splitlines()) == 5
    part.write_text(part.read_text()[:-9])  # a line that a kill has cut short
    assert generate(out, **keys) == whole
    assert calls[3:] == [[3, 4], [5]]

    # Another seed is another run: nothing of the first is taken over.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "other", **keys)
    calls.clear()
    calls += [[]] * 3
    generate(tmp_path / "other", **keys, seed=7)
    assert calls[3:] == [[0, 1], [2, 3], [4, 5]]


def test_two_processes_share_the_work_and_give_the_same(generate, checkpoint, tmp_path):
    keys = {"recipe": KINDS["prefix"], "max_samples": 5, "diffusion_steps": 12, "cutoff_len": 40}
    one = generate(tmp_path / "one", **keys)
    both = tmp_path / "both"
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(29300 + os.getpid() % 300)}
    words = [f"{key}={value}" for key, value in keys.items() if key != "recipe"]
    words += [f"output_dir={both}", f"model_name_or_path={checkpoint}", "use_cpu=true", "per_device_eval_batch_size=1"]
    run("train", f"examples/{KINDS['prefix']}", *words, env=env)
    assert predictions(both) == one
    assert metrics(both)["predict_samples"] == 5


def test_the_command_for_people(checkpoint, tmp_path):
    def words(*more, **rest):
        return run("generate", checkpoint, "--max-new-tokens", "6", "--steps", "6", *more, program=PROGRAM, **rest)

    assert words("--prompt", "Tom saw", "--seed", "3").stdout == words("--prompt", "Tom saw", "--seed", "3").stdout
    filled = words("--infill", "Tom saw<|infill:2|> cat.", "--infill", "A<|infill:1|>", "--temperature", "0").stdout
    assert filled.startswith("- Tom saw") and filled.count("\n- A") == 1
    assert len(words("--num-samples", "3", "--block-length", "2").stdout.strip().splitlines()) >= 3
    assert "\x1b" not in words("--show").stdout  # not a terminal: the text alone
    failed = run("generate", tmp_path / "no", program=PROGRAM, check=False)
    assert failed.returncode == 1 and "is not a folder; check the path" in failed.stderr
    assert "Traceback" not in failed.stderr
    failed = words("--strategy", "topp", check=False)
    assert failed.returncode == 1 and "did you mean 'topk'" in failed.stderr


PROGRAM = "llamafactory-ddm"
