"""The peak resident memory of a function, in a process of its own (Linux)."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_kib(function: Callable[..., Any], *arguments: Any) -> int:
    """Return the peak in KiB of a process that is forked from this one and calls the function.

    The child starts with the memory of this process. So call this while little but imports is loaded, and before
    anything is computed with several threads.

    Args:
        function: a function of a module.
        arguments: those of the function.
    Returns:
        The peak, which includes freed memory that the allocator keeps.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak, (function, arguments))


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    function(*arguments)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])
