"""Checks of autoregressive stages and commands: they warn of a diffusion model, or refuse it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamafactory.extras.misc import try_download_model_from_other_hub
from transformers.utils.hub import cached_file

from ...checkpoints.families import detect_family, raw_config
from ...checkpoints.hub import may_be_on_hub
from ...modeling.diffusion_config import FILE_NAME
from ..hparams.stages import STAGES
from ..logs import get_logger

logger = get_logger(__name__)
_DIFFUSION_STAGES = " or ".join(f"stage: {name}" for name in STAGES)
# Keys of the models that LLaMA-Factory's stages load in addition to the one that they train.
_EXTRA_MODELS = ("ref_model", "ref_model_adapters", "reward_model", "reward_model_adapters")


def check_training(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Warn if an autoregressive stage loads a diffusion model; training it that way may be intended.

    Raises:
        ValueError: if the run would resume a diffusion run, save its weights beside a diffusion_config.json, or
            generate with a diffusion model without training it.
    """
    stage = f"stage: {finetuning_args.stage}"
    if training_args.do_train:
        _check_output_dir(training_args, stage)
    extra_models = ",".join(getattr(finetuning_args, key, None) or "" for key in _EXTRA_MODELS).split(",")
    diffusion_models = dict(find_diffusion_models(model_args, filter(None, extra_models)))
    for name, evidence in diffusion_models.items():
        logger.warning_rank0(
            f"{name} is a diffusion model ({evidence}), but {stage} treats it as autoregressive; set "
            f"{_DIFFUSION_STAGES} to train it as a diffusion model."
        )
    if diffusion_models and training_args.do_predict and not training_args.do_train:
        raise ValueError(
            f"do_predict: {next(iter(diffusion_models))} is a diffusion model, but {stage} generates token by token; "
            "set stage: ddm-sft"
        )


def check_autoregressive(model_args: Any, stage: str | None) -> None:
    """Refuse a diffusion model, or a diffusion stage, in a command that reads or writes token by token.

    Args:
        model_args: LLaMA-Factory's.
        stage: the diffusion stage that the user set, or None.
    Raises:
        ValueError: if there is one; the message names the model and what does the same for it.
    """
    name_and_evidence = next(find_diffusion_models(model_args), None)
    if name_and_evidence is None and stage is None:
        return
    refused = f"stage: {stage}"
    name = "PATH"
    if name_and_evidence is not None:
        name, evidence = name_and_evidence
        refused = f"{name}, a diffusion model ({evidence})"
        logger.warning_rank0(f"{name} is a diffusion model, but this command works token by token.")
    raise ValueError(
        f"this command does not take {refused}; use {_DIFFUSION_STAGES} with do_predict or do_eval, or "
        f"llamafactory-ddm generate {name}; to chat with it, remove stage or set stage: ddm-sft"
    )


def find_diffusion_models(model_args: Any, extra_models: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield each diffusion model among adapters, model and `extra_models`, and the evidence that it is one."""
    adapters = model_args.adapter_name_or_path or ()
    # For a model on another hub, LLaMA-Factory uses the folder that it downloads.
    model = try_download_model_from_other_hub(model_args)
    for name in dict.fromkeys((*adapters, model, *extra_models)):
        evidence = _find_evidence(str(name), model_args)
        if evidence is not None:
            yield str(name), evidence


def is_diffusion_model(name: str, *, cache_dir: str | None = None) -> bool:
    """Tell whether a folder, or a model on Hugging Face's Hub, is a diffusion model or an adapter of one."""
    place = SimpleNamespace(model_revision="main", cache_dir=cache_dir, hf_hub_token=None)
    return _find_evidence(name, place) is not None


def _find_evidence(name: str, model_args: Any) -> str | None:
    """Return why a folder, or a model on the Hub, counts as a diffusion model; None if it does not."""
    if _find_file(name, FILE_NAME, model_args) is not None:
        return f"it holds {FILE_NAME}"
    config = _find_file(name, "config.json", model_args)
    try:
        family = None if config is None else detect_family(raw_config(config.parent))
    except ValueError:  # LLaMA-Factory reports the fault
        return None
    return None if family is None else f"the published {family.title}"


def _find_file(name: str, file_name: str, model_args: Any) -> Path | None:
    """Return a file of a folder, or of a model on Hugging Face's Hub; None if there is no such file."""
    if Path(name).is_dir() or not may_be_on_hub(name):
        path = Path(name) / file_name
        return path if path.is_file() else None
    try:
        path_in_cache = cached_file(
            name,
            file_name,
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):  # LLaMA-Factory loads the model too, and reports the fault
        return None
    return None if path_in_cache is None else Path(path_in_cache)


def _check_output_dir(training_args: Any, stage: str) -> None:
    resumed = training_args.resume_from_checkpoint
    if isinstance(resumed, str) and (Path(resumed) / FILE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {resumed} is a checkpoint of a diffusion run, which {stage} cannot resume; set "
            f"{_DIFFUSION_STAGES}, or start a new run with model_name_or_path: {resumed} and another output_dir"
        )
    folder = Path(training_args.output_dir)
    for config in (folder / FILE_NAME, *sorted(folder.glob(f"checkpoint-*/{FILE_NAME}"))):
        if config.is_file():
            raise ValueError(
                f"output_dir: {folder} holds {config}, which would mark the autoregressive weights of {stage} as a "
                f"diffusion model; set another output_dir, or remove {config.parent}"
            )
