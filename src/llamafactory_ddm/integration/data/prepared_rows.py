"""Checks of prepared rows before the model is loaded: they hold tokens to learn, and fit this run.

Of a large data set evenly spread rows are checked, of a streamed one the first rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from ...data.collators import IGNORE
from ...modeling.special_tokens import ResolvedMaskToken
from ..logs import get_logger
from .faults import explain_dataset_errors
from .templates import DiffuLlamaTemplate

logger = get_logger(__name__)
_MOST, _AT_ONCE, _STREAMED = 20_000, 2_000, 1_000  # rows
_TO_READ = 1_000_000  # tokens that are read as text
_COMMON = 1e-4  # of the tokens
_COLUMNS = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True)
class RowRules:
    """The requirements on the rows of a run.

    Attributes:
        source: their source in the YAML: `dataset: x`, or `tokenized_path: x` if it is opened.
        stage: `ddm` or `ddm-sft`.
        is_opened: whether an earlier run prepared them.
        packed: whether a row holds several texts.
        variable: whether rows have variable length.
        cutoff_len: largest number of tokens of a text.
        positions: number of positions of the model; None for no limit.
        tokenizer: the run's tokenizer.
        mask: the run's mask token.
        controls: spellings of the mask and padding tokens that are ordinary characters in texts.
        allow_common_mask: whether the mask token may be one that texts use.
        answers: how to tell whole answers from truncated ones; None if that is unknown.
    """

    source: str
    stage: str
    is_opened: bool
    packed: bool
    variable: bool
    cutoff_len: int
    positions: int | None
    tokenizer: Any
    mask: ResolvedMaskToken
    controls: list[str]
    allow_common_mask: bool
    answers: AnswerMarks | None

    @property
    def row_len(self) -> int:
        """Return the largest number of tokens in a row: the YAML's cutoff_len, which packed answers are padded to."""
        return self.cutoff_len + (self.packed and self.stage == "ddm-sft")


@dataclass(frozen=True)
class AnswerMarks:
    """How to tell a template's whole answers from those that were truncated at cutoff_len.

    Attributes:
        added: number of labelled tokens in a row whose answer was cut off completely.
        closing: the token that ends every whole answer, followed by `behind` more; None if there is none.
        behind: number of tokens after `closing`.
        before: number of tokens before an answer that are not its prompt, for a template that truncates an answer only
            after dropping the whole prompt; None for other templates.
        longest: a text of at least this many tokens may have been truncated.
    """

    added: int
    closing: int | None
    behind: int
    before: int | None
    longest: int

    @classmethod
    def of(cls, template: Any, tokenizer: Any, *, cutoff_len: int, packed: bool) -> AnswerMarks:
        """Return the marks of a template, from two trial answers."""
        if isinstance(template, DiffuLlamaTemplate):
            return cls(1, None, 0, 1 + int(tokenizer.bos_token_id is not None), cutoff_len - packed)
        trials = ([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "7"))
        ends = {(template.encode_oneturn(tokenizer, trial)[1] or [None])[-1] for trial in trials}
        closing = ends.pop() if len(ends) == 1 else None
        behind = int(template.efficient_eos)
        return cls(behind, closing, behind, None, cutoff_len)


@dataclass
class _Counts:
    """Counts over the checked rows; `learnt` marks the ids that are a target somewhere."""

    learnt: np.ndarray
    rows: int = 0
    tokens: int = 0
    masks: int = 0
    with_mask: int = 0
    longest: int = 0
    last_position: int = 0
    lengths: set[int] = field(default_factory=set)
    answers: int = 0
    cut: int = 0
    gone: int = 0
    read: int = 0
    with_text: int = 0


