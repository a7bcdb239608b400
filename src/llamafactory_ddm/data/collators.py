"""Batches of texts that all begin where generation begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def start_token_id(tokenizer: Any) -> int:
    """Return the token that a text starts with: the tokenizer's bos, else its eos.

    Raises:
        ValueError: if it has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    raise ValueError(
        "with shift: true a text starts with a given token, but the tokenizer has neither a bos nor an eos token; "
        "add one to the tokenizer, or set shift: false"
    )


class StartTokenCollator:
    """Puts the start token before each row that lacks it, so that the first token of a text is learned too.

    With shift the token at position 0 is never predicted. In packed rows that is one token of many; where a row is one
    text it would always be the first, and generation, which starts from the start token, would begin with the second.
    """

    def __init__(
        self, inner: Callable[[list[dict[str, Any]]], Any], start_id: int, max_length: int | None = None
    ) -> None:
        """Wrap `inner`; rows longer than `max_length` tokens lose their end."""
        self.inner = inner
        self.start_id = start_id
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Return what `inner` makes of the rows with their start token."""
        rows = []
        for feature in features:
            ids = list(feature["input_ids"])
            mask = list(feature.get("attention_mask", [1] * len(ids)))
            if not ids or ids[0] != self.start_id:
                ids, mask = [self.start_id, *ids], [1, *mask]
            rows.append({"input_ids": ids[: self.max_length], "attention_mask": mask[: self.max_length]})
        return self.inner(rows)
