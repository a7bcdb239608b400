"""What the commands that take a YAML have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_command(command: str, usage: str, argv: list[str], body: Callable[[dict[str, Any]], None]) -> int:
    """Run a command on the keys of its YAML and return the exit status; errors of the user become one line.

    Args:
        command: its name.
        usage: its help.
        argv: its arguments.
        body: what it does with the keys.
    """
    status = usage_status(argv, usage)
    if status is not None:
        return status
    try:
        body(read_yaml(argv))
    except ModuleNotFoundError as error:
        return report_missing_harness(command, error)
    except (ValueError, TypeError, OSError) as error:
        print(f"llamafactory-ddm {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = "interrupted; what is finished is kept, and the same command goes on"
        print(f"llamafactory-ddm {command}: {text}", file=sys.stderr)
        return 130
    return 0


def usage_status(argv: list[str], usage: str) -> int | None:
    """Print the usage and return the exit status if it was asked for, or if no YAML is given; else return None."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    if not argv or not argv[0].endswith((".yaml", ".yml", ".json")):
        print(usage, end="", file=sys.stderr)
        return 2
    return None


def report_missing_harness(command: str, error: ModuleNotFoundError) -> int:
    """Print how to install lm-eval and return the exit status.

    Raises:
        ModuleNotFoundError: the error itself, if another module is missing.
    """
    if error.name != "lm_eval":
        raise error
    text = 'lm-eval is not installed: pip install "llamafactory-ddm[eval]"'
    print(f"llamafactory-ddm {command}: {text}", file=sys.stderr)
    return 1


def read_yaml(argv: list[str]) -> dict[str, Any]:
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
    except (YAMLError, OmegaConfBaseException, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{argv[0]} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{argv[0]} holds no keys; write one `key: value` a line")
    return values
