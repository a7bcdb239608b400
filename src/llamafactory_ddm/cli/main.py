"""`llamafactory-ddm`: the plugin's own commands, and LLaMA-Factory's commands for when PyTorch's autoload is off."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .._autoload import disabled
from .._version import __version__
from ..utils.registry import did_you_mean

_MODULES = {
    "generate": ".generate",
    "convert": ".convert",
    "prepare-data": ".prepare_data",
    "fit-length": ".fit_length",
    "eval": ".eval",
    "compare": ".compare",
    "quality": ".quality",
    "plot-loss": ".plot_loss",
    "memory": ".memory",
}  # of commands
_FORWARDED = ("train", "chat", "api", "export", "webchat", "webui", "env", "version")
_COMMANDS = ("doctor", *_MODULES, *_FORWARDED)
# A console script does not have the current folder on its path; `python -c` does.
_PROBE = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
import llamafactory.hparams.parser
patches = sys.modules.get("llamafactory_ddm.integration.patches.table")
print(json.dumps(patches.status() if patches else "PyTorch's autoload did not call it"))
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else None
    if command in _FORWARDED:
        return forward(argv)
    if command in _MODULES:
        return int(importlib.import_module(_MODULES[command], __package__).main(argv[1:]))
    parser = _parser()
    if command is None or argv == ["help"]:
        parser.print_help(sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if not command.startswith("-") and command not in _COMMANDS:
        hint = did_you_mean(command, _COMMANDS)
        parser.error(f"unknown command {command!r}{hint or ';'} commands are {', '.join(_COMMANDS)}")
    parser.parse_args(argv)
    return doctor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm",
        description="Diffusion language models for LLaMA-Factory.",
        epilog=f"Options of a command: --help after it. {' | '.join(_FORWARDED)}: as llamafactory-cli, but with the "
        "plugin even if TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        choices=_COMMANDS,
        help="doctor: check whether the plugin is active; generate: generate texts; convert: convert published "
        "checkpoints; prepare-data: tokenise and pack a corpus; fit-length: fit length predictors; eval: evaluate on "
        "lm-evaluation-harness; compare: evaluate and compare several models; quality: measure generated texts; "
        "plot-loss: plot the losses of several runs; memory: estimate the memory of a training run on each GPU",
    )
    return parser


def doctor() -> int:
    """Print versions and whether a new `llamafactory-cli` process has the plugin; return 0 if so, else 1."""
    print(f"llamafactory-ddm {__version__}")
    for name in ("llamafactory", "transformers", "torch"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed: pip install {name}")
    child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    lines = child.stdout.strip().splitlines()
    if child.returncode != 0 or not lines:
        print(f"NOT ACTIVE: LLaMA-Factory cannot be imported:\n{child.stderr.strip()[-2000:]}")
        return 1
    state = json.loads(lines[-1])
    if state == "active":
        print("active: llamafactory-cli knows the diffusion stages")
        return 0
    reasons = [line.partition("NOT ACTIVE: ")[2] for line in child.stderr.splitlines() if "NOT ACTIVE: " in line]
    print(f"NOT ACTIVE: {reasons[0] if reasons else state}")
    if reasons:
        return 1
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":
        print(
            f"TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} turns it off: unset it, or call llamafactory-ddm train instead "
            "of llamafactory-cli train"
        )
    elif disabled():
        print("LLAMAFACTORY_DDM_DISABLE turns it off: unset it")
    elif not any(entry.name == "llamafactory_ddm" for entry in metadata.entry_points(group="torch.backends")):
        print("its entry point is not installed: pip install llamafactory-ddm, or call llamafactory-ddm train")
    return 1


def forward(argv: list[str]) -> int:
    """Activate the plugin and run LLaMA-Factory's command line with `argv`."""
    from .._autoload import activate

    activate()
    import llamafactory.launcher
    from llamafactory.cli import main as upstream

    # For several processes, upstream starts torchrun with this file.
    llamafactory.launcher.__file__ = str(Path(__file__).parents[1] / "_launcher.py")
    sys.argv = ["llamafactory-cli", *argv]
    upstream()
    return 0


if __name__ == "__main__":
    sys.exit(main())
