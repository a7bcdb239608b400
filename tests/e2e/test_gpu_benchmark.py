"""benchmarks/gpu.py: what it writes whatever its parts do, and the operations that it counts."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.row_selecting_head import RowSelectingHead
from support.cli import ROOT
from support.limits import LIMIT

BENCHMARKS = ROOT / "benchmarks"
ROWS, LENGTH = 3, 16

# Parts in place of the benchmark's own.
PARTS = """
    Part("fine", "own", 100),
    Part("raises", "own", 100),
    Part("crashes", "own", 100),
    Part("hangs", "own", 10),
    Part("unbuilt", "nowhere", 100),
"""
OWN = """
import os, subprocess, sys, time

def fine(machine, report):
    report.add("one", 1.0, "GB", at_most=2)
    report.add("two", 2.5, at_most=2, note="a | b")
    report.add("three", "words")
    report.leave_out("four", "no GPU")

def raises(machine, report):
    report.add("before", float("nan"), at_least=0)
    raise ImportError("first line\\nno module named x")

def crashes(machine, report):
    report.add("before", 1)
    print("Segfaulting", file=sys.stderr, flush=True)
    os.abort()

def hangs(machine, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    report.add("child", child.pid)
    time.sleep(1000)
"""


@pytest.fixture
def copied(tmp_path):
    """Return the path of a copy of the benchmark with parts that fail in every way, which imports no library."""
    shutil.copy(BENCHMARKS / "gpu.py", tmp_path)
    folder = tmp_path / "gpu_parts"
    folder.mkdir()
    shutil.copy(BENCHMARKS / "gpu_parts/report.py", folder)
    text = (BENCHMARKS / "gpu_parts/__init__.py").read_text()
    (folder / "__init__.py").write_text(text[: text.index("PARTS = (")] + f"PARTS = ({PARTS})\n")
    (folder / "own.py").write_text(OWN)
    (folder / "machine.py").write_text("def Machine(*arguments):\n    return arguments\n")
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("")
    return tmp_path / "gpu.py"


def start(path, *words):
    return subprocess.Popen(
        [sys.executable, path, "--device", "cpu", "--output", path.parent / "out", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_of(path):
    rows = json.loads((path.parent / "out/gpu.json").read_text())["rows"]
    return {(row["part"], row["what"]): row for row in rows}


def is_alive(pid):
    """Tell whether a process runs; one that has ended but was not waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_part_that_fails_is_a_row(copied):
    process = start(copied, "--minutes", 2)
    out, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, error
    rows = rows_of(copied)
    assert rows["fine", "one"]["held"] is True and rows["fine", "two"]["held"] is False
    assert rows["fine", "three"]["value"] == "words" and rows["fine", "four"]["state"] == "left out"
    assert rows["raises", "before"]["held"] is False and rows["raises", "before"]["value"] == "nan"
    assert rows["raises", "the part"]["note"] == "no module named x"
    assert rows["crashes", "before"]["value"] == 1
    assert rows["crashes", "the part"]["note"] == "signal SIGABRT: Segfaulting"
    assert rows["hangs", "the part"]["note"] == "stopped after its time limit of 2 s"
    assert not is_alive(rows["hangs", "child"]["value"])
    assert "gpu_parts.nowhere" in rows["unbuilt", "the part"]["note"]
    table = (copied.parent / "out/gpu.md").read_text()
    assert "| fine | one | 1 GB | <= 2 | held |  |" in table
    assert "| fine | two | 2.5 | <= 2 | NOT HELD | a / b |" in table
    assert table.count("| FAILED |") == 4 and table.count("\n") == 2 + len(rows)
    assert "| fine | one |" in out and "6 rows failed or did not hold" in out
    assert "Segfaulting" in (copied.parent / "out/gpu.log").read_text()


def test_parts_without_time_are_left_out(copied):
    process = start(copied, "--minutes", 0.05, "--parts", "fine,raises")  # what writing the results is given
    process.communicate(timeout=LIMIT)
    rows = rows_of(copied)
    assert process.returncode == 0 and {row["state"] for row in rows.values()} == {"left out"}
    assert rows["raises", "the part"]["note"].endswith("s of 0.05 minutes were left")


def test_a_killed_run_leaves_what_was_measured_and_no_process(copied):
    process = start(copied, "--minutes", 60, "--parts", "fine,hangs")
    end = time.monotonic() + LIMIT
    rows = {}
    while ("hangs", "child") not in rows:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.2)
        rows = rows_of(copied) if (copied.parent / "out/gpu.json").exists() else {}
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    child = rows["hangs", "child"]["value"]
    while is_alive(child):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert rows_of(copied)["fine", "one"]["held"] is True


