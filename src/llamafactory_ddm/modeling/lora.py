"""What LoRA needs to be told of a diffusion model: which modules, and which embeddings stay tied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..checkpoints.diffullama import shapes_of
from ..checkpoints.load_model import load_whole, load_whole_adapter
from ..checkpoints.weights import weight_files
from .diffusion_config import DiffusionConfig
from .embeddings import has_tied_embeddings, rows_of, set_rows

ADAPTER_CONFIG = "adapter_config.json"
# What an adapter and the model that it was trained on must say alike.
_AGREEING = ("mask_token", "mask_token_id", "shift", "noise_schedule")
# What pissa_convert keeps for itself: weights that belong to the rest of a decomposition, not to the base model.
_HALVES = ("pissa_init", "pissa_backup")
_WEIGHTS = ("safetensors", "bin")  # how files of weights end


def holds_model(folder: str | Path) -> bool:
    """Tell whether weights of a whole model lie in `folder`."""
    return any(any(Path(folder).glob(f"{kind}*.{end}")) for kind in ("model", "pytorch_model") for end in _WEIGHTS)


def refuse_both(folder: str | Path) -> None:
    """Refuse a folder that holds a model and an adapter, of which each reader would take another one.

    Raises:
        ValueError: naming the files.
    """
    if (Path(folder) / ADAPTER_CONFIG).is_file() and holds_model(folder):
        raise ValueError(
            f"{folder} holds the weights of a model and an adapter ({ADAPTER_CONFIG}), so it is not known which is "
            "meant: move one of them to another folder, with its own diffusion_config.json and tokenizer"
        )


def base_of(folder: str | Path) -> str:
    """Return the folder or name of the model that an adapter was trained on."""
    return str(_settings(folder)["base_model_name_or_path"])


def _settings(folder: str | Path) -> dict[str, Any]:
    """Return what adapter_config.json of a folder says.

    Raises:
        ValueError: if it is not readable, or names no base model.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = isinstance(settings["base_model_name_or_path"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        named = False
    if not named:
        raise ValueError(
            f"{path} is not readable, or names no base_model_name_or_path, the model that the adapter was trained on; "
            "copy or save the adapter again"
        )
    return settings


def check_agreement(found: Sequence[tuple[str, DiffusionConfig]]) -> None:
    """Check that what adapter, checkpoint and base model say about themselves is of one diffusion process.

    Args:
        found: folder and config of each that says something, the newest first.
    Raises:
        ValueError: if two contradict each other, naming both.
    """
    for folder, config in found[1:]:
        for key in _AGREEING:
            ours, theirs = getattr(found[0][1], key), getattr(config, key)
            if ours != theirs:
                raise ValueError(
                    f"{found[0][0]} was trained with {key}: {ours}, but {folder} says {key}: {theirs}; use the "
                    "adapter with the model that it was trained on"
                )


def check_adapter(folder: str | Path) -> None:
    """Check that an adapter loads as it was trained.

    Raises:
        ValueError: if it is one half of a decomposition whose other half is not the base model (PiSSA).
    """
    folder = Path(folder)
    converted = folder.parent / "pissa_converted" if folder.name in _HALVES else folder / "pissa_converted"
    cure = f"use {converted}" if converted.is_dir() else "train with pissa_convert: true and use its pissa_converted"
    if folder.name in _HALVES:
        raise ValueError(
            f"{folder} is an intermediate adapter of pissa_convert, and on the base model it is not the model that "
            f"was trained; {cure}"
        )
    if str(_settings(folder).get("init_lora_weights")).startswith("pissa_niter"):
        raise ValueError(
            f"{folder} was trained with pissa_init and an approximate decomposition (pissa_iter), which PEFT draws "
            f"anew when it loads the adapter: that gives another model than was trained; {cure}, or train with "
            "pissa_iter: -1"
        )


def merged_with_base(folder: str | Path, config: DiffusionConfig, *, base: str, dtype: Any) -> Any:
    """Load the base model of an adapter, and merge the adapter into it.

    Args:
        folder: with adapter_config.json and the adapter's weights.
        config: of the adapter.
        base: folder or name of the model, as transformers can load it.
        dtype: of the model's weights, as Hugging Face takes it.
    Raises:
        ValueError: if the base model cannot be loaded, or is not the one that the adapter was trained on.
    """
    from peft import PeftModel

    check_adapter(folder)
    described = DiffusionConfig.find(base)
    if described is not None:
        check_agreement([(str(folder), config), (base, described)])
    try:
        model: Any = load_whole(AutoModelForCausalLM, pretrained_model_name_or_path=base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is an adapter of {base}, which cannot be loaded ({str(error).strip().splitlines()[0]}); start "
            "where that path is right, or change base_model_name_or_path in its adapter_config.json"
        ) from error
    fit_rows(model, folder, own=rows_of(model))
    merged = load_whole_adapter(PeftModel, model, folder).merge_and_unload()
    tie_again(merged)
    return merged


def settle_targets(model: Any, finetuning_args: Any) -> None:
    """Put names in place of `lora_target: all`, GPT-2's included, and check that every name is one of the model's.

    Args:
        model: the base model.
        finetuning_args: upstream's; `lora_target` is changed.
    Raises:
        ValueError: if a name of lora_target or additional_target matches no module, saying what the others match.
    """
    linear = linear_modules(model)
    own = sorted({name.rpartition(".")[2] for name in linear})
    targets = list(finetuning_args.lora_target)
    if targets == ["all"]:
        finetuning_args.lora_target = own
    else:
        others = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        head = embedding_names(model)[1]
        _check_names("lora_target", targets, [*linear, *others, *([head] if head else [])], own)
        _check_tied("lora_target", model, targets)
    if finetuning_args.additional_target:
        names = [name for name, _ in model.named_modules() if name]
        others = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        _check_names("additional_target", list(finetuning_args.additional_target), names, others)
        _check_tied("additional_target", model, finetuning_args.additional_target)


def linear_modules(model: Any) -> list[str]:
    """Return the names of the modules that LoRA can take: all linear ones but the output embedding."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__)
        and "lm_head" not in name
    ]


def embedding_names(model: Any) -> tuple[str, str | None]:
    """Return the names of the input and the output embedding, the latter None where there is none of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if head is None or head is embedding:
        return name, None
    return name, next(name for name, module in model.named_modules() if module is head)


def stored_embeddings(model: Any, targets: Iterable[str], *, freeze: bool) -> tuple[bool, bool]:
    """Tell whether input and output embedding are trained and stored under these names.

    Args:
        model: the base model; of tied embeddings the output is stored with the input.
        targets: upstream's additional_target, or with `freeze` its freeze_extra_modules, which match parts of names.
        freeze: see there.
    """
    embedding, head = embedding_names(model)

    def is_named(name: str) -> bool:
        return any(target in f"{name}.weight" if freeze else _matches(target, name) for target in targets)

    stored = is_named(embedding)
    return stored, stored if head is None or has_tied_embeddings(model) else is_named(head)


def _check_tied(key: str, model: Any, targets: Iterable[str]) -> None:
    """Refuse a target that names the output end of tied embeddings alone: `tie_again` would undo its training."""
    targets = list(targets)
    if not has_tied_embeddings(model) or (
        key == "additional_target" and stored_embeddings(model, targets, freeze=False)[0]
    ):
        return
    embedding, head = embedding_names(model)
    named = [target for target in targets if head is not None and _matches(target, head)]
    if key == "lora_target":
        named += [target for target in targets if _matches(target, embedding)]
        if named:
            raise ValueError(
                f"lora_target: {', '.join(named)} is tied to the other embedding (input and output share one weight), "
                f"so merging the adapter would change both; remove it, or add {embedding.rpartition('.')[2]} to "
                "additional_target, which trains both"
            )
    if named:
        one = embedding.rpartition(".")[2]
        raise ValueError(
            f"additional_target: {', '.join(named)} is tied to the input embedding {one}, and trained alone would "
            f"part from it; name {one}, which trains both"
        )


def fit_rows(model: Any, folder: str | Path, *, own: int) -> None:
    """Give the embeddings of a base model as many rows as those that the adapter in `folder` holds, if it holds any.

    Args:
        model: the base model.
        folder: of the adapter.
        own: rows that the base model was saved with; an adapter with fewer belongs to another model.
    """
    rows = adapter_rows(model, folder)
    if rows is not None and rows >= own:
        set_rows(model, rows)


def adapter_rows(model: Any, folder: str | Path) -> int | None:
    """Return how many tokens the embeddings have that the adapter in `folder` holds, None where it holds none."""
    ends = [name for name in embedding_names(model) if name is not None]
    for path in weight_files(Path(folder)):
        for key, shape in shapes_of(path).items():
            for name in ends:
                if key.endswith((f".{name}.weight", f".{name}.lora_B.weight", f".{name}.base_layer.weight")):
                    return shape[0]
    return None


def tie_again(model: Any) -> None:
    """Have the output embedding share the input embedding's weight, if the model's config says that it does.

    PEFT trains, and merges, a copy of the input embedding that additional_target names, and leaves the output
    embedding with the weight of before: saved, the model would be another one than was trained.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    embedding = model.get_input_embeddings()
    trained = getattr(embedding, "modules_to_save", None)
    weight = embedding.weight if trained is None else next(iter(trained.values())).weight
    inner = getattr(head, "modules_to_save", None)
    head = head if inner is None else next(iter(inner.values()))
    if head.weight is not weight:
        head.weight = weight


def _check_names(key: str, targets: list[str], modules: list[str], known: list[str]) -> None:
    counts = {target: sum(_matches(target, name) for name in modules) for target in targets}
    missing = [target for target, count in counts.items() if not count]
    if missing:
        matched = ", ".join(f"{target} ({count} modules)" for target, count in counts.items() if count) or "nothing"
        raise ValueError(
            f"{key}: {', '.join(missing)} matches no module of this model; {matched} was matched. The model has "
            f"{', '.join(known)}"
        )


def _matches(target: str, name: str) -> bool:
    """Tell whether PEFT takes the module for the target."""
    return name == target or name.endswith(f".{target}")
