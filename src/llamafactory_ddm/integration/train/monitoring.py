"""Gives a trainer what a run shows while it trains: `sample_steps` and `eval_tasks`."""

from __future__ import annotations

from typing import Any

from ...generation.generator import TextGenerator, error_prefix
from ...modeling.quantization import evaluation_mode
from ...utils.random_state import unchanged_random_state
from ..resolve.datasets import RunData
from ..resolve.plan import RunPlan
from .samples import TrainingSamples, build_sample_requests
from .tasks import TaskEvaluation, user_sampling
from .trainer import DiffusionTrainer


def add_monitoring(
    trainer: DiffusionTrainer,
    plan: RunPlan,
    data: RunData,
    tasks: Any,
    data_args: Any,
    finetuning_args: Any,
    generating_args: Any,
) -> None:
    """Make the trainer generate texts (`sample_steps`) and run tasks in its evaluations (`eval_tasks`).

    Args:
        trainer: of the run.
        plan: of the run.
        data: the prepared rows, which give prompts.
        tasks: what `load_eval_tasks` returned.
        data_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        generating_args: LLaMA-Factory's.
    Raises:
        ValueError: naming the key, if the texts cannot be generated.
    """
    args, steps = trainer.args, finetuning_args.sample_steps if trainer.args.do_train else 0
    if not steps and tasks is None:
        return
    max_new_tokens = generating_args.max_new_tokens if "max_new_tokens" in plan.user_keys else None
    with evaluation_mode(trainer.model), unchanged_random_state():
        generator = TextGenerator(trainer.model, plan.tokenizer, plan.config, probe=False)
        settings = finetuning_args.sampling_settings(
            generating_args, plan.user_keys, seed=args.seed % 2**64, tokenizer=plan.tokenizer
        )
        if steps:
            requests = build_sample_requests(
                generator,
                _rows(data) if plan.finetunes else (),
                prompts=finetuning_args.sample_prompts,
                count=finetuning_args.sample_count,
                n_tokens=finetuning_args.sample_length or max_new_tokens,
                cutoff_len=data_args.cutoff_len,
            )
            with error_prefix(f"sample_steps: {steps}"):
                generator.check([request.canvas for request in requests], settings)
            trainer.add_callback(TrainingSamples(trainer, generator, requests, settings, steps))
    if tasks is not None:
        trainer.tasks = TaskEvaluation(
            tasks,
            generator,
            user_sampling(finetuning_args, generating_args, plan.user_keys),
            finetuning_args.eval_task_samples,
            max_new_tokens,
            args.per_device_eval_batch_size,
            bool(args.disable_tqdm),
        )


def _rows(data: RunData) -> list[Any]:
    """Return the data sets of the run, those for evaluation first."""
    evaluated = data.module.get("eval_dataset")
    sets = [*evaluated.values()] if isinstance(evaluated, dict) else [evaluated]
    return [rows for rows in (*sets, data.module.get("train_dataset")) if rows is not None]
