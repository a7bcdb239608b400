"""Where the parts run: the device, its peak, its memory, and time that includes the device's work."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamafactory_ddm.modeling.device_peaks import peak_flops


@dataclass(frozen=True)
class Machine:
    """A device and the size of what runs on it.

    Attributes:
        device: `cuda` or `cpu`.
        is_toy: whether models are small.
        peak_tflops: of the device, where the user gave it.
    """

    device: str
    is_toy: bool
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU; give --device cpu --toy to try the benchmark without one")

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @property
    def name(self) -> str:
        """Return the device's name."""
        return torch.cuda.get_device_name() if self.is_cuda else "CPU"

    @property
    def peak(self) -> float | None:
        """Return the peak in bfloat16 without sparsity, in FLOP/s; None if it is not known."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return peak_flops(self.name, torch.bfloat16, tf32=False)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the wall time of a call with all work that it gives the device."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def allocated(self) -> int:
        """Return the bytes of tensors on the device; 0 on a CPU, where nothing counts them."""
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def peak_memory(self, run: Callable[[], object]) -> int:
        """Return the largest number of bytes of tensors on the device during a call; 0 on a CPU."""
        if not self.is_cuda:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
