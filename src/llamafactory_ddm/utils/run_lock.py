"""One run at a time in one output_dir: a lock that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from .files import explain_disk_errors
from .processes import broadcast_from_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = ".diffusion_run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Descriptors of this process. The lock is of the open file, which a forked child has too, and may outlive us with.
_descriptors: set[int] = set()


@contextmanager
def run_lock(folder: str | Path, *, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Hold `folder` for this run; the first process does so for all, and all fail if it cannot.

    The file names its holder; that it is there says nothing, as a run that was killed leaves it. Where the file system
    has no locks, the holder's process is looked up, and a holder on another host is believed.

    Args:
        folder: made if absent, and removed at the end if it is still empty.
        rank: of this process.
        world: number of processes of the run.
    Raises:
        ValueError: if another run holds it, naming that run.
        OSError: if the file cannot be written.
    """
    lock: _Lock | None = None
    problem: Exception | None = None
    if rank == 0:
        try:
            with explain_disk_errors(folder):
                lock = _take(Path(folder))
        except (ValueError, OSError) as error:
            problem = error
    try:
        _fail_together(problem, world)
        yield
    finally:
        if lock is not None:
            lock.release()


def _fail_together(problem: Exception | None, world: int) -> None:
    message = broadcast_from_first(None if problem is None else str(problem), world)
    if problem is not None:
        raise problem
    if message is not None:
        raise ValueError(message)


@dataclass
class _Lock:
    path: Path
    descriptor: int
    made: list[Path]
    pid: int

    def release(self) -> None:
        """Remove the file, then let go of it, and leave no empty folder that was made for it."""
        if os.getpid() != self.pid:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        _descriptors.discard(self.descriptor)
        os.close(self.descriptor)
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def _take(folder: Path) -> _Lock:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / FILE_NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a run that is over has just removed the folder, which was empty
        try:
            if not _lock(descriptor):
                _check_holder(folder, _holder(descriptor))
            if _is_at(descriptor, path):
                _write_holder(descriptor)
                _descriptors.add(descriptor)
                return _Lock(path, descriptor, made, os.getpid())
        except BlockingIOError as error:
            held = ValueError(
                f"output_dir: {folder} is in use by another run{_said(_holder(descriptor))}; wait for it, stop it, or "
                "choose another output_dir"
            )
            os.close(descriptor)
            raise held from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file in between


def _lock(descriptor: int) -> bool:
    """Lock the file; False where the file system cannot.

    Raises:
        BlockingIOError: if somebody has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "process_start": psutil.Process().create_time(),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me).encode() + b"\n", 0)


def _holder(descriptor: int) -> dict[str, Any]:
    """Return what the file says of its holder, nothing if that has not written it yet."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        said = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return said if isinstance(said, dict) and {"host", "pid", "since"} <= said.keys() else {}


def _said(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def _check_holder(folder: Path, holder: dict[str, Any]) -> None:
    """Judge by the file alone.

    Raises:
        BlockingIOError: if the holder is a living process of this host.
        ValueError: if it is of another host.
    """
    if not holder:
        return
    if holder["host"] != socket.gethostname():
        raise ValueError(
            f"output_dir: {folder} is in use by another run{_said(holder)}, or that run was killed, which cannot be "
            f"told from {socket.gethostname()} on this file system; if it is over, remove {folder / FILE_NAME}"
        )
    with contextlib.suppress(psutil.Error, TypeError, ValueError):
        if psutil.Process(int(holder["pid"])).create_time() == holder.get("process_start"):
            raise BlockingIOError


def _forget_in_child() -> None:
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
