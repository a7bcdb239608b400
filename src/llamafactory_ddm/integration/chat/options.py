"""What one request asks for: the keywords of LLaMA-Factory's engines and of the API, checked and put over defaults."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...generation.generator import TextGenerator
from ...sampling import SamplingSettings
from ...sampling.keywords import ALIASES
from ...sampling.settings import KEYS
from ...utils.keys import boolean, integer, number
from ...utils.registry import did_you_mean

MAX_SAMPLES, MAX_STOPS = 128, 4
MAX_SEED = 2**32 - 1  # of a drawn seed: exact in every JSON reader
# Keywords of LLaMA-Factory's engines -> the name used here.
_NAMES = {"num_return_sequences": "n", "max_new_tokens": "max_tokens"}
# Keywords that have no effect on a diffusion model -> the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1, 1.0),
    "num_beams": (1,),
    "skip_special_tokens": (True,),
    "max_length": (),
}
_OWN = ("n", "max_tokens", "stop", "do_sample", "timeout", "shows_canvas")


@dataclass(frozen=True)
class Options:
    """One request without its prompt.

    Attributes:
        settings: how to sample, the seed included.
        chosen: keys of generation that the request sets, by their YAML names.
        n: number of samples.
        max_tokens: tokens to generate; None if the request does not say.
        stop: texts that end an answer.
        timeout: seconds until the request is ended; None for no limit.
        shows_canvas: whether the canvas of each step is wanted.
    """

    settings: SamplingSettings
    chosen: frozenset[str]
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    timeout: float | None
    shows_canvas: bool


def read_options(
    generator: TextGenerator, defaults: SamplingSettings, timeout: float | None, keywords: Mapping[str, Any]
) -> Options:
    """Return the options of a request.

    Args:
        generator: resolves tokens to suppress.
        defaults: settings where the request sets none. Without a `seed` in the request, one is drawn.
        timeout: the server's, in seconds; a request may only lower it.
        keywords: by name; None counts as not set.
    Raises:
        ValueError: naming the keyword, for an unknown one or a value that is not allowed.
    """
    values: dict[str, Any] = {}
    for name, value in keywords.items():
        if value is None:
            continue
        own_name = _NAMES.get(name, name)
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name}: {value} has no effect on a diffusion model; remove it")
            continue
        known = {*_OWN, *KEYS, *ALIASES, *_NAMES}
        if name not in known:
            raise ValueError(f"{name!r} is not a key of a request{did_you_mean(name, known)}")
        if own_name in values:
            raise ValueError(f"{name} and {own_name} are the same key; set one of them")
        values[own_name] = value
    own = {name: values.pop(name, None) for name in _OWN}
    values.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    if own["do_sample"] is not None and not boolean("do_sample", own["do_sample"]):
        values.pop("logits_temp", None)
        values["temperature"] = 0.0
    try:
        settings = generator.settings(defaults, **values)
    except TypeError as error:
        raise ValueError(str(error)) from error
    limit = None if own["timeout"] is None else number("timeout", own["timeout"], 1e-3, 1e9)
    return Options(
        settings,
        chosen=frozenset(ALIASES.get(name, name) for name in values),
        n=1 if own["n"] is None else integer("n", own["n"], 1, MAX_SAMPLES),
        max_tokens=None if own["max_tokens"] is None else integer("max_tokens", own["max_tokens"], 1, None),
        stop=_stops(own["stop"]),
        timeout=min((seconds for seconds in (limit, timeout) if seconds is not None), default=None),
        shows_canvas=bool(own["shows_canvas"]),
    )


def _stops(value: Any) -> tuple[str, ...]:
    texts: Any = () if value is None else [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list | tuple) and len(texts) <= MAX_STOPS
    if not is_list or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text or up to {MAX_STOPS} texts, none of them empty, got {value!r}")
    return tuple(dict.fromkeys(texts))
