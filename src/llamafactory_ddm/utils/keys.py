"""Keys: what a setting does and which values it takes, kept with the field of the dataclass that holds it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .registry import Registry, unknown_choice

# token: a token or its id; tokens: several, separated by commas; path: of a folder; modules: see `plugins`.
Kind = Literal["integer", "number", "boolean", "text", "token", "tokens", "path", "modules", "mapping"]
_KINDS: dict[type, Kind] = {bool: "boolean", int: "integer", float: "number", str: "text"}
_ALLOWED = {
    "boolean": "`true`, `false`",
    "text": "text",
    "token": "token or id",
    "tokens": "tokens or ids, separated by commas",
    "path": "folder",
    "modules": "list of modules or `.py` files",
    "mapping": "mapping",
}


@dataclass(frozen=True)
class Key:
    """What a key takes.

    Attributes:
        default: None where it depends on something else, which `help` says, or is nothing.
        help: what it does.
        kind: of its values.
        choices: its values where they are words.
        renamed: former names of choices, with their names now.
        low: the least number, None for no bound.
        high: the greatest number, None for no bound.
        above_low: whether `low` itself is too little.
        below_high: whether `high` itself is too much.
        needs: another key, and the values of it with which this one is read.
        name: in YAML, where it differs from the field's.
        is_upstream: whether LLaMA-Factory has a YAML key of this name, which is used in its place.
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
        """Return a value in the type of the key, also of a text that spells it.

        Args:
            name: of the key, for messages.
            value: None is the default where that is None.
        Raises:
            ValueError: naming the key, the value, and what is allowed.
        """
        if value is None:
            if self.default is not None:
                raise ValueError(f"{name} is empty; write a value, or remove the key (its default is {self.default})")
            return None
        if self.choices is not None:
            if value in self.choices:
                return value
            if new := self.renamed.get(str(value)):
                raise ValueError(f"{name}: {value} is now called {new}; set {name}: {new}")
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
        if self.kind in ("token", "tokens", "path"):
            _check_text(name, value, self.kind)
        return value

    def _number(self, name: str, value: object) -> float:
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        found = number(name, value, low, high, within=self.interval)
        if (self.above_low and found == low) or (self.below_high and found == high):
            raise ValueError(f"{name} must lie in {self.interval}, got {value!r}")
        return found

    @property
    def interval(self) -> str:
        """The numbers allowed, such as "(0, 1]"."""
        low = "(-inf" if self.low is None else f"{'(' if self.above_low else '['}{self.low:g}"
        high = "inf)" if self.high is None else f"{self.high:g}{')' if self.below_high else ']'}"
        return f"{low}, {high}"

    @property
    def allowed(self) -> str:
        """What the key takes, in Markdown."""
        if self.choices is not None:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        if self.kind == "integer":
            if self.low is None:
                return "integer"
            return f"integer from {int(self.low)}" + ("" if self.high is None else f" to {int(self.high)}")
        return f"number in {self.interval}" if self.kind == "number" else _ALLOWED[self.kind]


def key(default: Any, help: str, *, kind: Kind | None = None, **rest: Any) -> Any:
    """Return the field of a dataclass for a key; see `Key`, whose kind is by default that of the default's type."""
    if kind is None:
        kind = "text" if rest.get("choices") else _KINDS[type(default)]
    return field(default=default, metadata={"key": Key(default, help, kind, **rest)})


def keys_of(holder: Any) -> dict[str, Key]:
    """Return the keys among the fields of a dataclass, by the names of the fields."""
    return {spec.name: spec.metadata["key"] for spec in fields(holder) if "key" in spec.metadata}


def check_fields(holder: Any) -> None:
    """Check the keys of a dataclass, and give its fields the values in the right types.

    Raises:
        ValueError: naming the field.
    """
    for name, one in keys_of(holder).items():
        if one.kind == "tokens":
            continue  # ids by now, which a tokenizer has made of the text
        object.__setattr__(holder, name, one.checked(name, getattr(holder, name)))


def integer(name: str, value: object, low: int | None, high: int | None) -> int:
    """Return a whole number, also of a string that spells one.

    Raises:
        ValueError: naming the key and its bounds, None being no bound.
    """
    try:
        found = int(value)  # type: ignore[call-overload]
        whole = not isinstance(value, bool) and (isinstance(value, int) or found == float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if (low is not None and found < low) or (high is not None and found > high):
        raise ValueError(
            f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value!r}"
        )
    return int(found)


def number(name: str, value: object, least: float, most: float, *, within: str = "") -> float:
    """Return a finite number between the bounds, also of a string that spells one.

    Args:
        name: of the key.
        value: what was given.
        least: inclusive.
        most: inclusive.
        within: how the message writes the interval; by default with both ends.
    Raises:
        ValueError: naming the key and the bounds.
    """
    try:
        found = float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not (math.isfinite(found) and least <= found <= most):
        allowed = f"lie in {within or f'[{least:g}, {most:g}]'}"
        if most == math.inf:
            allowed = "be a number" if least == -math.inf else f"be a number of at least {least:g}"
        raise ValueError(f"{name} must {allowed}, got {value!r}")
    return found


def boolean(name: str, value: object) -> bool:
    """Return true or false, also of a string that spells one.

    Raises:
        ValueError: naming the key.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name} must be true or false, got {value!r}")


def mapping(name: str, value: object) -> dict[str, Any] | None:
    """Return a mapping with words for keys, also of a text that spells one in JSON; None for an empty one.

    Raises:
        ValueError: naming the key.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = value
    if not (isinstance(found, Mapping) and all(isinstance(word, str) for word in found)):
        raise ValueError(f"{name} must be a mapping of names to values, such as {{window: 4}}, got {value!r}")
    return dict(found) or None


def _check_text(name: str, value: object, kind: Kind) -> None:
    """Check the type of a key that takes text; YAML makes others of what is not in quotes.

    Raises:
        ValueError: saying how to write it.
    """
    is_path = kind == "path"
    if isinstance(value, str):
        if is_path and not value.strip():
            raise ValueError(f"{name} is empty; write the path of a folder, or remove the key")
        return
    if not is_path and isinstance(value, (bool, int)):
        return  # an id; a truth value gets its own message when the token is looked for
    if kind == "tokens" and isinstance(value, list):
        raise ValueError(f"{name}: {value!r} is a list; write tokens or ids in one text, separated by commas: '5,7'")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        text = value[0]
        quoted = f"'[{text}]' or '{text}'" if text.isprintable() else json.dumps(text)
        raise ValueError(
            f"{name}: {value!r} is a list, as YAML reads brackets; write {name}: {quoted}, with the quotes"
        )
    if not is_path and isinstance(value, float) and value.is_integer():
        raise ValueError(
            f"{name}: {value!r} is a number with a fraction; write the id as a whole number: {int(value)}"
        )
    wanted = "the path of a folder" if is_path else "a token in quotes, or an id"
    raise ValueError(f"{name}: {value!r} is of type {type(value).__name__}; write {wanted}")
