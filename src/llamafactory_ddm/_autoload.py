"""What PyTorch's entry-point autoload calls at the end of `import torch`; it must never break that import.

Nothing is imported here but the standard library: `activate` leaves one finder behind, which acts when
LLaMA-Factory's own modules load. Modules that are loaded already are patched at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import _errors

# Module of LLaMA-Factory -> function of ours, as module:name, that is called with it once it is loaded.
HOOKS = {
    "llamafactory.hparams.parser": "llamafactory_ddm.integration.patches.table:after_parser",
    "llamafactory.train.tuner": "llamafactory_ddm.integration.patches.table:after_tuner",
    "llamafactory.extras.env": "llamafactory_ddm.integration.patches.table:after_env",
    "llamafactory.v1.launcher": "llamafactory_ddm.integration.patches.table:after_v1_launcher",
}
DISABLE = "LLAMAFACTORY_DDM_DISABLE"
_said: set[str] = set()


def activate() -> None:
    """Watch for LLaMA-Factory's modules. Never raises; a failure is one line on stderr."""
    try:
        if disabled() or any(isinstance(f, _Finder) for f in sys.meta_path):
            return
        sys.meta_path.insert(0, _Finder())
        _errors.install()
        for name in HOOKS:
            module = sys.modules.get(name)
            if module is None:
                continue
            if getattr(getattr(module, "__spec__", None), "_initializing", False):
                # Its loader is at work already, so nothing would tell when it is done.
                not_active(f"{name} was imported before torch; import torch first")
            else:
                _call_hook(module)
    except Exception as error:
        not_active(error)


def disabled() -> bool:
    """Tell whether the user has switched the plugin off."""
    return os.environ.get(DISABLE, "").lower() in ("1", "true", "yes")


def not_active(reason: object) -> None:
    """Say in one line, once, why the plugin does nothing."""
    line = f"[llamafactory_ddm] NOT ACTIVE: {' '.join(str(reason).split()) or type(reason).__name__}"
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)


def _call_hook(module: ModuleType) -> None:
    try:
        path, _, name = HOOKS[module.__name__].partition(":")
        getattr(importlib.import_module(path), name)(module)
    except Exception as error:
        not_active(error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules by the other finders, and has its loader report when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path:
            find: Any = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The real loader, and then the hook."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        _call_hook(module)
