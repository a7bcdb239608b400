"""Canvases: the fixed tokens and the positions to generate that generation starts from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# <|infill:8|> is a span of eight tokens, <|infill|> a span as long as the label.
MARKER = re.compile(r"<\|infill(?::(-?\d+))?\|>")
_LIKE_A_MARKER = re.compile(r"<\|?\s*infill[^<>]*>", re.IGNORECASE)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Canvas:
    """One sample before denoising.

    Attributes:
        ids: the tokens; ids at editable positions are ignored.
        editable: True at positions to generate.
        n_start: number of leading tokens that are not text, such as the start token.
        room: number of positions to generate that can still be added at the end.
    """

    ids: tuple[int, ...]
    editable: tuple[bool, ...]
    n_start: int = 0
    room: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.editable):
            raise ValueError(f"ids and editable must have one length, got {len(self.ids)} and {len(self.editable)}")

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.ids)

    @property
    def n_editable(self) -> int:
        """Return the number of positions to generate."""
        return sum(self.editable)

    def cut(self, n_editable: int) -> Canvas:
        """Return the canvas cut after its first `n_editable` positions to generate.

        A canvas with fixed tokens after a position to generate is returned unchanged.

        Raises:
            ValueError: if `n_editable` is below 1.
        """
        if n_editable < 1:
            raise ValueError(f"n_editable must be at least 1, got {n_editable}")
        first = self.editable.index(True)
        if not all(self.editable[first:]):
            return self
        end = min(first + n_editable, len(self))
        return Canvas(self.ids[:end], self.editable[:end], self.n_start, self.room + len(self) - end)

    def grown(self, n_more: int) -> Canvas:
        """Return the canvas with min(n_more, room) further positions to generate at its end."""
        n = min(n_more, self.room)
        return Canvas(self.ids + (0,) * n, self.editable + (True,) * n, self.n_start, self.room - n)

    def with_fixed(self, ids: Sequence[int]) -> Canvas:
        """Return the canvas with `ids` as fixed tokens at all positions."""
        return Canvas(tuple(ids), (False,) * len(self), self.n_start, self.room)


def canvas_of(parts: Sequence[Sequence[int] | int], *, start_id: int | None = None) -> Canvas:
    """Return a canvas of fixed tokens and spans to generate, in order.

    Args:
        parts: ids of fixed tokens, or the length of a span to generate.
        start_id: token to prepend unless the canvas starts with it; needed with shift, as the first token of a row is
            never predicted.
    Raises:
        ValueError: if there is no position to generate, or a span is shorter than one token.
    """
    ids: list[int] = []
    editable: list[bool] = []
    for part in parts:
        if isinstance(part, int):
            if part < 1:
                raise ValueError(f"a span to generate must have at least 1 token, got {part}")
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
        raise ValueError("the canvas holds no position to generate: every token is fixed")
    return Canvas(tuple(ids), tuple(editable), n_start)


def split_at_markers(text: str) -> list[str | int | None]:
    """Split a text at its infilling markers into fixed text, span lengths, and None for a span as long as the label.

    Raises:
        ValueError: if there is no marker, or a malformed one, or one of length below 1.
    """
    for marker in _LIKE_A_MARKER.findall(text):
        if not MARKER.fullmatch(marker):
            raise ValueError(
                f"{marker} is not a valid infilling marker; write <|infill:8|> for 8 tokens, or <|infill|> for as "
                "many as the label has"
            )
    parts: list[str | int | None] = []
    offset = 0
    for match in MARKER.finditer(text):
        if match.start() > offset:
            parts.append(text[offset : match.start()])
        length = match.group(1)
        if length is not None and int(length) < 1:
            raise ValueError(f"{match.group(0)} is empty; a span must have at least 1 token, as <|infill:1|>")
        parts.append(None if length is None else int(length))
        offset = match.end()
    if parts.count(None) > 1:
        raise ValueError("only one <|infill|> can take its length from the label; write <|infill:8|> for others")
    if not offset:
        raise ValueError("the text holds no infilling marker; mark each gap, as in 'Tom had <|infill:8|> dog.'")
    if offset < len(text):
        parts.append(text[offset:])
    return parts


def check_unmarked(text: str) -> None:
    """Refuse infilling markers in a prompt to continue, where the model would see them as ordinary characters.

    Raises:
        ValueError: naming the first marker and the key that fills it.
    """
    marker = MARKER.search(text)
    if marker:
        raise ValueError(
            f"the prompt holds the infilling marker {marker[0]}, but prompts are continued, not filled; set "
            "generate_from: infill (--infill, infill=), or remove the marker"
        )


def infilling_canvas(
    text: str,
    encode: Encode,
    *,
    encode_after: Encode | None = None,
    label: str | None = None,
    start_id: int | None = None,
) -> Canvas:
    """Return the canvas of a text with infilling markers.

    Args:
        text: text with at least one marker.
        encode: text to ids, without special tokens.
        encode_after: the same for text that follows other text, by default `encode`; it differs for tokenizers that
            put a space before a text.
        label: reference text that gives the length of <|infill|>.
        start_id: token to prepend, as in `canvas_of`.
    Raises:
        ValueError: for an invalid marker, or <|infill|> without a label.
    """
    encode_after = encode_after or encode
    parts: list[list[int] | int] = []
    for number, part in enumerate(split_at_markers(text)):
        if isinstance(part, str):
            parts.append(encode(part) if number == 0 else encode_after(part))
        elif part is not None:
            parts.append(part)
        elif not label:
            raise ValueError("<|infill|> takes its length from the label, but there is no label; write <|infill:8|>")
        else:
            parts.append(len(encode_after(label)))
    return canvas_of(parts, start_id=start_id)


@dataclass(frozen=True)
class CanvasBatch:
    """A batch of canvases, padded on the left so that all of them end in the same column.

    Attributes:
        x: [batch, length] int64, ids.
        editable: [batch, length] bool, positions to generate.
        is_padding: [batch, length] bool.
        prompt: [batch, length] bool, fixed tokens without padding and the start token.
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
