"""Processes that have imported everything already, so that a test of a command waits for the command alone.

The standard library's fork server imports PyTorch, transformers and LLaMA-Factory once, with the plugin active as in
any process, and forks a child for each program to run. The child takes the arguments, environment, folder, input and
outputs that it would have got from a shell, and runs the program's own script as `__main__`. What an import reads or
says, and the seed of hashes, are the server's, and an interpreter's teardown, which takes seconds, is left out: a test
that is about those takes a fresh process.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

GRACE = 20  # seconds that the others get once one has failed
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
}
# Folders of sys.path that pytest adds, and a console script does not see.
TESTS = Path(__file__).parents[1]
OF_PYTEST = (Path(), TESTS.parent, Path(sys.executable).parent)


def run_warm(jobs, timeout):
    """Run programs side by side, each in a process of its own, to their ends; one that fails ends all.

    Args:
        jobs: for each program its words, the first of which is the path of a Python script, with `cwd` and `env`, and
            the text that it reads as `input` if it reads any.
        timeout: in seconds, after which all are killed.
    Returns:
        The finished processes with what they wrote.
    Raises:
        subprocess.TimeoutExpired: if one did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [{kind: Path(folder, f"{n}.{kind}") for kind in ("stdout", "stderr")} for n in range(len(jobs))]
        inputs = [Path(folder, f"{n}.stdin") if job.get("input") else Path(os.devnull) for n, job in enumerate(jobs)]
        for job, file in zip(jobs, inputs, strict=True):
            if job.get("input"):
                file.write_text(job["input"])
        files = [(given, *log.values()) for given, log in zip(inputs, logs, strict=True)]
        processes = []
        try:
            _start(jobs, files, processes)
            is_over = _wait(processes, timeout)
        finally:
            _kill(processes)
        texts = [
            {kind: file.read_text(errors="replace") if file.exists() else "" for kind, file in log.items()}
            for log in logs
        ]
        if not is_over:
            written = "".join(text[-5000:] for one in texts for text in one.values())
            raise subprocess.TimeoutExpired([*(job["words"] for job in jobs), written], timeout)
        return [
            subprocess.CompletedProcess(job["words"], process.exitcode, **text)
            for job, process, text in zip(jobs, processes, texts, strict=True)
        ]


class WarmProgram:
    """A program that runs beside the test, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, *words, cwd, env, stdin=os.devnull, stdout=os.devnull, stderr=os.devnull):
        """Start the Python script whose path is the first word.

        Its files are paths; if that of stdin is a terminal, it becomes the program's controlling terminal.
        """
        self._processes = []
        job = {"words": [*map(str, words)], "cwd": str(cwd), "env": env}
        _start([job], [(stdin, stdout, stderr)], self._processes)

    def poll(self):
        """Return the exit status, negative after a signal, or None while the program runs."""
        return self._processes[0].exitcode

    def wait(self, timeout):
        """Wait for the end and return the exit status; raise TimeoutError after `timeout` seconds."""
        self._processes[0].join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"the program did not end within {timeout} s")
        return self.poll()

    def send_signal(self, number):
        """Send a signal to the program, not to the processes that it started."""
        os.kill(self._processes[0].pid, number)

    def kill(self):
        """Kill the program and the processes that it started."""
        _kill(self._processes)


def free_port():
    """Return a port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(jobs, files, processes):
    """Start each job with the paths of its standard files, and add its process to `processes`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    path = [one for one in sys.path if Path(one) not in OF_PYTEST and not Path(one).is_relative_to(TESTS)]
    # Without a __main__, which a child would import. The fork server inherits this environment.
    no_main = mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")})
    of_server = {**QUIET, "PYTHONPATH": f"{TESTS}{os.pathsep}{QUIET['PYTHONPATH']}"}
    with no_main, mock.patch.dict(os.environ, of_server):
        for job, (stdin, stdout, stderr) in zip(jobs, files, strict=True):
            processes.append(context.Process(target=_main, args=(job, path, stdin, stdout, stderr)))
            processes[-1].start()


def _wait(processes, timeout):
    """Wait until all have ended, or one has failed `GRACE` seconds ago; return False at the end of the time."""
    end, has_failed = time.monotonic() + timeout, False
    while alive := [process.sentinel for process in processes if process.exitcode is None]:
        if not has_failed and any(process.exitcode for process in processes):
            end, has_failed = min(end, time.monotonic() + GRACE), True
        if not multiprocessing.connection.wait(alive, max(0, end - time.monotonic())):
            return has_failed
    return True


def _kill(processes):
    """Kill what still runs, with the processes that it started."""
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _main(job, path, stdin, stdout, stderr):
    os.setsid()
    _end_with_tests()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    multiprocessing.set_start_method(None, force=True)  # the system's, as in any program
    os.dup2(os.open(stdin, os.O_RDONLY), 0)  # a terminal becomes the controlling one
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    script = job["words"][0]
    sys.argv[:] = job["words"]
    sys.path[:] = [str(Path(script).parent), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:  # noqa: BLE001 - multiprocessing would not ask the hook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # nor do this


def _end_with_tests():
    """Have this process group get SIGIO, which ends it, when the process of the tests is gone, however it went."""
    pipe = multiprocessing.parent_process().sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
