"""An animation of a text being denoised, in the terminal, drawn with `rich`."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .trace import BLANK

_FRESH, _MASKED = "bold green", "dim"
_JOINERS = "\u200c\u200d"  # parts of an emoji


def printable(text: str, stream: TextIO) -> str:
    """Return `text` in characters that `stream` can encode, without cursor movements but newlines and tabs."""
    chars = []
    for char in re.sub("\r\n|[\u2028\u2029]", "\n", text):
        category = "" if char in "\n\t" + _JOINERS else unicodedata.category(char)
        chars.append({"Cc": "\ufffd", "Cs": "\ufffd", "Cf": ""}.get(category, char))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return "".join(chars).encode(encoding, "replace").decode(encoding)


class TerminalAnimation:
    """Redraws a text in place while it is denoised; a context manager, which restores the terminal at the end.

    A stream that is not a terminal, or a dumb one, gets only the final text, from `close`.

    Attributes:
        is_live: whether the stream is a terminal that can redraw.
    """

    def __init__(
        self, pieces: Sequence[str | None], *, stream: TextIO, delay: float = 0.05, width: int | None = None
    ) -> None:
        """Start from the pieces of a text.

        Args:
            pieces: of text; None is [MASK].
            stream: where to draw.
            delay: seconds to wait after each step.
            width: number of columns; None for that of the terminal.
        """
        self._pieces = list(pieces)
        self._stream = stream
        self._delay = delay
        self._console = Console(file=stream, width=width, force_terminal=stream.isatty(), force_jupyter=False)
        self.is_live = stream.isatty() and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._top = 0  # first line shown of a text taller than the terminal
        self._is_closed = False

    def __enter__(self) -> TerminalAnimation:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call `close`."""
        self.close()

    def update(self, step: int, steps: int, pieces: Sequence[str | None]) -> None:
        """Draw `pieces`, with those that changed since the last call highlighted.

        Args:
            step: number of steps taken so far.
            steps: number of steps in all.
            pieces: of text; None is [MASK].
        """
        before, self._pieces = self._pieces, list(pieces)
        if not self.is_live or self._is_closed:
            return
        is_fresh = [i >= len(before) or piece != before[i] for i, piece in enumerate(pieces)]
        lines = self._text(is_fresh).wrap(self._console, self._console.width)
        room = max(1, self._console.height - 2)
        fresh = [i for i, line in enumerate(lines) if any(span.style == _FRESH for span in line.spans)]
        if fresh and not self._top <= fresh[-1] < self._top + room:
            self._top = fresh[-1] - room // 2
        self._top = max(0, min(self._top, len(lines) - room))
        status = f"step {step:>{len(str(steps))}}/{steps}"
        if len(lines) > room:
            status += f"  lines {self._top + 1}-{self._top + room} of {len(lines)}"
        shown = Group(Text(status, no_wrap=True, overflow="crop"), *lines[self._top : self._top + room])
        self._live.start()
        self._live.update(shown, refresh=True)
        time.sleep(self._delay)

    def close(self, text: str | None = None) -> None:
        """Print the whole text without highlights and restore the cursor; a second call does nothing.

        Args:
            text: the final text, up to its EOS; None for the text drawn last.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._pieces = self._pieces if text is None else [text]
        whole = self._text([False] * len(self._pieces))
        if not self.is_live:
            self._stream.write(f"{whole.plain}\n")
            return
        self._live.update(whole)
        self._live.start()
        self._live.stop()

    def _text(self, is_fresh: Sequence[bool]) -> Text:
        text = Text()
        for piece, fresh in zip(self._pieces, is_fresh, strict=True):
            style = _MASKED if piece is None else _FRESH if fresh else None
            text.append(printable(BLANK if piece is None else piece, self._stream), style)
        return text
