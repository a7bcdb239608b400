"""The stage of chat, API and web chat: the user's, else recognised from the model, before arguments are parsed."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...checkpoints.hub import may_be_on_hub
from ..hparams.diffusion import DiffusionArguments
from ..hparams.parser import user_keys
from ..hparams.stages import STAGES, requested_stage
from ..logs import get_logger
from .autoregressive_use import find_diffusion_models

logger = get_logger(__name__)
_STAGE = "ddm-sft"
_BACKEND = "huggingface"


def with_stage(args: Any) -> Any:
    """Return the arguments with `stage: ddm-sft` if they name a diffusion model and no stage.

    Args:
        args: a dict, or command-line arguments.
    Raises:
        ValueError: if infer_backend is one that serves no diffusion model, or keys of ours come with a model that is
            not there.
    """
    found = _recognised(args)
    if found is not None:
        name, evidence = found
        logger.info_rank0(f"stage: not set; using {_STAGE}, as {name} is a diffusion model ({evidence}).")
        args = {**args, "stage": _STAGE} if isinstance(args, dict) else [*args, "--stage", _STAGE]
    elif requested_stage(args) is None:
        _check_folder(args)
    backend = _value(args, "infer_backend")
    if requested_stage(args) in STAGES and backend not in (None, _BACKEND):
        raise ValueError(
            f"infer_backend: {backend} generates token by token and serves no diffusion model; set infer_backend: "
            f"{_BACKEND}, or remove it"
        )
    return args


def _check_folder(args: Any) -> None:
    """Check that the model is there if keys of ours are set, which would be refused as those of another stage."""
    name = str(_value(args, "model_name_or_path"))
    ours = {field.name for field in fields(DiffusionArguments)}
    if ours.intersection(user_keys(args)) and not Path(name).is_dir() and not may_be_on_hub(name):
        raise ValueError(
            f"model_name_or_path: {name} is not a folder in {Path.cwd()}; train the model first, or correct the path"
        )


def serves_diffusion(args: Any) -> bool:
    """Tell whether a server with these arguments serves a diffusion model."""
    return requested_stage(args) in STAGES or _recognised(args) is not None


def _recognised(args: Any) -> tuple[str, str] | None:
    """Return the diffusion model in arguments that name no stage, with the evidence; None if there is none."""
    if requested_stage(args) is not None or _value(args, "export_dir") is not None:
        return None
    if _value(args, "model_name_or_path") is None:
        return None
    return next(find_diffusion_models(_model_args(args)), None)


def _value(args: Any, key: str) -> Any:
    """Return the value of a key in unparsed arguments; None if it is not set."""
    if isinstance(args, dict):
        return args.get(key)
    value, option = None, f"--{key}"
    for argument, following in pairwise([*args, None]):
        if argument == option:
            value = following
        elif str(argument).startswith(f"{option}="):
            value = str(argument).partition("=")[2]
    return value


def _model_args(args: Any) -> SimpleNamespace:
    adapters = _value(args, "adapter_name_or_path")
    return SimpleNamespace(
        model_name_or_path=str(_value(args, "model_name_or_path")),
        adapter_name_or_path=[part.strip() for part in str(adapters).split(",")] if adapters else None,
        model_revision=_value(args, "model_revision") or "main",
        cache_dir=_value(args, "cache_dir"),
        hf_hub_token=_value(args, "hf_hub_token"),
        om_hub_token=_value(args, "om_hub_token"),
        ms_hub_token=_value(args, "ms_hub_token"),
    )
