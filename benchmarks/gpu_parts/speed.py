"""A training step of `stage: ddm` beside one of `stage: pt`: tokens/s, share of the peak, memory."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

import torch

from .machine import Machine
from .models import GPT2_SMALL, LLAMA_1B, LLAMA_7B, TOY_GPT2, TOY_LLAMA, Shape, make_model, with_adapter
from .operations import training_operations
from .report import Report
from .steps import Stepper, rows_of, trainer_of

PREDICTED_CLAIM, MFU_CLAIM, MEMORY_CLAIM = 0.95, 0.45, 0.85
WARM_UP = 3


def speed_124m(machine: Machine, report: Report) -> None:
    """Compare steps of a GPT-2 small on rows of 1,024 tokens."""
    _speed(machine, report, GPT2_SMALL, batch=32, length=1024)


def speed_1b(machine: Machine, report: Report) -> None:
    """Compare steps of a Llama of 1B weights on rows of 2,048 tokens."""
    _speed(machine, report, LLAMA_1B, batch=8, length=2048, mfu=MFU_CLAIM)


def lora_7b(machine: Machine, report: Report) -> None:
    """Compare steps of LoRA on a Llama of 7B weights on rows of 2,048 tokens."""
    _speed(machine, report, LLAMA_7B, batch=4, length=2048, is_lora=True)


def _speed(
    machine: Machine,
    report: Report,
    shape: Shape,
    *,
    batch: int,
    length: int,
    is_lora: bool = False,
    mfu: float | None = None,
) -> None:
    """Compare at the largest batch that fits, of at most `batch` rows."""
    if machine.is_toy:
        shape, batch, length = TOY_GPT2 if shape.inner is None else TOY_LLAMA, 4, 32
    while True:
        try:
            _compare(machine, report, shape, batch=batch, length=length, is_lora=is_lora, mfu=mfu)
            return
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise
            report.leave_out(f"batch {batch}", str(error).splitlines()[0])
        machine.release()
        batch //= 2


def _compare(
    machine: Machine, report: Report, shape: Shape, *, batch: int, length: int, is_lora: bool, mfu: float | None
) -> None:
    label = f"{batch} x {length}, bfloat16{', LoRA' if is_lora else ''}"
    steppers: dict[str, Stepper] = {}
    memory: dict[str, int] = {}
    with ExitStack() as stack:
        for kind in ("pt", "ddm"):
            others = machine.allocated()
            steppers[kind] = stepper = Stepper(
                stack.enter_context(_trainer(machine, kind, shape, batch, length, is_lora))
            )
            for _ in range(WARM_UP):
                stepper.step()
            memory[kind] = machine.peak_memory(stepper.step) - others
        seconds, scored = _rounds(machine, steppers)
        operations = {
            kind: training_operations(
                stepper.trainer.model,
                rows=batch,
                length=length,
                scored=statistics.mean(scored[kind]),
                is_causal=kind == "pt",
            )
            for kind, stepper in steppers.items()
        }
    for kind in steppers:
        rate = batch * length / statistics.median(seconds[kind])
        report.add(f"{label}, {kind}: tokens/s", rate, note=f"{statistics.median(seconds[kind]):.4g} s a step")
        if machine.peak is None:
            report.leave_out(f"{label}, {kind}: MFU", "the peak of this device is unknown; give --peak-tflops")
        else:
            share = statistics.median(operations[kind] / each for each in seconds[kind]) / machine.peak
            report.add(f"{label}, {kind}: MFU", share, at_least=mfu if kind == "ddm" else None)
    _report_ratios(report, label, seconds, scored, operations)
    for kind, held in memory.items() if machine.is_cuda else ():
        report.add(f"{label}, {kind}: peak memory", held / 1e9, "GB")
    if machine.is_cuda:
        report.add(f"{label}: peak memory, ddm / pt", memory["ddm"] / memory["pt"], at_most=MEMORY_CLAIM)
    else:
        report.leave_out(f"{label}: peak memory, ddm / pt", "nothing counts the memory of tensors on a CPU")


def _report_ratios(
    report: Report, label: str, seconds: dict[str, list[float]], scored: dict[str, list[float]], operations: Any
) -> None:
    ratios = [one / other for one, other in zip(seconds["pt"], seconds["ddm"], strict=True)]
    ratio, predicted = statistics.median(ratios), operations["pt"] / operations["ddm"]
    note = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds"
    report.add(f"{label}: tokens/s, ddm / pt", ratio, note=note)
    share = statistics.mean(scored["ddm"]) / statistics.mean(scored["pt"])
    report.add(f"{label}: the same by operations", predicted, note=f"ddm scores {share:.3f} of the tokens")
    report.add(f"{label}: measured / by operations", ratio / predicted, at_least=PREDICTED_CLAIM)


def _trainer(machine: Machine, kind: str, shape: Shape, batch: int, length: int, is_lora: bool) -> Any:
    # LLaMA-Factory keeps weights that are trained in float32, and the frozen ones in bfloat16.
    model = make_model(shape, machine.device, torch.bfloat16 if is_lora else torch.float32)
    kind = {"pt": "ar", "ddm": "full"}[kind]
    rows, _ = rows_of(kind, shape, 8 * batch, length)
    return trainer_of(
        kind,
        with_adapter(model) if is_lora else model,
        rows,
        device=machine.device,
        mask_id=shape.mask_id,
        batch=batch,
        finetuning_type="lora" if is_lora else "full",
        training={"bf16": True, "learning_rate": 1e-5},
    )


def _rounds(machine: Machine, steppers: dict[str, Stepper]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of a step in each round, and the scored tokens of a step; rounds are interleaved."""
    rounds, steps = (2, 1) if machine.is_toy else (6, 4)
    seconds: dict[str, list[float]] = {kind: [] for kind in steppers}
    scored: dict[str, list[float]] = {kind: [] for kind in steppers}
    for _ in range(rounds):
        for kind, stepper in steppers.items():

            def some_steps(stepper: Stepper = stepper, kind: str = kind) -> None:
                scored[kind] += [stepper.step() for _ in range(steps)]

            seconds[kind].append(machine.seconds(some_steps) / steps)
    return seconds, scored
