"""The data sets of a run: prepared by LLaMA-Factory, checked row by row, without rows that do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamafactory.data import get_dataset

from ...data.collators import VariableLengthCollator
from ...data.control_tokens import control_texts, reading_as_text
from ...modeling.model_info import max_positions
from ..data.faults import dataset_names, explain_dataset_errors
from ..data.prepared_rows import AnswerMarks, RowRules, check_columns, check_prepared
from ..data.templates import uncut
from ..data.tokenized_folder import check_facts, facts_of, is_opened, opening, write_facts
from .plan import RunPlan
from .run_facts import run_facts
from .sft import with_own_cut
from .variable_length import keep_fitting


@dataclass(frozen=True)
class RunData:
    """The data sets of a run.

    Attributes:
        module: LLaMA-Factory's `train_dataset` and `eval_dataset`, as far as the run needs them.
        facts: the result of `run_facts`.
    """

    module: dict[str, Any]
    facts: dict[str, Any]


def load_datasets(
    plan: RunPlan,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    *,
    drops_overlong: bool = True,
) -> RunData:
    """Prepare the data sets with LLaMA-Factory, or open prepared ones; a run that only generates needs none.

    With `drops_overlong` rows without room for EOS are dropped; a run that only prepares keeps all.

    Raises:
        ValueError: if they cannot be prepared, were prepared for another kind of run, hold no token to learn, or no
            row has room for EOS.
        OSError: if a file is missing.
    """
    module: dict[str, Any] = {}
    if not training_args.do_predict or training_args.do_train or training_args.do_eval:
        opened = is_opened(data_args)
        module = _prepared(plan, model_args, data_args, training_args, finetuning_args, opened=opened)
        _check_rows(plan, module, data_args, training_args, finetuning_args, opened=opened)
    facts = run_facts(model_args, data_args, training_args, finetuning_args, module.get("train_dataset"))
    if drops_overlong and plan.lengths is not None and isinstance(plan.collator, VariableLengthCollator):
        module = keep_fitting(module, plan.collator, plan.lengths, data_args, training_args)
    return RunData(module, facts)


def _prepared(
    plan: RunPlan, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, *, opened: bool
) -> dict[str, Any]:
    cut_args = with_own_cut(plan.template, data_args) if plan.lengths is None else uncut(data_args)
    # Text that spells a control token is encoded as ordinary characters.
    controls = control_texts(plan.tokenizer, [plan.vocabulary.mask.token, *plan.vocabulary.pads])
    reading = {**plan.tokenizer_module, "tokenizer": reading_as_text(plan.tokenizer, controls)}
    with opening(data_args.tokenized_path) if opened else explain_dataset_errors(data_args):
        module: dict[str, Any] = get_dataset(
            plan.template, model_args, cut_args, training_args, stage=finetuning_args.stage, **reading
        )
    return module


def _check_rows(
    plan: RunPlan,
    module: dict[str, Any],
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    *,
    opened: bool,
) -> None:
    """Check the rows, and for prepared rows of an earlier run that they fit this run."""
    path, packed, variable = data_args.tokenized_path, bool(data_args.packing), plan.lengths is not None
    mask, pads = plan.vocabulary.mask, plan.vocabulary.pads
    answers = None
    if plan.finetunes and not variable:
        answers = AnswerMarks.of(plan.template, plan.tokenizer, cutoff_len=data_args.cutoff_len, packed=packed)
    rules = RowRules(
        source=f"tokenized_path: {path}" if opened else f"dataset: {dataset_names(data_args)}",
        stage=plan.stage,
        is_opened=opened,
        packed=packed,
        variable=variable,
        cutoff_len=data_args.cutoff_len,
        positions=max_positions(plan.model_config),
        tokenizer=plan.tokenizer,
        mask=mask,
        controls=control_texts(plan.tokenizer, [mask.token, *pads]),
        allow_common_mask=finetuning_args.allow_common_mask_token,
        answers=answers,
    )
    facts = facts_of(plan.stage, data_args, variable=variable)
    if opened:
        check_columns(module, rules, training_args)
        check_facts(path, facts, plan.tokenizer)
    elif path is not None and training_args.should_save:
        write_facts(path, facts, module, plan.tokenizer)
    check_prepared(module, rules, data_args, training_args)
