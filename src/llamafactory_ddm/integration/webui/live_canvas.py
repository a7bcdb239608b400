"""HTML of a text that is being denoised: masks as blocks, tokens coloured by the step at which they appeared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

BLANK = "░"
END = "·"  # EOS or padding
N_AGES = 8  # colours, from those that have been there longest to the latest

# Lightness suits a light page; a dark page overrides it. No colour is the only sign of a mask or of a fresh token.
_HUES = (230, 205, 180, 150, 110, 75, 45, 20)
CSS = "\n".join(
    (
        ".ddm-canvas { white-space: pre-wrap; overflow-wrap: anywhere; font-variant-ligatures: none; }",
        ".ddm-mask, .ddm-end { opacity: 0.35; }",
        ".ddm-fresh { font-weight: 700; border-radius: 3px; background: hsl(50 100% 80%); color: hsl(20 90% 25%); }",
        ".dark .ddm-fresh { background: hsl(50 90% 30%); color: hsl(50 100% 90%); }",
        ".ddm-step { opacity: 0.6; font-size: 0.85em; margin-top: 6px; }",
        *(f".ddm-age{age} {{ color: hsl({hue} 70% 35%); }}" for age, hue in enumerate(_HUES)),
        *(f".dark .ddm-age{age} {{ color: hsl({hue} 75% 72%); }}" for age, hue in enumerate(_HUES)),
    )
)


class LiveCanvas:
    """Remembers at which step each position got its present token, and renders the canvas as HTML."""

    def __init__(self, end_tokens: Collection[str] = ()) -> None:
        """Start without positions; the first `update` has all of them.

        Args:
            end_tokens: spellings of EOS and padding.
        """
        self._end_tokens = frozenset(end_tokens)
        self._pieces: list[str | None] = []
        self._born: list[int] = []  # step of each position's present piece

    def update(self, step: int, pieces: Sequence[str | None]) -> None:
        """Take the canvas after a step.

        Args:
            step: number of steps taken so far; it never falls.
            pieces: text of each position; None is [MASK]. A canvas may grow or shrink at its end.
        """
        before, self._pieces = self._pieces, list(pieces)
        born = self._born[: len(pieces)] + [step] * (len(pieces) - len(self._born))
        for position, (old, new) in enumerate(zip(before, pieces, strict=False)):
            if old != new:
                born[position] = step
        self._born = born

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self._pieces)

    @property
    def step(self) -> int:
        """The latest step at which a token appeared."""
        return max(
            (born for born, piece in zip(self._born, self._pieces, strict=True) if piece is not None), default=0
        )

    @property
    def n_decoded(self) -> int:
        """Number of positions that are not masked."""
        return sum(piece is not None for piece in self._pieces)

    def html(self, caption: str = "") -> str:
        """Return the canvas as one block of HTML, in which all text is escaped and no line is empty.

        Args:
            caption: text of a line below it.
        """
        latest = self.step
        runs = itertools.groupby(range(len(self._pieces)), key=lambda position: self._css_class(position, latest))
        spans = "".join(
            f'<span class="{css_class}">{escaped("".join(self._text(position) for position in run))}</span>'
            for css_class, run in runs
        )
        below = f'<div class="ddm-step">{escaped(caption)}</div>' if caption else ""
        return f'<div class="ddm-canvas">{spans}</div>{below}'

    def _css_class(self, position: int, latest: int) -> str:
        if self._pieces[position] is None:
            return "ddm-mask"
        born = self._born[position]
        if born == latest:
            return "ddm-fresh"
        if self._pieces[position] in self._end_tokens:
            return "ddm-end"
        return f"ddm-age{min(N_AGES - 1, born * N_AGES // max(latest, 1))}"

    def _text(self, position: int) -> str:
        piece = self._pieces[position]
        return BLANK if piece is None else END if piece in self._end_tokens else piece


def escaped(text: str) -> str:
    """Return text as HTML that also passes through a Markdown renderer unchanged.

    Characters with a meaning in HTML, Markdown or LaTeX become entities, line breaks included, because an empty line
    would end a block of HTML in Markdown. Control characters, and those that reverse the direction of the text around
    them, are replaced.
    """
    safe = re.sub("\r\n?|[\u0085\u2028\u2029]", "\n", text)
    safe = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", safe)
    return re.sub(r"[&<>\"'\n\t*_`$\\\[\]~|#:]", lambda match: f"&#{ord(match[0])};", safe)


def with_our_css(css: str) -> str:
    """Return the style sheet of upstream's pages with that of the canvas."""
    return f"{css}\n{CSS}\n"
