"""Running llamafactory-cli train many times: what the scripts of this folder share."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = ["llamafactory.train.tuner", "llamafactory.cli", "transformers.models.gpt2.modeling_gpt2", "datasets"]


def run_recipe(*words: str | Path) -> None:
    """Run `llamafactory-cli train` in the repository's root, in a process that is forked with all imports done.

    Raises:
        SystemExit: if it fails, with the end of what it said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    os.environ["HF_HUB_OFFLINE"] = "1"
    line = ["llamafactory-cli", "train", *map(str, words), "disable_tqdm=true", "overwrite_cache=true"]
    with tempfile.NamedTemporaryFile("r+", encoding="utf-8", errors="replace") as log:
        process = context.Process(target=_main, args=(line, log.name))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{' '.join(line)} failed:\n{log.read()[-3000:]}")


def _main(words: list[str], log: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv[:] = words
    from llamafactory.cli import main

    main()
    sys.stdout.flush()
