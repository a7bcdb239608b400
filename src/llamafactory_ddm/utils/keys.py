"""Keys: the help text, type and bounds of a setting, stored in the metadata of its dataclass field."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .registry import Registry, unknown_choice

# token: a token or its id; tokens: several, separated by commas; path: a folder; modules: see `load_plugins`; names:
# separated by commas, or a list; texts: one, or a list; sources: checked by the dataclass.
Kind = Literal[
    "integer", "number", "boolean", "text", "token", "tokens", "path", "modules", "mapping", "names", "texts",
    "sources",
]  # fmt: skip
_KINDS: dict[type, Kind] = {bool: "boolean", int: "integer", float: "number", str: "text"}
_ALLOWED = {
    "boolean": "`true`, `false`",
    "text": "text",
    "token": "token or id",
    "tokens": "tokens or ids, separated by commas",
    "path": "folder",
    "modules": "list of modules or `.py` files",
    "mapping": "mapping",
    "names": "list of names",
    "texts": "text or list of texts",
    "sources": "text, list of texts or mapping",
}


@dataclass(frozen=True)
class Key:
    """A setting of a user.

    Attributes:
        default: default value; None if there is none, or if it depends on other settings (`help` says on which).
        help: what the key does.
        kind: type of its values.
        choices: the allowed values, if they are names.
        renamed: former names of choices, with their present names.
        low: lower bound of a number; None for no bound.
        high: upper bound of a number; None for no bound.
        above_low: whether `low` itself is not allowed.
        below_high: whether `high` itself is not allowed.
        needs: another key, and those of its values with which this key has an effect.
        name: name in YAML, if it differs from the field's.
        is_upstream: whether LLaMA-Factory has a YAML key of this name, which is used instead.
    """

    default: Any
    help: str
    kind: Kind
    choices: Collection[str] | None = None
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    below_high: bool = False
    needs: tuple[str, tuple[str, ...]] | None = None
    name: str | None = None
    is_upstream: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)

    def checked(self, name: str, value: object) -> Any:
        """Check a value and convert it to the type of the key; a string such as "0.5" is parsed.

        Args:
            name: name of the key in messages.
            value: the value; None is allowed only if the default is None.
        Raises:
            ValueError: if the value is not allowed, naming the key, the value and what is allowed.
        """
        if value is None:
            if self.default is not None:
                raise ValueError(f"{name} is empty; write a value, or remove the key (its default is {self.default})")
            return None
        if self.choices is not None:
            if value in self.choices:
                return value
            if new_name := self.renamed.get(str(value)):
                raise ValueError(f"{name}: {value} is now called {new_name}; set {name}: {new_name}")
            registry = self.choices if isinstance(self.choices, Registry) else None
            raise ValueError(registry.unknown(value) if registry else unknown_choice(name, value, self.choices))
        if self.kind == "integer":
            low, high = (None if bound is None else int(bound) for bound in (self.low, self.high))
            return integer(name, value, low, high)
        if self.kind == "number":
            return self._number(name, value)
        if self.kind == "boolean":
            return boolean(name, value)
        if self.kind == "mapping":
            return mapping(name, value)
        if self.kind == "names":
            return ",".join(part for text in texts(name, value) for part in map(str.strip, text.split(",")) if part)
        if self.kind == "texts":
            return texts(name, value)
        if self.kind in ("token", "tokens", "path"):
            _check_text(name, value, self.kind)
        return value

    def _number(self, name: str, value: object) -> float:
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        checked = number(name, value, low, high, interval=self.interval)
        if (self.above_low and checked == low) or (self.below_high and checked == high):
            raise ValueError(f"{name} must lie in {self.interval}, got {value!r}")
        return checked

    @property
    def interval(self) -> str:
        """The allowed numbers, such as "(0, 1]"."""
        low = "(-inf" if self.low is None else f"{'(' if self.above_low else '['}{self.low:g}"
        high = "inf)" if self.high is None else f"{self.high:g}{')' if self.below_high else ']'}"
        return f"{low}, {high}"

    @property
    def allowed(self) -> str:
        """The allowed values, in Markdown."""
        if self.choices is not None:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        if self.kind == "integer":
            if self.low is None:
                return "integer"
            return f"integer from {int(self.low)}" + ("" if self.high is None else f" to {int(self.high)}")
        return f"number in {self.interval}" if self.kind == "number" else _ALLOWED[self.kind]


def key(default: Any, help: str, *, kind: Kind | None = None, **attributes: Any) -> Any:
    """Return a dataclass field for a `Key` with these attributes; `kind` is by default that of the default's type."""
    if kind is None:
        kind = "text" if attributes.get("choices") else _KINDS[type(default)]
    return field(default=default, metadata={"key": Key(default, help, kind, **attributes)})


