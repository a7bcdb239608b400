"""The device and the packages that the other parts use."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .machine import Machine
from .report import Report

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "llamafactory",
    "llamafactory-ddm",
    "bitsandbytes",
    "flash-attn",
    "flash-attn-3",
    "liger-kernel",
    "cut-cross-entropy",
)


def environment(machine: Machine, report: Report) -> None:
    """Report the device, the versions, and the speed of products and copies of matrices."""
    report.add("device", machine.name)
    report.add("Python", platform.python_version())
    for package in PACKAGES:
        try:
            report.add(package, version(package))
        except PackageNotFoundError:
            report.add(package, "not installed")
    if machine.is_cuda:
        report.add("CUDA", str(torch.version.cuda))
        report.add("memory", torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")
    if machine.peak is not None:
        report.add("peak, dense bfloat16", machine.peak / 1e12, "TFLOP/s", note="from the data sheet or the user")
    size = 256 if machine.is_toy else 8192
    one, other = (torch.randn(size, size, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 2 if machine.is_toy else 20

    def times(run: object) -> float:
        def all_of_them() -> None:
            for _ in range(repeats):
                run()  # type: ignore[operator]

        all_of_them()
        return machine.seconds(all_of_them) / repeats

    report.add(
        f"product of two {size} x {size} matrices, bfloat16",
        2 * size**3 / times(lambda: one @ other) / 1e12,
        "TFLOP/s",
    )
    report.add("copy, bytes read and written", 2 * one.nbytes / times(lambda: one.clone()) / 1e9, "GB/s")
