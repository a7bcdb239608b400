"""Checks for autoregressive stages and commands that are given a diffusion model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llamafactory.extras.misc import try_download_model_from_other_hub
from transformers.utils.hub import cached_file

from ...checkpoints.families import detect_family, raw_config
from ...checkpoints.hub import may_be_on_a_hub
from ...modeling.diffusion_config import FILE_NAME
from ..hparams.stages import STAGES
from ..logs import get_logger

logger = get_logger(__name__)
_OURS = " or ".join(f"stage: {name}" for name in STAGES)
# Models that LLaMA-Factory's stages load in addition to the one that they train.
_BESIDE = ("ref_model", "ref_model_adapters", "reward_model", "reward_model_adapters")


def check_training(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Warn if an autoregressive stage is about to load a diffusion model; training it so may be intended.

    Raises:
        ValueError: if the run would resume a diffusion run, save its weights next to a diffusion_config.json, which
            would then describe them, or generate with a diffusion model without training it.
    """
    stage = f"stage: {finetuning_args.stage}"
    if training_args.do_train:
        _check_output_dir(training_args, stage)
    names = [getattr(finetuning_args, key, None) for key in _BESIDE]
    found = dict(find_diffusion_models(model_args, (n for name in names if name for n in name.split(","))))
    for name, why in found.items():
        logger.warning_rank0(
            f"{name} is a diffusion model ({why}), but {stage} treats it as autoregressive: set {_OURS} to go on with "
            "it as what it is."
        )
    if found and training_args.do_predict and not training_args.do_train:
        raise ValueError(
            f"do_predict: {next(iter(found))} is a diffusion model, and {stage} would write with it token by token, "
            "as it was not trained to; set stage: ddm-sft"
        )


def check_serving(model_args: Any, stage: str | None) -> None:
    """Refuse to serve a diffusion model or a diffusion stage with LLaMA-Factory's autoregressive generation.

    Args:
        model_args: LLaMA-Factory's.
        stage: the diffusion stage that the user set, or None.
    Raises:
        ValueError: naming the model and the command that generates with it.
    """
    found = next(find_diffusion_models(model_args), None)
    if found is None and stage is None:
        return
    served = f"stage: {stage}"
    name = "PATH"
    if found is not None:
        name, why = found
        served = f"{name}, a diffusion model ({why})"
        logger.warning_rank0(f"{name} is a diffusion model, and this command writes token by token.")
    raise ValueError(
        f"this command does not serve {served}; generate with do_predict: true and {_OURS}, or with llamafactory-ddm "
        f"generate {name}; to export it, set export_dir"
    )


def find_diffusion_models(model_args: Any, beside: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield each diffusion model among adapters, model and `beside`, and the file that marks it as one."""
    adapters = model_args.adapter_name_or_path or ()
    # LLaMA-Factory replaces the name of a model on another hub by its folder.
    model = try_download_model_from_other_hub(model_args)
    for name in dict.fromkeys((*adapters, model, *beside)):
        why = _sign(str(name), model_args)
        if why is not None:
            yield str(name), why


def _sign(name: str, model_args: Any) -> str | None:
    """Return why a folder, or a model on the hub, counts as a diffusion model; None if it does not."""
    if _file(name, FILE_NAME, model_args) is not None:
        return f"it holds {FILE_NAME}"
    config = _file(name, "config.json", model_args)
    try:
        family = None if config is None else detect_family(raw_config(config.parent))
    except ValueError:  # LLaMA-Factory reports the fault
        return None
    return None if family is None else f"{family.title} as it was published"


def _file(name: str, file_name: str, model_args: Any) -> Path | None:
    """Return a file of a folder, or of a model on Hugging Face's hub; None if there is no such file."""
    if Path(name).is_dir() or not may_be_on_a_hub(name):
        path = Path(name) / file_name
        return path if path.is_file() else None
    try:
        found = cached_file(
            name,
            file_name,
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):  # LLaMA-Factory loads the model too, and reports the fault
        return None
    return None if found is None else Path(found)


def _check_output_dir(training_args: Any, stage: str) -> None:
    resumed = training_args.resume_from_checkpoint
    if isinstance(resumed, str) and (Path(resumed) / FILE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {resumed} is a checkpoint of a diffusion run, which {stage} cannot go on with; "
            f"set {_OURS}, or start a run of its own from it with model_name_or_path and another output_dir"
        )
    folder = Path(training_args.output_dir)
    held = [path.parent for path in (folder / FILE_NAME, *sorted(folder.glob(f"checkpoint-*/{FILE_NAME}")))]
    held = [path for path in held if (path / FILE_NAME).is_file()]
    if held:
        raise ValueError(
            f"output_dir: {held[0]} holds a diffusion model, whose {FILE_NAME} would mark the autoregressive weights "
            f"of {stage} as a diffusion model; choose another output_dir, or remove that folder"
        )
