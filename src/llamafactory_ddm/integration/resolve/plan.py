"""Resolves YAML and checkpoint into the plan of a run, before data are read or a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.model import load_config
from transformers import DataCollatorWithPadding

from ...data.collators import StartTokenCollator, VariableLengthCollator, start_token_id
from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...modeling.model_info import max_positions
from ...modeling.special_tokens import ResolvedMaskToken
from ..logs import get_logger
from .attention import with_attention
from .checks import check_cutoff
from .noise_process import resolve_noise_process
from .resume import check_resumed, resolve_resume
from .sft import build_response_collator, resolve_split_digits, resolve_template, with_finetuning
from .start_and_end import resolve_eos_token, resolve_template_name, warn_other_template, with_start_and_end
from .variable_length import LengthPlan, resolve_canvas, resolve_length_plan
from .vocabulary import RunTokenizer, Vocabulary, check_new_tokens, resolve_vocabulary

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What YAML and checkpoint determine about a run.

    Attributes:
        stage: `ddm` or `ddm-sft`.
        user_keys: the keys that the YAML sets.
        config: the diffusion config of this run's checkpoints.
        tokenizer_module: LLaMA-Factory's; its tokenizer has every token of the run.
        template: LLaMA-Factory's.
        vocabulary: the tokens of the run.
        model_config: transformers' config of the model.
        lengths: the variable-length format, or None.
        collator: the data collator.
        resume: the checkpoint to resume from, or None.
    """

    stage: str
    user_keys: frozenset[str]
    config: DiffusionConfig
    tokenizer_module: dict[str, Any]
    template: Any
    vocabulary: Vocabulary
    model_config: Any
    lengths: LengthPlan | None
    collator: Any
    resume: str | None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the run."""
        return self.tokenizer_module["tokenizer"]

    @property
    def finetunes(self) -> bool:
        """Whether rows are prompts with responses."""
        return self.stage == "ddm-sft"


def resolve_run(
    loaded: RunTokenizer, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> RunPlan:
    """Resolve YAML and checkpoint into a plan; add the template's tokens, [MASK] and padding to the tokenizer.

    Raises:
        ValueError: if the YAML contradicts itself or the checkpoint, naming the key.
    """
    resume = resolve_resume(training_args, finetuning_args)
    finetunes, trains = finetuning_args.stage == "sft", training_args.do_train
    if finetunes:
        resolve_split_digits(loaded.module, finetuning_args)
    tokenizer, stored = loaded.module["tokenizer"], loaded.config
    model_config = load_config(model_args)
    check_cutoff(model_config, data_args)
    if finetunes:
        resolve_template_name(stored, data_args)
    chat_template = getattr(tokenizer, "chat_template", None)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    if data_args.template is None:
        tokenizer.chat_template = chat_template  # not that of `empty`, which a later finetuning would keep
    loaded.additions.record(tokenizer, f"template: {data_args.template}")
    if not finetunes:
        resolve_eos_token(stored, tokenizer, data_args, trains=trains)
    lengths = resolve_length_plan(stored, data_args, training_args, finetuning_args)
    vocabulary = resolve_vocabulary(
        tokenizer, loaded.additions, loaded.mask, stored, lengths, finetuning_args.mask_token
    )
    check_new_tokens(vocabulary, model_config, model_args, training_args, finetuning_args)
    if finetunes:
        mask_id, truncates = vocabulary.mask.id, lengths is None
        template = resolve_template(
            template, tokenizer, stored, data_args, finetuning_args, mask_id=mask_id, truncates=truncates
        )
        warn_other_template(stored, template, tokenizer, data_args)
    config = resolve_config(stored, vocabulary.mask, model_args, training_args, finetuning_args)
    config = with_attention(config, stored, model_config, model_args, data_args, training_args, finetuning_args)
    config = with_start_and_end(config, template, tokenizer, data_args, finetunes=finetunes, trains=trains)
    collator: VariableLengthCollator | None = None
    if lengths is not None:
        config, collator = resolve_canvas(config, lengths, tokenizer, answers=finetunes, trains=trains)
    if trains:
        config = replace(config, canvas=data_args.cutoff_len)
    if finetunes and (trains or training_args.do_eval):
        config = with_finetuning(config, template, tokenizer, data_args, finetuning_args)
    if resume is not None:
        check_resumed(config, resume)
    if training_args.do_predict:
        finetuning_args.suppressed_ids(tokenizer)  # fails before the model is loaded
    return RunPlan(
        stage=finetuning_args.diffusion_stage,
        user_keys=finetuning_args.parsed.user_keys,
        config=config,
        tokenizer_module=loaded.module,
        template=template,
        vocabulary=vocabulary,
        model_config=model_config,
        lengths=lengths,
        collator=collator or _build_collator(config, tokenizer, model_config, data_args, finetunes=finetunes),
        resume=resume,
    )


def resolve_config(
    stored: DiffusionConfig | None,
    mask: ResolvedMaskToken,
    model_args: Any,
    training_args: Any,
    finetuning_args: Any,
) -> DiffusionConfig:
    """Return the checkpoint's diffusion config, or a config from the YAML if the checkpoint has none.

    A model without a config counts as autoregressive in a run that trains, which anneals its attention. In a run that
    only evaluates or generates it counts as a trained diffusion model from another project, with a warning.
    """
    name, trains = model_args.model_name_or_path, training_args.do_train
    if stored is not None:
        if trains and stored.attention_ratio == 1.0 and "anneal_steps" in finetuning_args.parsed.user_keys:
            logger.info_rank0(
                f"anneal_steps: {finetuning_args.anneal_steps} has no effect: {name} has full attention already."
            )
        return stored
    shift = finetuning_args.shift is not False
    if trains and finetuning_args.anneal_steps > 1 and finetuning_args.attention != "block":
        logger.info_rank0(
            f"{name} holds no {FILE_NAME} and is treated as an autoregressive model: its attention is annealed over "
            f"{finetuning_args.anneal_steps} steps. For a diffusion model from another project set anneal_steps: 0."
        )
    elif not trains and (training_args.do_eval or training_args.do_predict):
        logger.warning_rank0(
            f"{name} holds no {FILE_NAME} and is treated as a diffusion model that was trained with mask_token: "
            f"{mask.token!r} and shift: {shift}, as the YAML says. If it is an autoregressive model, its texts and "
            "metrics are meaningless."
        )
    process, ratio = resolve_noise_process(None, finetuning_args)
    return DiffusionConfig(
        mask_token=mask.token,
        mask_token_id=mask.id,
        shift=shift,
        noise_process=process,
        uniform_ratio=ratio,
        noise_schedule=finetuning_args.noise_schedule or "linear",
        attention_ratio=0.0 if trains else 1.0,
    )


def _build_collator(
    config: DiffusionConfig, tokenizer: Any, model_config: Any, data_args: Any, *, finetunes: bool
) -> Any:
    if finetunes:
        return build_response_collator(config, tokenizer, data_args)
    collator = DataCollatorWithPadding(tokenizer)
    if data_args.packing or not config.shift:
        return collator
    start_id = start_token_id(tokenizer) if config.start_token_id is None else config.start_token_id
    return StartTokenCollator(collator, start_id, max_positions(model_config))