def check_prepared(dataset_module: dict[str, Any], rules: RowRules, data_args: Any, training_args: Any) -> None:
    """Check the rows of a run.

    Args:
        dataset_module: LLaMA-Factory's; of a streamed data set the first rows are read.
        rules: the requirements.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
    Raises:
        ValueError: if the rows were prepared for another run, hold no token to learn, no answer is whole, or texts use
            the mask token.
    """
    for name, rows, trains in _parts(dataset_module, training_args):
        if rows is None or (hasattr(rows, "__len__") and not len(rows)):
            continue
        if not hasattr(rows, "__len__"):
            with explain_dataset_errors(data_args):
                rows = _first(rows)
        counts = _count(rows, rules)
        if counts.rows:
            _check_lengths(counts, rules)
            _check_learnable(rows, counts, rules, name)
            _check_answers(counts, rules, name, trains=trains)
            _check_mask(counts, rules, name, trains=trains)
            if counts.with_text:
                logger.warning_rank0(
                    f"{' or '.join(map(repr, rules.controls))} stands in {counts.with_text} of {counts.read} rows "
                    f"({rules.source}, {name}): there it is read as plain characters, not as the mask token or a pad."
                )


def _parts(dataset_module: dict[str, Any], training_args: Any) -> list[tuple[str, Any, bool]]:
    """Return the data sets that this run uses: name, rows, and whether they are training data."""
    prepares = not (training_args.do_train or training_args.do_eval or training_args.do_predict)
    parts: list[tuple[str, Any, bool]] = []
    if training_args.do_train or prepares:
        parts.append(("train", dataset_module.get("train_dataset"), True))
    if training_args.do_eval or prepares:
        rows = dataset_module.get("eval_dataset")
        named = rows if isinstance(rows, dict) else {"": rows}
        parts += [(f"evaluation {name}".strip(), part, False) for name, part in named.items()]
    return parts


def check_columns(dataset_module: dict[str, Any], rules: RowRules, training_args: Any) -> None:
    """Check that opened rows have the splits and columns that this run reads.

    Raises:
        ValueError: if a split or a column is missing, or a column belongs to another stage or format.
    """
    for name, rows, trains in _parts(dataset_module, training_args):
        if rows is not None:
            _check_columns(rows, rules)
        elif training_args.do_train if trains else training_args.do_eval:
            raise ValueError(
                f"{rules.source} has no split for {name}; LLaMA-Factory reads train and validation (or "
                f"validation_NAME). Prepare it again with {'dataset' if trains else 'eval_dataset or val_size'}"
            )


def _check_columns(rows: Any, rules: RowRules) -> None:
    columns = rows.column_names
    if columns is None:
        return
    again = "; prepare them again in another folder, or name that one"
    if "input_ids" not in columns:
        raise ValueError(f"{rules.source} has no input_ids but {', '.join(columns)}, so it is not tokenised{again}")
    answers = rules.stage == "ddm-sft"
    if answers and "labels" not in columns:
        raise ValueError(
            f"{rules.source} has no labels, which say what the response is: it was made for stage: ddm, and stage is "
            f"{rules.stage}{again}"
        )
    if not answers and "labels" in columns:
        raise ValueError(
            f"{rules.source} has labels, which tell responses from prompts: it was made for stage: ddm-sft, and stage "
            f"is {rules.stage}{again}, or take the column out"
        )
    if answers and ("position_ids" in columns) != rules.packed:
        was = "position_ids" in columns
        raise ValueError(
            f"{rules.source} was made with packing: {str(was).lower()}, and packing is {str(not was).lower()}; set "
            "packing as it was then, or prepare the rows again"
        )


def _count(rows: Any, rules: RowRules) -> _Counts:
    n_ids = max(max(rules.tokenizer.get_vocab().values()), rules.mask.id) + 1
    counts = _Counts(np.zeros(n_ids, dtype=bool))
    for table in _tables(rows):
        _add(counts, table, rules)
        if not counts.read and rules.controls:
            _read(counts, table, rules)
    return counts


def _read(counts: _Counts, table: pyarrow.Table, rules: RowRules) -> None:
    """Count the rows whose text spells a control token; the token's own id does not count."""
    control = {int(index) for index in rules.tokenizer.convert_tokens_to_ids(rules.controls)}
    left = _TO_READ
    for ids in table["input_ids"]:
        if left <= 0:
            break
        letters = [index for index in ids.as_py() if index not in control]
        left -= len(letters)
        text = rules.tokenizer.decode(letters)
        counts.with_text += any(token in text for token in rules.controls)
        counts.read += 1


