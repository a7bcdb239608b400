"""Has the C library keep freed memory for later tensors on the CPU."""

from __future__ import annotations

import ctypes
import os

_KEPT = 2**27  # bytes of the largest block that is kept; keeping larger ones takes more memory and saves little time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # with which a user decides it


def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks of up to 128 MiB for later tensors, for the rest of the process.

    Otherwise glibc gives blocks above 32 MiB back to the kernel at once. A training step would get each of its large
    tensors as new pages, and the first write to a new page is slow. Environment variables of glibc take precedence.

    Returns:
        Whether glibc was told so: not where a variable decides it, with another C library, or with a glibc that does
        not take this limit (before 2.35).
    """
    if _SETTINGS & os.environ.keys() or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: the heap never shrinks
