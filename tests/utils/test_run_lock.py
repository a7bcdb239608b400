"""One run at a time in one output_dir."""

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


def test_the_second_is_told_who_holds_it(folder):
    with run_lock(folder):
        with pytest.raises(ValueError, match=held_by(os.getpid())), run_lock(folder):
            pass
        assert (folder / FILE_NAME).is_file()
        with run_lock(folder.with_name("other")):
            pass
    with run_lock(folder):
        pass


def test_nothing_is_left(folder):
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
    """Nor do the workers that it forked, which may live on."""
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
    words = [sys.executable, "-c", hold, str(folder), str(locks)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
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


def test_another_host_is_believed_where_there_are_no_locks(folder):
    folder.mkdir(parents=True)
    there = {"host": "far", "pid": 7, "since": "2026-01-01 00:00:00+00:00", "process_start": 1.0}
    (folder / FILE_NAME).write_text(json.dumps(there))
    if module.fcntl.flock.__module__ == "fcntl":
        with run_lock(folder):
            pass
        return
    said = r"output_dir.* 7 .*far.*2026-01-01.*\.lock"
    with pytest.raises(ValueError, match=said), run_lock(folder):
        pass
    assert json.loads((folder / FILE_NAME).read_text()) == there


def test_a_file_that_names_nobody_is_not_in_the_way(folder):
    folder.mkdir(parents=True)
    for text in ("", "{", "[1]", json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "since": "x"})):
        (folder / FILE_NAME).write_text(text)
        with run_lock(folder):
            pass


def test_of_many_at_once_one_gets_it(tmp_path):
    """Also while others remove the file."""
    inside, most = [], []

    def run():
        for _ in range(30):
            try:
                with run_lock(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ValueError:
                pass

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_all_processes_of_a_run_fail_with_the_first(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda said, src: sent.append(list(said)))
    with run_lock(tmp_path), pytest.raises(ValueError, match="output_dir"), run_lock(tmp_path, rank=0, world=2):
        pass
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda said, src: said.__setitem__(0, sent[0][0]))
    with pytest.raises(ValueError, match="output_dir"), run_lock(tmp_path, rank=1, world=2):
        pass
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda said, src: None)
    with run_lock(tmp_path), run_lock(tmp_path, rank=1, world=2):  # the other process of the run that holds it
        pass
