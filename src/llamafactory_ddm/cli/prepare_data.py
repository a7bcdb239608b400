"""`llamafactory-ddm prepare-data x.yaml`: tokenise and pack a corpus into blocks that training reads."""

from __future__ import annotations

import os
from typing import Any

from .yaml_command import run_command

USAGE = """usage: llamafactory-ddm prepare-data x.yaml [key=value ...]

Tokenise the documents of parquet and JSON-lines files and pack them into blocks of cutoff_len tokens, which stage: ddm
reads with tokenized_path. A run that was interrupted goes on where it stopped. The keys are in docs/keys.md.
Example: examples/prepare_data_tiny.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command("prepare-data", USAGE, argv, _prepare)


def _prepare(values: dict[str, Any]) -> None:
    from .._autoload import activate

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # no model is loaded
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    activate()
    from ..integration.prepare_data import as_table, prepare_data

    print(as_table(prepare_data(values)))
