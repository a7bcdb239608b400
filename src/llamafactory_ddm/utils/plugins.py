"""Imports of plugins: the modules and files that a run names, and installed packages with an entry point."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

GROUP = "llamafactory_ddm.plugins"
_installed: set[str] = set()


def load_plugins(plugins: object) -> tuple[str, ...]:
    """Import modules, each once in a process, and return their names.

    Args:
        plugins: names of modules or paths of .py files: a list, or one text with commas; None imports nothing.
    Raises:
        ValueError: if a module does not exist or its import fails, naming it.
    """
    names = _names(plugins)
    for name in names:
        _load(f"plugins: {name}", partial(_run_file if name.endswith(".py") else _import, name))
    return names


def _names(plugins: object) -> tuple[str, ...]:
    names = plugins.split(",") if isinstance(plugins, str) else () if plugins is None else plugins
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"plugins must be a list of modules or of paths of .py files, got {plugins!r}")
    return tuple(name.strip() for name in names if name.strip())


def load_installed_plugins() -> None:
    """Import the entry points of installed packages in the group `llamafactory_ddm.plugins`, once.

    Raises:
        ValueError: if the import of an entry point fails, naming it.
    """
    for point in metadata.entry_points(group=GROUP):
        if point.value not in _installed:
            _installed.add(point.value)  # before the import, which may look up a registry itself
            try:
                _load(f"the installed plugin {point.name} ({point.value})", point.load)
            except ValueError:
                _installed.discard(point.value)
                raise


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ValueError(
            f"plugins: {name} is not a module that can be imported; install it, or give the path of its file, such as "
            f"./{name.rpartition('.')[2]}.py"
        ) from error


def _run_file(name: str) -> None:
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"plugins: {name} is not a file; check the path (it is relative to {Path.cwd()})")
    module_name = f"{GROUP}:{path}"
    if module_name in sys.modules:
        return
    spec: Any = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _load(subject: str, load: Callable[[], object]) -> None:
    """Import a plugin, and turn its errors into a ValueError of one line with file and line number."""
    try:
        load()
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(subject):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{subject} cannot be imported: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
