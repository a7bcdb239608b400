"""`llamafactory-ddm eval x.yaml`: evaluate a diffusion model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

USAGE = """usage: llamafactory-ddm eval x.yaml [key=value ...]

Evaluate a diffusion model on tasks of lm-evaluation-harness and print a table. The keys are in docs/evaluation.md.
Example: examples/eval/lambada.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not argv or not argv[0].endswith((".yaml", ".yml", ".json")):
        print(USAGE, end="", file=sys.stderr)
        return 2
    try:
        from omegaconf import OmegaConf

        from ..harness.keys import read_keys
        from ..harness.run import evaluate, save, table
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print('llamafactory-ddm eval: lm-eval is not installed: pip install "llamafactory-ddm[eval]"', file=sys.stderr)
        return 1
    try:
        values: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(argv[0]), OmegaConf.from_cli(argv[1:])))
        keys, sampling = read_keys(values)
        results = evaluate(keys, sampling)
        if results is not None:
            if keys.save_dir is not None:
                save(results, Path(keys.save_dir))
            print(table(results))
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm eval: {error}", file=sys.stderr)
        return 1
    return 0
