"""LoRA on diffusion models: target modules, and embeddings that stay tied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .embeddings import has_tied_embeddings


def resolve_lora_targets(model: Any, finetuning_args: Any) -> None:
    """Replace `lora_target: all` by the names of all linear modules (GPT-2's too), and check all target names.

    Args:
        model: the base model.
        finetuning_args: LLaMA-Factory's; `lora_target` is changed.
    Raises:
        ValueError: if a name in lora_target or additional_target matches no module, or one of two tied embeddings.
    """
    linear = linear_modules(model)
    linear_names = sorted({name.rpartition(".")[2] for name in linear})
    targets = list(finetuning_args.lora_target)
    if targets == ["all"]:
        finetuning_args.lora_target = linear_names
    else:
        embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        head = embedding_names(model)[1]
        _check_names("lora_target", targets, [*linear, *embeddings, *([head] if head else [])], linear_names)
        _check_tied("lora_target", model, targets)
    if finetuning_args.additional_target:
        names = [name for name, _ in model.named_modules() if name]
        last_parts = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        _check_names("additional_target", list(finetuning_args.additional_target), names, last_parts)
        _check_tied("additional_target", model, finetuning_args.additional_target)


def linear_modules(model: Any) -> list[str]:
    """Return the names of the modules that LoRA can adapt: all linear ones except the output embedding."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__)
        and "lm_head" not in name
    ]


def embedding_names(model: Any) -> tuple[str, str | None]:
    """Return the names of the input and the output embedding; the latter is None if missing or the same module."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if head is None or head is embedding:
        return name, None
    return name, next(name for name, module in model.named_modules() if module is head)


def stored_embeddings(model: Any, targets: Iterable[str], *, freeze: bool) -> tuple[bool, bool]:
    """Tell whether input and output embedding are trained and stored under these names.

    Args:
        model: the base model; a tied output embedding is stored with the input embedding.
        targets: LLaMA-Factory's additional_target, or with `freeze` its freeze_extra_modules.
        freeze: whether targets match any part of a name, as freeze_extra_modules do.
    """
    embedding, head = embedding_names(model)

    def is_named(name: str) -> bool:
        return any(target in f"{name}.weight" if freeze else _matches(target, name) for target in targets)

    stored = is_named(embedding)
    return stored, stored if head is None or has_tied_embeddings(model) else is_named(head)


def _check_tied(key: str, model: Any, targets: Iterable[str]) -> None:
    """Refuse a target that names only one of two tied embeddings: `tie_again` would undo its training."""
    targets = list(targets)
    if not has_tied_embeddings(model) or (
        key == "additional_target" and stored_embeddings(model, targets, freeze=False)[0]
    ):
        return
    embedding, head = embedding_names(model)
    name = embedding.rpartition(".")[2]
    named = [target for target in targets if head is not None and _matches(target, head)]
    if key == "lora_target":
        named += [target for target in targets if _matches(target, embedding)]
        if named:
            raise ValueError(
                f"lora_target: {', '.join(named)} is tied (input and output embedding share one weight), so merging "
                f"the adapter would change both; remove it, or add {name} to additional_target, which trains both"
            )
    if named:
        raise ValueError(
            f"additional_target: {', '.join(named)} is tied to the input embedding {name}, and training it alone "
            f"would untie them; name {name}, which trains both"
        )


def tie_again(model: Any) -> None:
    """Tie the output embedding to the input embedding again, if the model's config says that they are tied.

    PEFT trains and merges a copy of an input embedding that additional_target names, and the output embedding keeps
    the old weight. Without this function the saved model would differ from the trained one.
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


def _check_names(key: str, targets: list[str], modules: list[str], names: list[str]) -> None:
    counts = {target: sum(_matches(target, name) for name in modules) for target in targets}
    missing = [target for target, count in counts.items() if not count]
    if missing:
        matched = ", ".join(f"{target} ({count} modules)" for target, count in counts.items() if count) or "nothing"
        raise ValueError(
            f"{key}: {', '.join(missing)} matches no module of this model (matched: {matched}); choose from "
            f"{', '.join(names)}"
        )


def _matches(target: str, name: str) -> bool:
    """Tell whether PEFT matches the module `name` with `target`."""
    return name == target or name.endswith(f".{target}")
