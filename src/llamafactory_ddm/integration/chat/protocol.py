"""The fields of the API's requests: what OpenAI's clients send, and every key of generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...sampling.keywords import ALIASES
from ...sampling.settings import KEYS
from ...utils.keys import boolean
from ...utils.registry import did_you_mean
from .http import ApiError

# Our keys of generation by the names that a request may use: those of the YAML, and OpenAI's temperature and top_p.
SAMPLING_FIELDS = (*KEYS, *(alias for alias in ALIASES if alias in ("temperature", "top_p")))
_RENAMED = {"max_completion_tokens": "max_tokens"}
_COMMON = ("model", "stream", "stream_options", "stream_canvas", "n", "stop", "max_tokens", *_RENAMED, "do_sample")
FIELDS = {
    "chat": ("messages", "tools", "tool_choice", *_COMMON, *SAMPLING_FIELDS),
    "text": ("prompt", "suffix", *_COMMON, *SAMPLING_FIELDS),
}
# Fields about the client, which change no answer.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_NO_SCORES = "a diffusion model decodes tokens in no fixed order and gives no probability of each"
# Fields that are not supported: which values ask for nothing, and why others are refused.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "logprobs": (lambda value: value is False, _NO_SCORES),
    "top_logprobs": (lambda value: False, _NO_SCORES),
    "logit_bias": (lambda value: value == {}, "use suppress_tokens to exclude tokens"),
    "presence_penalty": (lambda value: _is_zero(value), "use repetition_penalty"),
    "frequency_penalty": (lambda value: _is_zero(value), "use repetition_penalty"),
    "response_format": (lambda value: value == {"type": "text"}, "answers are text"),
    "modalities": (lambda value: value == ["text"], "answers are text"),
    "audio": (lambda value: False, "answers are text"),
    "best_of": (lambda value: value == 1 and value is not True, _NO_SCORES),
    "echo": (lambda value: value is False, "the answer does not repeat the prompt"),
    "store": (lambda value: value is False, "nothing is stored"),
    "parallel_tool_calls": (lambda value: value is True, "the model decides how many tools it calls"),
    "functions": (lambda value: value == [], "use tools"),
    "function_call": (lambda value: value == "none", "use tools and tool_choice"),
    "service_tier": (lambda value: value in ("auto", "default"), "there is one tier"),
}


@dataclass(frozen=True)
class Body:
    """A request of a route, its fields known and of the right kind.

    Attributes:
        values: what the route reads itself: messages, tools, prompt, suffix.
        keywords: of `read_options`.
        model: the name that the client uses; None if it sends none.
        streams: whether the answer is streamed.
        includes_usage: whether a stream ends with a chunk of usage.
    """

    values: dict[str, Any]
    keywords: dict[str, Any]
    model: str | None
    streams: bool
    includes_usage: bool


def read_body(route: str, fields: Mapping[str, Any]) -> Body:
    """Return the body of a request to a route.

    Args:
        route: a name in `FIELDS`.
        fields: of the request; one that is null counts as not sent.
    Raises:
        ApiError: for an unknown field, one that is not supported, or a wrong value.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    _check_names(route, given)
    values = {name: given.pop(name) for name in FIELDS[route] if name in given and name in _of_route(route)}
    model = given.pop("model", None)
    if not isinstance(model, str | None):
        raise ApiError(400, f"model must be a name, got {model!r}", param="model")
    streams, shows_canvas = _flag(given, "stream"), _flag(given, "stream_canvas")
    options = given.pop("stream_options", None)
    if not streams and (options is not None or shows_canvas):
        name = "stream_canvas" if shows_canvas else "stream_options"
        raise ApiError(400, f"{name} needs stream: true; set it, or remove {name}", param=name)
    for name, own in _RENAMED.items():
        if name in given and own in given:
            raise ApiError(400, f"{name} and {own} are the same; send one of them", param=name)
        if name in given:
            given[own] = given.pop(name)
    keywords = {**given, "shows_canvas": shows_canvas}
    return Body(values, keywords, model, streams, _includes_usage(options))


def _of_route(route: str) -> tuple[str, ...]:
    return ("messages", "tools", "tool_choice") if route == "chat" else ("prompt", "suffix")


def _check_names(route: str, given: dict[str, Any]) -> None:
    """Refuse unknown and unsupported fields, and remove those without effect."""
    for name in list(given):
        if name in FIELDS[route]:
            continue
        if name not in _IGNORED and name not in _REFUSED:
            known = (*FIELDS[route], *_REFUSED, *_IGNORED)
            raise ApiError(400, f"unknown field {name!r}{did_you_mean(name, known)}", param=name, code="unknown_field")
        if name in _REFUSED:
            is_neutral, reason = _REFUSED[name]
            if not is_neutral(given[name]):
                message = f"{name}: {str(given[name])[:80]} is not supported: {reason}; remove it"
                raise ApiError(400, message, param=name, code="unsupported_field")
        del given[name]


def _flag(given: dict[str, Any], name: str) -> bool:
    try:
        return boolean(name, given.pop(name, False))
    except ValueError as error:
        raise ApiError(400, str(error), param=name) from error


def _includes_usage(options: Any) -> bool:
    if options is None:
        return False
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise ApiError(400, "stream_options must be an object with include_usage", param="stream_options")
    return _flag({"include_usage": options.get("include_usage", False)}, "include_usage")


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def refused(error: ValueError) -> ApiError:
    """Return the API's error for what the engine refuses, with the field that its message names first."""
    message = " ".join(str(error).split())
    named = re.match(r"'?([a-z_]+)'?(?=[ :])", message)
    names = {*FIELDS["chat"], *FIELDS["text"]}
    return ApiError(400, message, param=named[1] if named and named[1] in names else None)


# ---- the page that describes the API ----


def schema(route: str) -> dict[str, Any]:
    """Return the OpenAPI description of a route's body."""
    kinds = {"integer": "integer", "number": "number", "boolean": "boolean", "mapping": "object"}
    properties: dict[str, Any] = {name: {} for name in FIELDS[route]}
    for name in SAMPLING_FIELDS:
        spec = KEYS[ALIASES.get(name, name)]
        properties[name] = {"type": kinds.get(spec.kind, "string"), "description": spec.help}
        if spec.choices is not None:
            properties[name]["enum"] = list(spec.choices)
    needed = ["messages" if route == "chat" else "prompt"]
    content = {"type": "object", "required": needed, "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": content}}}}
