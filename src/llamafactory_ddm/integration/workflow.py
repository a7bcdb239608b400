"""What the diffusion stages run: tokenizer, data, model, then training, evaluation and generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding

from .. import _errors
from ..checkpoints.plain_copy import origin_of
from ..data.collators import StartTokenCollator, start_token_id
from ..modeling.length_heads import FILE_NAME as LENGTHS
from ..modeling.length_heads import REPORT_NAME as LENGTHS_REPORT
from ..modeling.model_info import max_positions
from ..utils.run_lock import run_lock
from .logs import get_logger, without_known_noise
from .model.loader import LoadedModel
from .model.model_card import Origin
from .model.plain_copy import resolve_model_names
from .model.prepare import prepare_data, prepare_model
from .predict.progress import barrier
from .predict.workflow import generate, what_to_generate
from .resolve.checks import check_checkpoint_folders, check_data, check_predict
from .resolve.length import LengthPlan
from .resolve.objective import build_objective
from .resolve.output_folder import check_output_folder
from .resolve.resume import check_resumed, how_to_go_on, resolve_resume
from .resolve.run_facts import check_facts, run_facts
from .resolve.sft import response_collator
from .train.eos_evaluation import evaluate_ends, save_end_metrics
from .train.plotting import plot_logs
from .train.trainer import DiffusionTrainer

logger = get_logger(__name__)


def run(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any = None,
    callbacks: list[Any] | None = None,
) -> None:
    """Run `stage: ddm` or `stage: ddm-sft` with upstream's parsed arguments.

    Raises:
        ValueError: for every mistake in the YAML, naming the key and the cure, before anything is written.
        OSError: if a file is missing or cannot be written.
    """
    _errors.when_interrupted(lambda: how_to_go_on(training_args))
    with without_known_noise(on_cpu=training_args.device.type == "cpu"):
        resolve_model_names(model_args)
        check_checkpoint_folders(model_args, finetuning_args, training_args)
        check_predict(training_args, finetuning_args.given_keys)
        if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
            prepare_data(model_args, data_args, training_args, finetuning_args)
            logger.info_rank0("The data set is prepared; set do_train, do_eval or do_predict to go on.")
            return
        check_output_folder(model_args, training_args, finetuning_args)
        with run_lock(training_args.output_dir, rank=training_args.process_index, world=training_args.world_size):
            _run(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)


def _run(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
    callbacks: list[Any] | None,
) -> None:
    """Run in an output_dir that nobody else writes to."""
    resume = resolve_resume(training_args, finetuning_args)
    data = prepare_data(model_args, data_args, training_args, finetuning_args)
    rows = data.dataset_module.get("train_dataset")
    facts = run_facts(model_args, data_args, training_args, finetuning_args, rows)
    prepared = prepare_model(data, model_args, data_args, training_args, finetuning_args)
    loaded, dataset_module = prepared.loaded, prepared.dataset_module
    if resume is not None:
        # What the checkpoint says of itself comes first: other tokens make other rows, which is no fault of the files.
        check_resumed(loaded.diffusion_config, resume)
        check_facts(facts, resume)
    asked = None
    if training_args.do_predict:
        asked = what_to_generate(
            loaded,
            data.template,
            data.tokenizer_module,
            model_args,
            data_args,
            training_args,
            finetuning_args,
            generating_args,
        )
    collator = prepared.collator or _make_collator(loaded, data_args, finetuning_args)
    trainer = _make_trainer(
        loaded, collator, data.lengths, dataset_module, model_args, training_args, finetuning_args, callbacks
    )
    trainer.run_facts, trainer.origin = facts, _origin(model_args, data_args, finetuning_args)
    if training_args.do_train:
        check_data(trainer, data_args)
        _train(trainer, dataset_module, resume, finetuning_args)
    if training_args.do_eval:
        metrics = trainer.last_evaluation()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if finetuning_args.eval_eos:
        _evaluate_ends(trainer, dataset_module["eval_dataset"], loaded.diffusion_config.end_token_ids or ())
    if asked is not None:
        generate(trainer, loaded, *asked, model_args, finetuning_args)
    if training_args.do_train:
        trainer.push_to_hub() if training_args.push_to_hub else trainer.create_model_card()
    # torchrun ends the first process in the middle of its writing if another one, which is done, fails as it exits.
    barrier(training_args.world_size)
    _errors.when_interrupted(None)


def _make_trainer(
    loaded: LoadedModel,
    collator: Any,
    lengths: LengthPlan | None,
    dataset_module: dict[str, Any],
    model_args: Any,
    training_args: Any,
    finetuning_args: Any,
    callbacks: list[Any] | None,
) -> DiffusionTrainer:
    config = loaded.diffusion_config
    objective = build_objective(config, loaded.tokenizer, loaded.model, lengths, training_args, finetuning_args)
    # The filter would hide a diverged loss behind the last good one, and costs a device synchronisation every step.
    training_args.logging_nan_inf_filter = False
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # there is nothing to pin for, and torch would say so
    if training_args.accelerator_config.dispatch_batches is None:
        # A dispatcher would put streamed batches on the device, where noise is not drawn, and cut up the last one.
        training_args.accelerator_config.dispatch_batches = False
    return DiffusionTrainer(
        objective=objective,
        diffusion_config=config,
        anneal_steps=finetuning_args.anneal_steps,
        eval_time_samples=finetuning_args.eval_time_samples,
        stop_after_nan_steps=finetuning_args.stop_after_nan_steps,
        model=loaded.model,
        args=training_args,
        finetuning_args=finetuning_args,
        model_args=model_args,
        data_collator=collator,
        callbacks=callbacks,
        tokenizer=loaded.tokenizer,
        processor=None,
        **dataset_module,
    )


def _origin(model_args: Any, data_args: Any, finetuning_args: Any) -> Origin:
    return Origin(
        None if model_args.train_from_scratch else origin_of(model_args.model_name_or_path),
        finetuning_args.diffusion_stage,
        finetuning_args.finetuning_type,
        tuple(data_args.dataset or ()),
    )


def _make_collator(loaded: LoadedModel, data_args: Any, finetuning_args: Any) -> Any:
    if finetuning_args.stage == "sft":
        return response_collator(loaded.diffusion_config, loaded.tokenizer, data_args)
    collator = DataCollatorWithPadding(loaded.tokenizer)
    if data_args.packing or not loaded.diffusion_config.shift:
        return collator
    start = loaded.diffusion_config.start_token_id
    start = start_token_id(loaded.tokenizer) if start is None else start
    return StartTokenCollator(collator, start, max_positions(loaded.model.config))


def _evaluate_ends(trainer: DiffusionTrainer, dataset: Any, end_ids: tuple[int, ...]) -> None:
    for name, part in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
        found = evaluate_ends(trainer, part, end_ids=end_ids)
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / name
            folder.mkdir(parents=True, exist_ok=True)
            save_end_metrics(found, folder)
            first, last = found["revealed 0"], found["revealed 1"]
            logger.info_rank0(
                f"The end is found in one step (top-1) in {100 * first['top1']:.1f} % of rows from nothing, and in "
                f"{100 * last['top1']:.1f} % from the whole text: {folder / 'eos_metrics.json'}"
            )


def _train(
    trainer: DiffusionTrainer, dataset_module: dict[str, Any], resume: str | None, finetuning_args: Any
) -> None:
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    _complete_converted(trainer, finetuning_args)
    if trainer.is_world_process_zero():
        _forget_lengths(Path(trainer.args.output_dir))
    if trainer.steps_taken:
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    else:
        logger.warning_rank0(
            f"Nothing was trained: {resume or trainer.args.output_dir} has seen {trainer.state.global_step} of "
            f"{trainer.state.max_steps} steps. "
            "Raise max_steps (or num_train_epochs) to go on, or set overwrite_output_dir: true to start anew."
        )
    trainer.save_state()
    reached = trainer.reached_ratio()
    if reached < 1.0:
        best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
        logger.warning_rank0(
            f"{f'The best weights, of {best}, were saved' if best else 'Training ended'} while attention was still "
            f"annealing (ratio {reached:.3f}), but sampling and evaluation use full attention: train for at least "
            f"anneal_steps ({finetuning_args.anneal_steps}) steps, or lower it."
        )
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        keys = ["loss", trainer.objective.term]
        evaluated = dataset_module.get("eval_dataset") if str(trainer.args.eval_strategy.value) != "no" else None
        if isinstance(evaluated, dict):
            keys += [f"eval_{name}_loss" for name in evaluated]
        elif evaluated is not None:
            keys += ["eval_loss"]
        plot_logs(trainer.args.output_dir, trainer.state.log_history, keys)


def _complete_converted(trainer: DiffusionTrainer, finetuning_args: Any) -> None:
    """Put beside the plain LoRA adapter that pissa_convert has written what makes it one of a diffusion model."""
    folder = Path(trainer.args.output_dir) / "pissa_converted"
    if finetuning_args.pissa_convert and trainer.is_world_process_zero() and folder.is_dir():
        trainer.processing_class.save_pretrained(folder)
        replace(trainer.diffusion_config, attention_ratio=trainer.reached_ratio()).save(folder)
    elif finetuning_args.pissa_init and finetuning_args.pissa_iter != -1:
        logger.warning_rank0(
            "pissa_init with an approximate decomposition (pissa_iter): PEFT draws it anew whenever the adapter is "
            "loaded, which gives another model than was trained. Set pissa_convert: true, or pissa_iter: -1."
        )


def _forget_lengths(folder: Path) -> None:
    """Remove the length predictors of a model whose weights were overwritten."""
    if (folder / LENGTHS).is_file():
        (folder / LENGTHS).unlink()
        (folder / LENGTHS_REPORT).unlink(missing_ok=True)
        logger.info_rank0(f"{folder / LENGTHS} belonged to the old weights and was removed; run fit-length again.")
