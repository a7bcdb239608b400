"""Has the C library keep freed memory for later tensors on the CPU."""

from __future__ import annotations

import ctypes
import os

_KEPT = 2**27  # bytes of the largest block that is kept; keeping larger ones takes more memory and saves little time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # the user's


def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks of up to 128 MiB for later tensors, for the rest of the process.

    By default glibc returns blocks above 32 MiB to the kernel at once. Then each large tensor of a training step needs
    new pages, and the first write to a new page is slow. Environment variables of glibc take precedence.

    Returns:
        Whether both limits were accepted; False if the user has set such a variable, with another C library, or with a
        glibc that refuses so large a limit (before 2.35).
    """
    if _SETTINGS & os.environ.keys() or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: the heap never shrinks
