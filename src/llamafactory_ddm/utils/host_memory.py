"""What the C library does with memory that tensors on the CPU no longer need."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for later tensors, for the rest of the process; glibc alone can.

    Otherwise glibc gives blocks above 32 MiB back to the kernel at once. A training step would get each of its large
    tensors as new pages, and the first write to a new page is slow.

    Returns:
        Whether it does so from now on.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
