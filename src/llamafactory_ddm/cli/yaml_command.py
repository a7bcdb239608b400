"""What the commands that take a YAML have in common."""

from __future__ import annotations

import sys


def usage_status(argv: list[str], usage: str) -> int | None:
    """Print the usage and return the exit status if it was asked for, or if no YAML is given; else return None."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    if not argv or not argv[0].endswith((".yaml", ".yml", ".json")):
        print(usage, end="", file=sys.stderr)
        return 2
    return None
