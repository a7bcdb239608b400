"""`llamafactory-ddm eval x.yaml`: evaluate a diffusion model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .yaml_command import usage_status

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
        if error.name != "lm_eval":
            raise
        print('llamafactory-ddm eval: lm-eval is not installed: pip install "llamafactory-ddm[eval]"', file=sys.stderr)
        return 1
    try:
        keys, sampling = read_keys(_read(argv))
        results = evaluate(keys, sampling)
        if results is not None:
            if keys.save_dir is not None:
                save(results, Path(keys.save_dir))
            print(table(results))
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm eval: {error}", file=sys.stderr)
        return 1
    return 0


def _read(argv: list[str]) -> dict[str, Any]:
    """Return the keys of the YAML, with those of the command line in place of its own.

    Raises:
        ValueError: if it cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(argv[0]).is_file():
        raise ValueError(f"{argv[0]} does not exist; the path is relative to {Path.cwd()}")
    try:
        read: Any = OmegaConf.load(argv[0])
        values: Any = OmegaConf.to_container(OmegaConf.merge(read, OmegaConf.from_cli(argv[1:])), resolve=True)
    except (YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{argv[0]} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{argv[0]} holds no keys; write one `key: value` a line")
    return values
