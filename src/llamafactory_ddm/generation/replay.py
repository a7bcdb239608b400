"""From what the steps of a sampler wrote to pieces of text that come one after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter

from ..data.canvas import Canvas
from ..data.text_codec import TextCodec
from .trace import Trace


def replay(codec: TextCodec, canvas: Canvas, ids: Sequence[int], events: Sequence[tuple[int, int, int]]) -> Trace:
    """Return how a text came about.

    A token that stands to the end shows the piece that it has in the whole text; one that was rewritten or masked
    again the piece that it had when it was written.

    Args:
        codec: of the tokenizer.
        canvas: what the text was written on.
        ids: what stands on it in the end.
        events: (step, place, id) in order of step; the id of [MASK] where a place was masked again.
    """
    begin = canvas.n_start
    pieces = codec.pieces(list(ids[begin:]))
    last = {place: number for number, (_, place, _) in enumerate(events)}
    now = [codec.mask_id if editable else token for token, editable in zip(ids, canvas.editable, strict=True)]
    made: list[tuple[int, int, str | None]] = []
    for step, group in itertools.groupby(enumerate(events), key=lambda pair: pair[1][0]):
        of_step = list(group)
        for _, (_, place, token) in of_step:
            now[place] = token
        then: list[str | None] = []
        for number, (_, place, token) in sorted(of_step, key=lambda pair: pair[1][1]):
            piece = None
            if token != codec.mask_id and number == last[place]:
                piece = pieces[place - begin]
            elif token != codec.mask_id:
                then = then or codec.pieces(now[begin:])
                piece = then[place - begin]
            made.append((step, place - begin, piece))
    return Trace(
        title="",
        start=tuple(None if e else p for e, p in zip(canvas.editable[begin:], pieces, strict=True)),
        events=tuple(made),
        steps=1 + max(map(itemgetter(0), events), default=-1),
    )
