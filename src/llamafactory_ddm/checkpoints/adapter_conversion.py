"""A published LoRA adapter into one of an ordinary model, and back."""

from __future__ import annotations

import json
from pathlib import Path

from ..modeling.diffusion_config import DiffusionConfig
from .adapters import ADAPTER_CONFIG
from .converted_weights import renamer, write_weights
from .diffullama import LAYOUTS, Layout, keys_of, layout_of
from .key_tables import check_adapter_keys
from .llada_dream import kind_behind, kind_of, raw_config
from .source_parts import source_tokenizer
from .weights import weight_files


def convert_adapter(source: Path, scratch: Path, base: str | Path | None, to_published: bool) -> None:
    """Write the adapter in the folder `source` to the folder `scratch`; see `conversion.convert`.

    Raises:
        ValueError: if its keys are not those of its settings, if nothing says which diffusion model it belongs to, or
            if there is no published layout for it.
    """
    keys = [key for path in weight_files(source) for key in keys_of(path)]
    layout = layout_of(keys)
    if to_published and layout is not None:
        raise ValueError(f"{source} has the layout of {layout.name} already")
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if base is not None:
        settings["base_model_name_or_path"] = str(base)
    check_adapter_keys(source, layout, settings)
    if to_published:
        _check_adapter_kind(source, str(settings["base_model_name_or_path"]), keys)
    rename = renamer(layout, _adapter_layout(keys) if to_published else None)
    write_weights(source, scratch, rename)
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    described = DiffusionConfig.find(source)
    if described is None and base is not None:
        described = DiffusionConfig.find(base)
    if described is None:
        raise ValueError(
            "nothing says which diffusion model this adapter belongs to: convert that first, and name the result with "
            "--base"
        )
    described.save(scratch)
    if (source / "tokenizer_config.json").is_file():
        source_tokenizer(source, None).save_pretrained(scratch)


def _check_adapter_kind(source: Path, base: str, keys: list[str]) -> None:
    """Refuse an adapter of LLaDA or Dream, which were published with no names for one.

    Raises:
        ValueError: saying what can be converted.
    """
    described = DiffusionConfig.find(source)
    raw = raw_config(base) if (Path(base) / "config.json").is_file() else {}
    is_llama = any(key.startswith("base_model.model.model.layers.") for key in keys)
    model_type = str(raw.get("model_type", "llama" if is_llama else ""))
    kind = kind_of(raw) or (None if described is None else kind_behind(model_type, described.shift))
    if kind is not None:
        raise ValueError(
            f"{source} is an adapter of {kind.name}, which has no published layout for adapters; merge it first with "
            "llamafactory-cli export, and convert the result with --published"
        )


def _adapter_layout(keys: list[str]) -> Layout:
    kinds = {"gpt2": "base_model.model.transformer.h.", "llama": "base_model.model.model.layers."}
    for kind, prefix in kinds.items():
        if any(key.startswith(prefix) for key in keys):
            return LAYOUTS[kind]
    raise ValueError("this adapter belongs to no kind of model that was published in another layout")
