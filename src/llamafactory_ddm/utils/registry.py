"""Registries: the named choices of a YAML key, to which plugins can add."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from .plugins import load_installed_plugins

T = TypeVar("T")
E = TypeVar("E")


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """Return "; did you mean '...'?" with the known word closest to `word`, or an empty text if none is close."""
    spelling = {str(known_word).lower(): str(known_word) for known_word in known}
    closest = difflib.get_close_matches(str(word).lower(), spelling, n=1)
    return f"; did you mean {spelling[closest[0]]!r}?" if closest else ""


def unknown_choice(key: str, value: object, choices: Iterable[object]) -> str:
    """Return the error message for a value that is not among a key's choices."""
    names = [str(choice) for choice in choices]
    return f"{key} must be one of {', '.join(names)}, got {value!r}{did_you_mean(value, names)}"


class Registry(Generic[T]):
    """Entries by name, in the order of registration.

    Installed plugins are imported when a name is looked up that is not registered yet.

    Args:
        key: the YAML key whose value is one of the names.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, entry: E, *, name: str | None = None) -> E:
        """Add an entry and return it, so that this can decorate a class.

        Args:
            entry: a class or another callable.
            name: name of the entry; by default `entry.name`.
        Raises:
            ValueError: if the name is taken.
        """
        named_entry: Any = entry
        name = named_entry.name if name is None else name
        if name in self._entries:
            raise ValueError(
                f"{self.key} {name!r} is registered already, as {self._entries[name]!r}; choose another name"
            )
        self._entries[name] = named_entry
        return entry

    def get(self, name: object) -> T:
        """Return the entry called `name`.

        Raises:
            ValueError: if there is no such entry, listing the names; or if an installed plugin cannot be imported.
        """
        if name not in self:
            raise ValueError(self.unknown(name))
        return self._entries[str(name)]

    def unknown(self, name: object) -> str:
        """Return the error message for a name that is not registered."""
        return (
            f"{unknown_choice(self.key, name, self)}; to add a name, list the module that registers it under plugins"
        )

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
