"""Collators: text after a start token, prompts with responses, and text of variable length with its padding.

Noise is limited to responses, one in a row or packed. With variable length a row is one document or response, its EOS,
and padding that the model learns to generate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def start_token_id(tokenizer: Any) -> int:
    """Return the id of the start token: the tokenizer's bos token, else its eos token.

    Raises:
        ValueError: if it has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    raise ValueError(
        "shift: true needs a start token, but the tokenizer has neither a bos nor an eos token; add one to the "
        "tokenizer, or set shift: false"
    )


class StartTokenCollator:
    """Prepends the start token to each row that lacks it, so that the first token of a text is learned too.

    With shift the token at position 0 is never predicted. Where a row is one text, that would always be the text's
    first token, and generation would begin with the second.
    """

    def __init__(
        self, inner: Callable[[list[dict[str, Any]]], Any], start_id: int, max_length: int | None = None
    ) -> None:
        """Wrap the collator `inner`; rows are truncated to `max_length` tokens."""
        self.inner = inner
        self.start_id = start_id
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch that `inner` makes of the rows with their start token."""
        rows = []
        for feature in features:
            ids = list(feature["input_ids"])
            mask = list(feature.get("attention_mask", [1] * len(ids)))
            if not ids or ids[0] != self.start_id:
                ids, mask = [self.start_id, *ids], [1, *mask]
            rows.append({"input_ids": ids[: self.max_length], "attention_mask": mask[: self.max_length]})
        return self.inner(rows)


def _integers(values: Any) -> Tensor:
    """Return a row's column as [length] int64; NumPy reads a list several times as fast as torch."""
    return values.long() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.int64))


IGNORE = -100  # the label of a token that is not scored


