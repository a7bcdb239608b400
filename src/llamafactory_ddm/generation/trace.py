"""What each step of a sampler wrote, as pieces of text, and a web page that replays it."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from operator import itemgetter
from pathlib import Path

from torch import Tensor

from ..data.canvas import Canvas
from ..data.text_codec import TextCodec
from ..utils.files import replacing

BLANK = "░"


@dataclass(frozen=True)
class Trace:
    """The denoising of one text, step by step.

    Attributes:
        title: shown above it.
        start: pieces of text at the beginning; None is [MASK].
        events: (step from 0, position, new piece) in order of step. A position may be written more than once, and None
            masks it again.
        steps: number of denoising steps in all; some may have no event.
    Raises:
        ValueError: if the events are out of order, or a step or a position is out of range.
    """

    title: str
    start: tuple[str | None, ...]
    events: tuple[tuple[int, int, str | None], ...]
    steps: int

    def __post_init__(self) -> None:
        """Check the events."""
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        earlier = 0
        for step, position, _ in self.events:
            if not 0 <= step < self.steps or step < earlier:
                raise ValueError(f"events must be in order of step, in [0, {self.steps}); got {step} after {earlier}")
            if not 0 <= position < len(self.start):
                raise ValueError(f"an event's position must lie in [0, {len(self.start)}), got {position}")
            earlier = step

    def frame(self, step: int) -> list[str | None]:
        """Return the pieces after `step` steps have been taken; 0 is the start.

        Raises:
            ValueError: if `step` is not in [0, steps].
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must lie in [0, {self.steps}], got {step}")
        pieces = list(self.start)
        for when, position, piece in self.events:
            if when >= step:
                break
            pieces[position] = piece
        return pieces


class Recorder:
    """Records what the steps of a batch write.

    Attributes:
        events: of each row (step from 0, column, id), in order of step, with the id of [MASK] where a position is
            remasked.
    """

    def __init__(self, z: Tensor) -> None:
        """Take the [batch, length] int64 sequences before the first step."""
        self._before = z
        self.events: list[list[tuple[int, int, int]]] = [[] for _ in range(len(z))]

    def __call__(self, step: int, z: Tensor) -> None:
        """Take the sequences after a step."""
        changed = (z != self._before).nonzero()
        for (row, column), token in zip(changed.tolist(), z[changed[:, 0], changed[:, 1]].tolist(), strict=True):
            self.events[row].append((step, column, token))
        self._before = z


def html_page(traces: Sequence[Trace], *, heading: str, facts: Mapping[str, str]) -> str:
    """Return a page that replays the denoising of each sample; it holds all it needs and asks the network for nothing.

    The fragment `#sample=1&step=3` opens it at the sample of that index, after that many steps.

    Args:
        traces: the samples.
        heading: of the page.
        facts: what the samples have in common, such as the strategy or the number of steps.
    Returns:
        ASCII; other characters are escaped.
    """
    known: dict[str, int] = {}

    def number(piece: str | None) -> int:
        return -1 if piece is None else known.setdefault(piece, len(known))

    samples = [
        {
            "title": trace.title,
            "steps": trace.steps,
            "start": [number(piece) for piece in trace.start],
            "events": [value for step, i, piece in trace.events for value in (step, i, number(piece))],
        }
        for trace in traces
    ]
    data = {"heading": heading, "facts": list(facts.items()), "samples": samples, "pieces": list(known)}
    parts = {
        "title": html.escape(heading).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = resources.files(__package__).joinpath("trace.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda match: parts[match[1]], template)


def write_html(path: str | Path, traces: Sequence[Trace], *, heading: str, facts: Mapping[str, str]) -> None:
    """Write `html_page` so that `path` is either the old file or the complete new one; makes the folder if need be."""
    page = html_page(traces, heading=heading, facts=facts)
    with replacing(path) as file:
        file.write(page)


def replay(codec: TextCodec, canvas: Canvas, ids: Sequence[int], events: Sequence[tuple[int, int, int]]) -> Trace:
    """Return the denoising of a text as pieces of text.

    A token of the final text shows the piece that it has in it; one that was edited or remasked later shows the piece
    that it had when it was written.

    Args:
        codec: of the tokenizer.
        canvas: that the text was generated on.
        ids: the final ids of its positions.
        events: (step, position, id) in order of step; the id of [MASK] where a position was remasked.
    """
    begin = canvas.n_start
    pieces = codec.pieces(list(ids[begin:]))
    last = {position: number for number, (_, position, _) in enumerate(events)}
    now = [codec.mask_id if editable else token for token, editable in zip(ids, canvas.editable, strict=True)]
    made: list[tuple[int, int, str | None]] = []
    for step, group in itertools.groupby(enumerate(events), key=lambda pair: pair[1][0]):
        of_step = list(group)
        for _, (_, position, token) in of_step:
            now[position] = token
        pieces_now: list[str | None] = []
        for number, (_, position, token) in sorted(of_step, key=lambda pair: pair[1][1]):
            piece = None
            if token != codec.mask_id and number == last[position]:
                piece = pieces[position - begin]
            elif token != codec.mask_id:
                pieces_now = pieces_now or codec.pieces(now[begin:])
                piece = pieces_now[position - begin]
            made.append((step, position - begin, piece))
    return Trace(
        title="",
        start=tuple(None if e else p for e, p in zip(canvas.editable[begin:], pieces, strict=True)),
        events=tuple(made),
        steps=1 + max(map(itemgetter(0), events), default=-1),
    )
