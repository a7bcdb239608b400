"""Batches of prompts with responses, of which noise may fall on the responses alone; one to a row, or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the label of a token that is given


def is_target(ids: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """Return which tokens of a row a model learns to write: the labelled ones.

    Templates without a token for the end of an answer label the first token of the next turn with the end. With
    mask_history LLaMA-Factory also labels the first token of all so, where nothing ends.

    Args:
        ids: [length] int64.
        labels: [length] int64, `IGNORE` for what is given.
        starts: [length] bool, True for the first token of each document.
    Returns:
        [length] bool.
    """
    return (labels != IGNORE) & ~(starts & (labels != ids))


@dataclass(frozen=True)
class ResponseCollator:
    """Makes one rectangle of rows that hold `input_ids` and `labels`, and of packed rows also `position_ids`.

    The result holds
    - `input_ids`: [batch, length] int64, clean ids: the labels where tokens are labelled;
    - `shown`: the same shape, what the model sees of a clean token; left out where labels are the tokens themselves;
    - `attention_mask`: [batch, length] int64, 0 for padding that is neither seen nor noised;
    - `maskable`: [batch, length] bool, tokens that noise may fall on: the labelled ones, and the padding if it is a
      target;
    - of packed rows, `document`: [batch, length] int64, a number for each document, and `position_ids`: the same
      shape, from 0 in each document.

    Attributes:
        pad_id: of the padding.
        shift: whether logits at i - 1 predict token i; the first token of a packed document is then given, as nothing
            in its document predicts it.
        target_length: pad each row to so many tokens, which the model learns to write as it learns the text; None pads
            to the longest row with padding that the model does not see.
    Source: DiffuSeq (arXiv 2210.08933), section 3.1, for noise on the response alone; DiffuLLaMA (arXiv 2410.17891)
        and LLaDA (arXiv 2502.09992), section 2.3, for padding as a target.
    """

    pad_id: int
    shift: bool
    target_length: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            ValueError: if a row is longer than `target_length`, or packed rows should have targets behind them.
        """
        packed = "position_ids" in features[0]
        longest = max(len(feature["input_ids"]) for feature in features)
        length = longest if self.target_length is None else self.target_length
        if longest > length:
            raise ValueError(
                f"a row of {longest} tokens does not fit cutoff_len: {length}; prepare the data again, or raise "
                "cutoff_len"
            )
        if packed and self.target_length is not None:
            raise ValueError("packed rows have no padding to learn; set train_on_padding: false, or packing: false")
        shape = (len(features), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.int64),
            "attention_mask": torch.full(shape, int(self.target_length is not None), dtype=torch.int64),
            "maskable": torch.full(shape, self.target_length is not None, dtype=torch.bool),
        }
        shown = batch["input_ids"].clone()
        if packed:
            batch["document"] = torch.zeros(shape, dtype=torch.int64)
            batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        for row, feature in enumerate(features):
            n = len(feature["input_ids"])
            ids, labels = torch.as_tensor(feature["input_ids"]), torch.as_tensor(feature["labels"])
            starts = torch.as_tensor(feature["position_ids"]) == 0 if packed else torch.arange(n) == 0
            batch["maskable"][row, :n] = is_target(ids, labels, starts)
            batch["input_ids"][row, :n] = torch.where(batch["maskable"][row, :n], labels, ids)
            shown[row, :n] = ids
            if packed:
                # Not from attention_mask: upstream numbers the documents there under neat_packing only.
                position = torch.as_tensor(feature["position_ids"])
                batch["document"][row, :n], batch["position_ids"][row, :n] = (position == 0).cumsum(dim=0), position
                batch["attention_mask"][row, :n] = (torch.as_tensor(feature["attention_mask"]) > 0).long()
                batch["maskable"][row, :n] &= (position > 0) | (not self.shift)
            else:
                batch["attention_mask"][row, :n] = 1
        if not torch.equal(shown, batch["input_ids"]):
            batch["shown"] = shown
        return batch
