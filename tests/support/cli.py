"""Running LLaMA-Factory as a user does, and in this process where a new one would show nothing more."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from .limits import LIMIT
from .warm import QUIET, WarmProgram, free_port, run_warm

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


class _Absent:
    def __repr__(self):  # the same in every process, as it is part of tests' names
        return "ABSENT"


PROGRAMS = ("llamafactory-cli", "llamafactory-ddm")
ABSENT = _Absent()  # as an override: the key is taken out of the recipe


def run(*words, check=True, env=None, program="llamafactory-cli", timeout=LIMIT, fresh=False, input=None, **rest):
    """Run a program of this environment, or a .py file of the repository, from its root; returns the finished process.

    A console script or file runs in a process that has imported the libraries already, unless it is to be a `fresh`
    one, as where `env` holds what an import reads.
    """
    is_file = str(program).endswith(".py")
    path = ROOT / program if is_file else SCRIPTS / program
    words = [str(path) if path.exists() else program, *map(str, words)]
    cwd = rest.pop("cwd", ROOT)
    everything = {**os.environ, **QUIET, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    if (program in PROGRAMS or is_file) and not rest and not fresh:
        (done,) = run_warm([{"words": words, "cwd": str(cwd), "env": everything, "input": input}], timeout)
    else:
        done = subprocess.run(
            [sys.executable, *words] if is_file else words,
            cwd=cwd,
            env=everything,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **rest,
        )
    if check:
        verify(done)
    return done


def start(program, *words, cwd=ROOT, env=None, **files):
    """Start a program of this environment in a process that has imported the libraries already.

    Args:
        cwd: its folder, by default the repository's root.
        env: further variables; one that is None is taken away.
        files: the paths of its `stdin`, `stdout` and `stderr`; what is missing is /dev/null.
    """
    everything = {**os.environ, **QUIET, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    everything = {key: value for key, value in everything.items() if value is not None}
    return WarmProgram(SCRIPTS / program, *words, cwd=cwd, env=everything, **files)


def verify(done):
    """Raise AssertionError, with the ends of what it wrote, if a process failed."""
    if done.returncode != 0:
        texts = f"{done.stdout[-5000:]}\n{done.stderr[-10000:]}"
        raise AssertionError(f"{done.args} ended with {done.returncode}:\n{texts}")


def train_in_processes(count, *words, env=None, timeout=LIMIT):
    """Run `llamafactory-cli train` on `count` processes, started as torchrun starts them; returns them finished."""
    return in_processes(
        count, importlib.util.find_spec("llamafactory.launcher").origin, *words, env=env, timeout=timeout
    )


def in_processes(count, *words, env=None, timeout=LIMIT):
    """Run a program on `count` processes, started as torchrun starts them; returns them finished."""
    ranks = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    everything = {**os.environ, **QUIET, **ranks, **(env or {})}
    rest = {"words": [*map(str, words)], "cwd": str(ROOT)}
    jobs = [
        {**rest, "env": {key: str(value) for key, value in (everything | of_rank).items()}}
        for of_rank in ({"RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
    ]
    finished = run_warm(jobs, timeout)
    if any(done.returncode for done in finished):
        ends = (f"rank {n} ended with {done.returncode}:\n{done.stderr[-8000:]}" for n, done in enumerate(finished))
        raise AssertionError("\n".join(ends))
    return finished


def train_here(recipe, **overrides):
    """Run a YAML of examples/ in this process, as run_exp(dict) does, from the repository's root."""
    from llamafactory.train.tuner import run_exp

    config = OmegaConf.to_container(OmegaConf.load(ROOT / "examples" / recipe))
    config = {key: value for key, value in config.items() if overrides.get(key) is not ABSENT}
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        run_exp(
            {
                **config,
                "disable_tqdm": True,
                "use_cpu": True,
                **{k: str(v) if isinstance(v, Path) else v for k, v in overrides.items() if v is not ABSENT},
            }
        )
    finally:
        os.chdir(before)


def history(folder):
    """Return the training logs of a run, without the last summary."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


def evaluations(folder):
    """Return the evaluation logs of a run."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "eval_loss" in log]


def predictions(folder):
    """Return the generated texts of a run."""
    lines = (Path(folder) / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]
