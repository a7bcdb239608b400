"""`do_train` and `do_eval`: the trainer of a run, training with what it saves, and evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.hub import origin_of
from ...modeling.length_heads import FILE_NAME as LENGTHS
from ...modeling.length_heads import REPORT_NAME as LENGTHS_REPORT
from ..logs import get_logger
from ..model.model_card import Origin
from ..resolve.datasets import RunData
from ..resolve.objective import build_objective
from ..resolve.plan import RunPlan
from .eos_evaluation import evaluate_eos, save_eos_metrics
from .plotting import plot_logs
from .trainer import DiffusionTrainer

logger = get_logger(__name__)


def build_trainer(
    plan: RunPlan,
    model: Any,
    data: RunData,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    callbacks: list[Any] | None,
) -> DiffusionTrainer:
    """Return the trainer of a run, with its diffusion objective."""
    # The filter would replace a NaN loss by the last good one, and synchronise with the device at every step.
    training_args.logging_nan_inf_filter = False
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # pinning has no use on a CPU, and torch would warn
    if training_args.accelerator_config.dispatch_batches is None:
        # A dispatcher would move streamed batches to the device (noise is drawn on the CPU), and split the last one.
        training_args.accelerator_config.dispatch_batches = False
    trainer = DiffusionTrainer(
        objective=build_objective(plan.config, plan.tokenizer, model, plan.lengths, training_args, finetuning_args),
        diffusion_config=plan.config,
        anneal_steps=finetuning_args.anneal_steps,
        eval_time_samples=finetuning_args.eval_time_samples,
        stop_after_nan_steps=finetuning_args.stop_after_nan_steps,
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        model_args=model_args,
        data_collator=plan.collator,
        callbacks=callbacks,
        tokenizer=plan.tokenizer,
        processor=None,
        **data.module,
    )
    origin = None if model_args.train_from_scratch else origin_of(model_args.model_name_or_path)
    names = tuple(data_args.dataset or ())
    trainer.origin = Origin(origin, plan.stage, finetuning_args.finetuning_type, names)
    trainer.run_facts = data.facts
    return trainer


def evaluate(trainer: DiffusionTrainer, plan: RunPlan, *, eos: bool) -> None:
    """Evaluate the evidence bound, and with `eos` how well the model predicts EOS; save both."""
    metrics = trainer.last_evaluation()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if eos:
        _evaluate_eos(trainer, trainer.eval_dataset, plan.config.end_token_ids or ())


def _evaluate_eos(trainer: DiffusionTrainer, dataset: Any, eos_ids: tuple[int, ...]) -> None:
    for name, part in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
        found = evaluate_eos(trainer, part, eos_ids=eos_ids)
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / name
            folder.mkdir(parents=True, exist_ok=True)
            save_eos_metrics(found, folder)
            first, last = found["revealed 0"], found["revealed 1"]
            logger.info_rank0(
                f"The end is found in one step (top-1) in {100 * first['top1']:.1f} % of rows from nothing, and in "
                f"{100 * last['top1']:.1f} % from the whole text: {folder / 'eos_metrics.json'}"
            )


def train(trainer: DiffusionTrainer, plan: RunPlan, finetuning_args: Any) -> None:
    """Train, from a checkpoint if the run resumes, and save the model, its metrics and plots."""
    resume = plan.resume
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
            "Raise max_steps (or num_train_epochs) to go on, or set overwrite_output_dir: true to start over."
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
        evaluated = trainer.eval_dataset if str(trainer.args.eval_strategy.value) != "no" else None
        if isinstance(evaluated, dict):
            keys += [f"eval_{name}_loss" for name in evaluated]
        elif evaluated is not None:
            keys += ["eval_loss"]
        plot_logs(trainer.args.output_dir, trainer.state.log_history, keys)


def _complete_converted(trainer: DiffusionTrainer, finetuning_args: Any) -> None:
    """Add tokenizer and diffusion_config.json to the plain LoRA adapter that pissa_convert has saved."""
    folder = Path(trainer.args.output_dir) / "pissa_converted"
    if finetuning_args.pissa_convert and trainer.is_world_process_zero() and folder.is_dir():
        trainer.processing_class.save_pretrained(folder)
        replace(trainer.diffusion_config, attention_ratio=trainer.reached_ratio()).save(folder)
    elif finetuning_args.pissa_init and finetuning_args.pissa_iter != -1:
        logger.warning_rank0(
            "pissa_init with an approximate decomposition (pissa_iter): PEFT draws it again whenever the adapter is "
            "loaded, which gives another model than was trained. Set pissa_convert: true, or pissa_iter: -1."
        )


def _forget_lengths(folder: Path) -> None:
    """Remove the length predictors of weights that were overwritten."""
    if (folder / LENGTHS).is_file():
        (folder / LENGTHS).unlink()
        (folder / LENGTHS_REPORT).unlink(missing_ok=True)
        logger.info_rank0(f"{folder / LENGTHS} belonged to the old weights and was removed; run fit-length again.")
