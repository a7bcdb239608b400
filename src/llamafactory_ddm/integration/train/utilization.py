"""MFU: the operations that training needs, as a fraction of those that the devices could do in the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...modeling.device_peaks import peak_flops
from ...modeling.model_flops import ModelFlops, StepCounts, model_flops
from ..logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilisation (MFU) of a run.

    Attributes:
        flops: operations of the model.
        peak: floating-point operations a second that all devices have at most.
    """

    flops: ModelFlops
    peak: float

    def of(self, counts: StepCounts, seconds: float) -> float:
        """Return the MFU of the steps with these counts, which took so long."""
        return self.flops.of(counts) / (seconds * self.peak)


def utilization(
    model: Any, head: torch.nn.Module, args: Any, peak_tflops: float | None, dtype: torch.dtype
) -> Utilization | None:
    """Return the MFU of a run; None, and a line in the log, if model or device are not known well enough.

    Args:
        model: the unwrapped model.
        head: its output embedding.
        args: the training arguments.
        peak_tflops: 10^12 operations a second of one device; None to look its data sheet up.
        dtype: of the matrix products.
    """
    flops = model_flops(model, head)
    if flops is None:
        logger.info_rank0(
            "MFU is not logged, as the operations of the model are not known: it is a mixture of experts, or its "
            "weights are packed by GPTQ or AWQ."
        )
        return None
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    if peak_tflops is None:
        peak = peak_flops(name, dtype, tf32=_multiplies_in_tf32())
    else:
        peak = 1e12 * peak_tflops
    if peak is None:
        logger.info_rank0(
            f"MFU is not logged: the peak of {name} in {str(dtype).removeprefix('torch.')} is not known; set "
            "peak_tflops to the TFLOP/s of its data sheet, without sparsity."
        )
        return None
    return Utilization(flops, peak * args.world_size)


def _multiplies_in_tf32() -> bool:
    """Tell whether a GPU multiplies matrices of float32 in TF32."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9, where the old flag may refuse to be read
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"
