"""A lock lets one run at a time use an output_dir."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from llamafactory_ddm.utils import run_lock as module
from llamafactory_ddm.utils.run_lock import FILE_NAME, run_lock

HELD = r"output_dir: .*out\b.*\b{pid} .*{host}.* 2\d\d\d-"


@pytest.fixture(params=["locks", "no locks"])
def folder(request, tmp_path, monkeypatch):
    """An output_dir, on a file system with locks and on one without."""
    if request.param == "no locks":

        def flock(descriptor, flags):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(module.fcntl, "flock", flock)
    return tmp_path / "a" / "out"


def held_by(pid):
    return HELD.format(pid=pid, host=socket.gethostname().replace(".", r"\."))


def test_a_second_run_is_refused_and_the_first_is_named(folder):
    with run_lock(folder):
        with pytest.raises(ValueError, match=held_by(os.getpid())), run_lock(folder):
            pass
        assert (folder / FILE_NAME).is_file()
        with run_lock(folder.with_name("other")):
            pass
    with run_lock(folder):
        pass


def test_the_key_of_the_folder_is_named(folder):
    with (
        run_lock(folder),
        pytest.raises(ValueError, match=r"^tokenized_path: .*another tokenized_path$"),
        run_lock(folder, key="tokenized_path"),
    ):
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file")
    with (
        pytest.raises(OSError, match=r"another tokenized_path.*the same command goes on"),
        run_lock(folder / "rows", key="tokenized_path"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    """In /proc, and where a file system was unmounted, making a folder is the error that it does not exist."""

    def mkdir(self, **keys):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    with pytest.raises(OSError, match=r"could not save to .*No such file"), run_lock(tmp_path / "out"):
        pass


def test_the_file_and_empty_folders_are_removed(folder):
    with run_lock(folder):
        pass
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), run_lock(folder):
        raise KeyboardInterrupt
    assert list(folder.parent.rglob("*")) == [folder]
    with run_lock(folder):
        (folder / "model.safetensors").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_a_killed_run_holds_nothing(folder):
    """Nor do its forked workers, which may outlive it."""
    locks = module.fcntl.flock.__module__ == "fcntl"
    hold = """
        import os, sys, time
        from llamafactory_ddm.utils import run_lock
        if sys.argv[2] == "False":
            run_lock._lock = lambda descriptor: False
        with run_lock.run_lock(sys.argv[1]):
            if os.fork():
                print("held", flush=True)
            time.sleep(600)
    """.replace("\n        ", "\n")
    command = [sys.executable, "-c", hold, str(folder), str(locks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=held_by(holder.pid)), run_lock(folder):
                pass
            holder.kill()
            holder.wait()
            assert (folder / FILE_NAME).is_file()
            with run_lock(folder):
                assert json.loads((folder / FILE_NAME).read_text())["pid"] == os.getpid()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)  # the worker
    assert not (folder / FILE_NAME).exists()


def test_a_holder_on_another_host_counts_without_locks(folder):
    folder.mkdir(parents=True)
    holder = {"host": "far", "pid": 7, "since": "2026-01-01 00:00:00+00:00", "process_start": 1.0}
    (folder / FILE_NAME).write_text(json.dumps(holder))
    if module.fcntl.flock.__module__ == "fcntl":
        with run_lock(folder):
            pass
        return
    pattern = r"output_dir.* 7 .*far.*2026-01-01.*\.lock"
    with pytest.raises(ValueError, match=pattern), run_lock(folder):
        pass
    assert json.loads((folder / FILE_NAME).read_text()) == holder


def test_a_file_without_a_living_holder_is_ignored(folder):
    folder.mkdir(parents=True)
    for text in ("", "{", "[1]", json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "since": "x"})):
        (folder / FILE_NAME).write_text(text)
        with run_lock(folder):
            pass


def test_one_of_several_concurrent_runs_gets_the_lock(tmp_path):
    """Also while the others remove the file."""
    inside, counts = [], []

    def run():
        for _ in range(30):
            try:
                with run_lock(tmp_path / "out"):
                    inside.append(1)
                    counts.append(len(inside))
                    inside.pop()
            except ValueError:
                pass

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counts) == {1}


def test_all_processes_of_a_run_fail_with_the_first(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values, src: sent.append(list(values)))
    with run_lock(tmp_path), pytest.raises(ValueError, match="output_dir"), run_lock(tmp_path, rank=0, world=2):
        pass
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list", lambda values, src: values.__setitem__(0, sent[0][0])
    )
    with pytest.raises(ValueError, match="output_dir"), run_lock(tmp_path, rank=1, world=2):
        pass
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values, src: None)
    with run_lock(tmp_path), run_lock(tmp_path, rank=1, world=2):  # the other process of the run that holds it
        pass
