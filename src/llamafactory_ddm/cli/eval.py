"""`llamafactory-ddm eval x.yaml`: evaluate a diffusion model on tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .yaml_command import run_command

USAGE = """usage: llamafactory-ddm eval x.yaml [key=value ...]

Evaluate a diffusion model on tasks of lm-evaluation-harness and print a table. The keys are in docs/keys.md.
Example: examples/eval/tiny_gpt2_stories.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command("eval", USAGE, argv, _evaluate)


def _evaluate(values: dict[str, Any]) -> None:
    from ..harness.keys import read_keys
    from ..harness.run import evaluate, save, table

    keys, sampling = read_keys(values)
    results = evaluate(keys, sampling)
    if results is not None:
        if keys.save_dir is not None:
            save(results, Path(keys.save_dir))
        print(table(results))
