"""Sampling settings from keyword arguments, named as the YAML keys or as the attributes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from ..utils.registry import did_you_mean
from .logits import LogitsConfig
from .settings import KEYS, SamplingSettings

_COMMAND_LINE_NAMES = {"steps": "diffusion_steps", "strategy": "denoising_strategy"}
_LOGITS_FIELDS = {f.name for f in fields(LogitsConfig)}
# Attributes whose YAML key has another name -> that name.
ALIASES = {"temperature": "logits_temp", "top_p": "topp_temp", "suppress": "suppress_tokens"}
_ATTRIBUTES = {name: attribute for attribute, name in ALIASES.items()}


def split_keys(values: Mapping[str, Any], own: Collection[str], command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a command, and those of generation that it takes too.

    Args:
        values: what the user set.
        own: names of the command's keys.
        command: its name, for the message.
    Raises:
        ValueError: for any other key, with the nearest one.
    """
    known = {*own, *KEYS, *ALIASES}
    for name in values:
        if name not in known:
            raise ValueError(f"{name} is not a key of {command}{did_you_mean(name, known)}")
    return (
        {name: value for name, value in values.items() if name in own},
        {name: value for name, value in values.items() if name not in own},
    )


def yaml_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the YAML keys of generation in place of other names; all other names are kept.

    Raises:
        ValueError: if a key is set under two names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        yaml_name = ALIASES.get(name, name)
        if yaml_name in found:
            raise ValueError(f"{name} sets {yaml_name}, which is set under its other name too; set one of them")
        found[yaml_name] = value
    return found


def with_keywords(settings: SamplingSettings, keywords: Mapping[str, Any]) -> SamplingSettings:
    """Return the settings with the values of keyword arguments in place of their own.

    Args:
        settings: values of the keys that no keyword sets.
        keywords: values by YAML key, or by attribute of SamplingSettings or LogitsConfig.
    Raises:
        TypeError: for an unknown key, with the nearest one, or for a key that is set under two names.
        ValueError: naming the key, if a value is not allowed, has no effect, or is incompatible with another one.
    """
    keyword_of: dict[str, str] = {}  # YAML key -> the keyword that sets it
    for keyword in keywords:
        name = ALIASES.get(keyword, keyword)
        if name not in KEYS:
            known = {*KEYS, *ALIASES}
            hint = (
                did_you_mean(_COMMAND_LINE_NAMES.get(keyword, keyword), known)
                or f"; allowed: {', '.join(sorted(known))}"
            )
            raise TypeError(f"{keyword!r} is not a key of generation{hint}")
        if name in keyword_of:
            raise TypeError(f"{keyword_of[name]} and {keyword} are the same key; set one of them")
        keyword_of[name] = keyword
    values = {
        _ATTRIBUTES.get(name, name): keywords[keyword]
        if name == "suppress_tokens"
        else KEYS[name].checked(keyword, keywords[keyword])
        for name, keyword in keyword_of.items()
    }
    logits = {name: value for name, value in values.items() if name in _LOGITS_FIELDS}
    rest = {name: value for name, value in values.items() if name not in _LOGITS_FIELDS}
    _check_needs(settings, keyword_of, values)
    return replace(settings, logits=replace(settings.logits, **logits), **rest)


def _check_needs(settings: SamplingSettings, keyword_of: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Check that each key that is set is read under the other values.

    Raises:
        ValueError: naming both keys.
    """
    for name, keyword in keyword_of.items():
        needs = KEYS[name].needs
        if needs is None:
            continue
        other_key, readers = needs
        chosen = values.get(other_key, getattr(settings, other_key))
        if chosen not in readers:
            raise ValueError(
                f"{keyword}: {values[name]} is read by {other_key}: {' and '.join(readers)} only, but {other_key} is "
                f"{chosen}; change one or remove {keyword}"
            )
