"""Programs that models write: right, wrong, endless, greedy and intrusive ones."""

import sys
import threading
import time

import pytest

from llamafactory_ddm.harness.sandbox import Limits, Verdict, run_program

QUICK = Limits(cpu_seconds=1, wall_seconds=15)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("def f(a):\n    return a + 1\nassert f(1) == 2", None),
        ("", None),
        ("import math, re, json, itertools\nfrom collections import Counter\nassert math.isqrt(9) == 3", None),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    b: 'int' = 3\nassert A().b == 3", None),
        ("assert __name__ != '__main__'", None),
        ("import os\nassert not {'HF_TOKEN', 'SECRET'} & set(os.environ) and os.listdir('.') == []", None),
        ("open('a.txt', 'w').write('b')\nassert open('a.txt').read() == 'b'\nimport os; os.remove('a.txt')", None),
        ("print('x' * 10**6 * 50, flush=True)", None),
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("undefined", "NameError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f():\n    f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read() == ''\nsys.exit(0)\nassert False", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit: None"),
        ("import os\nos._exit(0)\nassert False", "status 0 before its last statement"),
        ("import os\nos.closerange(0, 99)", "before its last statement"),
        ("a = bytearray(3 * 2**30)", "MemoryError"),
        ("a = []\nwhile True:\n    a.append(bytes(2**24))", "MemoryError"),
        ("open('a', 'wb').write(bytes(2**25))", "OSError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", "sandbox does not allow socket"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "sandbox does not allow socket"),
        ("import os\nos.system('true')", "sandbox does not allow os.system"),
        ("import subprocess\nsubprocess.run(['true'])", "sandbox does not allow subprocess.Popen"),
        ("import os\nos.kill(os.getppid(), 9)", "sandbox does not allow os.kill"),
        ("import ctypes\nctypes.CDLL(None).fork()", "sandbox does not allow ctypes"),
        ("import os\nwhile True:\n    os.fork()", "sandbox does not allow os.fork"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "sandbox does not allow"),
        ("import multiprocessing as m\nm.get_context('spawn').Process().start()", "sandbox does not allow"),
        (
            "from multiprocessing.shared_memory import SharedMemory\nSharedMemory(create=True, size=9)",
            "sandbox does not allow other processes, shared memory",
        ),
        ("import os\nos.mkfifo('/a')", "sandbox does not allow other processes, shared memory and special files"),
        ("import asyncio\nassert asyncio.run(asyncio.sleep(0, 3)) == 3", None),
        ("import socket\nsocket.socket(socket.AF_UNIX).bind('a')", "sandbox does not allow socket.bind"),
        ("import shelve\nwith shelve.open('a') as b:\n    b['c'] = 1\n    assert b['c'] == 1", None),
        (
            "import threading as t, time\na = [t.Thread(target=time.sleep, args=(0.2,)) for _ in range(40)]\n"
            "for b in a:\n    b.start()\nfor b in a:\n    b.join()",
            None,
        ),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))", "sandbox does not allow resource"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E", "E"),
    ],
)
def test_verdicts(program, error, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    verdict = run_program(program, QUICK)
    if error is None:
        assert verdict == Verdict("passed")
    else:
        assert verdict.status == "failed" and error in verdict.error, verdict
        assert not verdict.has_passed


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    try:\n        1 / 0\n    except:\n        pass",
        pytest.param("while True:\n    pass", marks=pytest.mark.slow),
    ],
)
def test_an_endless_loop_is_out_of_time_of_the_processor(program):
    verdict = run_program(program, QUICK)
    assert verdict.status == "timed out" and "1 seconds of the processor" in verdict.error


def test_a_program_that_waits_is_out_of_time():
    begin = time.monotonic()
    verdict = run_program("import time\ntime.sleep(60)", Limits(wall_seconds=0.5))
    assert verdict == Verdict("timed out", "it took more than 0.5 seconds") and time.monotonic() - begin < 30


def test_files_outside_the_folder_are_left_alone(tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"open({str(tmp_path / 'new.txt')!r}, 'a')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'stolen')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/kept.txt', 'w')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'a').mkdir()",
    ):
        verdict = run_program(program, QUICK)
        assert verdict.status == "failed" and "PermissionError" in verdict.error, (program, verdict)
    assert kept.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert run_program(f"assert open({str(kept)!r}).read() == 'mine'", QUICK).has_passed  # reading is not guarded


def test_the_report_cannot_be_made_up_by_printing():
    program = 'import os\nfor n in range(3, 20):\n    try:\n        os.write(n, b\'{"token": "", "error": ""}\\n\')\n'
    program += "    except OSError:\n        pass\nassert False"
    assert run_program(program, QUICK).status == "failed"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_program("open('a', 'w').write('b')\nimport os; os.mkdir('c')", QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not count threads")
def test_what_runs_beside_it_leaves_room_for_its_threads():
    """The limit counts all processes and threads of the user, where the program has no user namespace of its own."""
    done = threading.Event()
    for _ in range(70):
        threading.Thread(target=done.wait).start()
    program = "import resource, threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()\n"
    verdict = run_program(program + "assert resource.getrlimit(resource.RLIMIT_NPROC)[0] > 64 + 70", QUICK)
    done.set()
    assert verdict.has_passed, verdict
