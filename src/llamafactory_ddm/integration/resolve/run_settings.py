"""The settings that determine how a run trains: saved with its checkpoints, and checked when it resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ...checkpoints.hub import origin_of, repository_of
from ..logs import get_logger

logger = get_logger(__name__)
FILE_NAME = "diffusion_run.json"
_N_HASHED = 64  # rows that are hashed for a data set's fingerprint

_DATA_KEYS = (
    *("dataset", "template", "cutoff_len", "packing", "train_on_prompt", "mask_history", "default_system"),
    *("max_samples", "val_size", "streaming", "mix_strategy", "interleave_probs"),
)
# The optimiser's settings in a checkpoint override the YAML.
_TRAINING_KEYS = (
    *("seed", "data_seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
    *("neftune_noise_alpha", "disable_shuffling"),
)
# Without the keys that diffusion_config.json holds: `check_resumed` compares those.
_DIFFUSION_KEYS = (
    *("anneal_steps", "time_epsilon", "loss_weighting", "loss_norm", "antithetic_time", "random_truncate_ratio"),
    *("block_noise", "pad_extra_blocks", "drop_overlong", "pad_mask_ratio", "pad_anneal_steps"),
    *("pad_mask_method", "eos_window_ratio", "eos_window_max", "eos_window_anneal_steps"),
)
_LORA_KEYS = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "loraplus_lr_ratio"),
    *("use_rslora", "use_dora", "pissa_init", "create_new_adapter"),
)
_FREEZE_KEYS = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
# A resumed run may change these; the change is logged.
_CHANGEABLE_KEYS = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_grad_norm", "bf16"),
    *("fp16", "logging_steps", "save_strategy", "save_steps", "eval_strategy", "eval_steps"),
)


def collect_run_settings(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, dataset: Any
) -> dict[str, Any]:
    """Return the settings that determine how a run trains, as JSON values.

    Args:
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        dataset: the training rows, which are fingerprinted unless they are streamed.
    """
    finetuning_type = finetuning_args.finetuning_type
    type_keys = {"lora": _LORA_KEYS, "freeze": _FREEZE_KEYS}.get(finetuning_type, ())
    keys = (*_DATA_KEYS, *_TRAINING_KEYS, *_DIFFUSION_KEYS, *type_keys, *_CHANGEABLE_KEYS)
    settings = {key: _get(key, training_args, finetuning_args, data_args) for key in keys}
    settings |= {"stage": finetuning_args.diffusion_stage, "finetuning_type": finetuning_type}
    if data_args.packing and finetuning_args.stage == "sft":
        settings["cutoff_len"] += 1  # LLaMA-Factory subtracted a token from the YAML's value
    if finetuning_type == "lora":
        settings["model_name_or_path"] = _model_name(model_args.model_name_or_path)
    settings["rows of a step"] = (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size
    )
    settings["training rows"] = _fingerprint(dataset)
    as_json: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return as_json


def write_run_settings(settings: dict[str, Any], folder: Path) -> None:
    """Write the settings to a checkpoint's folder."""
    (folder / FILE_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_run_settings(settings: dict[str, Any], folder: str) -> None:
    """Check that this run has the settings of the checkpoint in `folder`, if the checkpoint stores them.

    Raises:
        ValueError: if a setting differs, naming it and both values.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "model_name_or_path" in stored:
            stored["model_name_or_path"] = _model_name(stored["model_name_or_path"])
        changed = [key for key in settings if key in stored and settings[key] != stored[key]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error}); resume from another checkpoint") from error
    refused = [key for key in changed if key not in _CHANGEABLE_KEYS]
    if refused == ["training rows"]:
        raise ValueError(
            f"the training rows differ from those of {folder}, but the keys of the data set do not, so the files "
            "of the data set have changed; restore them, or start a new run with model_name_or_path"
        )
    if refused:
        contradictions = "; ".join(
            f"{key}: {_format(settings[key])} contradicts the checkpoint, which has {key}: {_format(stored[key])}"
            for key in refused
            if key != "training rows"
        )
        raise ValueError(
            f"{folder} cannot be resumed with other settings: {contradictions}. Restore these settings, or start a "
            "new run with model_name_or_path"
        )
    if changed:
        changes = ", ".join(f"{key}: {_format(settings[key])} (was {_format(stored[key])})" for key in changed)
        logger.info_rank0(f"Resuming from {folder} with {changes}.")


def _get(key: str, *arguments: Any) -> Any:
    value = next((getattr(args, key) for args in arguments if hasattr(args, key)), None)
    return sorted(value) if isinstance(value, (set, frozenset)) else value  # a set has no order to compare


def _format(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _model_name(name: str | None) -> str | None:
    """Return the repository of a model from a hub, else the absolute path of a folder."""
    if name is None:
        return None
    origin = origin_of(name)
    return repository_of(origin) or (str(Path(origin).resolve()) if Path(origin).is_dir() else origin)


def _fingerprint(dataset: Any) -> str | None:
    """Return the number of rows and a hash of evenly spread ones; None for streamed or no rows."""
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    n_rows = len(dataset)
    indices = sorted({number * (n_rows - 1) // max(_N_HASHED - 1, 1) for number in range(_N_HASHED)})
    rows = [dataset[index] for index in indices]
    ids_and_labels = [[_as_list(row.get(key)) for key in ("input_ids", "labels")] for row in rows]
    return f"{n_rows} rows, {hashlib.sha256(json.dumps(ids_and_labels).encode()).hexdigest()[:16]}"


def _as_list(values: Any) -> list[int] | None:
    return None if values is None else [int(value) for value in values]
