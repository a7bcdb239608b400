"""The commands in benchmarks/ run on small shapes and report every claim; the figures mean nothing then."""

import json
import re

import pytest

from support.cli import run


@pytest.mark.slow
def test_the_sampling_benchmark_runs(checkpoint):
    threads = ("--threads", "1")  # two would wait for each other where tests take all cores
    words = ["--rounds", "1", "--length", "16", "--steps", "4", "--layers", "1", "--width", "64"]
    words += ["--vocabulary", "300", *threads]
    path = "benchmarks/sampling.py"
    for more, count in (([], 10), (["--memory", "--batches", "1"], 1)):
        done = run(*words, *more, program=path, check=False)
        assert done.returncode in (0, 1), done.stderr[-2000:]
        assert done.stdout.count("claimed <=") == count, done.stdout + done.stderr[-2000:]
    table = run(*words, "--table", program=path).stdout
    assert table.count("\n| ") == 13
    quality = run("--quality", checkpoint, "--samples", "1", *threads, program=path).stdout
    assert quality.count("| confidence_threshold: ") == 4
    revising = run(*words, "--revising", checkpoint, "--samples", "1", program=path).stdout
    assert revising.count("`edit_threshold: ") == 6 and revising.count("`denoising_strategy: remdm`") == 2


@pytest.mark.slow
def test_the_conversion_benchmark_runs(tmp_path):
    for kind in ("llada", "dream"):
        words = ("--kind", kind, "--gigabytes", "0.001", "--shards", "2", "--folder", tmp_path)
        done = run(*words, program="benchmarks/convert_memory.py")
        assert done.stdout.count("claimed <=") == done.stdout.count("  held") == 2, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_early_stop_benchmark_runs(finetuned):
    words = ("--model", finetuned, "--questions", "2", "--rounds", "1")
    table = run(*words, program="benchmarks/early_stop.py").stdout
    assert table.count("| none") == 2 and table.count("| grow") == 2 and table.count("| predict") == 3


@pytest.mark.slow
def test_the_benchmark_runs():
    """Small shapes: the ratios mean nothing then, only that the command works and reports every claim."""
    words = ["--rounds", "1", "--batch", "1", "--length", "16", "--layers", "1", "--width", "64", "--memory"]
    words += ["--threads", "1"]
    done = run(*words, program="benchmarks/train_step.py", check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count("claimed <=") == 10, done.stdout + done.stderr[-2000:]
    some = run(
        "--kinds", "full", "block", *words[:-3], "--threads", "1", program="benchmarks/train_step.py", check=False
    )
    assert some.stdout.count("claimed <=") == 2 and some.stdout.count(" in 1 rounds") == 1, some.stdout
    done = run("--data", *words, program="benchmarks/train_step.py")
    assert done.stdout.count("collating ") == 4 and done.stdout.count("noise of ") == 6, done.stdout


@pytest.mark.slow
def test_the_evaluation_benchmark_runs(checkpoint):
    words = (
        "--model",
        checkpoint,
        "--questions",
        "1",
        "--rounds",
        "1",
        "--passes",
        "2",
        "--only",
        "built-in",
        "--draws",
        "2",
        "--texts",
        "2",
    )
    done = run(*words, program="benchmarks/evaluation.py", check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count("claimed <=") == 3 and "passes a choice" in done.stdout


@pytest.mark.slow
def test_the_decoding_time_benchmark_runs(tmp_path):
    words = ("--lengths", "4", "8", "--steps", "2", "8", "--rounds", "1", "--out", tmp_path / "x.png")
    done = run(*words, program="benchmarks/decoding_time.py")
    assert done.stdout.count("| autoregressive |") == 2 and done.stdout.count(" to ") == 3
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_decoding_benchmark_runs(checkpoint, finetuned):
    words = ["--rounds", "1", "--layers", "1", "--width", "64", "--vocabulary", "300", "--threads", "1"]
    words += ["--prompt", "12", "--written", "8", "--block", "4"]
    path = "benchmarks/decoding.py"
    done = run(*words, program=path, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count("claimed <=") == 10, done.stdout + done.stderr[-2000:]
    # four passes over 20 columns; with `dual` two over 20 and two over the 4 of the block; 8 tokens are written
    for name, columns in {"uncached": "10.00", "bare-uncached": "10.00", "bare-dual": "6.00"}.items():
        assert re.search(rf"for each written, {name} +{columns}\n", done.stdout), done.stdout
    done = run(*words, "--block", "3", program=path, check=False)
    assert done.returncode == 2 and "needs --per-pass to divide --block" in done.stderr.splitlines()[-1]
    done = run(*words, "--batch", "2", "--decoders", "block-8", program=path, check=False)
    assert done.stdout.count("claimed <=") == 2 and "dual" not in done.stdout, done.stdout + done.stderr[-2000:]
    quality = run("--quality", checkpoint, "--samples", "1", "--threads", "1", program=path).stdout
    assert quality.count("\n| confidence_threshold 0.9 | ") == 4 and quality.count("dual, refresh 8") == 3
    words = ("--answers", finetuned, "--questions", "2", "--rounds", "1", "--threads", "1")
    answers = run(*words, program=path).stdout
    assert answers.count("\n| ") == 2 and "\n| 8 | " in answers, answers


@pytest.mark.slow
def test_the_serving_benchmark_runs():
    words = ("--shapes", "tiny-full", "tiny-block", "--requests", "2", "--rounds", "1", "--written", "8")
    done = run(*words, "--threads", "1", program="benchmarks/serving.py", check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count(" claimed ") == 1, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("milliseconds to the first text") == 4


@pytest.mark.slow
def test_the_preparation_benchmark_runs(tmp_path):
    words = ("--megabytes", "1", "--rounds", "1", "--processes", "1", "--folder", tmp_path)
    done = run(*words, program="benchmarks/prepare_data.py", check=False)
    assert done.stdout.count("claimed ") == 2, done.stdout + done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    """Two parts at toy sizes; `tests/e2e/test_gpu_benchmark.py` runs the others, and parts that fail."""
    words = ("--device", "cpu", "--toy", "--parts", "environment,gradients", "--minutes", "120")
    done = run(*words, "--output", tmp_path, program="benchmarks/gpu.py", check=False)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    bad = [row for row in rows if row["state"] == "failed" or row["held"] is False]
    assert done.returncode == 0 and not bad, (bad, done.stderr[-2000:], (tmp_path / "gpu.log").read_text()[-5000:])
    assert [row["part"] for row in rows if row["held"]] == ["gradients"] * 24
    assert {row["what"]: row["value"] for row in rows}["device"] == "CPU"
