"""Activation of the plugin by PyTorch's entry points at the end of `import torch`; it must never break that import.

Only the standard library is imported here. `activate` installs an import finder, which runs a hook after each of the
modules in `HOOKS` is loaded; modules that are loaded already are patched at once.
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

# Module of LLaMA-Factory or lm-evaluation-harness -> the function, as module:name, that is called with it after it is
# loaded.
HOOKS = {
    "llamafactory.hparams.parser": "llamafactory_ddm.integration.patches.table:after_parser",
    "llamafactory.train.tuner": "llamafactory_ddm.integration.patches.table:after_tuner",
    "llamafactory.api.app": "llamafactory_ddm.integration.patches.table:after_api",
    "llamafactory.chat.hf_engine": "llamafactory_ddm.integration.patches.table:after_engine",
    "llamafactory.chat.chat_model": "llamafactory_ddm.integration.patches.table:after_chat_model",
    "llamafactory.extras.env": "llamafactory_ddm.integration.patches.table:after_env",
    "llamafactory.webui.interface": "llamafactory_ddm.integration.patches.table:after_web_pages",
    "llamafactory.v1.launcher": "llamafactory_ddm.integration.patches.table:after_v1_launcher",
    "lm_eval.models": "llamafactory_ddm.harness.register:register_model",
}
DISABLE = "LLAMAFACTORY_DDM_DISABLE"
_printed: set[str] = set()


def activate() -> None:
    """Install the import finder. Never raises; a failure is one line on stderr."""
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
                # It is being loaded without the finder, so no hook would run after it. torchrun's processes load the
                # tuner first; it loads the parser, whose hook patches it before it trains.
                if name != "llamafactory.train.tuner" or "TORCHELASTIC_RUN_ID" not in os.environ:
                    not_active(f"{name} was imported before torch; import torch first")
            else:
                _call_hook(module)
    except Exception as error:
        not_active(error)


def disabled() -> bool:
    """Tell whether the user has disabled the plugin."""
    return os.environ.get(DISABLE, "").lower() in ("1", "true", "yes")


def not_active(reason: object) -> None:
    """Print once, in one line, why the plugin is not active."""
    line = f"[llamafactory_ddm] NOT ACTIVE: {' '.join(str(reason).split()) or type(reason).__name__}"
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr)


def _call_hook(module: ModuleType) -> None:
    try:
        path, _, name = HOOKS[module.__name__].partition(":")
        getattr(importlib.import_module(path), name)(module)
    except Exception as error:
        not_active(error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules in `HOOKS` through the other finders, and wraps their loaders in `_Loader`."""

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
    """Loads a module with its real loader, then calls its hook."""

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
