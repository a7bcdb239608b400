"""Processes that have imported everything already, so that a test of a command waits for the command alone.

A server process imports PyTorch, transformers and LLaMA-Factory once, with the plugin active as in any process, and
forks a child for each program to run. The child takes the arguments, environment, folder and outputs that it would
have got from a shell, runs the program's own script as `__main__`, and ends as any interpreter does. What an import
reads or says, and the seed of hashes, are the server's: a test that is about those takes a fresh process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOADED = (
    "datasets",
    "llamafactory.cli",
    "llamafactory.launcher",
    "llamafactory.train.tuner",
    "llamafactory_ddm.cli.generate",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
    "transformers.trainer",
)
GRACE = 20  # seconds that the others get once one has failed
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
}
_server: subprocess.Popen | None = None


def run_warm(jobs, timeout):
    """Run programs side by side, each in a process of its own, to their ends; one that fails ends all.

    Args:
        jobs: for each program its words, the first of which is the path of a Python script, with `cwd` and `env`; with
            `ends_at_once` it ends when the script does, without tearing down the interpreter.
        timeout: in seconds, after which all are killed.
    Returns:
        The finished processes with what they wrote.
    Raises:
        subprocess.TimeoutExpired: if one did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        for n, job in enumerate(jobs):
            job |= {"out": f"{folder}/{n}.out", "err": f"{folder}/{n}.err"}
        pids = []
        try:
            pids += _ask(jobs, 60)
            codes = _answer(timeout)
        except BaseException as error:  # what the server says later would be taken for the next jobs' answers
            _give_up(pids)
            if not isinstance(error, TimeoutError):
                raise
            said = "".join(path.read_text(errors="replace")[-5000:] for path in sorted(Path(folder).iterdir()))
            raise subprocess.TimeoutExpired([*(job["words"] for job in jobs), said], timeout) from None
        return [
            subprocess.CompletedProcess(
                job["words"], code, *(Path(job[kind]).read_text(errors="replace") for kind in ("out", "err"))
            )
            for job, code in zip(jobs, codes, strict=True)
        ]


def free_port():
    """Return a port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _ask(jobs, timeout):
    global _server
    if _server is None or _server.poll() is not None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}  # select sees what is unread
        _server = subprocess.Popen([sys.executable, __file__], env={**os.environ, **QUIET}, **pipes)
        atexit.register(_server.kill)
        timeout *= 2
    _server.stdin.write(json.dumps(jobs).encode() + b"\n")
    return _answer(timeout)


def _answer(timeout):
    if not select.select([_server.stdout], [], [], timeout)[0]:
        raise TimeoutError
    line = _server.stdout.readline()
    if not line:
        raise RuntimeError("the server of warm processes has died")
    return json.loads(line)


def _give_up(pids):
    global _server
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    if _server is not None:
        _server.kill()
        _server.wait()
    _server = None


def _die_with_parent():
    """Be killed when the parent is gone, however it went, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve():
    """Fork a child for each job of a line; return the job in the child, and None at the end."""
    for module in PRELOADED:
        __import__(module)
    for line in sys.stdin.buffer:
        sys.stdout.flush()  # what a child inherits it would write too
        sys.stderr.flush()
        pids = []
        for job in json.loads(line):
            pid = os.fork()
            if pid == 0:
                return job
            pids.append(pid)
        _say(pids)
        _say(_ends_of(pids))
    return None


def _ends_of(pids):
    """Wait for all and return their exit codes; when one fails, others may wait for it for ever, and are killed."""
    codes, patience = dict.fromkeys(pids), float("inf")
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            if time.monotonic() > patience:
                os.killpg(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            patience = min(patience, time.monotonic() + GRACE)
        time.sleep(0.02)
    return list(codes.values())


def _say(value):
    os.write(_OUT, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    _die_with_parent()
    sys.path.pop(0)  # this folder, which a console script would not see
    _OUT = os.dup(1)
    os.set_inheritable(_OUT, False)
    os.dup2(2, 1)  # what an import prints is no answer
    job = _serve()
    if job is not None:
        os.setsid()
        _die_with_parent()
        os.close(_OUT)
        for number, (name, flags) in enumerate(
            [(os.devnull, os.O_RDONLY), *((job[kind], os.O_WRONLY | os.O_CREAT) for kind in ("out", "err"))]
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        sys.argv[:] = job["words"]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        if job.get("ends_at_once"):
            sys.stdout.flush()
            os._exit(0)
