"""Traces: what each denoising step changed, as pieces of text, and a web page that replays it."""

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
        title: shown above the text.
        start: pieces of text before the first step; None is [MASK].
        events: (step from 0, position, new piece) in order of step. A position may have several events; None remasks
            it.
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
        previous = 0
        for step, position, _ in self.events:
            if not 0 <= step < self.steps or step < previous:
                raise ValueError(f"events must be in order of step, in [0, {self.steps}); got {step} after {previous}")
            if not 0 <= position < len(self.start):
                raise ValueError(f"an event's position must lie in [0, {len(self.start)}), got {position}")
            previous = step

    def frame(self, step: int) -> list[str | None]:
        """Return the pieces after `step` steps have been taken; 0 is the start.

        Raises:
            ValueError: if `step` is not in [0, steps].
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must lie in [0, {self.steps}], got {step}")
        pieces = list(self.start)
        for event_step, position, piece in self.events:
            if event_step >= step:
                break
            pieces[position] = piece
        return pieces


class Recorder:
    """Records what the steps of a batch change.

    Attributes:
        events: for each row (step from 0, column, new id), in order of step; the id of [MASK] where a position is
            remasked.
    """

    def __init__(self, z: Tensor) -> None:
        """Start from the sequences before the first step, [batch, length] int64."""
        self._previous = z
        self.events: list[list[tuple[int, int, int]]] = [[] for _ in range(len(z))]

    def __call__(self, step: int, z: Tensor) -> None:
        """Record a step, with the sequences after it."""
        changed = (z != self._previous).nonzero()
        for (row, column), token in zip(changed.tolist(), z[changed[:, 0], changed[:, 1]].tolist(), strict=True):
            self.events[row].append((step, column, token))
        self._previous = z


def html_page(traces: Sequence[Trace], *, heading: str, facts: Mapping[str, str]) -> str:
    """Return a self-contained page that replays the denoising of each sample.

    The fragment `#sample=1&step=3` opens it at the sample with index 1, after 3 steps.

    Args:
        traces: the samples.
        heading: heading of the page.
        facts: names and values shown below it, such as the strategy or the number of steps.
    Returns:
        ASCII; other characters are escaped.
    """
    index_of: dict[str, int] = {}

    def index(piece: str | None) -> int:
        return -1 if piece is None else index_of.setdefault(piece, len(index_of))

    samples = [
        {
            "title": trace.title,
            "steps": trace.steps,
            "start": [index(piece) for piece in trace.start],
            "events": [value for step, i, piece in trace.events for value in (step, i, index(piece))],
        }
        for trace in traces
    ]
    data = {"heading": heading, "facts": list(facts.items()), "samples": samples, "pieces": list(index_of)}
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
    """Return the trace of a text.

    The last token of a position appears as its piece of the final text. A token that was edited or remasked later
    appears as its piece of the text at that step.

    Args:
        codec: codec of the tokenizer.
        canvas: canvas that the text was generated on.
        ids: final ids of all positions.
        events: (step, position, id) in order of step; the id of [MASK] where a position was remasked.
    """
    begin = canvas.n_start
    pieces = codec.pieces(list(ids[begin:]))
    last_event = {position: index for index, (_, position, _) in enumerate(events)}
    current = [codec.mask_id if editable else token for token, editable in zip(ids, canvas.editable, strict=True)]
    piece_events: list[tuple[int, int, str | None]] = []
    for step, group in itertools.groupby(enumerate(events), key=lambda pair: pair[1][0]):
        step_events = list(group)
        for _, (_, position, token) in step_events:
            current[position] = token
        current_pieces: list[str | None] = []
        for index, (_, position, token) in sorted(step_events, key=lambda pair: pair[1][1]):
            piece = None
            if token != codec.mask_id and index == last_event[position]:
                piece = pieces[position - begin]
            elif token != codec.mask_id:
                current_pieces = current_pieces or codec.pieces(current[begin:])
                piece = current_pieces[position - begin]
            piece_events.append((step, position - begin, piece))
    return Trace(
        title="",
        start=tuple(None if e else p for e, p in zip(canvas.editable[begin:], pieces, strict=True)),
        events=tuple(piece_events),
        steps=1 + max(map(itemgetter(0), events), default=-1),
    )
