"""The commands in benchmarks/ run on small shapes and report every claim; the figures mean nothing then."""

import json
from collections import Counter

import pytest

from support.cli import run


@pytest.mark.slow
def test_the_sampling_benchmark_runs(checkpoint):
    threads = ("--threads", "1")  # two would wait for each other where tests take all cores
    words = ["--rounds", "1", "--length", "16", "--steps", "4", "--layers", "1", "--width", "64"]
    words += ["--vocabulary", "300", *threads]
    path = "benchmarks/sampling.py"
    for more, count in (([], 10), (["--memory"], 2)):
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
def test_the_decoding_benchmark_runs(checkpoint):
    words = ["--rounds", "1", "--layers", "1", "--width", "64", "--vocabulary", "300", "--threads", "1"]
    words += ["--prompt", "12", "--written", "8", "--block", "4"]
    path = "benchmarks/decoding.py"
    done = run(*words, program=path, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count("claimed <=") == 8, done.stdout + done.stderr[-2000:]
    quality = run("--quality", checkpoint, "--samples", "1", "--threads", "1", program=path).stdout
    assert quality.count("\n| confidence_threshold 0.9 | ") == 4 and quality.count("dual, refresh 8") == 3


@pytest.mark.slow
def test_the_serving_benchmark_runs():
    words = ("--shapes", "tiny-full", "tiny-block", "--requests", "2", "--rounds", "1", "--written", "8")
    done = run(*words, "--threads", "1", program="benchmarks/serving.py", check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert done.stdout.count(" claimed ") == 1, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("milliseconds to the first text") == 4


@pytest.mark.slow
def test_the_preparation_benchmark_runs(tmp_path):
    words = ("--megabytes", "1", "--rounds", "1", "--processes", "2", "--folder", tmp_path)
    done = run(*words, program="benchmarks/prepare_data.py", check=False)
    assert done.stdout.count("claimed ") == 3, done.stdout + done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    """At toy sizes; `tests/e2e/test_gpu_benchmark.py` shows what it writes of parts that fail."""
    words = ("--device", "cpu", "--toy", "--peak-tflops", "0.05", "--output", tmp_path)
    done = run(*words, program="benchmarks/gpu.py", check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    log = (tmp_path / "gpu.log").read_text()
    assert not [row for row in rows if row["state"] == "failed"], log[-5000:]
    count = Counter((row["part"], row["held"]) for row in rows)
    # The speeds of toys hold no claim; both steps are then the CPU's, so results are equal.
    assert count["gradients", True] == 24 and count["greedy", True] == 40 and count["draws", True] == 20
    assert count["precision", True] == 4 and count["compile", True] == 8 and count["four-bit", True] == 2
    for part, n_claims in (("speed-124m", 1), ("speed-1b", 2), ("lora-7b", 0)):
        assert count[part, True] + count[part, False] == n_claims
    assert {(row["part"], row["note"]) for row in rows if row["state"] == "left out"} >= {
        ("waits", "a CPU does not wait for itself"),
        ("flash", "needs a GPU"),
        ("speed-1b", "nothing counts the memory of tensors on a CPU"),
    }
    assert sum("/ autoregressive" in row["what"] for row in rows) == 20
    assert sum(row["part"] == "serving" for row in rows) == 8
