"""Diffusion language models for LLaMA-Factory. Importing this package has no side effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .generation.generator import TextGenerator
    from .generation.load import load
    from .sampling import LogitsConfig, SamplingSettings

__all__ = ["LogitsConfig", "SamplingSettings", "TextGenerator", "__version__", "load"]

_HOMES = {
    "LogitsConfig": "sampling",
    "SamplingSettings": "sampling",
    "TextGenerator": "generation.generator",
    "load": "generation.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