def test_an_unknown_part_is_refused(copied):
    process = start(copied, "--parts", "fine,speeed")
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "speeed" in error.splitlines()[-1]


@pytest.fixture
def parts(monkeypatch):
    """Return the modules of the benchmark that need no trainer."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_parts import machine, models, operations

    yield models, operations, machine
    own = ("gpu_parts", *(path.stem for path in BENCHMARKS.glob("*.py")))
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]


def counted(model, run):
    with FlopCounterMode(display=False) as counter:
        run(model).backward()
    # A Llama's frequencies times positions, an outer product, is no work of its layers.
    rotary = 0 if model.config.model_type == "gpt2" else 2 * (model.config.head_dim // 2) * LENGTH
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
def test_the_operations_are_those_of_the_matrix_products(parts, family):
    models, operations, _ = parts
    shape = models.TOY_GPT2 if family == "GPT-2" else models.TOY_LLAMA
    ids = torch.randint(0, 60, (ROWS, LENGTH))
    model = models.make_model(shape, attn_implementation="eager")
    said = operations.training_operations(model, rows=ROWS, length=LENGTH, scored=ROWS * LENGTH, is_causal=True)
    # The eager kernel computes what it masks too: per layer, head and row six products of its pairs of tokens.
    pairs = LENGTH**2 - int(torch.ones(LENGTH, LENGTH).tril().sum())
    masked = 6 * 2 * shape.layers * ROWS * pairs * shape.width
    assert said + masked == counted(model, lambda model: model(input_ids=ids, labels=ids).loss)

    make_bidirectional(model)
    head, index = RowSelectingHead(model), torch.tensor([1, 5, 20, 21, 40])

    def scored_loss(model):
        with head.only(index):
            return model(input_ids=ids).logits.square().mean()

    said = operations.training_operations(model, rows=ROWS, length=LENGTH, scored=len(index), is_causal=False)
    assert said == counted(model, scored_loss)


def test_frozen_weights_take_two_products(parts):
    models, operations, _ = parts
    ids = torch.randint(0, 60, (ROWS, LENGTH))
    model = models.make_model(models.TOY_LLAMA, attn_implementation="eager")
    config = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(model, config)
    make_bidirectional(model)
    said = operations.training_operations(model, rows=ROWS, length=LENGTH, scored=ROWS * LENGTH, is_causal=False)
    # The input of the first layer's projections needs no gradient, as the embeddings are frozen. The formula leaves
    # it out up to the first weight that is trained, that of the adapter of the queries.
    first = [
        p for n, p in model.named_parameters() if any(f".0.self_attn.{name}." in n for name in ("k_proj", "v_proj"))
    ]
    not_needed = sum(2 * ROWS * LENGTH * p.numel() for p in first if p.shape[1] == 32)
    assert said - not_needed == counted(model, lambda model: model(input_ids=ids).logits.square().mean())


def test_the_peak_is_known_by_the_name_of_the_device(parts, monkeypatch):
    machine = parts[2].Machine
    peaks = {}
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "Tesla T4"):
        monkeypatch.setattr(machine, "name", name)
        peaks[name] = machine("cpu", True).peak
        assert machine("cpu", True, 100.0).peak == 1e14
    assert list(peaks.values()) == [989.4e12, 989.4e12, 312e12, 756e12, None]


@pytest.fixture
def on_cpu(parts, monkeypatch):
    """Return a toy machine, a report, and a list of the rows that it gets."""
    from gpu_parts.report import Report

    rows = []
    monkeypatch.setattr(Report, "_write", lambda self, row: rows.append(row))
    return parts[2].Machine("cpu", True, 1.0), Report(Path(), "x"), rows


@pytest.fixture
def as_gpu(on_cpu, monkeypatch):
    """Return the same, with a CPU that says that it is a GPU."""
    for name, value in (("is_cuda", True), ("synchronize", lambda self: None), ("release", lambda self: None)):
        monkeypatch.setattr(type(on_cpu[0]), name, value)
    return on_cpu


# The rows of each part, and how many of them hold a claim. The first two parts run as a user runs them, elsewhere.
TOY_RUNS = {
    "speed-1b": (8, None),
    "speed-124m": (8, None),
    "greedy": (40, 40),
    "precision": (6, 4),
    "draws": (20, 20),
    "decoding": (44, 0),
    "waits": (13, 0),
    "lora-7b": (8, 0),
    "head": (22, 12),
    "serving": (8, 0),
    "four-bit": (4, 2),
    "flash": (2, 0),
    "flex": (1, 0),
    "compile": (2, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY_RUNS)
def test_a_part_runs_at_toy_sizes(on_cpu, name):
    """The figures mean nothing then; two runs on a CPU give the same results."""
    machine, report, rows = on_cpu
    from gpu_parts import PARTS

    if name == "four-bit":
        pytest.importorskip("bitsandbytes")
    (part,) = [part for part in PARTS if part.name == name]
    getattr(importlib.import_module(f"gpu_parts.{part.module}"), name.replace("-", "_"))(machine, report)
    n_rows, n_held = TOY_RUNS[name]
    assert not [row for row in rows if row.state == "failed"], rows
    assert len(rows) == n_rows and n_held in (None, sum(row.held is True for row in rows)), rows


def test_toy_runs_are_of_all_parts(parts):
    from gpu_parts import PARTS

    assert {part.name for part in PARTS} == {"environment", "gradients", *TOY_RUNS}


def test_waits_are_those_that_pytorch_warns_of(as_gpu, monkeypatch):
    """With a warning where a value is read, in place of PyTorch's own."""
    machine, report, rows = as_gpu
    modes, plain = ["default"], torch.Tensor.tolist

    def tolist(tensor):
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
            warnings.warn("something else", stacklevel=2)
        return plain(tensor)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    from gpu_parts.waits import waits

    waits(machine, report)
    assert not [row for row in rows if row.state == "failed"], rows
    steps = [row for row in rows if "denoising" in row.what]
    assert len(steps) == 8 and all(row.value == 1 and row.held and "loop.py" in row.note for row in steps)
    # Training reads the order of the samples now and then, which is on the CPU.
    assert len(rows) == 13 and all(row.note.startswith("median 0") for row in rows[8:]), rows[8:]
    assert modes[-1] == "default"


