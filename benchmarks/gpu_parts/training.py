"""Whether training steps are correct: against the CPU, in half precision, in 4 bits, compiled."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from .machine import Machine
from .models import SMALL_GPT2, SMALL_LLAMA, TOY_GPT2, TOY_LLAMA, Shape, make_model, with_adapter
from .report import Report
from .steps import KINDS, Trained, on_cpu, relative_error, train

FP32_LIMIT = 1e-4
HALF_LOSS_LIMIT, HALF_GRADIENT_LIMIT = 0.01, 0.05
FOUR_BIT_LIMIT = 0.05
SCALER_STEPS = 12  # loss scaling starts at 2^16, and a step whose gradient overflows is skipped


def _shapes(machine: Machine) -> dict[str, Shape]:
    return {"GPT-2": TOY_GPT2, "Llama": TOY_LLAMA} if machine.is_toy else {"GPT-2": SMALL_GPT2, "Llama": SMALL_LLAMA}


def _sizes(machine: Machine) -> dict[str, int]:
    return {"length": 64, "batch": 4} if machine.is_toy else {"length": 192, "batch": 8}


def gradients(machine: Machine, report: Report) -> None:
    """Compare the loss and the gradient of the first step with the CPU's, in float32."""
    cases = [(kind, name, shape) for kind in KINDS for name, shape in _shapes(machine).items()]
    sizes = _sizes(machine)
    with on_cpu(_train_on_cpu, [(kind, shape, sizes) for kind, _, shape in cases]) as expected:
        for (kind, name, shape), expected_of in zip(cases, expected, strict=True):
            what = f"{kind}, {name}, float32 / CPU"
            try:
                got = train(kind, shape, machine.device, **sizes)
                _compare(report, what, got, expected_of(), FP32_LIMIT, FP32_LIMIT)
            except Exception as error:  # noqa: BLE001 - the other kinds are measured
                report.fail(what, error)


def _train_on_cpu(kind: str, shape: Shape, sizes: dict[str, int]) -> Trained:
    return train(kind, shape, "cpu", **sizes)


def _compare(report: Report, what: str, got: Trained, expected: Trained, loss: float, gradient: float) -> None:
    """Report the relative errors of the losses, the largest, and of the first gradient that both have."""
    errors = [abs(one - other) / abs(other) for one, other in zip(got.losses, expected.losses, strict=True)]
    # max() would pass over NaN.
    worst = next((error for error in errors if error != error), max(errors))
    report.add(f"{what}: relative error of the loss", worst, at_most=loss)
    both = sorted(got.gradients.keys() & expected.gradients.keys())
    if not both:
        raise RuntimeError(f"{what}: no step has a gradient")
    error = relative_error(got.gradients[both[0]], expected.gradients[both[0]])
    report.add(f"{what}: relative error of the gradient", error, at_most=gradient)


def precision(machine: Machine, report: Report) -> None:
    """Compare steps in bfloat16 and float16 with float32 on the same device."""
    shapes, sizes = _shapes(machine), _sizes(machine)
    for name, shape in shapes.items():
        steps = {"steps": SCALER_STEPS}
        expected = train("full", shape, machine.device, **sizes, **steps)
        got = train("full", shape, machine.device, **sizes, **steps, training={"bf16": True})
        limits = (HALF_LOSS_LIMIT, HALF_GRADIENT_LIMIT)
        _compare(report, f"full, {name}, bfloat16 / float32", got, expected, *limits)
        if not machine.is_cuda:
            report.leave_out(f"full, {name}, float16 / float32", "fp16 has no effect on a CPU")
            continue
        for chunk, said in ((None, "logits in chunks"), (64, "chunks of 64 tokens"), (0, "all logits at once")):
            what = f"full, {name}, float16 with loss scaling, {said}"
            try:
                half = {"training": {"fp16": True}, "logits_chunk": chunk}
                got = train("full", shape, machine.device, **sizes, **steps, **half)
                _compare(report, f"{what} / float32", got, expected, *limits)
                report.add(f"{what}: steps taken", len(got.gradients), at_least=1, note=f"of {SCALER_STEPS}")
            except Exception as error:  # noqa: BLE001 - the other chunks are measured
                report.fail(what, error)


def four_bit(machine: Machine, report: Report) -> None:
    """Compare the loss of LoRA on a base in 4 bits with that on the base itself, in bfloat16."""
    if find_spec("bitsandbytes") is None:
        report.leave_out("LoRA, 4 bits", "bitsandbytes is not installed")
        return
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape, sizes = _shapes(machine)["Llama"], _sizes(machine)
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape).save_pretrained(folder)
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        for name, rest in (("bfloat16", {}), ("4 bits", {"quantization_config": quantized})):
            place = {"": 0} if machine.is_cuda else "cpu"
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map=place, local_files_only=True, **rest
            )
            kind = {"model": with_adapter(model), "finetuning_type": "lora", "training": {"bf16": True}}
            made[name] = train("full", shape, machine.device, **sizes, **kind)
            report.add(f"LoRA, {name}: bytes of the model", float(model.get_memory_footprint()))
    error = abs(made["4 bits"].losses[0] / made["bfloat16"].losses[0] - 1)
    report.add("LoRA, 4 bits / bfloat16: relative error of the loss", error, at_most=FOUR_BIT_LIMIT)
    (gradient,) = made["4 bits"].gradients.values()
    report.add("LoRA, 4 bits: norm of the gradient", float(gradient.norm()), at_least=1e-9)


def compile(machine: Machine, report: Report) -> None:
    """Compare compiled steps with eager ones: in float32, and in bfloat16 as users have it."""
    # A toy run only traces one kind, as compiling for a CPU takes a minute.
    backend = "aot_eager" if machine.is_toy else "inductor"
    # By default the trainer lets compiled float32 products round to TF32.
    exact, half = (FP32_LIMIT, FP32_LIMIT, {"tf32": False}), (HALF_LOSS_LIMIT, HALF_GRADIENT_LIMIT, {"bf16": True})
    shapes = {name: replace(shape, layers=2) for name, shape in _shapes(machine).items()}
    cases = [
        ("full", "Llama", "float32", exact),
        ("full", "GPT-2", "float32", exact),
        ("full", "Llama", "bfloat16", half),
        ("block", "Llama", "float32", exact),
    ]
    for kind, name, precision, (loss, gradient, keys) in cases[:1] if machine.is_toy else cases:
        what = f"{kind}, {name}, {precision}, {backend} / eager"
        try:
            compiled = {**keys, "torch_compile": True, "torch_compile_backend": backend}
            expected, got = (
                train(kind, shapes[name], machine.device, **_sizes(machine), steps=3, training=training)
                for training in (keys, compiled)
            )
            torch._dynamo.reset()
            _compare(report, what, got, expected, loss, gradient)
        except Exception as error:  # noqa: BLE001 - the other kinds are measured
            report.fail(what, error)