def is_target(ids: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """Return which tokens of a row are targets: those with a label.

    Templates without a token that ends an answer label the first token of the next turn with EOS. With mask_history
    LLaMA-Factory also labels the first token of a document so, where no answer ends; this token is not a target.

    Args:
        ids: [length] int64.
        labels: [length] int64, `IGNORE` for tokens that are not scored.
        starts: [length] bool, True for the first token of each document.
    Returns:
        [length] bool.
    """
    return (labels != IGNORE) & ~(starts & (labels != ids))


def response_start(is_target: Tensor, end: Tensor) -> Tensor:
    """Return the first position of the response that ends at `end`, the last run of targets before it.

    Args:
        is_target: [..., length] bool.
        end: [...] int64, position of EOS or the one after the response.
    Returns:
        [...] int64; `end` where the position before it is no target.
    """
    position = torch.arange(is_target.shape[-1], device=is_target.device)
    return torch.where(~is_target & (position < end[..., None]), position, -1).amax(dim=-1) + 1


@dataclass(frozen=True)
class ResponseCollator:
    """Collates rows with `input_ids` and `labels`; packed rows also have `position_ids`.

    The batch holds
    - `input_ids`: [batch, length] int64, clean ids; at labelled positions they are the labels;
    - `shown`: the same shape, the model's input for clean tokens; absent if it equals `input_ids`;
    - `attention_mask`: [batch, length] int64, 0 for padding that is neither attended to nor noised;
    - `maskable`: [batch, length] bool, tokens that may be noised: the labelled ones, and padding if it is a target;
    - for packed rows, `document`: [batch, length] int64, an index of the document, and `position_ids`: the same shape,
      from 0 in each document.

    Attributes:
        pad_id: id of padding.
        shift: whether logits at i - 1 predict token i; then the first token of a packed document is not maskable, as
            no token of its document predicts it.
        target_length: pad each row to this many tokens with padding that the model learns to generate; None pads to
            the longest row with padding that no token attends to.
        block_length: with `target_length`, pad only up to the next multiple of this many tokens, where the last block
            of a block model ends; None for a model with full attention.
    Source: DiffuSeq (arXiv 2210.08933), section 3.1, for noise on the response alone; DiffuLLaMA (arXiv 2410.17891)
        and LLaDA (arXiv 2502.09992), section 2.3, for padding as a target.
    """

    pad_id: int
    shift: bool
    target_length: int | None = None
    block_length: int | None = None

    def _width(self, n: int) -> int:
        """Return the length of a row of n tokens with the padding that the model learns to generate."""
        if self.target_length is None:
            return n
        block = self.block_length or self.target_length
        return min(-(-n // block) * block, self.target_length)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            ValueError: if a row is longer than `target_length`, or `target_length` is set for packed rows.
        """
        packed = "position_ids" in features[0]
        longest = max(len(feature["input_ids"]) for feature in features)
        if self.target_length is not None and longest > self.target_length:
            raise ValueError(
                f"a row of {longest} tokens does not fit cutoff_len: {self.target_length}; prepare the data again, or "
                "raise cutoff_len"
            )
        if packed and self.target_length is not None:
            raise ValueError(
                "train_on_padding: true needs rows without packing; set packing: false, or train_on_padding: false"
            )
        shape = (len(features), self._width(longest))
        batch = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "maskable": torch.zeros(shape, dtype=torch.bool),
        }
        shown = batch["input_ids"].clone()
        if packed:
            batch["document"] = torch.zeros(shape, dtype=torch.int64)
            batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        for row, feature in enumerate(features):
            n = len(feature["input_ids"])
            ids, labels = _integers(feature["input_ids"]), _integers(feature["labels"])
            position = _integers(feature["position_ids"]) if packed else torch.arange(n)
            starts = position == 0
            batch["maskable"][row, :n] = is_target(ids, labels, starts)
            batch["input_ids"][row, :n] = torch.where(batch["maskable"][row, :n], labels, ids)
            shown[row, :n] = ids
            if packed:
                # Not from attention_mask: LLaMA-Factory numbers the documents there with neat_packing only.
                batch["document"][row, :n], batch["position_ids"][row, :n] = starts.cumsum(dim=0), position
                batch["attention_mask"][row, :n] = (_integers(feature["attention_mask"]) > 0).long()
                batch["maskable"][row, :n] &= (position > 0) | (not self.shift)
            else:
                batch["attention_mask"][row, : self._width(n)] = 1
                batch["maskable"][row, n : self._width(n)] = True
        if not torch.equal(shown, batch["input_ids"]):
            batch["shown"] = shown
        return batch


@dataclass(frozen=True)
class VariableLengthCollator:
    """Collates rows with `input_ids` and, for responses, `labels` into canvases of variable length.

    A row is `[start] text eos pad pad ...` up to the length of its canvas (`width`). EOS, padding and labelled tokens
    inside the canvas are targets; positions outside are neither attended to nor noised. The batch holds
    - `input_ids`: [batch, length] int64, clean ids; at labelled positions they are the labels;
    - `shown`: the same shape, the model's input for clean tokens; absent if it equals `input_ids`;
    - `attention_mask`: [batch, length] int64, 0 outside the canvas;
    - `maskable`: [batch, length] bool, tokens that may be noised;
    - `is_pad`: [batch, length] bool, padding inside the canvas;
    - `end`: [batch] int64, position of EOS.

    Attributes:
        eos_id: EOS; appended to a row that lacks it.
        pad_ids: padding tokens after EOS, repeated in turn: EOS itself (`eos_eos`), one token (`eos_pad`), or several
            (`rainbow`).
        canvas: largest number of tokens in a row.
        start_id: token to prepend to a document that lacks it; None for responses, and where none is needed.
        block: round the length of a canvas up to a multiple of this many tokens; None uses `canvas` for every row.
        extra: largest number of blocks in a canvas beyond those that the row needs; None allows as many as fit
            `canvas`. The number is a hash of the row's tokens, so it is the same in every epoch, run and process.
            Without extra blocks a model would learn to read the length of a text off the length of its canvas.
        stop_ids: further tokens that end a response, such as a template's stop words.
    Source: Rainbow Padding (arXiv 2510.03680) for `rainbow`; variable-length DiffuGPT for the other two.
    """

    eos_id: int
    pad_ids: tuple[int, ...]
    canvas: int
    start_id: int | None = None
    block: int | None = None
    extra: int | None = None
    stop_ids: tuple[int, ...] = ()

    def row(self, feature: Mapping[str, Any]) -> tuple[list[int], list[bool], int]:
        """Return a row's clean ids up to EOS, which of them are maskable, and the position of EOS.

        Tokens that a template writes after the EOS of the last response, such as ChatML's line break, are dropped.
        """
        ids = list(feature["input_ids"])
        if "labels" in feature:
            labels = _integers(feature["labels"])
            maskable = is_target(_integers(ids), labels, torch.arange(len(ids)) == 0).tolist()
            ids = [
                label if is_labelled else token
                for token, label, is_labelled in zip(ids, feature["labels"], maskable, strict=True)
            ]
        else:
            if self.start_id is not None and (not ids or ids[0] != self.start_id):
                ids = [self.start_id, *ids]
            maskable = [True] * len(ids)
        first = 0 if self.start_id is None else 1  # the start token may be the same as EOS
        eos_ids = {self.eos_id, *(self.stop_ids if "labels" in feature else ())}
        end = max((n for n in range(first, len(ids)) if maskable[n] and ids[n] in eos_ids), default=None)
        if end is not None and (end == len(ids) - 1 or ("labels" in feature and all(maskable[end:]))):
            return ids[: end + 1], maskable[: end + 1], end
        return [*ids, self.eos_id], [*maskable, True], len(ids)

    def shown(self, feature: Mapping[str, Any], ids: list[int]) -> list[int]:
        """Return the model's input for `ids`, the clean ids that `row` returned."""
        return [*feature["input_ids"], *ids[len(feature["input_ids"]) :]][: len(ids)] if "labels" in feature else ids

    def fits(self, feature: Mapping[str, Any]) -> bool:
        """Tell whether a row with its EOS fits `canvas`."""
        return len(self.row(feature)[0]) <= self.canvas

    def width(self, ids: Sequence[int]) -> int:
        """Return the length of the canvas of a row; `ids` include EOS."""
        if self.block is None:
            return self.canvas
        n_blocks, max_blocks = -(-len(ids) // self.block), -(-self.canvas // self.block)
        max_extra = max_blocks - n_blocks if self.extra is None else min(self.extra, max_blocks - n_blocks)
        choices = max_extra + 1
        n_extra = zlib.crc32(np.array(ids, dtype=np.int64).tobytes()) % choices if choices > 1 else 0
        return min(self.canvas, (n_blocks + n_extra) * self.block)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            ValueError: if a row does not fit the canvas.
        """
        rows = [self.row(feature) for feature in features]
        longest = max(len(ids) for ids, _, _ in rows)
        if longest > self.canvas:
            raise ValueError(
                f"a row of {longest} tokens, EOS included, does not fit cutoff_len: {self.canvas}; set "
                "drop_overlong: true, or raise cutoff_len"
            )
        widths = [self.width(ids) for ids, _, _ in rows]
        shape = (len(rows), max(widths))
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
            batch["input_ids"][number, :width] = _integers([*ids, *pads])
            shown[number, :width] = _integers([*self.shown(features[number], ids), *pads])
            batch["attention_mask"][number, :width] = 1
            batch["maskable"][number, :width] = torch.from_numpy(np.array([*maskable, *[True] * len(pads)]))
            batch["is_pad"][number, n:width] = True
        if not torch.equal(shown, batch["input_ids"]):
            batch["shown"] = shown
        return batch
