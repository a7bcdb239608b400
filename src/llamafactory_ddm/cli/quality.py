"""`llamafactory-ddm quality x.yaml`: the quality of generated texts, by model, strategy and number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .yaml_command import run_command

USAGE = """usage: llamafactory-ddm quality x.yaml [key=value ...]

Generate texts with one or several models and settings, and measure perplexity under a judge, diversity, entropy and
repetition. Writes quality.md, quality.png, quality.json and texts.jsonl. The keys are in docs/keys.md.
Example: examples/eval/tiny_gpt2_quality.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command("quality", USAGE, argv, _measure)


def _measure(values: dict[str, Any]) -> None:
    from ..generation.quality_keys import read_keys
    from ..generation.quality_report import table
    from ..generation.quality_run import compare, save

    keys, sampling = read_keys(values)
    outcomes, record = compare(keys, sampling)
    save(outcomes, record, Path(str(keys.save_dir)))
    print(table(outcomes))
    print(f"saved: {keys.save_dir}/quality.md and quality.png")
