"""Upstream's runner of LlamaBoard with the diffusion keys of the page, and our stage for diffusion models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ..hparams.stages import STAGES
from ..resolve.autoregressive_use import is_diffusion_model
from .fields import PREDICT_KEYS, PREFIX, TRAINING_KEYS, changed_keys

_PREDICT_STAGE = "ddm-sft"


def diffusion_runner(original: type[Any]) -> type[Any]:
    """Return upstream's Runner with our keys in the commands of our stages and models."""

    class DiffusionRunner(original):  # type: ignore[misc]
        def _parse_train_args(self, data: Mapping[Any, Any]) -> dict[str, Any]:
            args: dict[str, Any] = original._parse_train_args(self, data)
            if args["stage"] in STAGES:
                # What the user wrote in "Extra arguments" counts.
                args = {**self._our_keys(data, "train", TRAINING_KEYS, args["stage"]), **args}
            return args

        def _parse_eval_args(self, data: Mapping[Any, Any]) -> dict[str, Any]:
            args: dict[str, Any] = original._parse_eval_args(self, data)
            names = [args.get("adapter_name_or_path"), args["model_name_or_path"]]
            models = [name for part in names if part for name in part.split(",")]
            if any(is_diffusion_model(name, cache_dir=args["cache_dir"]) for name in models):
                args = {**as_diffusion(args, models), **self._our_keys(data, "eval", PREDICT_KEYS, _PREDICT_STAGE)}
            return args

        def _our_keys(self, data: Mapping[Any, Any], tab: str, keys: Iterable[str], stage: str) -> dict[str, Any]:
            values = {name: data[self.manager.get_elem_by_id(f"{tab}.{PREFIX}{name}")] for name in keys}
            return changed_keys(values, stage=stage)

    DiffusionRunner.__name__ = DiffusionRunner.__qualname__ = original.__name__
    return DiffusionRunner


def as_diffusion(args: Mapping[str, Any], models: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of "Evaluate & Predict" for a diffusion model.

    Upstream's cutoff_len bounds a prompt, and ours prompt and response. A model answers badly on a longer canvas than
    it was finetuned on, which therefore bounds cutoff_len; max_new_tokens counts where it is the lower one.
    """
    ours = {**args, "stage": _PREDICT_STAGE}
    del ours["predict_with_generate"]  # upstream's switch from likelihoods to texts
    ours["cutoff_len"] = min(ours["cutoff_len"], *(_trained_canvas(name) or ours["cutoff_len"] for name in models))
    if ours["max_new_tokens"] >= ours["cutoff_len"]:
        del ours["max_new_tokens"]
    return ours


def _trained_canvas(name: str) -> int | None:
    """Return the number of tokens of prompt and response that a folder says it was finetuned on, or None."""
    if not (Path(name) / FILE_NAME).is_file():
        return None
    config = DiffusionConfig.load(name)
    return config.canvas if config.variable_length is None else config.variable_length.canvas
