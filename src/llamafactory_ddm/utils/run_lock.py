"""A lock that lets one run at a time use an output_dir, and is released when its process ends."""

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
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_TRIES = 100  # to create the folder and the file
# Descriptors of lock files. A forked child inherits them and would keep the lock after this process has ended.
_descriptors: set[int] = set()


@contextmanager
def run_lock(folder: str | Path, *, rank: int = 0, world: int = 1, key: str = "output_dir") -> Iterator[None]:
    """Lock `folder` for this run; the first process locks it for all, and all fail if it cannot.

    The lock file names the process that holds the lock. A file without a lock means nothing, as a killed run leaves
    one. If the file system does not support locks, the lock is held as long as that process exists; a process on
    another host is assumed to exist.

    Args:
        folder: created if absent, and removed at the end if it is still empty.
        rank: rank of this process.
        world: number of processes of the run.
        key: the key that names the folder, for messages.
    Raises:
        ValueError: if another run holds the lock, naming its process.
        OSError: if the file cannot be written.
    """
    lock: _Lock | None = None
    lock_error: Exception | None = None
    if rank == 0:
        try:
            with explain_disk_errors(folder, key=key):
                lock = _acquire(Path(folder), key)
        except (ValueError, OSError) as error:
            lock_error = error
    try:
        _raise_in_all(lock_error, world)
        yield
    finally:
        if lock is not None:
            lock.release()


def _raise_in_all(error: Exception | None, world: int) -> None:
    """Raise the first process's error in every process."""
    message = broadcast_from_first(None if error is None else str(error), world)
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)


@dataclass
class _Lock:
    path: Path
    descriptor: int
    created: list[Path]
    pid: int

    def release(self) -> None:
        """Remove the file, release the lock, and remove the folders that were created for it and are empty."""
        if os.getpid() != self.pid:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        _descriptors.discard(self.descriptor)
        os.close(self.descriptor)
        with contextlib.suppress(OSError):
            for folder in self.created:
                folder.rmdir()


def _acquire(folder: Path, key: str) -> _Lock:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / FILE_NAME
    n_tries = 0
    while True:
        try:
            n_tries += 1
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            if n_tries == _TRIES:
                raise
            continue  # another run has just ended and removed the empty folder
        try:
            if not _lock(descriptor):
                _check_holder(folder, _holder(descriptor), key)
            if _is_at(descriptor, path):
                _write_holder(descriptor)
                _descriptors.add(descriptor)
                return _Lock(path, descriptor, created, os.getpid())
        except BlockingIOError as error:
            in_use = ValueError(
                f"{key}: {folder} is in use by another run{_describe(_holder(descriptor))}; wait for it, stop it, or "
                f"choose another {key}"
            )
            os.close(descriptor)
            raise in_use from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the other run has removed the file in the meantime


def _lock(descriptor: int) -> bool:
    """Lock the file; return False if the file system does not support locks.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKS_UNSUPPORTED:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "process_start": psutil.Process().create_time(),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _holder(descriptor: int) -> dict[str, Any]:
    """Return the process named in the lock file, or an empty dict if it is not written yet."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys() else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def _check_holder(folder: Path, holder: dict[str, Any], key: str) -> None:
    """Check by the content of the lock file that no other run holds the lock.

    Raises:
        BlockingIOError: if the process exists on this host.
        ValueError: if the process is on another host.
    """
    if not holder:
        return
    if holder["host"] != socket.gethostname():
        raise ValueError(
            f"{key}: {folder} is in use by another run{_describe(holder)}, or that run was killed: on this file "
            f"system {socket.gethostname()} cannot tell which; if it has ended, remove {folder / FILE_NAME}"
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
