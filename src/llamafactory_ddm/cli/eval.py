"""`llamafactory-ddm eval x.yaml`: evaluate a diffusion model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from pathlib import Path

from .yaml_command import read_yaml, report_missing_harness, usage_status

USAGE = """usage: llamafactory-ddm eval x.yaml [key=value ...]

Evaluate a diffusion model on tasks of lm-evaluation-harness and print a table. The keys are in docs/keys.md.
Example: examples/eval/tiny_gpt2_stories.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    status = usage_status(argv, USAGE)
    if status is not None:
        return status
    try:
        from ..harness.keys import read_keys
        from ..harness.run import evaluate, save, table
    except ModuleNotFoundError as error:
        return report_missing_harness("eval", error)
    try:
        keys, sampling = read_keys(read_yaml(argv))
        results = evaluate(keys, sampling)
        if results is not None:
            if keys.save_dir is not None:
                save(results, Path(keys.save_dir))
            print(table(results))
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm eval: {error}", file=sys.stderr)
        return 1
    return 0