def test_the_peak_memory_of_a_step_leaves_out_the_other_model(as_gpu, monkeypatch):
    """1 GB of a model that was there before; then the steps of pt and ddm reach 5 and 4 GB in all."""
    machine, report, rows = as_gpu
    held, peaks = iter([0, 10**9]), iter([5 * 10**9, 4 * 10**9])
    monkeypatch.setattr(type(machine), "allocated", lambda self: next(held))
    monkeypatch.setattr(type(machine), "peak_memory", lambda self, run: (run(), next(peaks))[1])
    from gpu_parts import speed

    speed.speed_124m(machine, report)
    by_name = {row.what.partition(": ")[2] or row.what: row for row in rows}
    assert by_name["peak memory, ddm / pt"].value == 0.6 and by_name["peak memory, ddm / pt"].held
    assert by_name["measured / by operations"].value == pytest.approx(
        by_name["tokens/s, ddm / pt"].value / by_name["the same by operations"].value, rel=0.2
    )


def test_too_little_memory_halves_the_batch(as_gpu, monkeypatch):
    machine, report, rows = as_gpu
    from gpu_parts import speed

    tried = []

    def compare(machine, report, case):
        tried.append(case.batch)
        if case.batch > 1 or case.is_lora:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(speed, "_compare", compare)
    speed.speed_1b(machine, report)
    assert tried == [4, 2, 1]
    assert [(row.state, row.note) for row in rows] == [("left out", "CUDA out of memory. Tried")] * 2
    with pytest.raises(torch.OutOfMemoryError):
        speed.lora_7b(machine, report)


def test_4_bits_are_left_out_without_their_package(as_gpu, monkeypatch):
    machine, report, rows = as_gpu
    from gpu_parts import training

    monkeypatch.setattr(training, "find_spec", lambda name: None)
    training.four_bit(machine, report)
    assert [(row.state, row.note) for row in rows] == [("left out", "bitsandbytes is not installed")]


def test_flash_attention_is_compared_where_it_is_installed(as_gpu, monkeypatch):
    """With sdpa under its name, which sees documents only in a mask, so they leak without one."""
    machine, report, rows = as_gpu
    from gpu_parts import attention

    monkeypatch.setitem(attention.FLASH, "FA2", ("sdpa", "is_torch_available"))
    attention.flash(machine, report)
    assert rows[-1].part and (rows[-1].what, rows[-1].note) == ("FA3", "not installed")
    error, padding, packed, leaked = (row.value for row in rows[:4])
    assert (error, padding) == (0.0, 0.0) and packed > attention.FLASH_LIMIT and leaked > 0.0, rows
    assert [row.held for row in rows] == [True, True, False, False, None]


