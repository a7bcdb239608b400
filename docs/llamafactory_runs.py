"""`llamafactory-cli train`, run many times in forked processes: shared by the scripts of this folder."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# PyTorch comes first: its import activates the plugin.
_PRELOADED = [
    "torch",
    "llamafactory.train.tuner",
    "llamafactory.cli",
    "transformers.models.gpt2.modeling_gpt2",
    "datasets",
]
_LOCK = threading.Lock()
_CPU_SECONDS = "CPU seconds:"


def run_recipe(*words: str | Path) -> float:
    """Run `llamafactory-cli train` in the repository's root, in a process forked after all imports.

    Returns:
        Its CPU seconds (user and system), summed over its threads.

    Raises:
        SystemExit: if it fails, with the end of its output.
    """
    # A process that has found a GPU cannot be forked.
    context = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "forkserver")
    context.set_forkserver_preload(_PRELOADED)
    os.environ["HF_HUB_OFFLINE"] = "1"
    line = ["llamafactory-cli", "train", *map(str, words), "disable_tqdm=true", "overwrite_cache=true"]
    with tempfile.NamedTemporaryFile("r+", encoding="utf-8", errors="replace") as log:
        process = context.Process(target=_main, args=(line, log.name))
        with _LOCK:  # a start polls the processes of other threads, whose exit codes can be read once
            process.start()
        multiprocessing.connection.wait([process.sentinel])
        with _LOCK:
            process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{' '.join(line)} failed:\n{log.read()[-3000:]}")
        return float(log.read().rpartition(_CPU_SECONDS)[2])


def _main(words: list[str], log: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv[:] = words
    from llamafactory.cli import main

    main()
    print(_CPU_SECONDS, sum(os.times()[:2]), flush=True)
