"""Checks of prepared rows before the model is loaded: they hold tokens to learn, and match this run.

Of a large data set evenly spread rows are checked, of a streamed one the first rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...modeling.special_tokens import ResolvedMaskToken
from ..logs import get_logger
from .faults import explain_dataset_errors
from .row_counts import RowCounts, first_rows, row_tables
from .truncated_answers import AnswerMarks

logger = get_logger(__name__)
_COMMON_MASK = 1e-4  # fraction of the tokens


@dataclass(frozen=True)
class RowRules:
    """The requirements on the rows of a run.

    Attributes:
        source: the YAML key of the rows and its value, for messages: `dataset: x` or `tokenized_path: x`.
        stage: `ddm` or `ddm-sft`.
        is_prepared: whether an earlier run prepared the rows.
        packing: whether a row holds several texts.
        variable_length: whether rows have variable length.
        cutoff_len: largest number of tokens of a text.
        max_positions: number of positions of the model; None for no limit.
        tokenizer: the run's tokenizer.
        mask: the run's mask token.
        control_tokens: spellings of the mask and padding tokens that are encoded as ordinary characters in texts.
        allow_common_mask: whether the mask token may be one that texts use.
        answer_marks: how to recognise truncated answers; None if that is unknown.
    """

    source: str
    stage: str
    is_prepared: bool
    packing: bool
    variable_length: bool
    cutoff_len: int
    max_positions: int | None
    tokenizer: Any
    mask: ResolvedMaskToken
    control_tokens: list[str]
    allow_common_mask: bool
    answer_marks: AnswerMarks | None

    @property
    def row_len(self) -> int:
        """Return the largest number of tokens in a row: the YAML's cutoff_len, which packed answers are padded to."""
        return self.cutoff_len + (self.packing and self.stage == "ddm-sft")


def check_rows(dataset_module: dict[str, Any], rules: RowRules, data_args: Any, training_args: Any) -> None:
    """Check the rows of a run.

    Args:
        dataset_module: LLaMA-Factory's; of a streamed data set the first rows are read.
        rules: the requirements.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
    Raises:
        ValueError: if the rows were prepared for another run, hold no token to learn, all answers are truncated, or
            texts use the mask token.
    """
    for name, rows, trains in _splits(dataset_module, training_args):
        if rows is None or (hasattr(rows, "__len__") and not len(rows)):
            continue
        if not hasattr(rows, "__len__"):
            with explain_dataset_errors(data_args):
                rows = first_rows(rows)
        counts = _count(rows, rules)
        if counts.n_rows:
            _check_lengths(counts, rules)
            _check_learnable(rows, counts, rules, name)
            _check_answers(counts, rules, name, trains=trains)
            _check_mask(counts, rules, name, trains=trains)
            if counts.n_with_control:
                logger.warning_rank0(
                    f"{counts.n_with_control} of {counts.n_decoded} rows ({rules.source}, {name}) spell out "
                    f"{' or '.join(map(repr, rules.control_tokens))}, which is encoded there as ordinary text, not as "
                    "the mask token or a padding token."
                )


def check_columns(dataset_module: dict[str, Any], rules: RowRules, training_args: Any) -> None:
    """Check that prepared rows have the splits and columns that this run reads.

    Raises:
        ValueError: if a split or a column is missing, or a column belongs to another stage or format.
    """
    for _, rows, trains in _splits(dataset_module, training_args):
        if rows is not None:
            _check_columns(rows, rules)
        elif training_args.do_train if trains else training_args.do_eval:
            split, key = ("train", "dataset") if trains else ("validation", "eval_dataset or val_size")
            raise ValueError(f"{rules.source} has no split {split}; prepare it again with {key}")


def _splits(dataset_module: dict[str, Any], training_args: Any) -> list[tuple[str, Any, bool]]:
    """Return the data sets that this run uses: name, rows, and whether they are training data."""
    prepares = not (training_args.do_train or training_args.do_eval or training_args.do_predict)
    splits: list[tuple[str, Any, bool]] = []
    if training_args.do_train or prepares:
        splits.append(("train", dataset_module.get("train_dataset"), True))
    if training_args.do_eval or prepares:
        evaluated = dataset_module.get("eval_dataset")
        by_name = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        splits += [(f"evaluation {name}".strip(), rows, False) for name, rows in by_name.items()]
    return splits


def _check_columns(rows: Any, rules: RowRules) -> None:
    columns = rows.column_names
    if columns is None:
        return
    prepare_again = "prepare the rows again in another folder"
    if "input_ids" not in columns:
        raise ValueError(
            f"{rules.source} has the columns {', '.join(columns)} and no input_ids, so it is not tokenised; "
            f"{prepare_again}"
        )
    finetunes = rules.stage == "ddm-sft"
    if finetunes and "labels" not in columns:
        raise ValueError(
            f"{rules.source} has no labels, so it was prepared with stage: ddm, but stage is {rules.stage}; "
            f"{prepare_again}"
        )
    if not finetunes and "labels" in columns:
        raise ValueError(
            f"{rules.source} has labels, so it was prepared with stage: ddm-sft, but stage is {rules.stage}; "
            f"{prepare_again}, or remove the column"
        )
    if finetunes and ("position_ids" in columns) != rules.packing:
        stored = str("position_ids" in columns).lower()
        raise ValueError(
            f"{rules.source} was prepared with packing: {stored}, but packing is {str(rules.packing).lower()}; set "
            f"packing: {stored}, or {prepare_again}"
        )


