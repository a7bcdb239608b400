"""A training step of `stage: ddm` beside one of `stage: pt`: tokens/s, share of the peak, memory."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from .machine import Machine
from .models import GPT2_SMALL, LLAMA_1B, LLAMA_7B, TOY_GPT2, TOY_LLAMA, Shape, make_model, with_adapter
from .operations import training_operations
from .report import Report
from .steps import Stepper, rows_of, trainer_of

# Of the measured ratio of tokens/s to that by operations, of the share of the peak, of the ratio of peak memory.
PREDICTED_CLAIM, MFU_CLAIM, MEMORY_CLAIM = 0.95, 0.45, 0.85
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """What is trained: `batch` rows of `length` tokens, all weights or adapters alone."""

    shape: Shape
    batch: int
    length: int
    is_lora: bool = False
    mfu: float | None = None  # lower bound on the share of the peak

    @property
    def label(self) -> str:
        """Return the words that rows begin with."""
        return f"{self.batch} x {self.length}, bfloat16{', LoRA' if self.is_lora else ''}"


def speed_124m(machine: Machine, report: Report) -> None:
    """Compare steps of a GPT-2 small on rows of 1,024 tokens."""
    _speed(machine, report, Case(GPT2_SMALL, batch=32, length=1024))


def speed_1b(machine: Machine, report: Report) -> None:
    """Compare steps of a Llama of 1B weights on rows of 2,048 tokens."""
    _speed(machine, report, Case(LLAMA_1B, batch=8, length=2048, mfu=MFU_CLAIM))


def lora_7b(machine: Machine, report: Report) -> None:
    """Compare steps of LoRA on a Llama of 7B weights on rows of 2,048 tokens; nothing is claimed of them."""
    _speed(machine, report, Case(LLAMA_7B, batch=2, length=2048, is_lora=True))


def _speed(machine: Machine, report: Report, case: Case) -> None:
    """Compare at the largest batch that fits, of at most that of `case`."""
    if machine.is_toy:
        case = replace(case, shape=TOY_GPT2 if case.shape.inner is None else TOY_LLAMA, batch=4, length=32)
    while True:
        try:
            _compare(machine, report, case)
            return
        except torch.OutOfMemoryError as error:
            if case.batch == 1:
                raise
            report.leave_out(case.label, str(error).splitlines()[0])
        machine.release()  # here, as the error holds the tensors of the failed step
        case = replace(case, batch=case.batch // 2)


def _compare(machine: Machine, report: Report, case: Case) -> None:
    steppers: dict[str, Stepper] = {}
    memory: dict[str, int] = {}
    with ExitStack() as stack:
        for kind in ("pt", "ddm"):
            others = machine.allocated()
            steppers[kind] = stepper = Stepper(stack.enter_context(_trainer(machine, kind, case)))
            for _ in range(WARM_UP):
                stepper.step()
            memory[kind] = machine.peak_memory(stepper.step) - others
        _report_speed(machine, report, case, steppers)
    if not machine.is_cuda:
        report.leave_out(f"{case.label}: peak memory, ddm / pt", "nothing counts the memory of tensors on a CPU")
        return
    for kind, held in memory.items():
        report.add(f"{case.label}, {kind}: peak memory", held / 1e9, "GB")
    claim = None if case.is_lora else MEMORY_CLAIM
    report.add(f"{case.label}: peak memory, ddm / pt", memory["ddm"] / memory["pt"], at_most=claim)


def _report_speed(machine: Machine, report: Report, case: Case, steppers: dict[str, Stepper]) -> None:
    seconds, scored = _rounds(machine, steppers)
    # In the order of the rounds, as the number of scored tokens varies.
    operations = {
        kind: [
            training_operations(
                stepper.trainer.model, rows=case.batch, length=case.length, scored=count, is_causal=kind == "pt"
            )
            for count in scored[kind]
        ]
        for kind, stepper in steppers.items()
    }
    n_tokens = case.batch * case.length
    for kind in steppers:
        typical = statistics.median(seconds[kind])
        report.add(f"{case.label}, {kind}: tokens/s", n_tokens / typical, note=f"{typical:.4g} s a step")
        if machine.peak is None:
            report.leave_out(f"{case.label}, {kind}: MFU", "the peak of this device is unknown; give --peak-tflops")
        else:
            pairs = zip(operations[kind], seconds[kind], strict=True)
            share = statistics.median(done / taken for done, taken in pairs) / machine.peak
            report.add(f"{case.label}, {kind}: MFU", share, at_least=case.mfu if kind == "ddm" else None)
    measured = [pt / ddm for pt, ddm in zip(seconds["pt"], seconds["ddm"], strict=True)]
    predicted = [pt / ddm for pt, ddm in zip(operations["pt"], operations["ddm"], strict=True)]
    note = f"{min(measured):.3f} to {max(measured):.3f} in {len(measured)} rounds"
    report.add(f"{case.label}: tokens/s, ddm / pt", statistics.median(measured), note=note)
    share = statistics.mean(scored["ddm"]) / n_tokens
    note = f"ddm scores {share:.3f} of the tokens"
    report.add(f"{case.label}: the same by operations", statistics.median(predicted), note=note)
    shares = [one / other for one, other in zip(measured, predicted, strict=True)]
    claim = None if case.is_lora else PREDICTED_CLAIM
    report.add(f"{case.label}: measured / by operations", statistics.median(shares), at_least=claim)


def _trainer(machine: Machine, kind: str, case: Case) -> Any:
    # LLaMA-Factory keeps weights that are trained in float32, and the frozen ones in bfloat16.
    model = make_model(case.shape, machine.device, torch.bfloat16 if case.is_lora else torch.float32)
    kind = {"pt": "ar", "ddm": "full"}[kind]
    rows, _ = rows_of(kind, case.shape, 8 * case.batch, case.length)
    return trainer_of(
        kind,
        with_adapter(model) if case.is_lora else model,
        rows,
        device=machine.device,
        mask_id=case.shape.mask_id,
        batch=case.batch,
        finetuning_type="lora" if case.is_lora else "full",
        training={"bf16": True, "learning_rate": 1e-5},
    )


def _rounds(machine: Machine, steppers: dict[str, Stepper]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds and the scored tokens of a step, the mean of each round; rounds are interleaved."""
    rounds, steps = (2, 1) if machine.is_toy else (6, 4)
    seconds: dict[str, list[float]] = {kind: [] for kind in steppers}
    scored: dict[str, list[float]] = {kind: [] for kind in steppers}
    for _ in range(rounds):
        for kind, stepper in steppers.items():
            counts: list[int] = []

            def some_steps(stepper: Stepper = stepper, counts: list[int] = counts) -> None:
                counts += [stepper.step() for _ in range(steps)]

            seconds[kind].append(machine.seconds(some_steps) / steps)
            scored[kind].append(statistics.mean(counts))
    return seconds, scored
