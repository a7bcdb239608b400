"""`llamafactory-ddm memory x.yaml`: the memory that full training takes on each GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .yaml_command import run_command

USAGE = """usage: llamafactory-ddm memory x.yaml [gpus=8] [key=value ...]

Estimate the memory that full training by a YAML takes on each of `gpus` GPUs, with the formula of docs/scale.md. No
weights are loaded: model_name_or_path may be a folder that holds only config.json. Example:
llamafactory-ddm memory examples/llama2_full_ddm.yaml gpus=8
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command("memory", USAGE, argv, _print)


def _print(keys: dict[str, Any]) -> None:
    from ..modeling.memory import parts, shape_of

    if not keys.get("model_name_or_path"):
        raise ValueError("model_name_or_path is missing; name the model, or a folder that holds its config.json")
    run = run_of(keys)
    config = _config(str(keys["model_name_or_path"]))
    row = int(keys.get("cutoff_len", 2048)) * (2 if keys.get("attention") == "block" else 1)
    sizes = parts(shape_of(config, row=row, half=run.half), run)
    for name, size in sizes.items():
        print(f"{name:22} {size / 1e9:7.2f} GB")
    total = sum(size for name, size in sizes.items() if not name.startswith("host: "))
    print(f"{'total on each GPU':22} {total / 1e9:7.2f} GB, without what CUDA, NCCL and the allocator take")


def _config(name: str) -> Any:
    """Return the config of a model.

    Raises:
        ValueError: if it cannot be read.
    """
    from transformers import AutoConfig

    from ..checkpoints.hub import may_be_on_hub
    from ..checkpoints.weights import first_line

    if not (Path(name).is_dir() or may_be_on_hub(name)):
        raise ValueError(
            f"model_name_or_path: {name} is not a folder; check the path (it is relative to {Path.cwd()})"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # any: transformers checks a config in many ways
        cure = "check the name, the connection and HF_HUB_OFFLINE, or give a folder that holds its config.json"
        if Path(name).is_dir():
            cure = "give a folder that holds the config.json of a model that transformers knows"
        raise ValueError(
            f"model_name_or_path: the config of {name} cannot be read ({first_line(error)}); {cure}"
        ) from error


def run_of(keys: dict[str, Any]) -> Any:
    """Return how the YAML trains, as a `Run` of the formula.

    Raises:
        ValueError: if the formula does not cover it.
    """
    from ..modeling.memory import Run

    if keys.get("finetuning_type", "lora") != "full":
        raise ValueError(
            f"finetuning_type: {keys.get('finetuning_type', 'lora')} is not covered by the formula, only full is"
        )
    gpus, sequence = (_whole_number(keys, name) for name in ("gpus", "sequence_parallel_size"))
    sharding, offload = "none", ""
    if keys.get("deepspeed"):
        zero = json.loads(Path(keys["deepspeed"]).read_text(encoding="utf-8")).get("zero_optimization", {})
        sharding = f"zero{zero.get('stage', 0)}".replace("zero0", "none")
        places = {"w": "offload_param", "g": "offload_optimizer", "o": "offload_optimizer"}
        offload = "".join(part for part, name in places.items() if zero.get(name, {}).get("device", "none") != "none")
    elif keys.get("fsdp"):
        config = keys.get("fsdp_config") or {}
        config = json.loads(Path(config).read_text(encoding="utf-8")) if isinstance(config, str) else config
        if int(config.get("version", config.get("fsdp_version", 1))) != 2:
            raise ValueError('fsdp_config: the formula covers FSDP 2 only; set "version": 2')
        sharding, offload = "fsdp2", "wgo" if "offload" in str(keys["fsdp"]) else ""
    return Run(
        sharding=sharding,  # type: ignore[arg-type]
        processes=gpus,
        rows=int(keys.get("per_device_train_batch_size", 8)),
        half=bool(keys.get("bf16") or keys.get("fp16")),
        checkpointing=not keys.get("disable_gradient_checkpointing", False),
        offload=offload,
        logits=keys.get("logits_chunk"),
        sequence=sequence,
    )


def _whole_number(keys: dict[str, Any], name: str) -> int:
    value = keys.get(name, 1)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r} must be a whole number of at least 1")
    return value
