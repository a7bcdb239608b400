"""The settings that decide how a run trains, stored with its checkpoints, so that only the same run resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ...checkpoints.hub import origin_of, repository_of
from ..logs import get_logger

logger = get_logger(__name__)
FILE_NAME = "diffusion_run.json"
_ROWS = 64  # rows that are hashed for a data set's fingerprint

_OF_DATA = (
    *("dataset", "template", "cutoff_len", "packing", "train_on_prompt", "mask_history", "default_system"),
    *("max_samples", "val_size", "streaming", "mix_strategy", "interleave_probs"),
)
# The checkpoint stores the optimiser's settings, and they override the YAML.
_OF_TRAINING = (
    *("seed", "data_seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
    *("neftune_noise_alpha", "disable_shuffling"),
)
# Keys of diffusion_config.json are compared with that file.
_OF_DIFFUSION = (
    *("anneal_steps", "time_epsilon", "loss_weighting", "loss_norm", "antithetic_time", "random_truncate_ratio"),
    *("pad_extra_blocks", "drop_overlong", "pad_mask_ratio", "pad_anneal_steps"),
    *("pad_mask_method", "eos_window_ratio", "eos_window_max", "eos_window_anneal_steps"),
)
_OF_LORA = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "loraplus_lr_ratio"),
    *("use_rslora", "use_dora", "pissa_init", "create_new_adapter"),
)
_OF_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
# These may change between runs, and take effect; a change is logged.
_MAY_CHANGE = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_grad_norm", "bf16"),
    *("fp16", "logging_steps", "save_strategy", "save_steps", "eval_strategy", "eval_steps"),
)


def run_facts(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, dataset: Any
) -> dict[str, Any]:
    """Return the settings that decide how a run trains, as JSON values.

    Args:
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        dataset: the training rows; a streamed data set is identified by its name only.
    """
    kind = finetuning_args.finetuning_type
    of_kind = {"lora": _OF_LORA, "freeze": _OF_FREEZE}.get(kind, ())
    names = (*_OF_DATA, *_OF_TRAINING, *_OF_DIFFUSION, *of_kind, *_MAY_CHANGE)
    facts = {name: _value(name, training_args, finetuning_args, data_args) for name in names}
    facts |= {"stage": finetuning_args.diffusion_stage, "finetuning_type": kind}
    if data_args.packing and finetuning_args.stage == "sft":
        facts["cutoff_len"] += 1  # LLaMA-Factory subtracted a token from the YAML's value
    if kind == "lora":
        facts["model_name_or_path"] = _model_name(model_args.model_name_or_path)
    facts["rows of a step"] = (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size
    )
    facts["training rows"] = _fingerprint(dataset)
    decoded: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return decoded


def save_facts(facts: dict[str, Any], folder: Path) -> None:
    """Write the facts into a checkpoint's folder."""
    (folder / FILE_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_facts(facts: dict[str, Any], folder: str) -> None:
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
        differing = [name for name in facts if name in stored and facts[name] != stored[name]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error}); resume from another checkpoint") from error
    changed = [name for name in differing if name not in _MAY_CHANGE]
    if changed == ["training rows"]:
        raise ValueError(
            f"the training rows are not those that {folder} was trained on, though the keys of the data set are the "
            "same: its files have changed; put them back, or start a new run from it with model_name_or_path"
        )
    if changed:
        said = "; ".join(
            f"{name}: {_said(facts[name])} contradicts the checkpoint, which says {name}: {_said(stored[name])}"
            for name in changed
            if name != "training rows"
        )
        raise ValueError(
            f"resuming from {folder} would be another run: {said}. Restore these settings, or start a new run from it "
            "with model_name_or_path"
        )
    if differing:
        said = ", ".join(f"{name}: {_said(facts[name])} (was {_said(stored[name])})" for name in differing)
        logger.info_rank0(f"Resuming from {folder} with {said}.")


def _value(name: str, *holders: Any) -> Any:
    value = next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)
    return sorted(value) if isinstance(value, (set, frozenset)) else value  # a set has no order to compare


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _model_name(name: str | None) -> str | None:
    """Return the repository of a hub's folder, else the absolute path of a folder."""
    if name is None:
        return None
    origin = origin_of(name)
    return repository_of(origin) or (str(Path(origin).resolve()) if Path(origin).is_dir() else origin)


def _fingerprint(dataset: Any) -> str | None:
    """Return the number of rows and a hash of some evenly spread ones."""
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    count = len(dataset)
    indices = sorted({number * (count - 1) // max(_ROWS - 1, 1) for number in range(_ROWS)})
    rows = [dataset[index] for index in indices]
    shown = [[_listed(row.get(key)) for key in ("input_ids", "labels")] for row in rows]
    return f"{count} rows, {hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]}"


def _listed(values: Any) -> list[int] | None:
    return None if values is None else [int(value) for value in values]
