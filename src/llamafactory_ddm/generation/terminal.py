"""A denoising played in the terminal as it happens."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, TextIO

from .trace import BLANK

TAB = 4


class _Cell(NamedTuple):
    """What stands in one place of a terminal: a character with its accents, or a tab's spaces."""

    text: str
    columns: int
    style: str

    @property
    def breaks(self) -> bool:
        """Whether a row may end after it."""
        return not self.text.strip() or self.columns == 2 or self.style == _MASKED


# Styles are the parameters of the escape sequence that sets them.
_PLAIN, _FRESH, _MASKED = "", "1;32", "2"
_SHOW = "\x1b[?7h\x1b[?25h"  # wrap at the edge again, show the cursor
_HIDE = "\x1b[?25l\x1b[?7l"


def _printable(text: str) -> str:
    """Return `text` with nothing in it that moves a cursor, but for tabs and newlines."""
    shown = []
    for char in text.replace("\r\n", "\n"):
        category = unicodedata.category(char)
        if char in "\n\t\u200c\u200d" or "\U000e0020" <= char <= "\U000e007f":  # joiners and tags belong to emoji
            shown.append(char)
        elif category in ("Zl", "Zp"):
            shown.append("\n")
        elif char < " " or char == "\x7f":
            shown.append("\u2421" if char == "\x7f" else chr(0x2400 + ord(char)))
        elif category in ("Cc", "Cs"):
            shown.append("\ufffd")
        elif category != "Cf":
            shown.append(char)
    return "".join(shown)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _rows(pieces: Sequence[str | None], fresh: Sequence[bool], width: int) -> list[list[_Cell]]:
    """Return the text in rows of at most `width` columns, broken at spaces where there are any."""
    rows: list[list[_Cell]] = [[]]
    used = 0
    for piece, new in zip(pieces, fresh, strict=True):
        style = _MASKED if piece is None else _FRESH if new else _PLAIN
        for char in BLANK if piece is None else _printable(piece):
            row = rows[-1]
            if char == "\n":
                rows.append([])
                used = 0
                continue
            text = " " * min(TAB - used % TAB, width) if char == "\t" else char
            cell = _Cell(text, len(text) if char == "\t" else _columns(char), style)
            if cell.columns == 0 and row:
                row[-1] = row[-1]._replace(text=row[-1].text + char)
                continue
            if row and used + cell.columns > width and cell.text.isspace():
                row.append(_Cell("", 0, style))  # the end of the row takes its place
                continue
            if row and used + cell.columns > width:
                cut = len(row)
                while cut and not row[cut - 1].breaks and not cell.breaks:
                    cut -= 1
                rows.append(row[cut:] if cut else [])
                del row[cut or len(row) :]
                used = sum(moved.columns for moved in rows[-1])
            rows[-1].append(cell)
            used += cell.columns
    return rows


class TerminalAnimation:
    """Redraws a text in place while it denoises; a context manager, so that the terminal is itself again afterwards.

    Where the stream is not a terminal that can do this, it prints the text that `close` finds and nothing before.
    """

    def __init__(
        self, pieces: Sequence[str | None], *, stream: TextIO, delay: float = 0.05, width: int | None = None
    ) -> None:
        """Take the text at the beginning.

        Args:
            pieces: of text; None is [MASK].
            stream: where to draw.
            delay: seconds to wait after each step.
            width: columns to use; the terminal's, if None.
        """
        self._pieces = list(pieces)
        self._stream = stream
        self._delay = delay
        self._width = width
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = not os.environ.get("NO_COLOR")
        self._drawn = 0  # rows on the screen
        self._top = 0  # first row shown of a text taller than the screen
        self._closed = False

    def __enter__(self) -> TerminalAnimation:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, whatever happened."""
        self.close()

    def update(self, step: int, steps: int, pieces: Sequence[str | None]) -> None:
        """Show `pieces`, with those that changed since the last call highlighted.

        Args:
            step: number of steps taken so far.
            steps: in all.
            pieces: of text; None is [MASK].
        """
        before = self._pieces
        self._pieces = list(pieces)
        if not self._live or self._closed:
            return
        changed = [i >= len(before) or piece != before[i] for i, piece in enumerate(pieces)]
        size = shutil.get_terminal_size()
        rows = _rows(self._pieces, changed, max(1, self._width or size.columns))
        room = max(1, size.lines - 1)
        self._top = max(0, min(self._top, len(rows) - room))
        touched = [i for i, row in enumerate(rows) if any(cell.style == _FRESH for cell in row)]
        if touched and not self._top <= touched[-1] < self._top + room:
            self._top = max(0, min(touched[-1] - room // 2, len(rows) - room))
        part = rows[self._top : self._top + room]
        status = f"step {step:>{len(str(steps))}}/{steps}"
        if len(part) < len(rows):
            status += f"  rows {self._top + 1}-{self._top + len(part)} of {len(rows)}"
        status = status[: self._width or size.columns]
        self._draw([status] * (size.lines > 1) + [self._styled(row) for row in part])
        if self._delay > 0:
            time.sleep(self._delay)

    def close(self, text: str | None = None) -> None:
        """Leave the whole text behind, without highlights, and give the terminal back; a second call does nothing.

        Args:
            text: as it turned out, without what stands behind its end; what was shown last, if None.
        """
        if self._closed:
            return
        self._closed = True
        self._pieces = self._pieces if text is None else [text]
        if not self._live:
            self._write("".join(BLANK if piece is None else _printable(piece) for piece in self._pieces) + "\n")
            return
        try:
            width = max(1, self._width or shutil.get_terminal_size().columns)
            rows = _rows(self._pieces, [False] * len(self._pieces), width)
            self._draw(["".join(cell.text for cell in row) for row in rows])
        finally:
            self._write(_SHOW + "\n")

    def _styled(self, row: Sequence[_Cell]) -> str:
        text, style = "", _PLAIN
        for cell in row:
            if self._colours and cell.style != style:
                text += "\x1b[0m" + (f"\x1b[{cell.style}m" if cell.style else "")
                style = cell.style
            text += cell.text
        return text + ("\x1b[0m" if style else "")

    def _draw(self, rows: Sequence[str]) -> None:
        """Put `rows` where the last ones are; the cursor stays at the end, so that no line is lost below it."""
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        # Each row is cleared before it is written: after it, the cursor may still be on its last column.
        text = "\n".join(("\x1b[J" if i == len(rows) - 1 else "\x1b[K") + row for i, row in enumerate(rows))
        self._write(("" if self._drawn else _HIDE) + "\r" + up + text)
        self._drawn = len(rows)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
