"""What the parts measure: a row for each figure, written as soon as it is there, and the table of all rows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["measured", "failed", "left out"]


@dataclass(frozen=True)
class Row:
    """A figure of a part, or why there is none.

    Attributes:
        part: name of the part.
        what: what was measured.
        value: a number or words; None if nothing was measured.
        unit: of the number.
        at_least: the claim, a lower bound; None for none.
        at_most: the claim, an upper bound; None for none.
        state: `failed` with an error in `note`, `left out` with the reason there.
        note: further words.
    """

    part: str
    what: str
    value: float | str | None = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    state: State = "measured"
    note: str = ""

    @property
    def held(self) -> bool | None:
        """Tell whether the claim holds; None if there is none, or nothing was measured."""
        if (self.at_least is None and self.at_most is None) or self.state != "measured":
            return None
        if not isinstance(self.value, int | float) or not math.isfinite(self.value):
            return False
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def is_good(self) -> bool:
        """Tell whether the row says neither of a failure nor of a claim that does not hold."""
        return self.state != "failed" and self.held is not False

    def to_json(self) -> dict[str, Any]:
        """Return the row with `held`; a number that is not finite becomes a word."""
        value = self.value
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        return {**asdict(self), "value": value, "held": self.held}


class Report:
    """Collects the rows of a part in a file, so that what was measured stays when the process is ended."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part

    def add(
        self,
        what: str,
        value: float | str,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        note: str = "",
    ) -> None:
        """Write a figure, with the claim that it is checked against."""
        self._write(Row(self._part, what, value, unit, at_least, at_most, note=note))

    def leave_out(self, what: str, reason: str) -> None:
        """Write that something was not measured, and why."""
        self._write(Row(self._part, what, state="left out", note=reason))

    def fail(self, what: str, error: BaseException) -> None:
        """Write that something failed."""
        self._write(Row(self._part, what, state="failed", note=last_line(f"{type(error).__name__}: {error}")))

    def _write(self, row: Row) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a `Report` wrote; a line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            continue
    return rows


def last_line(text: str, width: int = 300) -> str:
    """Return the last line of a text that is not blank, cut to `width` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:width] if lines else ""


def table(rows: list[Row]) -> str:
    """Return all rows as a Markdown table."""
    lines = ["| part | what | value | claimed | | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.value is None:
            value = ""
        elif isinstance(row.value, str):
            value = row.value
        else:
            value = f"{row.value:.4g} {row.unit}".strip()
        claims = [
            f"{sign} {bound:g}" for sign, bound in ((">=", row.at_least), ("<=", row.at_most)) if bound is not None
        ]
        verdict = {True: "held", False: "NOT HELD", None: ""}[row.held]
        if row.state != "measured":
            verdict = {"failed": "FAILED", "left out": "left out"}[row.state]
        cells = (row.part, row.what, value, ", ".join(claims), verdict, row.note)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
