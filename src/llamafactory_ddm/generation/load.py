"""A diffusion model from its folder, or by its name, ready to generate; `load` is the package's public name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoints.adapters import ADAPTER_CONFIG, base_of, merged_with_base, refuse_both
from ..checkpoints.layouts import layout_of_folder
from ..checkpoints.load_model import load_whole
from ..checkpoints.plain_copy import may_be_on_a_hub, plain_folder
from ..checkpoints.weights import verify_checkpoint
from ..modeling.bidirectional import make_bidirectional
from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ..modeling.length_heads import LengthPredictors
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
    """Load a diffusion model that this package has saved, or a LLaDA or Dream as it was published.

    Args:
        path: a folder with model, tokenizer and diffusion_config.json, or with a LoRA adapter in place of the model;
            or a LLaDA or Dream, as a folder or by its name on Hugging Face's hub, of which a plain copy is made once.
        device: by default the first GPU if there is one, else the CPU.
        dtype: of the weights; by default the one they are stored in, on a CPU float32.
        template: name of the template to write prompts by; by default the one that the model was finetuned with.
        raw: continue prompts as they stand.
        plugins: modules or .py files of your own to import first, such as those that the model was trained with.
    Raises:
        ValueError: if a plugin cannot be imported, or the folder is not there, is truncated, lacks weights, or is no
            diffusion model.
    """
    if raw and template is not None:
        raise ValueError("template and raw exclude each other; give one of them")
    load_plugins(plugins)
    folder = Path(plain_folder(path))
    if not folder.is_dir():
        hub = ", nor a model in the hub's cache (without HF_HUB_OFFLINE it would be downloaded)"
        raise ValueError(
            f"{path} is not a folder{hub if may_be_on_a_hub(str(path)) else ''}; check the path (it is relative to "
            f"{Path.cwd()})"
        )
    config = DiffusionConfig.find(folder)
    if config is None:
        raise ValueError(
            f"{path} holds no {FILE_NAME}, so it is not a diffusion model of this package; adapt it with stage: ddm"
        )
    refuse_both(folder)
    verify_checkpoint(folder)
    layout = layout_of_folder(folder)
    if layout is not None:
        raise ValueError(
            f"{path} has the layout of {layout.name}, whose weights Hugging Face cannot load: make it an ordinary "
            f"folder with llamafactory-ddm convert {path} OUT"
        )
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype if dtype is not None else torch.float32 if device.type == "cpu" else "auto"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        base = base_of(folder)
        if not Path(base).is_dir() and not may_be_on_a_hub(base):
            raise ValueError(
                f"{path} is an adapter of {base}, which is not a folder; start where that path is right, or change "
                f"base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        model = merged_with_base(folder, config, base=plain_folder(base), dtype=dtype)
    else:
        model = load_whole(AutoModelForCausalLM, pretrained_model_name_or_path=folder, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    make_bidirectional(model)
    generator = TextGenerator(model, tokenizer, config, lengths=LengthPredictors.find(folder))
    return generator.with_template(template) if raw or template is not None else generator
