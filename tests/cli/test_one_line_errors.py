"""How a command ends: one line for a mistake of the user and for Ctrl-C, a traceback for a bug."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafactory_ddm import _errors
from support.cli import QUIET, ROOT, SCRIPTS, run


@pytest.fixture
def diffusion_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/llamafactory-cli", "stage=ddm"])
    monkeypatch.delenv(_errors.TRACEBACK, raising=False)


def message_of(function):
    with pytest.raises(BaseException) as caught:
        function()
    return _errors.message(caught.type, caught.value, caught.tb)


def raise_in(package, error):
    code = compile("def fail(error):\n    raise error", package, "exec")
    names = {"__name__": f"{package}.module"}
    exec(code, names)
    return lambda: names["fail"](error)


@pytest.mark.parametrize("package", ["llamafactory_ddm", "llamafactory", "transformers", "omegaconf"])
def test_a_mistake_is_one_line(diffusion_command, package):
    message = message_of(raise_in(package, ValueError("key: 3 is\n    wrong; set 4")))
    assert message == "key: 3 is wrong; set 4  [LLAMAFACTORY_DDM_TRACEBACK=1 shows where]"


def test_missing_files_and_packages_are_mistakes_wherever_they_are_raised(diffusion_command):
    assert message_of(Path("/nowhere/at/all").read_text).startswith("[Errno 2] No such file")
    assert message_of(raise_in("importlib", ImportError("install x"))).startswith("install x")


@pytest.mark.parametrize(
    "package, error",
    [("torch", ValueError("a bug")), ("llamafactory_ddm", TypeError("a bug")), ("numpy", KeyError("a bug"))],
)
def test_a_bug_keeps_its_traceback(diffusion_command, package, error):
    assert message_of(raise_in(package, error)) is None


def test_an_interruption_that_a_library_turned_into_its_own_error(diffusion_command):
    """As where Ctrl-C arrives while weights are written."""

    def save():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise_in("torch", RuntimeError("unexpected pos"))()

    assert message_of(save).startswith("interrupted")


START = """
import atexit, sys
from llamafactory_ddm import _errors
sys.argv = ["/bin/llamafactory-cli", "stage=ddm"]
_errors.install()
"""
INTERRUPTIONS = {
    "as it is": "raise KeyboardInterrupt",
    "turned into an error of a library": """
try:
    raise KeyboardInterrupt
except KeyboardInterrupt:
    raise RuntimeError("unexpected pos")
""",
    # Python forgets then that the process is to end by SIGINT, and ends it with status 1.
    "and a string is evaluated at exit": """
atexit.register(lambda: exec("1"))
raise KeyboardInterrupt
""",
    # LLaMA-Factory's log has one from the first logged step to the end of training.
    "while a pool of threads is idle": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
pool.submit(int).result()
raise KeyboardInterrupt
""",
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_it_ends_the_process_by_sigint_after_the_exit_handlers(name):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    code = START + "atexit.register(print, 'exit handlers', end='')\n" + INTERRUPTIONS[name]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stderr.strip() == "interrupted."
    assert done.stdout == "exit handlers"


def test_a_variable_shows_the_traceback(diffusion_command, monkeypatch):
    monkeypatch.setenv(_errors.TRACEBACK, "1")
    assert message_of(raise_in("llamafactory_ddm", ValueError("x"))) is None


def test_errors_of_other_stages_are_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/llamafactory-cli", "stage=sft"])
    monkeypatch.setattr(_errors, "_resume_hint", None)
    assert message_of(raise_in("llamafactory", ValueError("x"))) is None
    assert message_of(raise_in("builtins", KeyboardInterrupt())) is None
    # An error that this package raises in another stage is a mistake, too.
    assert message_of(raise_in("llamafactory_ddm", ValueError("x"))).startswith("x")


@pytest.mark.parametrize(
    "program, is_hooked",
    [
        ("/v/bin/llamafactory-cli", True),
        ("/v/bin/lmf", True),
        ("/v/bin/llamafactory-ddm", True),
        ("/v/bin/torchrun", True),
        ("/v/site-packages/llamafactory/cli.py", True),
        ("/v/site-packages/llamafactory_ddm/_launcher.py", True),
        ("/home/me/my_script.py", False),
        ("/home/me/tool/cli.py", False),
        ("/v/bin/pytest", False),
        ("", False),
    ],
)
def test_the_hook_is_for_the_commands_only(program, is_hooked, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(_errors, "_original_hook", None)
    _errors.install()
    assert (sys.excepthook is not sys.__excepthook__) == is_hooked
    _errors.uninstall()
    assert sys.excepthook is sys.__excepthook__


MISTAKES = {
    "our key": (["examples/tiny_gpt2_full_ddm.yaml", "loss_weighting=elba"], "loss_weighting"),
    "no such model": (["examples/tiny_gpt2_full_ddm.yaml", "model_name_or_path=data/nothing"], "data/nothing"),
    "upstream's key": (["examples/tiny_gpt2_full_ddm.yaml", "template=nothing", "stage=ddm-sft"], "nothing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_no_traceback_on_a_mistake(name, tmp_path):
    argv, fragment = MISTAKES[name]
    done = run("train", *argv, f"output_dir={tmp_path / 'out'}", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert fragment in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("stage: ddm\nmodel_name_or_path: [data\ndo_train: true\n")
    done = run("train", path, check=False, fresh=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_an_interrupted_run_prints_how_to_resume(tmp_path):
    out = tmp_path / "out"
    argv = ["train", "examples/tiny_gpt2_full_ddm.yaml", f"output_dir={out}", "save_steps=1", "max_steps=1000"]
    argv += ["per_device_train_batch_size=1", "max_samples=50", "logging_steps=1"]
    process = subprocess.Popen(
        [SCRIPTS / "llamafactory-cli", *argv],
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 400
    while not (out / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGINT, error[-3000:]
    assert "Traceback" not in error
    assert re.search(f"resume_from_checkpoint=true .*{out}", error)
