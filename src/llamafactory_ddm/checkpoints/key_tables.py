"""Whether the weights of a checkpoint are those of its model, by exact tables of names and shapes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .diffullama import AnyLayout, shapes_of
from .weights import some, weight_files


def check_keys(source: Path, layout: AnyLayout | None, config: Any) -> None:
    """Compare names and shapes with those of the model.

    Raises:
        ValueError: listing what is missing, unexpected, there twice, or of another shape.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if is_tied(config) else set()
    _compare(source, layout, expected, optional=tied, what=config.model_type)


def _compare(
    source: Path,
    layout: AnyLayout | None,
    expected: dict[str, tuple[int, ...]],
    *,
    optional: set[str],
    what: str,
) -> None:
    found: dict[str, tuple[int, ...]] = {}
    twice = []
    for path in weight_files(source):
        for key, shape in shapes_of(path).items():
            standard = key if layout is None else layout.to_standard(key)
            if standard is None:
                continue
            twice += [standard] * (standard in found)
            found[standard] = shape
    missing = sorted(expected.keys() - found.keys() - optional)
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} {found[key]} instead of {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key]
    ]
    faults = {"missing": missing, "unexpected": unexpected, "there twice": twice, "of another shape": shapes}
    said = [f"{fault} {some(names)}" for fault, names in faults.items() if names]
    if said:
        raise ValueError(f"the weights in {source} do not fit {what}: {'; '.join(said)}")


def check_adapter_keys(source: Path, layout: AnyLayout | None, settings: dict[str, Any]) -> None:
    """Compare names and shapes with those that PEFT gives the adapter on its base.

    Raises:
        ValueError: if the base has no config, or listing what is missing, unexpected or of another shape.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    base = str(settings.get("base_model_name_or_path"))
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is an adapter of {base}, whose config.json cannot be loaded ({first_line(error)}); name the "
            "model with --base"
        ) from error
    known = {field.name for field in fields(LoraConfig)}
    lora = LoraConfig(**{key: value for key, value in settings.items() if key in known and key != "peft_type"})
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key: tuple(value.shape) for key, value in state.items()}
    _compare(source, layout, expected, optional=set(), what=f"an adapter of {base}")


def is_tied(config: Any) -> bool:
    """Tell whether input and output embedding are one."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def first_line(error: BaseException) -> str:
    """Return what an error says before its details."""
    return str(error).strip().partition("\n")[0]
