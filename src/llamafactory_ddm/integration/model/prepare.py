"""What a run has before it trains, evaluates or generates: tokenizer, data, model, every mistake found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.model import load_config

from ...data.collators import VariableLengthCollator
from ...data.control_tokens import control_texts, reading_as_text
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.model_info import max_positions
from ..data.faults import dataset_names, datasets_explained
from ..data.prepared_rows import AnswerMarks, RowRules, check_columns, check_prepared
from ..data.templates import uncut
from ..data.tokenized_folder import check_facts, facts_of, is_opened, opening, write_facts
from ..resolve.checks import check_cutoff
from ..resolve.length import LengthPlan, check_width, keep_fitting, resolve_canvas, resolve_lengths
from ..resolve.sft import finetuned_config, resolve_digits, resolve_template, with_own_cut
from ..resolve.start_and_end import keep_end_token, take_stored_template, tell_other_template, with_start_and_end
from ..resolve.vocabulary import Vocabulary, check_new_tokens, resolve_vocabulary
from .loader import LoadedModel, load_diffusion_model, load_diffusion_tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Tokenizer and data of a run.

    Attributes:
        tokenizer_module: upstream's.
        template: upstream's.
        config: what the checkpoint says about its diffusion process; None for an autoregressive one.
        vocabulary: the tokens of the run, all of them in the tokenizer.
        model_config: of transformers.
        lengths: the variable-length format, or None.
        dataset_module: upstream's `train_dataset` and `eval_dataset`, as far as the run needs them.
    """

    tokenizer_module: dict[str, Any]
    template: Any
    config: DiffusionConfig | None
    vocabulary: Vocabulary
    model_config: Any
    lengths: LengthPlan | None
    dataset_module: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """The model of a run, and its data as far as they fit.

    Attributes:
        loaded: model, tokenizer and the facts of the diffusion process.
        collator: that of the variable-length format, or None.
        dataset_module: upstream's, less the rows without room for their end.
    """

    loaded: LoadedModel
    collator: VariableLengthCollator | None
    dataset_module: dict[str, Any]


def prepare_data(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> PreparedData:
    """Load tokenizer and data.

    Raises:
        ValueError: for every mistake in the YAML, naming the key and the cure.
        OSError: if a file is missing.
    """
    finetunes = finetuning_args.stage == "sft"
    loaded = load_diffusion_tokenizer(model_args, finetuning_args, training_args)
    tokenizer_module, config = loaded.module, loaded.config
    if finetunes:
        resolve_digits(tokenizer_module, finetuning_args)
    tokenizer = tokenizer_module["tokenizer"]
    model_config = load_config(model_args)
    check_cutoff(model_config, data_args)
    if finetunes:
        take_stored_template(config, data_args)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    loaded.additions.note(tokenizer, f"template: {data_args.template}")
    if not finetunes:
        keep_end_token(config, tokenizer, data_args, trains=training_args.do_train)
    lengths = resolve_lengths(config, data_args, training_args, finetuning_args)
    if lengths is not None:
        check_width(lengths, model_config)
    vocabulary = resolve_vocabulary(
        tokenizer, loaded.additions, loaded.mask, config, lengths, finetuning_args.mask_token
    )
    check_new_tokens(vocabulary, model_config, model_args, training_args, finetuning_args)
    if finetunes:
        mask_id, cuts = vocabulary.mask.id, lengths is None
        template = resolve_template(
            template, tokenizer, config, data_args, finetuning_args, mask_id=mask_id, cuts=cuts
        )
        tell_other_template(config, template, tokenizer, data_args)
    preparing = with_own_cut(template, data_args) if lengths is None else uncut(data_args)
    opened = is_opened(data_args)
    # Of a user's texts no part becomes a control token, whether the tokenizer had that before or not.
    controls = control_texts(tokenizer, [vocabulary.mask.token, *vocabulary.pads])
    reading = {**tokenizer_module, "tokenizer": reading_as_text(tokenizer, controls)}
    dataset_module = _load_data(
        template, reading, model_args, preparing, training_args, stage=finetuning_args.stage, opened=opened
    )
    data = PreparedData(tokenizer_module, template, config, vocabulary, model_config, lengths, dataset_module)
    if dataset_module:
        _check_rows(data, data_args, training_args, finetuning_args, opened=opened)
    return data


def _check_rows(data: PreparedData, data_args: Any, training_args: Any, finetuning_args: Any, *, opened: bool) -> None:
    """Check what the rows hold, and what they were made for if an earlier run made them."""
    tokenizer, path = data.tokenizer_module["tokenizer"], data_args.tokenized_path
    stage, packed, variable = finetuning_args.diffusion_stage, bool(data_args.packing), data.lengths is not None
    answers = None
    if stage == "ddm-sft" and not variable:
        answers = AnswerMarks.of(data.template, tokenizer, cutoff_len=data_args.cutoff_len, packed=packed)
    rules = RowRules(
        source=f"tokenized_path: {path}" if opened else f"dataset: {dataset_names(data_args)}",
        stage=stage,
        is_opened=opened,
        packed=packed,
        variable=variable,
        cutoff_len=data_args.cutoff_len,
        positions=max_positions(data.model_config),
        tokenizer=tokenizer,
        mask=data.vocabulary.mask,
        controls=control_texts(tokenizer, [data.vocabulary.mask.token, *data.vocabulary.pads]),
        allow_common_mask=finetuning_args.allow_common_mask_token,
        answers=answers,
    )
    facts = facts_of(stage, data_args, variable=variable)
    if opened:
        check_columns(data.dataset_module, rules, training_args)
        check_facts(path, facts, tokenizer)
    elif path is not None and training_args.should_save:
        write_facts(path, facts, data.dataset_module, tokenizer)
    check_prepared(data.dataset_module, rules, data_args, training_args)


def prepare_model(
    data: PreparedData, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> Prepared:
    """Load the model, and leave out rows that do not fit.

    Raises:
        ValueError: for every mistake in the YAML, naming the key and the cure.
    """
    tokenizer, lengths = data.tokenizer_module["tokenizer"], data.lengths
    finetunes, dataset_module = finetuning_args.stage == "sft", data.dataset_module
    loaded = load_diffusion_model(tokenizer, data.vocabulary, data.config, model_args, finetuning_args, training_args)
    loaded.diffusion_config = with_start_and_end(
        loaded.diffusion_config,
        data.template,
        tokenizer,
        data_args,
        finetunes=finetunes,
        trains=training_args.do_train,
    )
    collator: VariableLengthCollator | None = None
    if lengths is not None:
        loaded.diffusion_config, collator = resolve_canvas(
            loaded.diffusion_config, lengths, tokenizer, answers=finetunes, trains=training_args.do_train
        )
        dataset_module = keep_fitting(dataset_module, collator, lengths, data_args, training_args)
    if finetunes and (training_args.do_train or training_args.do_eval):
        loaded.diffusion_config = finetuned_config(
            loaded.diffusion_config, data.template, tokenizer, data_args, finetuning_args
        )
    return Prepared(loaded, collator, dataset_module)


def _load_data(
    template: Any,
    tokenizer_module: dict[str, Any],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    *,
    stage: str,
    opened: bool,
) -> dict[str, Any]:
    """Return upstream's `train_dataset` and `eval_dataset`; generation alone needs none."""
    if training_args.do_predict and not (training_args.do_train or training_args.do_eval):
        return {}
    with opening(data_args.tokenized_path) if opened else datasets_explained(data_args):
        module: dict[str, Any] = get_dataset(
            template, model_args, data_args, training_args, stage=stage, **tokenizer_module
        )
    return module
