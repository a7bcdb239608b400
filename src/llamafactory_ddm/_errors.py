"""How a command ends on a mistake of its user: one line, the traceback behind an environment variable.

Standard library only: the hook is set while `import torch` runs. It is `sys.excepthook`, which sees what nobody has
caught, and is set in LLaMA-Factory's commands and torchrun alone; whoever calls `run_exp` gets the exception.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

TRACEBACK = "LLAMAFACTORY_DDM_TRACEBACK"
_COMMANDS = ("llamafactory-cli", "lmf", "llamafactory-ddm", "torchrun")
_MODULES = ("cli", "launcher", "_launcher")  # of python -m llamafactory.cli, and what torchrun's children run
# Where an error is about what the user wrote: below them, in torch say, a ValueError is a fault of the program.
_ABOUT_INPUT = (
    *("llamafactory_ddm", "llamafactory", "transformers", "datasets", "peft", "accelerate", "huggingface_hub"),
    *("omegaconf", "yaml", "argparse", "json", "pathlib"),
)
_OF_LAUNCHER = ("ChildFailedError", "SignalException")  # torchrun's, of what its children have said already
_PATIENCE = 10.0  # seconds in which the launcher ends the other processes once one has failed

Hook = Callable[[type[BaseException], BaseException, "TracebackType | None"], None]
_before: Hook | None = None
_how_to_go_on: Callable[[], str] | None = None


def install() -> None:
    """Have this process, if it is one of the commands, end in one line; doing so again changes nothing."""
    global _before
    if _before is None and _is_command(sys.argv):
        _before, sys.excepthook = sys.excepthook, _end


def uninstall() -> None:
    """Put back what handled uncaught exceptions before."""
    global _before
    if _before is not None:
        sys.excepthook, _before = _before, None


def when_interrupted(say: Callable[[], str] | None) -> None:
    """Set what a run that is interrupted from the keyboard says about going on."""
    global _how_to_go_on
    _how_to_go_on = say


def message(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> str | None:
    """Return the one line for an exception that nobody caught, or None where the traceback is to be shown."""
    if os.environ.get(TRACEBACK, "").lower() in ("1", "true", "yes"):
        return None
    names = {one.__name__ for one in kind.__mro__}
    ours = _of_a_diffusion_run()
    if issubclass(kind, KeyboardInterrupt):
        return f"interrupted. {_how_to_go_on() if _how_to_go_on else ''}".rstrip() if ours else None
    if names & set(_OF_LAUNCHER) or "CalledProcessError" in names:
        return "the run ended with an error, which is said above" if ours else None
    about_input = issubclass(kind, (ValueError, OSError)) or names & {
        *("NotBidirectionalError", "YAMLError", "OmegaConfBaseException", "ImportError"),
    }
    package = _package(frames)
    if not about_input or not (package == "llamafactory_ddm" or (ours and _is_about_input(kind, package))):
        return None
    text = " ".join(str(error).split()) or kind.__name__
    return f"{text}  [{TRACEBACK}=1 shows where]"


def _end(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    try:
        line = message(kind, error, frames)
    except Exception:  # noqa: BLE001 - whatever goes wrong in explaining, the error itself is shown
        line = None
    if line is None:
        (_before or sys.__excepthook__)(kind, error, frames)
        return
    if os.environ.get("RANK", "0") != "0":
        # A mistake that all processes find is said by the first, and the launcher ends the others.
        time.sleep(_PATIENCE)
    if Path(sys.argv[0]).stem != "torchrun":
        sys.stderr.write(f"\n{line}\n" if issubclass(kind, KeyboardInterrupt) else f"\nerror: {line}\n")


def _is_command(argv: list[str]) -> bool:
    program = Path(argv[0]) if argv else Path()
    name = program.name if program.suffix not in (".exe", ".py") else program.stem
    return name in _COMMANDS or (name in _MODULES and program.parent.name in ("llamafactory", "llamafactory_ddm"))


def _of_a_diffusion_run() -> bool:
    from .integration.patches.wrappers import names_our_stage

    return _how_to_go_on is not None or names_our_stage(sys.argv[1:])


def _is_about_input(kind: type[BaseException], package: str) -> bool:
    return issubclass(kind, (OSError, ImportError)) or package in _ABOUT_INPUT


def _package(frames: TracebackType | None) -> str:
    """Return the top-level package of the innermost frame."""
    name = ""
    while frames is not None:
        name = str(frames.tb_frame.f_globals.get("__name__", ""))
        frames = frames.tb_next
    return name.partition(".")[0]
