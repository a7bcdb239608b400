"""Registries: what a YAML key may name, where a package or a module of the user's own may add to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from .plugins import load_installed_plugins

T = TypeVar("T")
E = TypeVar("E")


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """Return "; did you mean '...'?" with the known word nearest to `word`, or an empty text if none is near."""
    spelling = {str(one).lower(): str(one) for one in known}
    near = difflib.get_close_matches(str(word).lower(), spelling, n=1)
    return f"; did you mean {spelling[near[0]]!r}?" if near else ""


def unknown_choice(key: str, value: object, choices: Iterable[object]) -> str:
    """Return the error message for a value that is none of a key's choices."""
    known = [str(choice) for choice in choices]
    return f"{key} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"


class Registry(Generic[T]):
    """The entries of one kind under their names, in the order of registration.

    Installed plugins are imported once a name is asked for that nothing has registered yet.

    Args:
        key: the YAML key whose value is one of the names.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, entry: E, *, name: str | None = None) -> E:
        """Add an entry and return it, so that this also decorates a class.

        Args:
            entry: a class or another callable.
            name: by default `entry.name`.
        Raises:
            ValueError: if the name is taken.
        """
        found: Any = entry
        name = found.name if name is None else name
        if name in self._entries:
            raise ValueError(
                f"{self.key} {name!r} is registered already, as {self._entries[name]!r}; choose another name"
            )
        self._entries[name] = found
        return entry

    def get(self, name: object) -> T:
        """Return the entry called `name`.

        Raises:
            ValueError: if there is none, with the names that there are and the nearest; or if an installed plugin
                cannot be imported.
        """
        if name not in self:
            raise ValueError(self.unknown(name))
        return self._entries[str(name)]

    def unknown(self, name: object) -> str:
        """Return the error message for a name that nothing has registered."""
        return f"{unknown_choice(self.key, name, self)}; for one of your own, name its module under plugins"

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            load_installed_plugins()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
