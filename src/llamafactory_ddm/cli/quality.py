"""`llamafactory-ddm quality x.yaml`: the quality of generated texts, by model, strategy and number of steps."""

from __future__ import annotations

import sys
from pathlib import Path

from .yaml_command import read_yaml, usage_status

USAGE = """usage: llamafactory-ddm quality x.yaml [key=value ...]

Generate texts with one or several models and settings, and measure perplexity under a judge, diversity, entropy and
repetition. Writes quality.md, quality.png, quality.json and texts.jsonl. The keys are in docs/keys.md.
Example: examples/eval/tiny_gpt2_quality.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    status = usage_status(argv, USAGE)
    if status is not None:
        return status
    from ..generation.quality_keys import read_keys
    from ..generation.quality_report import table
    from ..generation.quality_run import compare, save

    try:
        keys, sampling = read_keys(read_yaml(argv))
        outcomes, record = compare(keys, sampling)
        save(outcomes, record, Path(str(keys.save_dir)))
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm quality: {error}", file=sys.stderr)
        return 1
    print(table(outcomes))
    print(f"saved: {keys.save_dir}/quality.md and quality.png")
    return 0
