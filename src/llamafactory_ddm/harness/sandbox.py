"""Run a Python program that a model wrote in a process of its own, with limits, and tell whether it passed.

Guarded, so that a faulty program harms neither the run nor the machine:

- time: wall and CPU; at the limit the program is killed with all processes of its group;
- memory, size of files and, unless the user is root, number of processes: the system's resource limits (macOS does not
  enforce that of memory);
- files: the program starts in an empty temporary folder, which is deleted afterwards. Opening a file for writing, and
  removing, renaming or linking, outside this folder is a PermissionError;
- network, other processes (fork, exec, signals), shared memory, sqlite3 and ctypes: a PermissionError. Linux also
  gives the program a network of its own without interfaces, where the kernel permits that;
- input is empty, output is discarded, and the environment holds no variable of the user.

Not guarded: reading files; files named relative to the descriptor of a folder (dir_fd); what native code of an
installed extension module does, as Python's audit events do not see it; the processor's caches. This is no security
boundary: a program that was written to break out can. Evaluate models that you do not trust in a container or a
virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: of the processor, rounded up to whole seconds. It decides the verdict on an endless loop, whatever
            else runs on the machine.
        wall_seconds: in all, for a program that waits.
        memory_mb: of address space, in MiB, the interpreter included.
        file_mb: size of a file that it writes, in MiB.
        processes: and threads that may start beside those that run on the machine, for users other than root.
    """

    cpu_seconds: float = 5
    wall_seconds: float = 20
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 64


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        status: "passed" if its last statement finished; "failed" if it raised an error or ended before, also by
            sys.exit(0); "timed out" if a limit of time ended it.
        error: last line of the error; empty if it passed.
    """

    status: Status
    error: str = ""

    @property
    def has_passed(self) -> bool:
        """Tell whether the program passed."""
        return self.status == "passed"


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Run a program, which is Python source, and return the verdict on it.

    Raises:
        OSError: if no process can be started, or this system has no resource limits (Windows).
    """
    if os.name != "posix":
        raise OSError("run_generated_code: generated code runs on Linux and macOS only, which have resource limits")
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="generated-code-") as folder:
        order = {"program": program, "token": token, "folder": os.path.realpath(folder), "limits": limits.__dict__}
        process = subprocess.Popen(
            [sys.executable, "-s", "-B", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        is_late = False
        try:
            written, _ = process.communicate(json.dumps(order).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            is_late = True
            _kill_group(process.pid)
            written, _ = process.communicate()
        finally:
            _kill_group(process.pid)
            process.wait()
    return _verdict(written, token, process.returncode, limits, is_late)


def _verdict(written: bytes, token: str, returncode: int, limits: Limits, is_late: bool) -> Verdict:
    """Return the verdict from the report of the process, or from how it ended if it wrote none."""
    for line in reversed(written.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            report = json.loads(line)
            if report["token"] == token:
                return Verdict("failed" if report["error"] else "passed", report["error"])
    if is_late:
        return Verdict("timed out", f"it took more than {limits.wall_seconds:g} seconds")
    if returncode == -signal.SIGXCPU:
        return Verdict("timed out", f"it took more than {limits.cpu_seconds:g} seconds of the processor")
    if returncode < 0:
        return Verdict("failed", f"it was ended by {signal.Signals(-returncode).name}")
    return Verdict("failed", f"it ended with status {returncode} before its last statement")


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of a program, the same for every user and run."""
    variables = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
    variables |= {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    variables["MALLOC_ARENA_MAX"] = "1"  # glibc reserves address space for each thread otherwise
    libraries = os.environ.get("LD_LIBRARY_PATH")  # the interpreter may need it
    return variables if libraries is None else {**variables, "LD_LIBRARY_PATH": libraries}


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# The program's process. It reads its order, keeps standard output to itself for the report, sets its own limits, and
# runs the program as a module. The token in the report tells it from what the program writes.
_CHILD = r"""
import json, math, os, resource, sys, traceback, types

def main():
    order = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    limits, folder = order["limits"], order["folder"]
    leave_network()
    cpu = math.ceil(limits["cpu_seconds"])
    sizes = {"CPU": (cpu, cpu + 2), "CORE": (0, 0), "NPROC": (limits["processes"] + count_running(),) * 2}
    sizes |= {"FSIZE": (limits["file_mb"] << 20,) * 2, "AS": (limits["memory_mb"] << 20,) * 2}
    for name, (soft, hard) in sizes.items():
        kind = getattr(resource, "RLIMIT_" + name)
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise
    guard(folder)
    module = types.ModuleType("generated")
    sys.modules["generated"] = module
    error = ""
    try:
        exec(compile(order["program"], "generated.py", "exec"), module.__dict__)
    except SystemExit as stop:
        error = f"SystemExit: {stop.code}, before the last statement"
    except BaseException as problem:
        error = describe(problem)
    os.write(report, (json.dumps({"token": order["token"], "error": error}) + "\n").encode())
    os._exit(0)

def describe(problem):
    try:
        lines = "".join(traceback.format_exception_only(problem)).strip().splitlines()
        return lines[-1][:500]
    except BaseException:
        return type(problem).__name__

def leave_network():
    if sys.platform != "linux":
        return
    import ctypes
    try:
        system = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        if system.unshare(0x10000000 | 0x40000000) == 0:  # CLONE_NEWUSER | CLONE_NEWNET
            maps = {"setgroups": "deny", "gid_map": f"{group} {group} 1", "uid_map": f"{user} {user} 1"}
            for name, text in maps.items():
                with open("/proc/self/" + name, "w") as file:
                    file.write(text)
    except (OSError, AttributeError):
        pass  # the kernel does not permit it; the guard below holds

def count_running():
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[2])  # processes and threads of the machine
    except OSError:
        return 0  # macOS, where threads do not count

def guard(folder):
    inside = folder + os.sep
    harmless = (os.devnull,)
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode
    one = ("remove", "rmdir", "mkdir", "truncate", "chmod", "chown", "utime", "setxattr", "removexattr")
    paths = {f"os.{name}": 1 for name in one} | {f"os.{name}": 2 for name in ("rename", "link", "symlink")}
    paths["shutil.rmtree"] = 1  # which removes relative to descriptors of folders
    refused = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
    refused += ("os.startfile", "pty.", "ctypes.", "resource.", "signal.pthread_kill", "syslog.", "sqlite3.")
    allowed = ("socket.gethostname",)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check(path):
        if isinstance(path, int):
            return
        full = realpath(fsdecode(fspath(path)))
        if not (full + os.sep).startswith(inside) and full not in harmless:
            raise PermissionError(f"the sandbox allows changes to files in the working folder only, not to {full}")

    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            if flags & writing and path is not None:
                check(path)
        elif event in paths:
            for path in args[:paths[event]]:
                check(path)
        elif event == "socket.__new__" and args[1] == 1:
            pass  # AF_UNIX, of which asyncio makes a pair; to connect or bind it is refused
        elif event.startswith(refused) and event not in allowed:
            raise PermissionError(f"the sandbox does not allow {event}")

    def refuse(*args, **options):
        raise PermissionError("the sandbox does not allow other processes, shared memory and special files")

    # Python reports no event of these: how multiprocessing starts a process, shared memory, files without `open`.
    import _posixshmem, _posixsubprocess
    _posixsubprocess.fork_exec = _posixshmem.shm_open = os.mkfifo = os.mknod = refuse
    sys.modules |= dict.fromkeys(("_gdbm", "_dbm"))  # which cannot be imported then: dbm has another way
    sys.addaudithook(hook)

main()
"""
