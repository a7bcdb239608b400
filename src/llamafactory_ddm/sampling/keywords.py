"""Sampling settings from keyword arguments, under the names of the YAML keys and those of the attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..utils.registry import did_you_mean
from .logits import LogitsConfig
from .settings import KEYS, SamplingSettings

_OF_COMMAND = {"steps": "diffusion_steps", "strategy": "denoising_strategy"}  # as the command line has them
_OF_LOGITS = {f.name for f in fields(LogitsConfig)}
# Names of the attributes that differ -> those of the YAML keys.
ALIASES = {"temperature": "logits_temp", "top_p": "topp_temp", "suppress": "suppress_tokens"}
_ATTRIBUTES = {name: attribute for attribute, name in ALIASES.items()}


def with_keywords(settings: SamplingSettings, keywords: Mapping[str, Any]) -> SamplingSettings:
    """Return the settings with what keyword arguments change.

    Args:
        settings: what stays where no keyword says otherwise.
        keywords: YAML keys, or attributes of SamplingSettings and LogitsConfig.
    Raises:
        TypeError: for one that does not exist, with the nearest name, or one that is given under two names.
        ValueError: naming the key, if a value is not allowed, has no effect, or does not go with another one.
    """
    given: dict[str, str] = {}  # names in YAML -> names given
    for word in keywords:
        name = ALIASES.get(word, word)
        if name not in KEYS:
            known = {*KEYS, *ALIASES}
            hint = did_you_mean(_OF_COMMAND.get(word, word), known) or f"; there are {', '.join(sorted(known))}"
            raise TypeError(f"{word!r} is no setting of generation{hint}")
        if name in given:
            raise TypeError(f"{given[name]} and {word} mean the same; give one of them")
        given[name] = word
    values = {
        _ATTRIBUTES.get(name, name): keywords[word]
        if name == "suppress_tokens"
        else KEYS[name].checked(word, keywords[word])
        for name, word in given.items()
    }
    logits = {name: value for name, value in values.items() if name in _OF_LOGITS}
    others = {name: value for name, value in values.items() if name not in _OF_LOGITS}
    _check_needs(settings, given, values)
    return replace(settings, logits=replace(settings.logits, **logits), **others)


def _check_needs(settings: SamplingSettings, given: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Check that a key that is given is read.

    Raises:
        ValueError: naming both keys.
    """
    for name, word in given.items():
        needs = KEYS[name].needs
        if needs is None:
            continue
        other, readers = needs
        chosen = values.get(other, getattr(settings, other))
        if chosen not in readers:
            raise ValueError(
                f"{word}: {values[name]} is read by {other}: {' and '.join(readers)} only, but {other} is {chosen}; "
                f"change one or remove {word}"
            )
