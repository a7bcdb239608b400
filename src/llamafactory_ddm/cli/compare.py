"""`llamafactory-ddm compare x.yaml`: compare several models on tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys

from .yaml_command import read_yaml, report_missing_harness, usage_status

USAGE = """usage: llamafactory-ddm compare x.yaml [key=value ...]

Evaluate several models on the same tasks of lm-evaluation-harness, and write a table, their differences with errors
over documents, and for a sweep the accuracy against tokens per forward pass. The keys are in docs/keys.md.
Example: examples/eval/compare_tiny.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    status = usage_status(argv, USAGE)
    if status is not None:
        return status
    try:
        from ..harness.compare import as_markdown, compare
        from ..harness.compare_keys import read_comparison
    except ModuleNotFoundError as error:
        return report_missing_harness("compare", error)
    try:
        comparison = read_comparison(read_yaml(argv))
        record = compare(comparison)
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm compare: {error}", file=sys.stderr)
        return 1
    if record is not None:
        print(as_markdown(record))
        print(f"saved: {comparison.save_dir}")
    return 0
