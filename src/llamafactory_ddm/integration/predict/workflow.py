"""`do_predict: true` within a run: build and check the requests before training, generate them after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.canvas import MARKER
from ...generation.generator import TextGenerator
from ...modeling.length_heads import LengthPredictors
from ...sampling import SamplingSettings
from ..logs import get_logger
from ..model.loader import sources
from ..resolve.plan import RunPlan
from ..train.trainer import DiffusionTrainer
from .requests import Request, build_example_requests, build_noise_requests, build_text_requests, distinct
from .runner import generate_all

logger = get_logger(__name__)


def build_requests(
    plan: RunPlan,
    model: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
) -> tuple[SamplingSettings, Sequence[Request]]:
    """Return the sampling settings and the checked requests; called before training, so that mistakes show early.

    Raises:
        ValueError: naming the key, or the index of the text in the data set.
    """
    settings = finetuning_args.sampling_settings(
        generating_args,
        plan.user_keys,
        seed=training_args.seed % 2**64,
        tokenizer=plan.tokenizer,
    )
    lengths = _length_predictors(model_args, training_args, finetuning_args)
    generator = TextGenerator(model, plan.tokenizer, plan.config, probe=False, lengths=lengths)
    max_new_tokens = generating_args.max_new_tokens if "max_new_tokens" in plan.user_keys else None
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    source = finetuning_args.generation_source()
    requests: Sequence[Request] = ()
    if source == "noise":
        if data_args.dataset is not None or data_args.eval_dataset is not None:
            logger.info_rank0("generate_from: noise does not use the data set.")
        requests = build_noise_requests(
            generator, count=finetuning_args.num_samples, length=data_args.cutoff_len, max_new_tokens=max_new_tokens
        )
    elif "num_samples" in plan.user_keys:
        logger.info_rank0(
            f"num_samples is used with generate_from: noise only; with generate_from: {source} set max_samples."
        )
    if source == "prompt":
        if plan.config.train_on_padding is False and max_new_tokens is None:
            logger.warning_rank0(
                "This model was finetuned with train_on_padding: false, so its responses fill the whole canvas, which "
                "has cutoff_len tokens unless max_new_tokens is set; set max_new_tokens to about the length of the "
                "answers."
            )
        requests = build_example_requests(
            generator,
            plan.template,
            plan.tokenizer_module,
            model_args,
            data_args,
            training_args,
            max_new_tokens=max_new_tokens,
        )
        marked = [index for index, request in enumerate(requests) if MARKER.search(request.prompt or "")]
        if marked:
            logger.warning_rank0(
                f"{len(marked)} prompts have an infilling marker such as <|infill:8|>, first in example {marked[0]}. "
                "stage: ddm-sft reads it as plain text; to fill gaps, use stage: ddm with generate_from: infill."
            )
    elif source != "noise":
        requests = build_text_requests(
            generator,
            model_args,
            data_args,
            training_args,
            infill=source == "infill",
            prefix_length=finetuning_args.prefix_length,
            max_new_tokens=max_new_tokens,
        )
    generator.check([request.canvas for request in distinct(requests)], settings)
    return settings, requests


def predict(
    trainer: DiffusionTrainer,
    plan: RunPlan,
    settings: SamplingSettings,
    requests: Sequence[Request],
    model_args: Any,
    finetuning_args: Any,
) -> None:
    """Generate the requests that `build_requests` returned, and save texts and metrics."""
    args = trainer.args
    ratio = trainer.reached_ratio()
    if ratio < 1.0:
        logger.warning_rank0(
            f"Training ended at attention_ratio {ratio:.3f}, before full attention (1), but generation uses full "
            "attention; train for more steps, or lower anneal_steps."
        )
    lengths = _length_predictors(model_args, args, finetuning_args)
    model = trainer.model.to(args.device)
    generator = TextGenerator(model, plan.tokenizer, plan.config, lengths=lengths)
    folders = None if args.do_train else sources(model_args, finetuning_args.checkpoint_dir)
    metrics = generate_all(
        generator, requests, settings, args, model_folders=folders, save_trace=finetuning_args.save_trace
    )
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)


def _length_predictors(model_args: Any, training_args: Any, finetuning_args: Any) -> LengthPredictors | None:
    """Return the length predictors stored with the weights; None if this run trains the weights."""
    if training_args.do_train:
        return None
    return LengthPredictors.find(sources(model_args, finetuning_args.checkpoint_dir)[0])
