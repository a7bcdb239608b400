"""Checks of folders, keys and lengths before a run loads or writes anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...checkpoints.adapters import ADAPTER_CONFIG, check_adapter, check_model_or_adapter
from ...checkpoints.families import detect_family, raw_config
from ...checkpoints.hub import may_be_on_hub
from ...checkpoints.layouts import is_model_folder, unreadable_layout
from ...checkpoints.weights import verify_checkpoint
from ...modeling.model_info import max_positions
from .output_folder import check_output_folder


def check_inputs(model_args: Any, training_args: Any, finetuning_args: Any, *, prepares: bool) -> None:
    """Check the folders of the model, the keys of generation, output_dir, and that flash attention is installed.

    Raises:
        ValueError: for a mistake, naming the key and the remedy.
        OSError: if output_dir cannot be written.
    """
    check_checkpoint_folders(model_args, finetuning_args, training_args)
    check_predict(training_args, finetuning_args.parsed.user_keys)
    if not prepares:
        check_deepspeed_device(training_args)
        check_flash_attention(model_args)
        check_monitoring(training_args, finetuning_args)
        check_output_folder(model_args, training_args, finetuning_args)


def check_deepspeed_device(training_args: Any) -> None:
    """Check that neither use_cpu nor ACCELERATE_USE_CPU is set with DeepSpeed; accelerate would use plain DDP.

    Raises:
        ValueError: if it is.
    """
    if not training_args.deepspeed:
        return
    for name, is_set in (
        ("use_cpu: true", training_args.use_cpu),
        ("the environment variable ACCELERATE_USE_CPU", parse_flag_from_env("ACCELERATE_USE_CPU")),
    ):
        if is_set:
            raise ValueError(
                f"deepspeed: with {name}, accelerate would use plain DDP instead; remove {name}, and on a machine "
                "without a GPU set the environment variable DS_ACCELERATOR=cpu"
            )


def check_flash_attention(model_args: Any) -> None:
    """Check that FlashAttention-2 can be used; LLaMA-Factory would warn and fall back to another attention.

    Raises:
        ValueError: if `flash_attn: fa2` is set, and FlashAttention-2 cannot be used.
    """
    from transformers.utils import is_flash_attn_2_available, is_torch_npu_available  # type: ignore[attr-defined]

    if model_args.flash_attn != "fa2" or is_flash_attn_2_available() or is_torch_npu_available():
        return
    cause = "there is no GPU, or flash-attn is too old"
    if importlib.util.find_spec("flash_attn") is None:
        cause = "the package flash-attn is not installed"
    raise ValueError(
        f"flash_attn: fa2 cannot be used, as {cause}; on a machine with a GPU run pip install --no-build-isolation "
        '"llamafactory-ddm[flash-attn]", or set flash_attn: sdpa'
    )


def check_checkpoint_folders(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    """Check the folders of `model_name_or_path`, `checkpoint_dir` and `adapter_name_or_path`.

    Raises:
        ValueError: if one does not exist, is truncated, or cannot be used by the run.
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
            _check_model_or_adapter(key, path)
            family = detect_family(raw_config(path))
            if family is not None and key != "model_name_or_path":
                raise ValueError(
                    f"{key}: {folder} holds the published {family.title}, a whole model; name it as model_name_or_path"
                )
            verify_checkpoint(path)
            if key == "adapter_name_or_path":
                check_adapter(path)
            layout = None if key == "checkpoint_dir" else unreadable_layout(path)
            if layout is not None:
                raise ValueError(
                    f"{key}: {folder} has the layout of {layout.name}, which Hugging Face cannot load; convert it "
                    f"with llamafactory-ddm convert {folder} OUT"
                    + (", or name it as checkpoint_dir, with its base as model_name_or_path" if not adapters else "")
                )
        elif key != "model_name_or_path" or not may_be_on_hub(folder):
            nor_on_hub = ""
            if key == "adapter_name_or_path" and may_be_on_hub(folder):
                nor_on_hub = f", nor a diffusion adapter on the Hub at model_revision: {model_args.model_revision}"
            raise ValueError(
                f"{key}: {folder} is not a folder{nor_on_hub}; check the path, which is relative to {Path.cwd()}"
            )
    has_adapter = finetuning_args.finetuning_type == "lora" and (training_args.do_train or bool(adapters))
    _check_checkpoint_dir(finetuning_args.checkpoint_dir, has_adapter=has_adapter)


