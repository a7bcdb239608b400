"""The peak resident memory of a function, in a process of its own (Linux)."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def peak_kib(function: Callable[..., Any], *arguments: Any, threshold: int | None = None) -> int:
    """Return the peak in KiB of a process that is forked from this one and calls the function.

    The child starts with the memory of this process. So call this while little but imports is loaded, and before
    anything is computed with several threads.

    Args:
        function: a function of a module.
        arguments: those of the function.
        threshold: bytes above which the allocator returns freed memory to the system at once. With None the peak
            includes the freed memory that it keeps.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak, (function, arguments, threshold))


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...], threshold: int | None) -> int:
    if threshold is not None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, threshold)
    function(*arguments)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])
