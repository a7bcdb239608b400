"""What `stage: ddm` runs: tokenizer, data, model, then training, evaluation and generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.extras import logging
from llamafactory.extras.ploting import plot_loss
from llamafactory.model import load_config, load_model, load_tokenizer
from llamafactory.train.trainer_utils import create_modelcard_and_push
from transformers import DataCollatorWithPadding

from ..data.collators import StartTokenCollator, start_token_id
from ..diffusion.schedules import get_schedule
from ..generation import SamplingSettings, TextGenerator
from ..modeling.attention_layers import max_positions
from ..modeling.bidirectional import make_bidirectional
from ..modeling.checkpoints import load_weights, stored_dtype
from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ..modeling.mask_token import ResolvedMaskToken, add_mask_token, resolve_mask_token
from ..modeling.objective import MaskedObjective
from . import requests
from .checks import (
    check_checkpoint_folders,
    check_cutoff,
    check_data,
    check_predict,
    check_rows,
    datasets_explained,
)
from .predict import generate_all
from .resume import check_resumed, settle_resume
from .trainer import DiffusionTrainer

logger = logging.get_logger(f"llamafactory.{__name__}")


@dataclass
class LoadedModel:
    """A bidirectional model with the tokenizer and the facts of its diffusion process."""

    model: Any
    tokenizer: Any
    diffusion_config: DiffusionConfig


def run_ddm(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any = None,
    callbacks: list[Any] | None = None,
) -> None:
    """Run `stage: ddm` with upstream's parsed arguments.

    Raises:
        ValueError: for every mistake in the YAML, naming the key and the cure, before anything is written.
        OSError: if a file is missing or cannot be written.
    """
    check_checkpoint_folders(model_args, finetuning_args)
    check_predict(training_args, finetuning_args.given_keys)
    resume = settle_resume(training_args, finetuning_args)
    tokenizer_module, config, mask = _load_tokenizer(model_args, finetuning_args, training_args)
    tokenizer = tokenizer_module["tokenizer"]
    model_config = load_config(model_args)
    check_cutoff(model_config, data_args)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    dataset_module = _load_data(template, tokenizer_module, model_args, data_args, training_args)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        logger.info_rank0("The data set is prepared; set do_train, do_eval or do_predict to go on.")
        return
    loaded = _load_model(tokenizer, mask, config, model_args, finetuning_args, training_args)
    check_rows(model_config, data_args, dataset_module)
    if resume is not None:
        check_resumed(loaded.diffusion_config, resume)
    asked = None
    if training_args.do_predict:
        asked = _asked_for(
            loaded,
            template,
            tokenizer_module,
            model_args,
            data_args,
            training_args,
            finetuning_args,
            generating_args,
        )
    trainer = _make_trainer(loaded, dataset_module, model_args, data_args, training_args, finetuning_args, callbacks)
    if training_args.do_train:
        check_data(trainer, data_args)
        _train(trainer, dataset_module, resume, finetuning_args)
    if training_args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval")
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if asked is not None:
        _predict(trainer, loaded, *asked, model_args, finetuning_args)
    create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)


def run_ddm_sft(model_args: Any, data_args: Any, training_args: Any, *rest: Any) -> None:
    """Run `stage: ddm-sft`, which answers the prompts of an instruction data set.

    Raises:
        ValueError: for every mistake in the YAML, naming the key and the cure, before anything is written.
        OSError: if a file is missing or cannot be written.
    """
    if training_args.do_train or training_args.do_eval or not training_args.do_predict:
        raise ValueError(
            "stage: ddm-sft generates only in this version: set do_predict: true and neither do_train nor do_eval; "
            "stage: ddm trains"
        )
    run_ddm(model_args, data_args, training_args, *rest)


def _asked_for(
    loaded: LoadedModel,
    template: Any,
    tokenizer_module: dict[str, Any],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
) -> tuple[SamplingSettings, list[requests.Request]]:
    """Return how and what to generate, every mistake found, so that no training is lost to one.

    Raises:
        ValueError: naming the key, or the text of the data set.
    """
    given = finetuning_args.given_keys
    settings = finetuning_args.sampling_settings(
        generating_args, given, seed=training_args.seed % 2**64, tokenizer=loaded.tokenizer
    )
    generator = TextGenerator(loaded.model, loaded.tokenizer, loaded.diffusion_config, probe=False)
    max_new_tokens = generating_args.max_new_tokens if "max_new_tokens" in given else None
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    source = finetuning_args.generation_source()
    if source == "noise":
        if data_args.dataset is not None or data_args.eval_dataset is not None:
            logger.info_rank0("Generation starts from nothing but noise: the data set given is not used for it.")
        asked = requests.from_noise(
            generator, count=finetuning_args.num_samples, length=data_args.cutoff_len, max_new_tokens=max_new_tokens
        )
    elif "num_samples" in given:
        logger.info_rank0(
            f"num_samples is for generation from noise; with generate_from: {source} max_samples counts."
        )
    if source == "prompt":
        asked = requests.from_examples(
            generator, template, tokenizer_module, model_args, data_args, training_args, max_new_tokens=max_new_tokens
        )
    elif source != "noise":
        asked = requests.from_texts(
            generator,
            model_args,
            data_args,
            training_args,
            infill=source == "infill",
            prefix_length=finetuning_args.prefix_length,
            max_new_tokens=max_new_tokens,
        )
    generator.check([request.canvas for request in asked], settings)
    return settings, asked


def _predict(
    trainer: DiffusionTrainer,
    loaded: LoadedModel,
    settings: SamplingSettings,
    asked: list[requests.Request],
    model_args: Any,
    finetuning_args: Any,
) -> None:
    """Generate what was asked for, and save texts and metrics."""
    args = trainer.args
    ratio = trainer.reached_ratio()
    if ratio < 1.0:
        logger.warning_rank0(
            f"This model's attention was annealed to a ratio of {ratio:.3f} only; it generates with full attention."
        )
    generator = TextGenerator(trainer.model.to(args.device), loaded.tokenizer, loaded.diffusion_config)
    folder = None if args.do_train else finetuning_args.checkpoint_dir or model_args.model_name_or_path
    metrics = generate_all(
        generator, asked, settings, args, model_folder=folder, save_trace=finetuning_args.save_trace
    )
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)


def _load_data(
    template: Any, tokenizer_module: dict[str, Any], model_args: Any, data_args: Any, training_args: Any
) -> dict[str, Any]:
    """Return upstream's `train_dataset` and `eval_dataset`; generation alone needs none."""
    if training_args.do_predict and not (training_args.do_train or training_args.do_eval):
        return {}
    with datasets_explained(data_args):
        module: dict[str, Any] = get_dataset(
            template, model_args, data_args, training_args, stage="pt", **tokenizer_module
        )
    return module


