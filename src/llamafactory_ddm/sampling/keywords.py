"""Sampling settings from keyword arguments, under their own names and those of the YAML keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..utils.registry import did_you_mean
from .logits import LogitsConfig
from .settings import SamplingSettings

# Names of YAML keys -> those of the settings.
ALIASES = {"logits_temp": "temperature", "topp_temp": "top_p", "suppress_tokens": "suppress"}
_OF_COMMAND = {"steps": "diffusion_steps", "strategy": "denoising_strategy"}  # as the command line has them


def with_keywords(settings: SamplingSettings, keywords: Mapping[str, Any]) -> SamplingSettings:
    """Return the settings with what keyword arguments change.

    Args:
        settings: what stays where no keyword says otherwise.
        keywords: attributes of SamplingSettings and LogitsConfig, or YAML keys.
    Raises:
        TypeError: for one that does not exist, with the nearest name, or one that is given under two names.
        ValueError: if a value is out of range.
    """
    own = {f.name for f in fields(SamplingSettings)} - {"logits"}
    of_logits = {f.name for f in fields(LogitsConfig)}
    names: dict[str, str] = {}
    for key in keywords:
        name = ALIASES.get(key, key)
        if name not in own | of_logits:
            raise TypeError(_unknown(key, own | of_logits | ALIASES.keys()))
        if name in names:
            raise TypeError(f"{names[name]} and {key} mean the same; give one of them")
        names[name] = key
    given = {name: keywords[key] for name, key in names.items()}
    changes = {name: value for name, value in given.items() if name in own}
    logits = {name: value for name, value in given.items() if name in of_logits}
    return replace(settings, logits=replace(settings.logits, **logits), **changes)


def _unknown(key: str, known: set[str]) -> str:
    hint = did_you_mean(_OF_COMMAND.get(key, key), known) or f"; there are {', '.join(sorted(known))}"
    return f"{key!r} is no setting of generation{hint}"
