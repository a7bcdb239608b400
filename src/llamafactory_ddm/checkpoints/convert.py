"""A published checkpoint into an ordinary Hugging Face folder with diffusion_config.json, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.diffusion_config import DiffusionConfig
from .adapter_conversion import convert_adapter
from .adapters import ADAPTER_CONFIG
from .converted_weights import renamer, write_weights
from .diffullama import LAYOUTS, AnyLayout, Layout, embedding_rows, keys_of, layout_of
from .key_tables import check_keys, is_tied
from .llada_dream import LLADA, kind_behind, kind_of, raw_config
from .llada_dream import published_config as published_config_of
from .source_parts import (
    check_options,
    described_by_code,
    described_by_table,
    source_config,
    source_tokenizer,
    with_start_and_end,
)
from .weights import read_weight, stored_dtype, verify_checkpoint, weight_files


def convert(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    to_published: bool = False,
    mask_token: str | None = None,
    sep_token: str | None = None,
    pad_token: str | None = None,
    shift: bool = True,
) -> None:
    """Write `target`, a folder that does not exist yet; it appears when it is complete.

    Args:
        source: a published checkpoint, or with `to_published` an ordinary one; a model or a LoRA adapter.
        target: where the result goes.
        base: folder or name of the model that it was trained from, for a config or tokenizer that `source` lacks.
        to_published: write the names of the published layout.
        mask_token: spelling or id; by default what the table of published models says.
        sep_token: the same, between prompt and response.
        pad_token: the same, of padding.
        shift: whether logits at i predict token i + 1.
    Raises:
        ValueError: if a file is missing, broken or holds other weights than the model has, if nothing says which token
            is the mask, or if `target` exists.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; check the path (it is relative to {Path.cwd()})")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a folder that does not")
    verify_checkpoint(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if (source / ADAPTER_CONFIG).is_file():
            convert_adapter(source, scratch, base, to_published)
        else:
            tokens = {"mask_token": mask_token, "sep_token": sep_token, "pad_token": pad_token}
            _convert_model(source, scratch, base, to_published, tokens, shift)
        for path in scratch.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_model(
    source: Path,
    scratch: Path,
    base: str | Path | None,
    to_published: bool,
    tokens: dict[str, str | None],
    shift: bool,
) -> None:
    config = source_config(source, base)
    layout = layout_of(key for path in weight_files(source) for key in keys_of(path))
    own = kind_of(raw_config(source))
    described = DiffusionConfig.find(source)
    if to_published and (layout is not None or own is not None):
        raise ValueError(f"{source} has the layout of {layout.name if layout else own.name if own else ''} already")
    wanted = _published_layout(config, described) if to_published else None
    rows = embedding_rows(source, layout) or int(config.vocab_size)
    config.vocab_size = rows
    check_keys(source, layout, config)
    if is_tied(config) and _ends_differ(source, layout):
        config.tie_word_embeddings = False
    write_weights(source, scratch, renamer(layout, wanted))
    config.dtype = stored_dtype(source)
    config.save_pretrained(scratch)
    tokenizer = source_tokenizer(source, base, own)
    if described is None and own is not None:
        described = described_by_code(source, own, tokenizer, tokens)
    if described is not None:
        check_options(described, tokenizer, tokens, shift)
    else:
        described = described_by_table(config, rows, tokenizer, tokens, shift, layout)
    if described.mask_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"mask_token": described.mask_token})
    if tokenizer.convert_tokens_to_ids(described.mask_token) != described.mask_token_id:
        raise ValueError(
            f"the tokenizer gives the mask token {described.mask_token!r} the id "
            f"{tokenizer.convert_tokens_to_ids(described.mask_token)}, the weights were trained with "
            f"{described.mask_token_id}; name the model that they were trained from with --base"
        )
    tokenizer.save_pretrained(scratch)
    with_start_and_end(described, tokenizer).save(scratch)
    own = kind_behind(config.model_type, described.shift)
    if to_published and own is not None and not isinstance(wanted, Layout):
        raw = published_config_of(config, own, described.mask_token_id)
        (scratch / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _published_layout(config: Any, described: DiffusionConfig | None) -> AnyLayout | None:
    """Return the layout in which models like this were published; None for Dream, whose names are Qwen2's.

    Raises:
        ValueError: if there were none.
    """
    own = None if described is None else kind_behind(config.model_type, described.shift)
    if own is not None:
        return LLADA if own.standard_type == "llama" else None
    if config.model_type not in LAYOUTS:
        raise ValueError(f"no {config.model_type} model was published in another layout; {', '.join(LAYOUTS)} were")
    return LAYOUTS[config.model_type]


def _ends_differ(source: Path, layout: AnyLayout | None) -> bool:
    """Tell whether the files hold an output embedding with other values than the input's."""
    names = {kind.embedding + "weight" for kind in LAYOUTS.values()}
    ends: dict[str, Tensor] = {}
    for path in weight_files(source):
        for key in keys_of(path):
            standard = key if layout is None else layout.to_standard(key)
            if standard in names or standard == "lm_head.weight":
                ends["out" if standard == "lm_head.weight" else "in"] = read_weight(path, key)
    return len(ends) == 2 and not torch.equal(ends["in"], ends["out"])
