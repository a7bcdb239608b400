"""Counts over prepared rows: tokens, row lengths, target ids, mask tokens and truncated answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from ...data.collators import IGNORE
from .truncated_answers import AnswerMarks

_MAX_ROWS, _ROWS_PER_TABLE, _STREAMED_ROWS = 20_000, 2_000, 1_000
_MAX_DECODED = 1_000_000  # tokens
_COLUMNS = ("input_ids", "labels", "position_ids")


def first_rows(rows: Any) -> list[dict[str, Any]]:
    """Return the first rows of a streamed data set."""
    return [{key: row[key] for key in _COLUMNS if key in row} for row in itertools.islice(rows, _STREAMED_ROWS)]


def row_tables(rows: Any, *, every_row: bool = False) -> Iterator[pyarrow.Table]:
    """Yield rows in tables: of a large data set evenly spread ones, unless `every_row`; of a list all."""
    if isinstance(rows, list):
        if rows:
            yield pyarrow.Table.from_pylist(rows)
        return
    step = 1 if every_row else -(-len(rows) // _MAX_ROWS)
    if step > 1:
        rows = rows.select(range(0, len(rows), step))
    rows = rows.with_format("arrow")
    for start in range(0, len(rows), _ROWS_PER_TABLE):
        table = rows[start : start + _ROWS_PER_TABLE]
        yield table.select([key for key in _COLUMNS if key in table.column_names])


@dataclass
class RowCounts:
    """Counts over the rows that were added.

    Attributes:
        source: the YAML key of the rows and its value, for messages.
        mask_id: id of the mask token.
        answer_marks: how to recognise truncated answers; None if that is unknown.
        is_target: [n_ids] whether an id is a target in some row.
        n_rows: rows.
        n_tokens: tokens.
        n_masks: mask tokens.
        n_rows_with_mask: rows with a mask token.
        row_lengths: the lengths that occur.
        max_position: largest of position_ids.
        n_answers: texts with an answer.
        n_truncated: truncated answers.
        n_empty: answers truncated to nothing.
        n_decoded: rows that were decoded to look for control tokens.
        n_with_control: decoded rows whose text spells a control token.
    """

    source: str
    mask_id: int
    answer_marks: AnswerMarks | None
    is_target: np.ndarray
    n_rows: int = 0
    n_tokens: int = 0
    n_masks: int = 0
    n_rows_with_mask: int = 0
    row_lengths: set[int] = field(default_factory=set)
    max_position: int = 0
    n_answers: int = 0
    n_truncated: int = 0
    n_empty: int = 0
    n_decoded: int = 0
    n_with_control: int = 0

    def add(self, table: pyarrow.Table) -> None:
        """Count the rows of a table.

        Raises:
            ValueError: if a column holds no lists of integers, an id is out of range, or a token has no label.
        """
        ids = self._flat(table, "input_ids")
        lengths = pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
        self._check_ids(ids)
        is_mask = ids == self.mask_id
        row_index = np.repeat(np.arange(len(lengths)), lengths)
        self.n_rows += len(lengths)
        self.n_tokens += len(ids)
        self.row_lengths |= set(lengths.tolist())
        self.n_masks += int(is_mask.sum())
        self.n_rows_with_mask += len(np.unique(row_index[is_mask]))
        starts = (np.cumsum(lengths) - lengths)[lengths > 0]
        if "position_ids" in table.column_names:  # packed; each padding token counts as a text
            position_ids = self._flat(table, "position_ids")
            starts = np.flatnonzero(position_ids == 0)
            self.max_position = max(self.max_position, int(position_ids.max(initial=0)))
        if "labels" not in table.column_names:
            self.is_target[ids[~is_mask]] = True
            return
        labels = self._flat(table, "labels")
        if len(labels) != len(ids):
            raise ValueError(
                f"{self.source} has rows with {len(ids)} input_ids and {len(labels)} labels in total; each token "
                "needs one label"
            )
        is_label = labels != IGNORE
        self._check_ids(labels[is_label])
        self.is_target[labels[is_label & (labels != self.mask_id)]] = True
        if self.answer_marks is not None:
            n_answers, n_truncated, n_empty = self.answer_marks.count(ids, is_label, starts).tolist()
            self.n_answers += n_answers
            self.n_truncated += n_truncated
            self.n_empty += n_empty

    def add_controls(self, table: pyarrow.Table, tokenizer: Any, control_tokens: list[str]) -> None:
        """Count the rows whose text spells a control token; the token's own id does not count."""
        control_ids = {int(index) for index in tokenizer.convert_tokens_to_ids(control_tokens)}
        n_left = _MAX_DECODED
        for row in table["input_ids"]:
            if n_left <= 0:
                break
            text_ids = [index for index in row.as_py() if index not in control_ids]
            n_left -= len(text_ids)
            text = tokenizer.decode(text_ids)
            self.n_with_control += any(token in text for token in control_tokens)
            self.n_decoded += 1

    def _flat(self, table: pyarrow.Table, key: str) -> np.ndarray:
        """Return a column's integers, the rows concatenated."""
        column = table[key]
        column_type = column.type
        is_list = pyarrow.types.is_list(column_type) or pyarrow.types.is_large_list(column_type)
        integers = pyarrow.compute.list_flatten(column) if is_list else column
        if (
            not is_list
            or not pyarrow.types.is_integer(column_type.value_type)
            or column.null_count
            or integers.null_count
        ):
            raise ValueError(
                f"{self.source} has {key} of type {column_type}, expected a list of integers in each row; prepare the "
                "rows again"
            )
        flat: np.ndarray = integers.to_numpy()
        return flat

    def _check_ids(self, ids: np.ndarray) -> None:
        smallest, largest, n_ids = int(ids.min(initial=0)), int(ids.max(initial=0)), len(self.is_target)
        if smallest < 0 or largest >= n_ids:
            raise ValueError(
                f"{self.source} has the id {smallest if smallest < 0 else largest}, but the tokenizer's ids are 0 to "
                f"{n_ids - 1}; prepare the rows again with the tokenizer of model_name_or_path"
            )