def _load_tokenizer(
    model_args: Any, finetuning_args: Any, training_args: Any
) -> tuple[dict[str, Any], DiffusionConfig | None, ResolvedMaskToken]:
    """Return upstream's tokenizer module, the checkpoint's own diffusion config if it has one, and the mask token."""
    folder = finetuning_args.checkpoint_dir or model_args.model_name_or_path
    config = DiffusionConfig.find(folder)
    if config is None and not training_args.do_train and finetuning_args.mask_token is None:
        raise ValueError(
            f"{folder} holds no {FILE_NAME}, so nothing says that it is a diffusion model, and this run trains "
            "nothing. Point model_name_or_path (or checkpoint_dir) at a checkpoint of stage: ddm; if it is a "
            "diffusion model from elsewhere, say so with mask_token and shift"
        )
    tokenizer_module = _tokenizer_module(model_args, finetuning_args.checkpoint_dir)
    stored = None
    if config is not None:
        config.check_against(
            shift=finetuning_args.shift,
            noise_schedule=finetuning_args.noise_schedule,
            uniform_ratio=finetuning_args.uniform_ratio,
        )
        stored = (config.mask_token, config.mask_token_id)
    mask = resolve_mask_token(tokenizer_module["tokenizer"], finetuning_args.mask_token, config_mask=stored)
    if config is not None and mask.id != config.mask_token_id:
        raise ValueError(
            f"mask_token: {finetuning_args.mask_token!r} has id {mask.id}, but {Path(folder) / FILE_NAME} says the "
            f"model was trained with {config.mask_token!r}, id {config.mask_token_id}; remove the key from the YAML"
        )
    return tokenizer_module, config, mask


