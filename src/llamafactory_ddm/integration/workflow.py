"""A run of `stage: ddm` or `stage: ddm-sft`, from top to bottom."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from .. import _errors
from ..utils.processes import barrier
from ..utils.run_lock import run_lock
from .data.faults import check_not_empty
from .logs import get_logger, hide_harmless_messages
from .model.loader import load_diffusion_model, load_diffusion_tokenizer
from .predict.workflow import build_requests, predict
from .resolve.checks import check_inputs
from .resolve.datasets import load_datasets
from .resolve.model_names import resolve_model_names
from .resolve.plan import resolve_run
from .resolve.resume import resume_hint
from .resolve.run_settings import check_run_settings
from .train.monitoring import add_monitoring
from .train.tasks import load_eval_tasks
from .train.training import build_trainer, evaluate, train

logger = get_logger(__name__)


def run(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any = None,
    callbacks: list[Any] | None = None,
) -> None:
    """Run a diffusion stage with LLaMA-Factory's parsed arguments.

    Raises:
        ValueError: for a mistake in the YAML, naming the key and the remedy, before anything is written.
        OSError: if a file is missing or cannot be written.
    """
    _errors.when_interrupted(lambda: resume_hint(training_args))
    prepares = not (training_args.do_train or training_args.do_eval or training_args.do_predict)
    rank, world = training_args.process_index, training_args.world_size
    with hide_harmless_messages(on_cpu=training_args.device.type == "cpu"):
        resolve_model_names(model_args)
        check_inputs(model_args, training_args, finetuning_args, prepares=prepares)
        with nullcontext() if prepares else run_lock(training_args.output_dir, rank=rank, world=world):
            tokenizer = load_diffusion_tokenizer(model_args, finetuning_args, training_args)
            plan = resolve_run(tokenizer, model_args, data_args, training_args, finetuning_args)
            data = load_datasets(
                plan, model_args, data_args, training_args, finetuning_args, drops_overlong=not prepares
            )
            if prepares:
                logger.info_rank0("The data set is prepared; set do_train, do_eval or do_predict to use it.")
                return
            if plan.resume is not None:
                check_run_settings(data.run_settings, plan.resume)
            tasks = load_eval_tasks(training_args, finetuning_args, plan.config.template)
            model = load_diffusion_model(plan.tokenizer, plan.vocabulary, model_args, finetuning_args, training_args)
            requests = None  # built before training, which a mistake in them would waste
            if training_args.do_predict:
                requests = build_requests(
                    plan, model, model_args, data_args, training_args, finetuning_args, generating_args
                )
            trainer = build_trainer(
                plan, model, data, model_args, data_args, training_args, finetuning_args, callbacks
            )
            add_monitoring(trainer, plan, data, tasks, data_args, finetuning_args, generating_args)
            if training_args.do_train:
                check_not_empty(trainer.train_dataset, data_args)
                train(trainer, plan, finetuning_args)
            if training_args.do_eval:
                evaluate(trainer, plan, eos=finetuning_args.eval_eos)
            if requests is not None:
                predict(trainer, plan, *requests, model_args, finetuning_args)
            if training_args.do_train:
                trainer.push_to_hub() if training_args.push_to_hub else trainer.create_model_card()
            # If a finished process fails as it exits, torchrun kills the first one while it still writes.
            barrier(world)
    _errors.when_interrupted(None)
