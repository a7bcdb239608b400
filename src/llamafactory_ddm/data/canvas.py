"""What generation starts from: given tokens and places to be written, for every kind of generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# <|infill:8|> is a span of eight tokens, <|infill|> one of as many tokens as the label has.
MARKER = re.compile(r"<\|infill(?::(-?\d+))?\|>")
_LIKE_A_MARKER = re.compile(r"<\|?\s*infill[^<>]*>", re.IGNORECASE)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Canvas:
    """One sample before denoising.

    Attributes:
        ids: the tokens; what stands at an editable place does not matter.
        editable: True where a token is to be written.
        n_start: tokens at the beginning that belong to no text, such as the start token.
        room: places to be written that may yet be added at the end.
    """

    ids: tuple[int, ...]
    editable: tuple[bool, ...]
    n_start: int = 0
    room: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.editable):
            raise ValueError(f"{len(self.ids)} ids, but {len(self.editable)} flags")

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self.ids)

    @property
    def n_editable(self) -> int:
        """Return the number of tokens to be written."""
        return sum(self.editable)

    def cut(self, n_editable: int) -> Canvas:
        """Return the canvas with its first `n_editable` places to be written, if it ends with them; else itself.

        Raises:
            ValueError: if that leaves nothing to write.
        """
        if n_editable < 1:
            raise ValueError(f"a canvas needs a place to be written, got {n_editable}")
        first = self.editable.index(True)
        if not all(self.editable[first:]):
            return self
        end = min(first + n_editable, len(self))
        return Canvas(self.ids[:end], self.editable[:end], self.n_start, self.room + len(self) - end)

    def grown(self, n_more: int) -> Canvas:
        """Return the canvas with `n_more` further places to be written, or as many as there is room for."""
        more = min(n_more, self.room)
        return Canvas(self.ids + (0,) * more, self.editable + (True,) * more, self.n_start, self.room - more)

    def given(self, ids: Sequence[int]) -> Canvas:
        """Return the canvas with `ids` at all its places, none of which is to be written."""
        return Canvas(tuple(ids), (False,) * len(self), self.n_start, self.room)


def canvas_of(parts: Sequence[Sequence[int] | int], *, start_id: int | None = None) -> Canvas:
    """Put given tokens and spans one after another.

    Args:
        parts: ids that are given, or the length of a span to be written.
        start_id: a token put in front unless the given tokens begin with it; with shift one is needed, as the first
            token of a row is never predicted.
    Raises:
        ValueError: if there is nothing to write, or a span is shorter than a token.
    """
    ids: list[int] = []
    editable: list[bool] = []
    for part in parts:
        if isinstance(part, int):
            if part < 1:
                raise ValueError(f"a span to be written must be of at least 1 token, got {part}")
            ids += [0] * part
            editable += [True] * part
        else:
            ids += part
            editable += [False] * len(part)
    n_start = 0
    if start_id is not None:
        if not ids or editable[0] or ids[0] != start_id:
            ids, editable = [start_id, *ids], [False, *editable]
        n_start = 1
    if not any(editable):
        raise ValueError("there is nothing to write: every token is given")
    return Canvas(tuple(ids), tuple(editable), n_start)


def split_at_markers(text: str) -> list[str | int | None]:
    """Return the parts of a text with infilling markers: given text, the length of a span, None for the label's.

    Raises:
        ValueError: if there is no marker, or one that is malformed or leaves no room.
    """
    for found in _LIKE_A_MARKER.findall(text):
        if not MARKER.fullmatch(found):
            raise ValueError(f"{found} is no marker; write <|infill:8|> for 8 tokens, or <|infill|> for the label's")
    parts: list[str | int | None] = []
    place = 0
    for match in MARKER.finditer(text):
        if match.start() > place:
            parts.append(text[place : match.start()])
        length = match.group(1)
        if length is not None and int(length) < 1:
            raise ValueError(f"{match.group(0)} leaves no room; a span is of at least 1 token")
        parts.append(None if length is None else int(length))
        place = match.end()
    if parts.count(None) > 1:
        raise ValueError("only one <|infill|> can take its length from the label; write <|infill:8|> for the others")
    if not place:
        raise ValueError("there is nothing to fill in; mark the places, as in 'Tom had <|infill:8|> dog.'")
    if place < len(text):
        parts.append(text[place:])
    return parts


def check_unmarked(text: str) -> None:
    """Look for infilling markers in a text that is to be continued, where they would be given as plain characters.

    Raises:
        ValueError: naming the first and what fills it.
    """
    found = MARKER.search(text)
    if found:
        raise ValueError(
            f"it holds the marker {found[0]}, which a text to be continued does not fill; fill it in with "
            "generate_from: infill (--infill, infill=), or remove it"
        )


def infilling_canvas(
    text: str,
    encode: Encode,
    *,
    encode_after: Encode | None = None,
    label: str | None = None,
    start_id: int | None = None,
) -> Canvas:
    """Return the canvas of a text with markers.

    Args:
        text: with at least one marker.
        encode: of the tokenizer, without special tokens.
        encode_after: the same for text that follows other text, by default `encode`; tokenizers that put a space
            before a text make a difference.
        label: gives the length of <|infill|>.
        start_id: see `canvas_of`.
    Raises:
        ValueError: for a marker that is wrong, or one that needs a label where there is none.
    """
    encode_after = encode_after or encode
    parts: list[list[int] | int] = []
    for number, part in enumerate(split_at_markers(text)):
        if isinstance(part, str):
            parts.append(encode(part) if number == 0 else encode_after(part))
        elif part is not None:
            parts.append(part)
        elif not label:
            raise ValueError("<|infill|> takes its length from the label, and there is none; write <|infill:8|>")
        else:
            parts.append(len(encode_after(label)))
    return canvas_of(parts, start_id=start_id)


@dataclass(frozen=True)
class CanvasBatch:
    """Canvases side by side, padded on the left, so that what follows a prompt stands in the same columns.

    Attributes:
        x: [batch, length] int64.
        editable: [batch, length] bool.
        is_padding: [batch, length] bool.
        prompt: [batch, length] bool, given tokens that are text: neither padding nor the start token.
    """

    x: Tensor
    editable: Tensor
    is_padding: Tensor
    prompt: Tensor


def stack_canvases(canvases: Sequence[Canvas], pad_id: int) -> CanvasBatch:
    """Return the canvases as one batch, on the CPU."""
    length = max(len(canvas) for canvas in canvases)
    shape = (len(canvases), length)
    x = torch.full(shape, pad_id, dtype=torch.int64)
    editable, is_padding, prompt = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for row, canvas in enumerate(canvases):
        begin = length - len(canvas)
        x[row, begin:] = torch.tensor(canvas.ids)
        editable[row, begin:] = torch.tensor(canvas.editable)
        is_padding[row, :begin] = True
        prompt[row, begin + canvas.n_start :] = ~editable[row, begin + canvas.n_start :]
    return CanvasBatch(x, editable, is_padding, prompt)