def _tokenizer_module(model_args: Any, checkpoint: str | None) -> dict[str, Any]:
    """Load the tokenizer; a `checkpoint` that is a whole Hugging Face folder takes the place of the base model."""
    base = model_args.model_name_or_path
    folder = Path(checkpoint) if checkpoint is not None else None
    has_model = folder is not None and (folder / "config.json").is_file()
    if has_model and folder is not None and (folder / "tokenizer_config.json").is_file():
        model_args.model_name_or_path = checkpoint
    try:
        tokenizer_module = load_tokenizer(model_args)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: {base} has no tokenizer that could be loaded ({error.__cause__ or error}); "
            "give a folder with a model and its tokenizer, or the name of one that can be downloaded"
        ) from error
    if has_model:
        model_args.model_name_or_path = checkpoint
    return tokenizer_module


def _load_model(
    tokenizer: Any,
    mask: ResolvedMaskToken,
    config: DiffusionConfig | None,
    model_args: Any,
    finetuning_args: Any,
    training_args: Any,
) -> LoadedModel:
    base_stage, finetuning_args.stage = finetuning_args.stage, finetuning_args.diffusion_stage
    try:
        model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    finally:
        finetuning_args.stage = base_stage
    add_mask_token(model, tokenizer, mask)
    checkpoint = finetuning_args.checkpoint_dir
    if checkpoint and not (Path(checkpoint) / "config.json").is_file():
        if not training_args.do_train:  # training has set its own dtype
            model.to(stored_dtype(checkpoint))
        load_weights(model, Path(checkpoint))
    make_bidirectional(model)
    if config is None:
        config = DiffusionConfig(
            mask_token=mask.token,
            mask_token_id=mask.id,
            shift=finetuning_args.shift if finetuning_args.shift is not None else True,
            noise_process="masked",
            uniform_ratio=finetuning_args.uniform_ratio or 0.0,
            noise_schedule=finetuning_args.noise_schedule or "linear",
            # A foreign checkpoint that is only used is taken to be what the YAML says, a finished diffusion model.
            attention_ratio=0.0 if training_args.do_train else 1.0,
        )
    return LoadedModel(model, tokenizer, config)


def _make_trainer(
    loaded: LoadedModel,
    dataset_module: dict[str, Any],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    callbacks: list[Any] | None,
) -> DiffusionTrainer:
    config = loaded.diffusion_config
    objective = MaskedObjective(
        mask_id=config.mask_token_id,
        shift=config.shift,
        schedule=get_schedule(config.noise_schedule),
        weighting=finetuning_args.loss_weighting,
        norm=finetuning_args.loss_norm,
        time_epsilon=finetuning_args.time_epsilon,
        antithetic=finetuning_args.antithetic_time,
        seed=training_args.seed % 2**64,
    )
    # The filter would hide a diverged loss behind the last good one, and costs a device synchronisation every step.
    training_args.logging_nan_inf_filter = False
    if training_args.accelerator_config.dispatch_batches is None:
        # A dispatcher would put streamed batches on the device, where noise is not drawn, and cut up the last one.
        training_args.accelerator_config.dispatch_batches = False
    return DiffusionTrainer(
        objective=objective,
        diffusion_config=config,
        anneal_steps=finetuning_args.anneal_steps,
        eval_time_samples=finetuning_args.eval_time_samples,
        model=loaded.model,
        args=training_args,
        finetuning_args=finetuning_args,
        model_args=model_args,
        data_collator=_make_collator(loaded, data_args),
        callbacks=callbacks,
        tokenizer=loaded.tokenizer,
        processor=None,
        **dataset_module,
    )


def _make_collator(loaded: LoadedModel, data_args: Any) -> Any:
    collator = DataCollatorWithPadding(loaded.tokenizer)
    if data_args.packing or not loaded.diffusion_config.shift:
        return collator
    return StartTokenCollator(collator, start_token_id(loaded.tokenizer), max_positions(loaded.model.config))


def _train(
    trainer: DiffusionTrainer, dataset_module: dict[str, Any], resume: str | None, finetuning_args: Any
) -> None:
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    reached = trainer.reached_ratio()
    if reached < 1.0:
        logger.warning_rank0(
            f"Training ended while attention was still annealing (ratio {reached:.3f}), but sampling and evaluation "
            f"use full attention: train for at least anneal_steps ({finetuning_args.anneal_steps}) steps, or lower it."
        )
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        keys = ["loss", "nll"]
        evaluated = dataset_module.get("eval_dataset")
        if isinstance(evaluated, dict):
            keys += [f"eval_{name}_loss" for name in evaluated]
        elif evaluated is not None:
            keys += ["eval_loss"]
        plot_loss(trainer.args.output_dir, keys=keys)
