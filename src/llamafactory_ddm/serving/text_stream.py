"""The final part of a text that is still being denoised.

Tokens are final if no later step changes them: those before the first masked position, or, if the strategy edits or
remasks decoded tokens, those of finished blocks. An end of the final text that further tokens may change is held back:
an incomplete character, white space, and the beginning of a stop string.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..data.canvas import Canvas
from ..data.text_codec import TextCodec


@dataclass
class TextStream:
    """The final text of one sample.

    Attributes:
        codec: of the model's tokenizer.
        canvas: of the request.
        eos_ids: EOS and padding tokens, which end a text.
        stop: strings that end the text; they are not part of it.
        block_of: returns the block of each position of a canvas, -1 for a fixed one; None if decoded tokens never
            change.
        sent: the text that `advance` has returned so far.
        stopped: the complete text once a stop string was found, else None.
    """

    codec: TextCodec
    canvas: Canvas
    eos_ids: Sequence[int]
    stop: tuple[str, ...] = ()
    block_of: Callable[[Canvas], list[int]] | None = None
    sent: str = field(default="", init=False)
    stopped: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        editable = self.canvas.editable
        self.start = editable.index(True)
        self._follows = self.start > self.canvas.n_start
        gaps = [is_gap for is_gap, _ in itertools.groupby(editable)]
        # Several gaps are joined by line breaks, and the text after one gap tells where it ends.
        self._streams = gaps.count(True) == 1
        self._final: list[int] = []  # final ids at the latest call of `advance`
        self._end = len(editable) - editable[::-1].index(True) if not editable[-1] else None

    def final_ids(self, canvas: Canvas, ids: Sequence[int]) -> list[int]:
        """Return the generated tokens that no further step changes.

        Args:
            canvas: that of the sampler's present call, in which positions of earlier calls are fixed.
            ids: of all its positions; the mask token's where they are masked.
        """
        generated = ids[self.start : self._end]
        unmasked = list(itertools.takewhile(lambda token: token != self.codec.mask_id, generated))
        if self.block_of is None:
            return unmasked
        block = self.block_of(canvas)
        decoded = [number for number, token in zip(block, ids, strict=True) if token != self.codec.mask_id]
        current = max(decoded, default=-1)  # blocks are decoded one after another
        first = next((i for i, number in enumerate(block) if number >= max(current, 0)), len(block))
        return unmasked[: max(first - self.start, 0)]

    def advance(self, canvas: Canvas, ids: Sequence[int]) -> str:
        """Return the text that has become final since the last call; sets `stopped` at a stop string."""
        if not self._streams or self.stopped is not None:
            return ""
        final = self.final_ids(canvas, ids)
        if final == self._final:
            return ""
        self._final = list(final)
        # An invalid byte after them would make all bytes invalid, even after a token without text.
        while final and (self.codec.is_byte(final[-1]) or self.codec.is_silent(final[-1])):
            final.pop()
        text = self.text_of(final)
        end = self.find_stop(text.rstrip("\ufffd"))  # which may be the first bytes of a character
        if end is not None:
            self.stopped = text[:end]
            return self._take(self.stopped)
        return self._take(text[: self._n_certain(text)])

    def finish(self, text: str) -> str:
        """Return the rest of the text, which is complete now."""
        return self._take(text)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of generated tokens, up to EOS unless they fill a gap."""
        if self._end is None:
            ids = list(itertools.takewhile(lambda token: token not in self.eos_ids, ids))
        return self.codec.decode(list(ids), follows=self._follows)

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """Return the text of each position from the first generated one on; None for [MASK]."""
        return self.codec.pieces(list(ids))[self.start :]

    def ends(self, ids: Sequence[int]) -> bool:
        """Tell whether EOS is among the generated tokens; never true of a gap."""
        return self._end is None and any(token in self.eos_ids for token in ids[self.start :])

    def whole(self, text: str) -> str:
        """Return the text of the only gap together with the text of the fixed tokens around it."""
        ids = self.canvas.ids
        before = self.codec.decode(list(ids[self.canvas.n_start : self.start]), follows=False)
        after = [] if self._end is None else list(ids[self._end :])
        return before + text + (self.codec.decode(after, follows=True) if after else "")

    def find_stop(self, text: str) -> int | None:
        """Return where the first stop string begins in a text."""
        found = [position for word in self.stop if (position := text.find(word)) >= 0]
        return min(found, default=None)

    def n_tokens(self, ids: Sequence[int], text: str) -> int:
        """Return how many of the first tokens it takes to spell `text`, with which their text begins."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.text_of(ids[:middle])) < len(text):
                low = middle + 1
            else:
                high = middle
        return low

    def _n_certain(self, text: str) -> int:
        """Return how many characters neither change with more tokens nor begin a stop string."""
        base = text.rstrip("\ufffd")
        begins = (n for word in self.stop for n in range(1, min(len(word), len(base) + 1)) if base.endswith(word[:n]))
        return len(base[: len(base) - max(begins, default=0)].rstrip().rstrip("\ufffd"))

    def _take(self, text: str) -> str:
        if not text.startswith(self.sent):  # never seen; what was sent cannot be taken back
            return ""
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return new
