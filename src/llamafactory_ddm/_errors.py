"""Errors of users' input on the command line: one line, with the traceback on request (an environment variable).

`sys.excepthook` is replaced, which handles uncaught exceptions, in LLaMA-Factory's commands and torchrun only; a
Python caller of `run_exp` gets the exception. Only the standard library is imported, as `import torch` runs this code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

TRACEBACK = "LLAMAFACTORY_DDM_TRACEBACK"
_COMMANDS = ("llamafactory-cli", "lmf", "llamafactory-ddm", "torchrun")
_MODULES = ("cli", "launcher", "_launcher")  # python -m llamafactory.cli, and the scripts that torchrun starts
# Packages whose ValueErrors concern the user's input; in others, such as torch, they are faults of the program.
_INPUT_PACKAGES = (
    *("llamafactory_ddm", "llamafactory", "transformers", "datasets", "peft", "accelerate", "huggingface_hub"),
    *("omegaconf", "yaml", "argparse", "json", "pathlib"),
)
_LAUNCHER_ERRORS = ("ChildFailedError", "SignalException")  # of torchrun, whose processes have reported the cause
_GRACE_SECONDS = 10.0  # within which the launcher ends the other processes after one has failed

Hook = Callable[[type[BaseException], BaseException, "TracebackType | None"], None]
_original_hook: Hook | None = None
_resume_hint: Callable[[], str] | None = None


def install() -> None:
    """Replace `sys.excepthook` if this process is one of the commands; a second call changes nothing."""
    global _original_hook
    if _original_hook is None and _is_command(sys.argv):
        _original_hook, sys.excepthook = sys.excepthook, _report


def uninstall() -> None:
    """Restore the original `sys.excepthook`."""
    global _original_hook
    if _original_hook is not None:
        sys.excepthook, _original_hook = _original_hook, None


def when_interrupted(resume_hint: Callable[[], str] | None) -> None:
    """Set the function that returns, for a run interrupted from the keyboard, how to resume it."""
    global _resume_hint
    _resume_hint = resume_hint


def message(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> str | None:
    """Return the line that reports an uncaught exception, or None if the traceback is to be shown."""
    if os.environ.get(TRACEBACK, "").lower() in ("1", "true", "yes"):
        return None
    names = {base.__name__ for base in kind.__mro__}
    is_diffusion_run = _is_diffusion_run()
    if _is_interruption(error):
        return f"interrupted. {_resume_hint() if _resume_hint else ''}".rstrip() if is_diffusion_run else None
    if names & set(_LAUNCHER_ERRORS) or "CalledProcessError" in names:
        return "the run ended with the error above" if is_diffusion_run else None
    about_input = issubclass(kind, (ValueError, OSError)) or names & {
        *("NotBidirectionalError", "YAMLError", "OmegaConfBaseException", "ImportError"),
    }
    package = _package(frames)
    if not about_input or not (package == "llamafactory_ddm" or (is_diffusion_run and _is_about_input(kind, package))):
        return None
    text = " ".join(str(error).split()) or kind.__name__
    return f"{text}  [{TRACEBACK}=1 shows where]"


def _report(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    try:
        line = message(kind, error, frames)
    except Exception:  # noqa: BLE001 - the error itself is shown, whatever fails in reporting it
        line = None
    if line is None:
        (_original_hook or sys.__excepthook__)(kind, error, frames)
        return
    if os.environ.get("RANK", "0") != "0":
        # The first process reports an error that all processes have, and the launcher ends the others.
        time.sleep(_GRACE_SECONDS)
    is_interruption = _is_interruption(error)
    if Path(sys.argv[0]).stem != "torchrun":
        sys.stderr.write(f"\n{line}\n" if is_interruption else f"\nerror: {line}\n")
    if is_interruption:
        _end_by_sigint()


def _end_by_sigint() -> None:
    """End the process as Ctrl-C does, so that a shell script stops with it.

    Python does so by itself only where KeyboardInterrupt is the exception itself, and not even there if a string is
    evaluated afterwards, as in defining a namedtuple at exit: the status is 1 then.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # wakes idle pools, such as that of LLaMA-Factory's log, too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _is_interruption(error: BaseException | None) -> bool:
    """Tell whether an exception is Ctrl-C, or was raised because of it, as a library's writer of files may do."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _is_command(argv: list[str]) -> bool:
    program = Path(argv[0]) if argv else Path()
    name = program.name if program.suffix not in (".exe", ".py") else program.stem
    return name in _COMMANDS or (name in _MODULES and program.parent.name in ("llamafactory", "llamafactory_ddm"))


def _is_diffusion_run() -> bool:
    from .integration.patches.wrappers import names_our_stage

    return _resume_hint is not None or names_our_stage(sys.argv[1:])


def _is_about_input(kind: type[BaseException], package: str) -> bool:
    return issubclass(kind, (OSError, ImportError)) or package in _INPUT_PACKAGES


def _package(frames: TracebackType | None) -> str:
    """Return the top-level package of the innermost frame."""
    name = ""
    while frames is not None:
        name = str(frames.tb_frame.f_globals.get("__name__", ""))
        frames = frames.tb_next
    return name.partition(".")[0]
