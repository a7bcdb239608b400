"""`do_train` and `do_eval`: builds the trainer of a run, trains and saves, evaluates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.hub import origin_of
from ...modeling.length_heads import FILE_NAME as LENGTHS
from ...modeling.length_heads import REPORT_NAME as LENGTHS_REPORT
from ...modeling.sparse_attention import check_takes_sparse
from ..logs import get_logger
from ..model.model_card import Origin
from ..resolve.datasets import RunData
from ..resolve.objective import build_objective
from ..resolve.plan import RunPlan
from .eos_evaluation import JSON, evaluate_eos, write_eos_metrics
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
    # The filter would replace a NaN loss by the last finite one, and wait for the device at every step.
    training_args.logging_nan_inf_filter = False
    # Collated rows stay on the CPU, where noise is drawn; what goes to the device is pinned after that.
    training_args.dataloader_pin_memory = False
    if training_args.accelerator_config.dispatch_batches is None:
        # A dispatcher would split the last streamed batch, and move batches to the device before noise is drawn.
        training_args.accelerator_config.dispatch_batches = False
    sparse = plan.config.attention == "block" and finetuning_args.sparse_attention
    if sparse:
        check_takes_sparse(model)
        if training_args.device.type != "cuda":
            sparse = False
            logger.info_rank0("sparse_attention: true needs a GPU; this run computes the same attention densely.")
    trainer = DiffusionTrainer(
        objective=build_objective(plan.config, plan.tokenizer, model, plan.lengths, training_args, finetuning_args),
        diffusion_config=plan.config,
        anneal_steps=finetuning_args.anneal_steps,
        eval_time_samples=finetuning_args.eval_time_samples,
        stop_after_nan_steps=finetuning_args.stop_after_nan_steps,
        sparse_attention=sparse,
        logits_chunk=finetuning_args.logits_chunk,
        peak_tflops=finetuning_args.peak_tflops,
        sequence_parallel_size=finetuning_args.sequence_parallel_size if training_args.do_train else 1,
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
    trainer.run_settings = data.run_settings
    return trainer


def evaluate(trainer: DiffusionTrainer, plan: RunPlan, *, eos: bool) -> None:
    """Evaluate the evidence bound and, with `eos`, how well the model predicts EOS; save both."""
    metrics = trainer.last_evaluation()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if eos:
        _evaluate_eos(trainer, trainer.eval_dataset, plan.config.end_token_ids or ())


def _evaluate_eos(trainer: DiffusionTrainer, dataset: Any, eos_ids: tuple[int, ...]) -> None:
    for name, part in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
        metrics = evaluate_eos(trainer, part, eos_ids=eos_ids)
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / name
            folder.mkdir(parents=True, exist_ok=True)
            write_eos_metrics(metrics, folder)
            hidden, revealed = (100 * metrics[key]["top1"] for key in ("revealed 0", "revealed 1"))
            logger.info_rank0(
                f"EOS is the most probable token at its position in {hidden:.1f} % of rows if the text is masked, in "
                f"{revealed:.1f} % if it is revealed: {folder / JSON}"
            )


def train(trainer: DiffusionTrainer, plan: RunPlan, finetuning_args: Any) -> None:
    """Train, from a checkpoint if the run resumes, and save the model, its metrics and plots."""
    resume = plan.resume
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    _complete_pissa_adapter(trainer, finetuning_args)
    if trainer.is_world_process_zero():
        _remove_length_predictors(Path(trainer.args.output_dir))
    if trainer.steps_taken:
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    else:
        logger.warning_rank0(
            f"No step was taken: {resume or trainer.args.output_dir} already has {trainer.state.global_step} steps of "
            f"max_steps: {trainer.state.max_steps}. Raise max_steps (or num_train_epochs) to train further, or set "
            "overwrite_output_dir: true to start over."
        )
    trainer.save_state()
    reached = trainer.reached_ratio()
    if reached < 1.0:
        best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
        weights = f"the best weights, of {best}," if best else "the weights"
        logger.warning_rank0(
            f"anneal_steps: {finetuning_args.anneal_steps}: {weights} were trained up to an attention ratio of "
            f"{reached:.3f}, but sampling and evaluation use full attention; train longer, or lower anneal_steps."
        )
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        keys = ["loss", trainer.objective.term]
        evaluated = trainer.eval_dataset if str(trainer.args.eval_strategy.value) != "no" else None
        if isinstance(evaluated, dict):
            keys += [f"eval_{name}_loss" for name in evaluated]
        elif evaluated is not None:
            keys += ["eval_loss"]
        plot_logs(trainer.args.output_dir, trainer.state.log_history, keys)


def _complete_pissa_adapter(trainer: DiffusionTrainer, finetuning_args: Any) -> None:
    """Save tokenizer and diffusion_config.json with the plain LoRA adapter that pissa_convert has saved."""
    folder = Path(trainer.args.output_dir) / "pissa_converted"
    if finetuning_args.pissa_convert and trainer.is_world_process_zero() and folder.is_dir():
        trainer.processing_class.save_pretrained(folder)
        replace(trainer.diffusion_config, attention_ratio=trainer.reached_ratio()).save(folder)
    elif finetuning_args.pissa_init and finetuning_args.pissa_iter != -1:
        logger.warning_rank0(
            f"pissa_iter: {finetuning_args.pissa_iter}: PEFT draws the approximate decomposition of pissa_init again "
            "whenever it loads the adapter, so the loaded model differs from the trained one; set pissa_convert: true "
            "or pissa_iter: -1."
        )


def _remove_length_predictors(folder: Path) -> None:
    """Remove the length predictors that belong to the overwritten weights."""
    if (folder / LENGTHS).is_file():
        (folder / LENGTHS).unlink()
        (folder / LENGTHS_REPORT).unlink(missing_ok=True)
        logger.info_rank0(f"{folder / LENGTHS} was fitted to the old weights and is removed; run fit-length again.")