def _check_model_or_adapter(key: str, path: Path) -> None:
    """Check that the folder holds what the key names: a model or an adapter."""
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if key == "adapter_name_or_path" and not is_adapter:
        raise ValueError(
            f"{key}: {path} holds no {ADAPTER_CONFIG}, so it is not an adapter; name a model as model_name_or_path"
        )
    check_model_or_adapter(path)
    if key == "model_name_or_path" and is_adapter and not (path / "config.json").is_file():
        raise ValueError(
            f"{key}: {path} is an adapter; name it as adapter_name_or_path, with finetuning_type: lora, and as "
            "model_name_or_path the model that it was trained on"
        )


def _check_checkpoint_dir(folder: str | None, *, has_adapter: bool) -> None:
    """Refuse a checkpoint_dir that the run cannot load, or that an adapter would not record as its base."""
    if folder is None or not Path(folder).is_dir() or is_model_folder(folder):
        return
    remedy = f"convert it with llamafactory-ddm convert {folder} OUT, and set model_name_or_path: OUT instead"
    if has_adapter:
        raise ValueError(
            f"checkpoint_dir: {folder} holds weights that replace those of model_name_or_path, but an adapter records "
            f"only model_name_or_path as its base; {remedy}"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"checkpoint_dir: {folder} holds weights for a whole model, which DeepSpeed ZeRO-3 shards; {remedy}"
        )


# LLaMA-Factory's keys of autoregressive generation -> the alternative.
_AUTOREGRESSIVE_KEYS = {
    "do_sample": "for greedy decoding set logits_temp: 0",
    "num_beams": "a diffusion model has no beam search",
    "length_penalty": "a diffusion model has no beam search",
    "max_length": "set max_new_tokens, or cutoff_len for prompt and response together",
    "skip_special_tokens": "special tokens are always skipped",
}


def check_monitoring(training_args: Any, finetuning_args: Any) -> None:
    """Refuse keys of sample_steps and eval_tasks that the run cannot follow.

    Raises:
        ValueError: for sharded parameters, tasks without evaluations or without lm-eval, and for keys of
            autoregressive generation.
    """
    tasks = finetuning_args.eval_tasks
    samples = finetuning_args.sample_steps if training_args.do_train else 0
    for key, value in (("sample_steps", samples), ("eval_tasks", tasks)):
        if value and _is_sharded(training_args):
            raise ValueError(
                f"{key}: {value} needs the whole model in every process, but DeepSpeed ZeRO-3 and FSDP shard it; "
                f"remove {key}, or train with DDP or ZeRO-2"
            )
        if value:
            _check_not_autoregressive(finetuning_args.parsed.user_keys)
    if not tasks:
        return
    if not training_args.do_eval:
        raise ValueError(
            f"eval_tasks: {tasks} is run by each evaluation, but eval_strategy is no; set eval_strategy: steps or "
            "epoch, or do_eval: true for one evaluation at the end"
        )
    folder = finetuning_args.eval_task_dir
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"eval_task_dir: {folder} is not a folder; check the path, which is relative to {Path.cwd()}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f'eval_tasks: {tasks} needs lm-eval, which is not installed: pip install "llamafactory-ddm[eval]"'
        )


def _is_sharded(training_args: Any) -> bool:
    return bool(is_deepspeed_zero3_enabled() or training_args.fsdp)


def check_predict(training_args: Any, user_keys: frozenset[str]) -> None:
    """Refuse settings that generation does not support.

    Args:
        training_args: LLaMA-Factory's.
        user_keys: keys that the YAML sets.
    Raises:
        ValueError: for sharded parameters, and for keys of autoregressive generation.
    """
    if not training_args.do_predict:
        return
    if _is_sharded(training_args):
        raise ValueError(
            "do_predict: true needs the whole model in every process, but DeepSpeed ZeRO-3 and FSDP shard it; "
            "generate in a separate run without deepspeed and fsdp"
        )
    _check_not_autoregressive(user_keys)


def _check_not_autoregressive(user_keys: frozenset[str]) -> None:
    refused = [key for key in _AUTOREGRESSIVE_KEYS if key in user_keys]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: {_AUTOREGRESSIVE_KEYS[refused[0]]}; remove the key. Diffusion sampling takes "
            "denoising_strategy, diffusion_steps, temperature (logits_temp), top_p (topp_temp), top_k, "
            "repetition_penalty and max_new_tokens"
        )


def check_cutoff(config: Any, data_args: Any) -> None:
    """Check that rows of cutoff_len fit the model's positions.

    Raises:
        ValueError: naming cutoff_len and the number of positions.
    """
    limit = max_positions(config)
    if limit is not None and data_args.cutoff_len > limit:
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len} exceeds the model's {limit} positions; set cutoff_len: {limit}"
        )