def _count(rows: Any, rules: RowRules) -> RowCounts:
    n_ids = max(max(rules.tokenizer.get_vocab().values()), rules.mask.id) + 1
    counts = RowCounts(rules.source, rules.mask.id, rules.answer_marks, np.zeros(n_ids, dtype=bool))
    for table in row_tables(rows):
        counts.add(table)
        if not counts.n_decoded and rules.control_tokens:
            counts.add_controls(table, rules.tokenizer, rules.control_tokens)
    return counts


def _check_lengths(counts: RowCounts, rules: RowRules) -> None:
    if not rules.is_prepared or rules.variable_length:  # rows without room for EOS are dropped later
        return
    longest = max(counts.row_lengths)
    n_positions = counts.max_position + 1 if rules.row_len > rules.cutoff_len else longest
    if rules.max_positions is not None and n_positions > rules.max_positions:
        raise ValueError(
            f"{rules.source} has a row of {n_positions} tokens, but the model has {rules.max_positions} positions; "
            f"prepare the rows again with cutoff_len: {rules.max_positions} or less"
        )
    if longest > rules.row_len:
        raise ValueError(
            f"{rules.source} has a row of {longest} tokens, more than cutoff_len: {rules.row_len}; raise cutoff_len, "
            "or prepare the rows again"
        )
    if rules.stage == "ddm" and rules.packing and len(counts.row_lengths) > 2:  # the last row may be shorter
        raise ValueError(
            f"{rules.source} has rows of {min(counts.row_lengths)} to {longest} tokens, so it was prepared with "
            "packing: false, but packing is true; set packing: false, or prepare the rows again"
        )


def _check_learnable(rows: Any, counts: RowCounts, rules: RowRules, name: str) -> None:
    """Check that some row has a target that is neither a special token nor white space."""
    if _has_text(counts, rules):
        return
    if counts.n_rows < len(rows):  # look at every row before refusing the data
        for table in row_tables(rows, every_row=True):
            counts.add(table)
            if _has_text(counts, rules):
                return
    if counts.n_empty:
        raise ValueError(_truncation_message(counts, rules, name))
    checked = f"{'first ' if isinstance(rows, list) else ''}{len(rows)} rows"
    text = "response" if rules.stage == "ddm-sft" else "text"
    raise ValueError(
        f"{rules.source} ({name}): none of its {checked} has a token to learn, as every {text} is empty; check the "
        "data and the columns of their entry in dataset_info.json"
    )


def _has_text(counts: RowCounts, rules: RowRules) -> bool:
    special_ids = {*rules.tokenizer.all_special_ids, rules.mask.id}
    target_ids = (index for index in np.flatnonzero(counts.is_target).tolist() if index not in special_ids)
    return any(rules.tokenizer.decode([index]).strip() for index in target_ids)


def _check_answers(counts: RowCounts, rules: RowRules, name: str, *, trains: bool) -> None:
    if not counts.n_truncated:
        return
    message = _truncation_message(counts, rules, name)
    if trains and counts.n_truncated == counts.n_answers:
        raise ValueError(message)
    logger.warning_rank0(message)


def _truncation_message(counts: RowCounts, rules: RowRules, name: str) -> str:
    to_nothing = f", {counts.n_empty} of them to nothing" if counts.n_empty else ""
    return (
        f"cutoff_len: {rules.row_len} truncates the answers of {counts.n_truncated} of {counts.n_answers} examples"
        f"{to_nothing} ({rules.source}, {name}); raise cutoff_len"
    )


def _check_mask(counts: RowCounts, rules: RowRules, name: str, *, trains: bool) -> None:
    if not counts.n_masks:
        return
    mask = rules.mask
    occurrences = (
        f"mask_token: {mask.token!r} (id {mask.id}) occurs {counts.n_masks} times among {counts.n_tokens} tokens, in "
        f"{counts.n_rows_with_mask} of {counts.n_rows} checked rows ({rules.source}, {name})"
    )
    is_common = counts.n_masks > _COMMON_MASK * counts.n_tokens
    if trains and is_common and not (mask.is_trained or rules.allow_common_mask):
        raise ValueError(
            f"{occurrences}, and the model could never generate it; name a token that texts do not use, such as a new "
            "one, '<|mask|>', or set allow_common_mask_token: true"
        )
    logger.warning_rank0(f"{occurrences}; it stays fixed in these texts: neither noised nor scored.")
