import os
import platform
import subprocess
import sys

import pytest

PAGES = """
import ctypes
import resource
import torch
from llamafactory_ddm.utils.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = libc.malloc(100 << 20)  # the last of the heap, which glibc would cut off
        libc.memset(block, 1, 100 << 20)
        libc.free(block)
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
before = new_pages()
kept = keep_freed_memory()
for _ in range(8):  # until the heap holds a free block of this size
    new_pages()
print(kept, before, new_pages())
"""


def pages(**settings):
    """Return what `PAGES` prints in a process with these settings of glibc alone."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    output = subprocess.run(
        [sys.executable, "-c", PAGES], env=env | settings, capture_output=True, text=True, check=True, timeout=300
    )
    return output.stdout.split()


def glibc():
    """Return the version of glibc; (0,) for another C library."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else (0,)


@pytest.mark.skipif(glibc() < (2, 35), reason="others do not take the limit")
def test_large_tensors_reuse_the_pages_of_earlier_ones():
    kept, before, after = pages()
    assert kept == "True"
    assert int(before) >= 4 * 32  # 64 MiB each, in pages of at most 2 MiB
    assert int(after) < int(before) // 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_a_setting_of_the_user_takes_precedence(monkeypatch, name, value):
    from llamafactory_ddm.utils import host_memory

    loaded = []
    monkeypatch.setattr(host_memory.ctypes, "CDLL", loaded.append)
    monkeypatch.setenv(name, value)
    assert host_memory.keep_freed_memory() is False
    assert not loaded


def test_another_c_library_is_left_alone(monkeypatch):
    from llamafactory_ddm.utils import host_memory

    def load(name):
        raise OSError(name)

    monkeypatch.setattr(host_memory.ctypes, "CDLL", load)
    assert host_memory.keep_freed_memory() is False
