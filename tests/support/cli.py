"""Running LLaMA-Factory as a user does, and in this process where a new one would show nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


class _Absent:
    def __repr__(self):  # the same in every process, as it is part of tests' names
        return "ABSENT"


ABSENT = _Absent()  # as an override: the key is taken out of the recipe
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
}


def run(*words, check=True, env=None, program="llamafactory-cli", timeout=400, **rest):
    """Run a program of this environment from the repository's root; returns the finished process with its text."""
    path = [str(SCRIPTS / program)] if (SCRIPTS / program).exists() else [program]
    done = subprocess.run(
        [*path, *map(str, words)],
        cwd=rest.pop("cwd", ROOT),
        env={**os.environ, **QUIET, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **rest,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{words} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


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
