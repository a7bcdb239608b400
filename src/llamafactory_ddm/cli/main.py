"""`llamafactory-ddm`: its own commands, and LLaMA-Factory's commands where PyTorch's autoload is off."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .._autoload import disabled
from .._version import __version__
from ..utils.registry import did_you_mean

_FORWARDED = ("train", "chat", "api", "export", "webchat", "webui", "env", "version")
_COMMANDS = ("doctor", "generate", "convert", "fit-length", *_FORWARDED)
# A console script has no current folder on its path, as -c has.
_PROBE = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
import llamafactory.hparams.parser
patches = sys.modules.get("llamafactory_ddm.integration.patches.table")
print(json.dumps(patches.status() if patches else "PyTorch's autoload did not call it"))
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in _FORWARDED:
        return forward(words)
    if words and words[0] == "generate":
        from .generate import main as generate

        return generate(words[1:])
    if words and words[0] == "convert":
        from .convert import main as convert

        return convert(words[1:])
    if words and words[0] == "fit-length":
        from .fit_length import main as fit_length

        return fit_length(words[1:])
    parser = _parser()
    if words in ([], ["help"]):
        parser.print_help(sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if not words[0].startswith("-") and words[0] not in _COMMANDS:
        hint = did_you_mean(words[0], _COMMANDS)
        parser.error(f"unknown command {words[0]!r}{hint or ';'} there are {', '.join(_COMMANDS)}")
    parser.parse_args(words)
    return doctor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm",
        description="Diffusion language models for LLaMA-Factory.",
        epilog="generate --help says how to generate text with a model, convert --help how to read published ones, "
        "fit-length --help how to predict the length of texts. "
        f"{' | '.join(_FORWARDED)} work as with llamafactory-cli, also where TORCH_DEVICE_BACKEND_AUTOLOAD=0 "
        "keeps the plugin out of that.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        choices=_COMMANDS,
        help="doctor: is the plugin active, and why not; generate: text; convert: published checkpoints; fit-length: "
        "train length predictors",
    )
    return parser


def doctor() -> int:
    """Print versions and whether a fresh `llamafactory-cli` would have the plugin; 0 if so, else 1."""
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
    said = [line.partition("NOT ACTIVE: ")[2] for line in child.stderr.splitlines() if "NOT ACTIVE: " in line]
    print(f"NOT ACTIVE: {said[0] if said else state}")
    if said:
        return 1
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":
        print(
            f"TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} switches it off: unset it, or call llamafactory-ddm train, not "
            "llamafactory-cli"
        )
    elif disabled():
        print("LLAMAFACTORY_DDM_DISABLE switches it off: unset it")
    elif not any(e.name == "llamafactory_ddm" for e in metadata.entry_points(group="torch.backends")):
        print("its entry point is not installed: pip install llamafactory-ddm, or call llamafactory-ddm train")
    return 1


def forward(words: list[str]) -> int:
    """Activate the plugin and run LLaMA-Factory's command line with `words`."""
    from .._autoload import activate

    activate()
    import llamafactory.launcher
    from llamafactory.cli import main as upstream

    # Upstream starts torchrun on this file.
    llamafactory.launcher.__file__ = str(Path(__file__).parents[1] / "_launcher.py")
    sys.argv = ["llamafactory-cli", *words]
    upstream()
    return 0


if __name__ == "__main__":
    sys.exit(main())
