"""Loads the data sets of a run: prepares them with LLaMA-Factory, checks their rows, and drops those without room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamafactory.data import get_dataset

from ...data.collators import VariableLengthCollator
from ...data.control_tokens import control_texts, reading_as_text
from ...modeling.model_info import max_positions
from ..data.faults import dataset_names, explain_dataset_errors
from ..data.prepared_rows import RowRules, check_columns, check_rows
from ..data.templates import without_cutoff
from ..data.tokenized_folder import (
    check_row_settings,
    explain_open_errors,
    has_prepared_rows,
    row_settings,
    write_row_settings,
)
from ..data.truncated_answers import AnswerMarks
from .plan import RunPlan
from .run_settings import collect_run_settings
from .sft import preparation_args
from .variable_length import drop_overlong


@dataclass(frozen=True)
class RunData:
    """The data sets of a run.

    Attributes:
        module: LLaMA-Factory's `train_dataset` and `eval_dataset`, as far as the run uses them.
        run_settings: what `collect_run_settings` returns.
    """

    module: dict[str, Any]
    run_settings: dict[str, Any]


def load_datasets(
    plan: RunPlan,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    *,
    drops_overlong: bool = True,
) -> RunData:
    """Prepare the data sets with LLaMA-Factory, or open prepared ones; a run that only generates loads none.

    With `drops_overlong`, rows without room for EOS are dropped; a run that only prepares data keeps them.

    Raises:
        ValueError: if the rows cannot be prepared, were prepared for another kind of run, hold no token to learn, or
            all lack room for EOS.
        OSError: if a file is missing.
    """
    module: dict[str, Any] = {}
    if not training_args.do_predict or training_args.do_train or training_args.do_eval:
        prepared = has_prepared_rows(data_args)
        module = _load_rows(plan, model_args, data_args, training_args, finetuning_args, prepared=prepared)
        _check_loaded(plan, module, data_args, training_args, finetuning_args, prepared=prepared)
    train_rows = module.get("train_dataset")
    run_settings = collect_run_settings(model_args, data_args, training_args, finetuning_args, train_rows)
    if drops_overlong and plan.lengths is not None and isinstance(plan.collator, VariableLengthCollator):
        module = drop_overlong(module, plan.collator, plan.lengths, data_args, training_args)
    return RunData(module, run_settings)


def _load_rows(
    plan: RunPlan, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, *, prepared: bool
) -> dict[str, Any]:
    loading_args = preparation_args(plan.template, data_args) if plan.lengths is None else without_cutoff(data_args)
    # Text that spells a control token is encoded as ordinary characters.
    tokenizer_module = {**plan.tokenizer_module, "tokenizer": reading_as_text(plan.tokenizer, _control_tokens(plan))}
    with explain_open_errors(data_args.tokenized_path) if prepared else explain_dataset_errors(data_args):
        module: dict[str, Any] = get_dataset(
            plan.template, model_args, loading_args, training_args, stage=finetuning_args.stage, **tokenizer_module
        )
    return module


def _control_tokens(plan: RunPlan) -> list[str]:
    return control_texts(plan.tokenizer, [plan.vocabulary.mask.token, *plan.vocabulary.pad_tokens])


def _check_loaded(
    plan: RunPlan,
    module: dict[str, Any],
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    *,
    prepared: bool,
) -> None:
    """Check the rows, and that rows which an earlier run prepared match this run; save the settings of new ones."""
    path, packing, variable = data_args.tokenized_path, bool(data_args.packing), plan.lengths is not None
    answer_marks = None
    if plan.finetunes and not variable:
        answer_marks = AnswerMarks.of(plan.template, plan.tokenizer, cutoff_len=data_args.cutoff_len, packed=packing)
    rules = RowRules(
        source=f"tokenized_path: {path}" if prepared else f"dataset: {dataset_names(data_args)}",
        stage=plan.stage,
        is_prepared=prepared,
        packing=packing,
        variable_length=variable,
        cutoff_len=data_args.cutoff_len,
        max_positions=max_positions(plan.model_config),
        tokenizer=plan.tokenizer,
        mask=plan.vocabulary.mask,
        control_tokens=_control_tokens(plan),
        allow_common_mask=finetuning_args.allow_common_mask_token,
        answer_marks=answer_marks,
    )
    settings = row_settings(plan.stage, data_args, variable=variable)
    if prepared:
        check_columns(module, rules, training_args)
        check_row_settings(path, settings, plan.tokenizer)
    elif path is not None and training_args.should_save:
        write_row_settings(path, settings, module, plan.tokenizer)
    check_rows(module, rules, data_args, training_args)
