"""Checks of folders, keys and lengths before a run loads or writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...checkpoints.adapters import ADAPTER_CONFIG, check_adapter, refuse_both
from ...checkpoints.families import detect_family, raw_config
from ...checkpoints.hub import may_be_on_a_hub
from ...checkpoints.layouts import is_model_folder, unreadable_layout
from ...checkpoints.weights import verify_checkpoint
from ...modeling.model_info import max_positions
from .output_folder import check_output_folder


def check_inputs(model_args: Any, training_args: Any, finetuning_args: Any, *, prepares: bool) -> None:
    """Check the folders of the model, the keys of generation and output_dir.

    Raises:
        ValueError: naming the key and what to do.
        OSError: if output_dir cannot be written.
    """
    check_checkpoint_folders(model_args, finetuning_args, training_args)
    check_predict(training_args, finetuning_args.parsed.user_keys)
    if not prepares:
        check_output_folder(model_args, training_args, finetuning_args)


def check_checkpoint_folders(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    """Check the folders of `model_name_or_path`, `checkpoint_dir` and `adapter_name_or_path`.

    Raises:
        ValueError: if one does not exist or is truncated, or the run could not use it.
    """
    adapters = [("adapter_name_or_path", folder) for folder in model_args.adapter_name_or_path or ()]
    for key, folder in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("checkpoint_dir", finetuning_args.checkpoint_dir),
        *adapters,
    ):
        if folder is None:
            continue
        path = Path(folder)
        if path.is_dir():
            if key == "model_name_or_path" and model_args.train_from_scratch:
                continue
            _check_kind(key, path)
            family = detect_family(raw_config(path))
            if family is not None and key != "model_name_or_path":
                raise ValueError(
                    f"{key}: {folder} holds {family.title} as it was published, a whole model; name it as "
                    "model_name_or_path"
                )
            verify_checkpoint(path)
            if key == "adapter_name_or_path":
                check_adapter(path)
            layout = None if key == "checkpoint_dir" else unreadable_layout(path)
            if layout is not None:
                raise ValueError(
                    f"{key}: {folder} has the layout of {layout.name}, which Hugging Face cannot load: make it an "
                    f"ordinary folder with llamafactory-ddm convert {folder} OUT"
                    + (", or name it as checkpoint_dir, with its base as model_name_or_path" if not adapters else "")
                )
        elif key != "model_name_or_path" or not may_be_on_a_hub(folder):
            is_on_hub = key == "adapter_name_or_path" and may_be_on_a_hub(folder)
            hub = f", nor a diffusion adapter on the hub at model_revision: {model_args.model_revision}"
            raise ValueError(
                f"{key}: {folder} is not a folder{hub if is_on_hub else ''}; check the path (it is relative to "
                f"{Path.cwd()})"
            )
    has_adapter = finetuning_args.finetuning_type == "lora" and (training_args.do_train or bool(adapters))
    _check_checkpoint_dir(finetuning_args.checkpoint_dir, has_adapter=has_adapter)


def _check_kind(key: str, path: Path) -> None:
    """Check that the folder holds the kind of weights that the key names, a model or an adapter."""
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if key == "adapter_name_or_path" and not is_adapter:
        raise ValueError(
            f"{key}: {path} holds no {ADAPTER_CONFIG}, so it is no adapter; name a model as model_name_or_path"
        )
    refuse_both(path)
    if key == "model_name_or_path" and is_adapter and not (path / "config.json").is_file():
        raise ValueError(
            f"{key}: {path} is an adapter; name it as adapter_name_or_path, with finetuning_type: lora, and as "
            "model_name_or_path the model that it was trained on"
        )


def _check_checkpoint_dir(folder: str | None, *, has_adapter: bool) -> None:
    """Refuse a checkpoint_dir that the run could not load, or that an adapter would not record as its base."""
    if folder is None or not Path(folder).is_dir() or is_model_folder(folder):
        return
    cure = f"make it an ordinary folder first, with llamafactory-ddm convert {folder} OUT, and name that as "
    if has_adapter:
        raise ValueError(
            f"checkpoint_dir: {folder} holds weights that are put into model_name_or_path, and an adapter remembers "
            f"only the latter; {cure}model_name_or_path"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"checkpoint_dir: {folder} holds weights that are put into a whole model, which DeepSpeed ZeRO-3 splits; "
            f"{cure}model_name_or_path"
        )


# LLaMA-Factory's keys of autoregressive generation -> what to do instead.
_AUTOREGRESSIVE = {
    "do_sample": "for the most probable tokens set logits_temp: 0",
    "num_beams": "a diffusion model has no beams",
    "length_penalty": "a diffusion model has no beams",
    "max_length": "set max_new_tokens, or cutoff_len for prompt and text together",
    "skip_special_tokens": "special tokens are always left out",
}


def check_predict(training_args: Any, given: frozenset[str]) -> None:
    """Refuse settings that generation does not support.

    Args:
        training_args: LLaMA-Factory's.
        given: keys that the YAML sets.
    Raises:
        ValueError: for sharded parameters, and for keys of autoregressive generation.
    """
    if not training_args.do_predict:
        return
    if is_deepspeed_zero3_enabled() or training_args.fsdp:
        raise ValueError(
            "do_predict needs the whole model in every process, which DeepSpeed ZeRO-3 and FSDP do not give; "
            "generate in a run of its own, without deepspeed and fsdp"
        )
    refused = [key for key in _AUTOREGRESSIVE if key in given]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: {_AUTOREGRESSIVE[refused[0]]}; a diffusion model reads denoising_strategy, "
            "diffusion_steps, temperature (logits_temp), top_p (topp_temp), top_k, repetition_penalty and "
            "max_new_tokens"
        )


def check_cutoff(config: Any, data_args: Any) -> None:
    """Check that rows of cutoff_len fit the model's positions.

    Raises:
        ValueError: naming cutoff_len and the number of positions.
    """
    limit = max_positions(config)
    if limit is not None and data_args.cutoff_len > limit:
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len} exceeds the model's {limit} positions; "
            f"set cutoff_len: {limit} or less"
        )