def _first(rows: Any) -> list[dict[str, Any]]:
    """Return the first rows of a streamed data set."""
    return [{key: row[key] for key in _COLUMNS if key in row} for row in itertools.islice(rows, _STREAMED)]


def _tables(rows: Any, *, everything: bool = False) -> Iterator[pyarrow.Table]:
    """Yield the rows to check, in tables."""
    if isinstance(rows, list):
        if rows:
            yield pyarrow.Table.from_pylist(rows)
        return
    step = 1 if everything else -(-len(rows) // _MOST)
    if step > 1:
        rows = rows.select(range(0, len(rows), step))
    rows = rows.with_format("arrow")
    for low in range(0, len(rows), _AT_ONCE):
        table = rows[low : low + _AT_ONCE]
        yield table.select([key for key in _COLUMNS if key in table.column_names])


def _flat(table: pyarrow.Table, key: str, rules: RowRules) -> np.ndarray:
    """Return the numbers of all rows, concatenated."""
    column = table[key]
    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    numbers = pyarrow.compute.list_flatten(column) if is_list else column
    if not is_list or not pyarrow.types.is_integer(kind.value_type) or column.null_count or numbers.null_count:
        raise ValueError(
            f"{rules.source} holds {key} of type {kind}, where a list of integers is expected for each row"
        )
    flat: np.ndarray = numbers.to_numpy()
    return flat


def _add(counts: _Counts, table: pyarrow.Table, rules: RowRules) -> None:
    ids = _flat(table, "input_ids", rules)
    lengths = pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
    _check_ids(ids, len(counts.learnt), rules)
    counts.rows += len(lengths)
    counts.tokens += len(ids)
    counts.longest = max(counts.longest, int(lengths.max(initial=0)))
    counts.lengths |= set(lengths.tolist())
    is_mask = ids == rules.mask.id
    row = np.repeat(np.arange(len(lengths)), lengths)
    counts.masks += int(is_mask.sum())
    counts.with_mask += len(np.unique(row[is_mask]))
    learnt = ~is_mask
    if "labels" in table.column_names:
        labels = _flat(table, "labels", rules)
        if len(labels) != len(ids):
            raise ValueError(f"{rules.source} holds rows with {len(ids)} ids and {len(labels)} labels in all")
        given = labels == IGNORE
        _check_ids(labels[~given], len(counts.learnt), rules)
        learnt = ~given & (labels != rules.mask.id)
        starts = _starts(table, ids, lengths, rules)
        _add_answers(counts, ids, given, starts, rules)
        counts.learnt[labels[learnt]] = True
    else:
        counts.learnt[ids[learnt]] = True
    if "position_ids" in table.column_names:
        counts.last_position = max(counts.last_position, int(_flat(table, "position_ids", rules).max(initial=0)))


def _check_ids(ids: np.ndarray, n_ids: int, rules: RowRules) -> None:
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= n_ids:
        raise ValueError(
            f"{rules.source} holds the id {low if low < 0 else high}, but the ids of the tokenizer are 0 to "
            f"{n_ids - 1}: it was made with another one; prepare it again with the tokenizer of model_name_or_path"
        )


def _starts(table: pyarrow.Table, ids: np.ndarray, lengths: np.ndarray, rules: RowRules) -> np.ndarray:
    """Return the first indices of the texts; in packed rows each padding token counts as one."""
    first = np.cumsum(lengths) - lengths
    if "position_ids" not in table.column_names:
        return first[lengths > 0]
    return np.flatnonzero(_flat(table, "position_ids", rules) == 0)


def _add_answers(counts: _Counts, ids: np.ndarray, given: np.ndarray, starts: np.ndarray, rules: RowRules) -> None:
    """Count the texts whose answers were truncated."""
    marks = rules.answers
    if not len(starts) or marks is None:
        return
    lengths = np.diff(starts, append=len(ids))
    labelled = np.add.reduceat((~given).astype(np.int64), starts)
    is_text = (lengths > 1) | (labelled > 0)
    full = is_text & (lengths >= marks.longest)
    gone = full & (labelled <= marks.added)
    cut = gone.copy()
    if marks.before is not None:
        first = np.minimum.reduceat(np.where(given, len(ids), np.arange(len(ids))), starts) - starts
        cut |= full & (first <= marks.before)
    elif marks.closing is not None:
        last = np.maximum(starts + lengths - 1 - marks.behind, starts)
        cut |= full & (ids[last] != marks.closing)
    counts.answers += int(is_text.sum())
    counts.gone += int(gone.sum())
    counts.cut += int(cut.sum())


def _check_lengths(counts: _Counts, rules: RowRules) -> None:
    if not rules.is_opened or rules.variable:  # rows without room for EOS are dropped later
        return
    needed = counts.last_position + 1 if rules.row_len > rules.cutoff_len else counts.longest
    if rules.positions is not None and needed > rules.positions:
        raise ValueError(
            f"{rules.source} holds a row of {needed} tokens, more than the model's {rules.positions} positions; "
            f"prepare it again with cutoff_len: {rules.positions} or less"
        )
    if counts.longest > rules.row_len:
        raise ValueError(
            f"{rules.source} holds a row of {counts.longest} tokens, more than cutoff_len: {rules.row_len}; "
            "prepare it again, or set cutoff_len as it was then"
        )
    if rules.stage == "ddm" and rules.packed and len(counts.lengths) > 2:  # a last one may be short
        raise ValueError(
            f"{rules.source} holds rows of {min(counts.lengths)} to {counts.longest} tokens, so it was made with "
            "packing: false, and packing is true; set packing: false, or prepare it again"
        )


def _check_learnable(rows: Any, counts: _Counts, rules: RowRules, name: str) -> None:
    """Check that a row holds a target that is neither a special token nor white space."""
    if _has_text(counts, rules):
        return
    if counts.rows < len(rows):  # check all rows before raising
        for table in _tables(rows, everything=True):
            _add(counts, table, rules)
            if _has_text(counts, rules):
                return
    looked_at = f"none of its {'first ' if isinstance(rows, list) else ''}{len(rows)} rows"
    if counts.gone:
        raise ValueError(_cut_away(counts, rules, name))
    what = "every response" if rules.stage == "ddm-sft" else "every text"
    raise ValueError(
        f"{rules.source} ({name}): {looked_at} holds a token to learn, as {what} is empty; check the data, and the "
        "columns that their entry in dataset_info.json names"
    )


def _has_text(counts: _Counts, rules: RowRules) -> bool:
    special = {*rules.tokenizer.all_special_ids, rules.mask.id}
    ids = (index for index in np.flatnonzero(counts.learnt).tolist() if index not in special)
    return any(rules.tokenizer.decode([index]).strip() for index in ids)


def _check_answers(counts: _Counts, rules: RowRules, name: str, *, trains: bool) -> None:
    if not counts.cut:
        return
    said = _cut_away(counts, rules, name)
    if trains and counts.cut == counts.answers:
        raise ValueError(said)
    logger.warning_rank0(said)


def _cut_away(counts: _Counts, rules: RowRules, name: str) -> str:
    gone = f", {counts.gone} of them to the last token" if counts.gone else ""
    return (
        f"cutoff_len: {rules.row_len} cuts the answers of {counts.cut} of {counts.answers} examples short{gone} "
        f"({rules.source}, {name}); raise cutoff_len"
    )


def _check_mask(counts: _Counts, rules: RowRules, name: str, *, trains: bool) -> None:
    if not counts.masks:
        return
    mask = rules.mask
    said = (
        f"mask_token: {mask.token!r} (id {mask.id}) occurs {counts.masks} times among {counts.tokens} tokens, in "
        f"{counts.with_mask} of {counts.rows} rows that were checked ({rules.source}, {name})"
    )
    if trains and not (mask.is_trained or rules.allow_common_mask) and counts.masks > _COMMON * counts.tokens:
        raise ValueError(
            f"{said}: the model could never generate this token. Name a token that texts do not use, such as a "
            "new one, '<|mask|>', or set allow_common_mask_token: true"
        )
    logger.warning_rank0(f"{said}; there it is treated as fixed: neither noised nor scored.")
