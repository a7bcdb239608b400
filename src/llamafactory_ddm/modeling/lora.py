"""LoRA on diffusion models: target modules, embeddings that stay tied, and the parts of an adapted layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
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


def trained_copy(wrapper: Any) -> nn.Module:
    """Return the module that a `ModulesToSaveWrapper` of PEFT calls."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.modules_to_save[names[0]]  # type: ignore[no-any-return]


def why_not_low_rank(layer: nn.Module) -> str:
    """Return why `low_rank_parts` does not describe an output embedding; empty if it does."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return f"the output embedding is a {type(layer).__name__}"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "the LoRA of the output embedding is DoRA or another variant"
    parts: list[Any] = [layer.get_base_layer(), *layer.lora_B.values()]
    others = [type(part).__name__ for part in parts if type(part) is not nn.Linear]
    if others:
        return f"the LoRA of the output embedding has a {others[0]}"
    if any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "parts of the output embedding's LoRA have hooks, as ZeRO-3 adds to gather their weights"
    return ""


def low_rank_parts(layer: Any, hidden: Tensor) -> tuple[nn.Linear, tuple[Tensor, Tensor] | None]:
    """Return the two summands of a LoRA layer: its linear layer, and the factors of a product of low rank.

    The output is `base(hidden) + inner @ outer.T`. Here inner is the scaled output of A on the hidden states after
    dropout, and outer is B; several active adapters are concatenated along the rank. Dropout draws the same random
    numbers as in the layer's own forward.

    Args:
        layer: a PEFT layer for which `why_not_low_rank` is empty.
        hidden: [n, width].
    Returns:
        The linear layer, and (inner [n, rank], outer [outputs, rank]); None for these if no adapter is active or
        they are merged.
    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    base: nn.Linear = layer.get_base_layer()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    if not names:
        return base, None
    inner = []
    for name in names:
        down = layer.lora_A[name]
        inner.append(down(layer.lora_dropout[name](hidden.to(down.weight.dtype))) * layer.scaling[name])
    outer = [layer.lora_B[name].weight for name in names]
    return base, (inner[0], outer[0]) if len(names) == 1 else (torch.cat(inner, dim=1), torch.cat(outer, dim=1))


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
