"""The peak speed of known GPUs, from their data sheets, for the utilisation that training logs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """10^12 floating-point operations a second of dense matrix products; None where the device has no such units.

    Attributes:
        half: float16 and, where the device has it, bfloat16, summed in float32.
        tf32: float32 numbers rounded to TF32.
        single: float32.
        has_bfloat16: whether its matrix units take bfloat16.
    """

    half: float
    tf32: float | None
    single: float
    has_bfloat16: bool = True


# Names as `torch.cuda.get_device_name` gives them, as regular expressions for the whole name -> figures without
# sparsity from NVIDIA's and AMD's data sheets and white papers. A part of a GPU (MIG) has a name of its own.
_PEAKS: dict[str, Peak] = {
    r"Tesla V100-SXM[23]-\d+GB": Peak(125.0, None, 15.7, has_bfloat16=False),
    r"Tesla V100-PCIE-\d+GB": Peak(112.0, None, 14.0, has_bfloat16=False),
    r"Tesla T4": Peak(65.0, None, 8.1, has_bfloat16=False),
    r"NVIDIA A100-(SXM4|PCIE|PCI)-\d+GB|NVIDIA A100 80GB PCIe": Peak(312.0, 156.0, 19.5),
    r"NVIDIA A10": Peak(125.0, 62.5, 31.2),
    r"NVIDIA A30": Peak(165.0, 82.0, 10.3),
    r"NVIDIA A40": Peak(149.7, 74.8, 37.4),
    r"NVIDIA RTX A6000": Peak(154.8, 77.4, 38.7),
    r"NVIDIA GeForce RTX 3090": Peak(71.0, 35.6, 35.6),
    r"NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
    r"NVIDIA RTX 6000 Ada Generation": Peak(364.2, 182.1, 91.1),
    r"NVIDIA L4": Peak(121.0, 60.0, 30.3),
    r"NVIDIA L40": Peak(181.0, 90.5, 90.5),
    r"NVIDIA L40S": Peak(362.0, 183.0, 91.6),
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": Peak(989.4, 494.7, 66.9),
    r"NVIDIA H100 PCIe": Peak(756.0, 378.0, 51.2),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": Peak(835.5, 417.5, 60.0),
    r"NVIDIA H20": Peak(148.0, 74.0, 44.0),
    r"NVIDIA B200": Peak(2250.0, 1100.0, 75.0),
    r"AMD Instinct MI300X.*": Peak(1307.4, 653.7, 163.4),
}


def peak_flops(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Return the floating-point operations a second that a device has at most, or None if they are not known.

    Args:
        name: of the device, as `torch.cuda.get_device_name` gives it.
        dtype: of the matrix products.
        tf32: whether products of float32 numbers are computed in TF32.
    """
    peak = next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None or (dtype == torch.bfloat16 and not peak.has_bfloat16):
        return None
    of_single = peak.tf32 if tf32 and peak.tf32 is not None else peak.single
    teraflops = {torch.float16: peak.half, torch.bfloat16: peak.half, torch.float32: of_single}.get(dtype)
    return None if teraflops is None else 1e12 * teraflops
