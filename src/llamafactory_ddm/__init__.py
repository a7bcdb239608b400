"""Diffusion language models for LLaMA-Factory. Importing this package has no side effect."""

from ._version import __version__

__all__ = ["__version__"]