def test_flash_attention_takes_documents_as_segments(as_gpu, monkeypatch):
    """With kernels that sdpa computes, behind transformers' own code."""
    from support.fake_flash import FakeKernels

    machine, report, rows = as_gpu
    from gpu_parts import attention

    FakeKernels().install(monkeypatch)
    monkeypatch.setattr(attention, "make_model", faked(attention.make_model))
    monkeypatch.setitem(attention.FLASH, "FA2", ("flash_attention_2", "is_torch_available"))
    attention.flash(machine, report)
    assert [row.held for row in rows] == [True, True, True, True, None], rows


def faked(make):
    """Return `make_model` without transformers' search for a GPU and the package of flash attention."""

    def make_model(*args, attn_implementation="sdpa", **rest):
        model = make(*args, **rest)
        model.config._attn_implementation_internal = attn_implementation
        return model

    return make_model


def liger_loss(is_old):
    """Return Liger's class with its signature, computed by PyTorch; an old one scales all gradients by the first."""

    class Loss(torch.nn.Module):
        def __init__(self, ce_weight=None, ignore_index=-100, reduction="mean", accum_dtype=None):
            super().__init__()
            self.reduction, self.accum_dtype = reduction, accum_dtype

        def forward(self, lin_weight, _input, target, bias=None):
            losses = torch.nn.functional.cross_entropy(
                _input.float() @ lin_weight.float().T, target, reduction=self.reduction
            )
            if is_old and self.reduction == "none":
                losses.register_hook(lambda grad: grad[:1].expand_as(grad))
            return losses

    return Loss


def cut_loss(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="auto"):
    """Compute cut cross-entropy by PyTorch, with its signature."""
    return torch.nn.functional.cross_entropy(e.float() @ c.float().T, targets, reduction=reduction)


@pytest.mark.parametrize("is_old", [False, True])
def test_fused_heads_are_compared_where_they_are_installed(is_old, as_gpu, monkeypatch):
    machine, report, rows = as_gpu
    from gpu_parts import head

    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", ModuleType("cut_cross_entropy"))
    sys.modules["liger_kernel.transformers"].LigerFusedLinearCrossEntropyLoss = liger_loss(is_old)
    sys.modules["cut_cross_entropy"].linear_cross_entropy = cut_loss
    monkeypatch.setattr(head, "find_spec", lambda name: name)
    monkeypatch.setattr(type(machine), "peak_memory", lambda self, run: (run(), 10**9)[1])
    head.head(machine, report)
    assert not [row for row in rows if row.state != "measured"], rows
    assert len(rows) == 2 * 5 * 8 and sum(row.held is True for row in rows) == 12
    for row in rows:
        if "error" in row.what:
            # With a factor of its own for each token, the gradient of an old Liger is another one.
            is_wrong = is_old and "gradient" in row.what and "Liger" in row.what and "no weights" not in row.what
            assert row.value > 0.3 if is_wrong else row.value < 0.01, row
    assert {row.value for row in rows if "memory" in row.what} == {1.0}


def test_fused_heads_without_their_package(as_gpu, monkeypatch):
    machine, report, rows = as_gpu
    from gpu_parts import head

    monkeypatch.setattr(head, "find_spec", lambda name: None)
    monkeypatch.setattr(type(machine), "peak_memory", lambda self, run: (run(), 0)[1])
    head.head(machine, report)
    left_out = [(row.what, row.note) for row in rows if row.state == "left out"]
    assert left_out == [(name, f"{name} is not installed") for name in ("liger_kernel", "cut_cross_entropy")]
    assert len(rows) == 22


def test_the_weights_of_the_heads_are_those_of_the_bound(parts):
    """Half of the tokens are scored, and the mean over all tokens of what is masked, times 1/t, is 1."""
    from gpu_parts import head

    batch = head.make_batch(head.TOY_SIZES[0], "cpu")
    assert len(batch.targets) == 32 and batch.hidden.shape == (32, 32) and batch.weight.shape == (64, 32)
    assert float(batch.weights.sum()) == pytest.approx(1.0, rel=1e-6)
    logits = (batch.hidden @ batch.weight.T).detach()
    assert float((logits.argmax(dim=1) == batch.targets).float().mean()) > 0.5
