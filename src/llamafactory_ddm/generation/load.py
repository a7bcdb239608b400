"""`load`: a diffusion model from its folder or Hub name, ready to generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoints.adapters import ADAPTER_CONFIG, base_of, check_model_or_adapter, merged_with_base
from ..checkpoints.families import find_diffusion_config
from ..checkpoints.families.base import without_code
from ..checkpoints.hub import local_folder, may_be_on_hub
from ..checkpoints.layouts import unreadable_layout
from ..checkpoints.load_model import load_whole
from ..checkpoints.weights import verify_checkpoint
from ..modeling.activations import fuse_gelu
from ..modeling.bidirectional import make_bidirectional
from ..modeling.diffusion_config import FILE_NAME
from ..modeling.length_heads import LengthPredictors
from ..utils.devices import check_float64
from ..utils.plugins import load_plugins
from .generator import TextGenerator


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: Any = None,
    template: str | None = None,
    raw: bool = False,
    plugins: Sequence[str] | str | None = None,
) -> TextGenerator:
    """Load a diffusion model that this package saved, or a published LLaDA, Dream or SDAR model.

    Args:
        path: a folder with model, tokenizer and diffusion_config.json, or with a LoRA adapter in place of the model;
            or a published LLaDA, Dream or SDAR model, as a folder or Hub name.
        device: by default the first GPU if there is one, else the CPU.
        dtype: of the weights; by default float32 on a CPU, else the one that they are stored in.
        template: name of the template that formats prompts; by default the one that the model was finetuned with.
        raw: continue prompts without a template.
        plugins: your own modules or .py files to import first, such as those that the model was trained with.
    Raises:
        ValueError: if a plugin cannot be imported, or the folder does not exist, is truncated, lacks weights, or holds
            no diffusion model.
    """
    if raw and template is not None:
        raise ValueError("template and raw exclude each other; give one of them")
    load_plugins(plugins)
    folder = Path(local_folder(path))
    if not folder.is_dir():
        hub = ", nor a model in the Hub's cache (without HF_HUB_OFFLINE it would be downloaded)"
        raise ValueError(
            f"{path} is not a folder{hub if may_be_on_hub(str(path)) else ''}; check the path (it is relative to "
            f"{Path.cwd()})"
        )
    config = find_diffusion_config(folder)
    if config is None:
        raise ValueError(
            f"{path} holds no {FILE_NAME}, so it is no diffusion model of this package; train it with stage: ddm first"
        )
    check_model_or_adapter(folder)
    verify_checkpoint(folder)
    layout = unreadable_layout(folder)
    if layout is not None:
        raise ValueError(
            f"{path} has the published layout of {layout.name}, which transformers cannot load; convert it with "
            f"llamafactory-ddm convert {path} OUT"
        )
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    check_float64(device, "generation")
    dtype = dtype if dtype is not None else torch.float32 if device.type == "cpu" else "auto"
    tokenizer = without_code(AutoTokenizer.from_pretrained(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        base = base_of(folder)
        if not Path(base).is_dir() and not may_be_on_hub(base):
            raise ValueError(
                f"{path} is an adapter of {base}, which is not a folder in {Path.cwd()}; change the folder that you "
                f"start in, or base_model_name_or_path in {ADAPTER_CONFIG}"
            )
        model = merged_with_base(folder, config, base=local_folder(base), dtype=dtype)
    else:
        model = load_whole(AutoModelForCausalLM, pretrained_model_name_or_path=folder, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    make_bidirectional(model)
    fuse_gelu(model)
    generator = TextGenerator(model, tokenizer, config, lengths=LengthPredictors.find(folder))
    return generator.with_template(template) if raw or template is not None else generator
