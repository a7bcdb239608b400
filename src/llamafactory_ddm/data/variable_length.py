"""Batches in which a model learns where a text ends: one document or answer a row, its end, and padding behind it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .responses import is_target


@dataclass(frozen=True)
class VariableLengthCollator:
    """Makes one rectangle of rows that hold `input_ids` and, for answers, `labels`.

    A row is `[start] text eos pad pad …` up to its canvas: `canvas` tokens, or with `block` the next multiple of it or
    one of those behind.
    What is inside the canvas and labelled, the end and all padding included, is a target; what is outside is neither
    seen nor noised. The result holds
    - `input_ids`: [batch, length] int64, clean ids: the labels where tokens are labelled;
    - `shown`: the same shape, what the model sees of a clean token; left out where labels are the tokens themselves;
    - `attention_mask`: [batch, length] int64, 0 outside the canvas;
    - `maskable`: [batch, length] bool, tokens that noise may fall on;
    - `is_pad`: [batch, length] bool, padding inside the canvas;
    - `end`: [batch] int64, index of the end-of-text token.

    Attributes:
        eos_id: ends a text; added where a row lacks an end.
        pad_ids: what stands behind the end, in turn: the end-of-text token itself (`eos_eos`), a token of its own
            (`eos_pad`), or several (`rainbow`).
        canvas: the most tokens of a row.
        start_id: put in front of a document that lacks it; None for answers, and where none is needed.
        block: extend a row's canvas to a multiple of so many tokens only; None extends it to `canvas`.
        extra: blocks that a row's canvas may have beyond those it fills, None for all that `canvas` has room for; how
            many is decided by the row's own tokens, so that it is the same in every epoch, run and process. A model
            that only sees canvases that end with the text's last block takes their size for the length of the text.
        multiple: make the rectangle's length a multiple of so many tokens.
        end_ids: of further tokens that end an answer, such as a template's stop words.
    Source: Rainbow Padding (arXiv 2510.03680) for `rainbow`; variable-length DiffuGPT for the other two.
    """

    eos_id: int
    pad_ids: tuple[int, ...]
    canvas: int
    start_id: int | None = None
    block: int | None = None
    extra: int | None = None
    multiple: int = 1
    end_ids: tuple[int, ...] = ()

    def row(self, feature: Mapping[str, Any]) -> tuple[list[int], list[bool], int]:
        """Return a row's clean ids up to its end, which of them noise may fall on, and the index of the end.

        What a template puts behind the end of the last answer, as the line break of ChatML, is left out.
        """
        ids = list(feature["input_ids"])
        if "labels" in feature:
            labels = torch.as_tensor(feature["labels"])
            maskable = is_target(torch.as_tensor(ids), labels, torch.arange(len(ids)) == 0).tolist()
            ids = [label if own else token for token, label, own in zip(ids, feature["labels"], maskable, strict=True)]
        else:
            if self.start_id is not None and (not ids or ids[0] != self.start_id):
                ids = [self.start_id, *ids]
            maskable = [True] * len(ids)
        first = 0 if self.start_id is None else 1  # the start token may be the same as the end
        ends = {self.eos_id, *(self.end_ids if "labels" in feature else ())}
        end = max((n for n in range(first, len(ids)) if maskable[n] and ids[n] in ends), default=None)
        if end is not None and (end == len(ids) - 1 or ("labels" in feature and all(maskable[end:]))):
            return ids[: end + 1], maskable[: end + 1], end
        return [*ids, self.eos_id], [*maskable, True], len(ids)

    def shown(self, feature: Mapping[str, Any], ids: list[int]) -> list[int]:
        """Return what a model sees of the `ids` that `row` made of a row."""
        return [*feature["input_ids"], *ids[len(feature["input_ids"]) :]][: len(ids)] if "labels" in feature else ids

    def fits(self, feature: Mapping[str, Any]) -> bool:
        """Tell whether a row has room for its end."""
        return len(self.row(feature)[0]) <= self.canvas

    def width(self, ids: Sequence[int]) -> int:
        """Return the length of the canvas of a row of tokens, its end included."""
        if self.block is None:
            return self.canvas
        least, most = -(-len(ids) // self.block), -(-self.canvas // self.block)
        choices = (most - least if self.extra is None else min(self.extra, most - least)) + 1
        drawn = zlib.crc32(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()) % choices if choices > 1 else 0
        return min(self.canvas, (least + drawn) * self.block)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            ValueError: if a row does not fit the canvas.
        """
        rows = [self.row(feature) for feature in features]
        longest = max(len(ids) for ids, _, _ in rows)
        if longest > self.canvas:
            raise ValueError(
                f"a row of {longest} tokens, its end included, does not fit cutoff_len: {self.canvas}; set "
                "drop_overlong: true, or raise cutoff_len"
            )
        widths = [self.width(ids) for ids, _, _ in rows]
        shape = (len(rows), -(-max(widths) // self.multiple) * self.multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_ids[0], dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "maskable": torch.zeros(shape, dtype=torch.bool),
            "is_pad": torch.zeros(shape, dtype=torch.bool),
            "end": torch.tensor([end for _, _, end in rows]),
        }
        shown = batch["input_ids"].clone()
        for number, ((ids, maskable, _), width) in enumerate(zip(rows, widths, strict=True)):
            n, pads = len(ids), [self.pad_ids[i % len(self.pad_ids)] for i in range(width - len(ids))]
            batch["input_ids"][number, :width] = torch.tensor([*ids, *pads])
            shown[number, :width] = torch.tensor([*self.shown(features[number], ids), *pads])
            batch["attention_mask"][number, :width] = 1
            batch["maskable"][number, :width] = torch.tensor([*maskable, *[True] * len(pads)])
            batch["is_pad"][number, n:width] = True
        if not torch.equal(shown, batch["input_ids"]):
            batch["shown"] = shown
        return batch