def keys_of(settings: Any) -> dict[str, Key]:
    """Return the keys of a dataclass, by the names of their fields."""
    return {item.name: item.metadata["key"] for item in fields(settings) if "key" in item.metadata}


def check_fields(settings: Any) -> None:
    """Check the keys of a dataclass instance, and convert its fields to the types of the keys.

    Raises:
        ValueError: if a value is not allowed, naming the field.
    """
    for name, spec in keys_of(settings).items():
        if spec.kind == "tokens":
            continue  # the field holds ids, which a tokenizer has made of the text
        object.__setattr__(settings, name, spec.checked(name, getattr(settings, name)))


def integer(name: str, value: object, low: int | None, high: int | None) -> int:
    """Return a whole number, parsed if `value` is a string; a bound of None is no bound.

    Raises:
        ValueError: if `value` is no whole number within the bounds, naming the key and its bounds.
    """
    try:
        parsed = int(value)  # type: ignore[call-overload]
        is_whole = not isinstance(value, bool) and (isinstance(value, int) or parsed == float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if (low is not None and parsed < low) or (high is not None and parsed > high):
        raise ValueError(
            f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value!r}"
        )
    return int(parsed)


def number(name: str, value: object, low: float, high: float, *, interval: str = "") -> float:
    """Return a finite number within the bounds, parsed if `value` is a string.

    Args:
        name: name of the key.
        value: the user's value.
        low: inclusive lower bound.
        high: inclusive upper bound.
        interval: the interval as the message shows it; by default closed at both ends.
    Raises:
        ValueError: if `value` is no finite number within the bounds, naming the key and its bounds.
    """
    try:
        parsed = float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        parsed = float("nan")
    if not (math.isfinite(parsed) and low <= parsed <= high):
        allowed = f"lie in {interval or f'[{low:g}, {high:g}]'}"
        if high == math.inf:
            allowed = "be a number" if low == -math.inf else f"be a number of at least {low:g}"
        raise ValueError(f"{name} must {allowed}, got {value!r}")
    return parsed


def boolean(name: str, value: object) -> bool:
    """Return a boolean, parsed if `value` is a string.

    Raises:
        ValueError: if `value` is neither true nor false, naming the key.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name} must be true or false, got {value!r}")


def mapping(name: str, value: object) -> dict[str, Any] | None:
    """Return a mapping with strings as keys, parsed if `value` is JSON text; None if it is empty.

    Raises:
        ValueError: if `value` is no such mapping, naming the key.
    """
    parsed = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
    if not (isinstance(parsed, Mapping) and all(isinstance(word, str) for word in parsed)):
        raise ValueError(f"{name} must be a mapping of names to values, such as {{window: 4}}, got {value!r}")
    return dict(parsed) or None


def texts(name: str, value: object) -> list[str]:
    """Return a list of texts; one text is a list of one, unless it is a JSON list, as on a command line.

    Raises:
        ValueError: if `value` is neither, or a text is empty, naming the key.
    """
    parsed = value
    if isinstance(value, str):
        parsed = [value]
        with contextlib.suppress(ValueError):
            parsed = loaded if isinstance(loaded := json.loads(value), list) else parsed
    if not (isinstance(parsed, list | tuple) and parsed and all(isinstance(text, str) and text for text in parsed)):
        raise ValueError(f"{name} must be a text or a list of texts, none of them empty, got {value!r}")
    return list(parsed)


def _check_text(name: str, value: object, kind: Kind) -> None:
    """Check the type of a key that takes text: YAML reads some text without quotes as another type.

    Raises:
        ValueError: if the type is wrong, naming the key and how to write the value.
    """
    is_path = kind == "path"
    if isinstance(value, str):
        if is_path and not value.strip():
            raise ValueError(f"{name} is empty; write the path of a folder, or remove the key")
        return
    if not is_path and isinstance(value, (bool, int)):
        return  # an id; a boolean is refused when the token is resolved
    if kind == "tokens" and isinstance(value, list):
        raise ValueError(f"{name}: {value!r} is a list; write tokens or ids as one text, separated by commas: '5,7'")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        text = value[0]
        quoted = f"'[{text}]' or '{text}'" if text.isprintable() else json.dumps(text)
        raise ValueError(
            f"{name}: {value!r} is a list, as YAML reads brackets as one; write {name}: {quoted}, with the quotes"
        )
    if not is_path and isinstance(value, float) and value.is_integer():
        raise ValueError(f"{name}: {value!r} is a decimal number; write the id as a whole number: {int(value)}")
    expected = "the path of a folder" if is_path else "a token in quotes, or an id"
    raise ValueError(f"{name}: {value!r} is of type {type(value).__name__}; write {expected}")
