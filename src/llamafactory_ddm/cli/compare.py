"""`llamafactory-ddm compare x.yaml`: compare several models on tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from .yaml_command import run_command

USAGE = """usage: llamafactory-ddm compare x.yaml [key=value ...]

Evaluate several models on the same tasks of lm-evaluation-harness, and write a table, their differences with errors
over documents, and for a sweep the accuracy against tokens per forward pass. The keys are in docs/keys.md.
Example: examples/eval/tiny_gpt2_compare.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command("compare", USAGE, argv, _compare)


def _compare(values: dict[str, Any]) -> None:
    from ..harness.compare import as_markdown, compare
    from ..harness.compare_keys import read_comparison

    comparison = read_comparison(values)
    record = compare(comparison)
    if record is not None:
        print(as_markdown(record))
        print(f"saved: {comparison.save_dir}")
