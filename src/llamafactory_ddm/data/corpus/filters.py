"""Which documents are kept: by length, and by comparisons of columns with values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(\S+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")


@dataclass(frozen=True)
class Comparison:
    """A column, an operator and a value; as numbers if the value is one."""

    text: str
    column: str
    sign: str
    value: str | float

    def holds(self, found: Any) -> bool:
        """Tell whether a document's value passes; None never does.

        Raises:
            ValueError: if it cannot be compared.
        """
        if found is None:
            return False
        try:
            if isinstance(self.value, float):
                found = float(found)
            elif isinstance(found, bool):
                found = str(found).lower()
            elif not isinstance(found, str):
                raise TypeError
        except (TypeError, ValueError) as error:
            raise ValueError(f"filters: {self.text!r} cannot be compared with {found!r}") from error
        return bool(_OPERATORS[self.sign](found, self.value))


@dataclass(frozen=True)
class Filters:
    """Bounds on the number of characters, and comparisons.

    Attributes:
        min_length: smallest number of characters.
        max_length: largest number of characters; None for no bound.
        comparisons: what the columns of a document must fulfil.
    """

    min_length: int = 1
    max_length: int | None = None
    comparisons: tuple[Comparison, ...] = ()

    @classmethod
    def parse(cls, lines: Sequence[str], min_length: int, max_length: int | None, subject: str) -> Filters:
        """Return the filters of a YAML.

        Raises:
            ValueError: if a line is no comparison, naming `subject`.
        """
        found = []
        for line in lines:
            match = _COMPARISON.fullmatch(line)
            if match is None:
                raise ValueError(
                    f"{subject}: the filter {line!r} must be a column, one of {' '.join(_OPERATORS)}, and a value, "
                    "such as 'language == en'"
                )
            column, sign, word = match.groups()
            value: str | float = word.strip("'\"")
            if value == word:
                try:
                    value = float(word)
                except ValueError:
                    value = word
            found.append(Comparison(line, column, sign, value))
        return cls(min_length, max_length, tuple(found))

    @property
    def columns(self) -> list[str]:
        """Return the columns that the comparisons read."""
        return list(dict.fromkeys(comparison.column for comparison in self.comparisons))

    def reason_to_drop(self, text: str, row: Mapping[str, Any]) -> str | None:
        """Return the rule that a document breaks, or None if it is kept.

        Args:
            text: its text.
            row: its columns.
        """
        if len(text) < self.min_length:
            return "min_length"
        if self.max_length is not None and len(text) > self.max_length:
            return "max_length"
        for comparison in self.comparisons:
            if not comparison.holds(row.get(comparison.column)):
                return comparison.text
        return None
