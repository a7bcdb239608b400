import platform
import subprocess
import sys

import pytest

PAGES = """
import resource
import torch
from llamafactory_ddm.utils.host_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
before = new_pages()
kept = keep_freed_memory()
for _ in range(8):  # until the heap holds a free block of this size
    new_pages()
print(kept, before, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_reuse_the_pages_of_earlier_ones():
    output = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True, timeout=300)
    kept, before, after = output.stdout.split()
    assert kept == "True"
    assert int(before) >= 4 * 32  # 64 MiB each, in pages of at most 2 MiB
    assert int(after) < int(before) // 4


def test_another_c_library_is_left_alone(monkeypatch):
    from llamafactory_ddm.utils import host_memory

    def load(name):
        raise OSError(name)

    monkeypatch.setattr(host_memory.ctypes, "CDLL", load)
    assert host_memory.keep_freed_memory() is False
