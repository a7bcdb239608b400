"""Recognises answers that cutoff_len has truncated, from the ids and labels of prepared rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .templates import DiffuLlamaTemplate


@dataclass(frozen=True)
class AnswerMarks:
    """How to tell a template's whole answers from truncated ones.

    Attributes:
        full_length: a text of at least this many tokens may have been truncated.
        n_added: labelled tokens that the template adds to an answer, and that remain if the whole answer is cut off.
        closing_id: the token that ends every whole answer, except for `n_after_closing` more; None if there is none.
        n_after_closing: tokens after `closing_id`.
        n_besides_prompt: tokens before an answer that are not its prompt, such as [bos] and [sep], for a template that
            truncates an answer only after dropping the whole prompt; None for other templates.
    """

    full_length: int
    n_added: int
    closing_id: int | None
    n_after_closing: int
    n_besides_prompt: int | None

    @classmethod
    def of(cls, template: Any, tokenizer: Any, *, cutoff_len: int, packed: bool) -> AnswerMarks:
        """Return the marks of a template, from two trial answers."""
        if isinstance(template, DiffuLlamaTemplate):
            return cls(cutoff_len - packed, 1, None, 0, 1 + int(tokenizer.bos_token_id is not None))
        trials = ([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "7"))
        last_ids = {(template.encode_oneturn(tokenizer, trial)[1] or [None])[-1] for trial in trials}
        closing_id = last_ids.pop() if len(last_ids) == 1 else None
        n_eos = int(template.efficient_eos)
        return cls(cutoff_len, n_eos, closing_id, n_eos, None)

    def count(self, ids: np.ndarray, is_label: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the numbers of answers, of truncated answers, and of answers truncated to nothing.

        Args:
            ids: [n] ids of all rows, concatenated.
            is_label: [n] whether a token has a label.
            starts: first index of each text.
        """
        if not len(starts):
            return np.zeros(3, dtype=np.int64)
        lengths = np.diff(starts, append=len(ids))
        n_labels = np.add.reduceat(is_label.astype(np.int64), starts)
        is_answer = (lengths > 1) | (n_labels > 0)
        is_full = is_answer & (lengths >= self.full_length)
        is_empty = is_full & (n_labels <= self.n_added)
        is_truncated = is_empty.copy()
        if self.n_besides_prompt is not None:
            label_index = np.where(is_label, np.arange(len(ids)), len(ids))
            first_label = np.minimum.reduceat(label_index, starts) - starts
            is_truncated |= is_full & (first_label <= self.n_besides_prompt)
        elif self.closing_id is not None:
            closing_index = np.maximum(starts + lengths - 1 - self.n_after_closing, starts)
            is_truncated |= is_full & (ids[closing_index] != self.closing_id)
        return np.array([is_answer.sum(), is_truncated.sum(), is_empty.sum()])
