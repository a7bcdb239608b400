"""`llamafactory-cli export` of a diffusion model: merged weights, tokenizer, diffusion_config.json, model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...checkpoints.hub import origin_of
from ...modeling.diffusion_config import DiffusionConfig
from ..logs import get_logger
from ..resolve.plan import resolve_config
from ..resolve.vocabulary import check_all_trained, resolve_vocabulary
from .loader import load_diffusion_model, load_diffusion_tokenizer
from .model_card import FILE_NAME as CARD
from .model_card import Origin, card, write

logger = get_logger(__name__)
_exported: list[Path] = []  # folders to which the running export has saved a diffusion model
# An export resolves the model as generation does: with the checkpoint's own noise process.
_GENERATION_ARGS = SimpleNamespace(do_train=False, do_eval=False, do_predict=True)


def exported_tokenizer(model_args: Any) -> dict[str, Any]:
    """Return LLaMA-Factory's tokenizer module, with the tokenizer of the adapter, the checkpoint or the base model.

    Raises:
        ValueError: if the model has no diffusion config, or a YAML key contradicts it.
    """
    args = model_args.exported_diffusion
    loaded = load_diffusion_tokenizer(model_args, args, _GENERATION_ARGS)
    tokenizer = loaded.module["tokenizer"]
    vocabulary = resolve_vocabulary(tokenizer, loaded.additions, loaded.mask, loaded.config, None, args.mask_token)
    model_args.exported_as = (loaded.config, vocabulary)
    return loaded.module


def exported_model(tokenizer: Any, model_args: Any) -> Any:
    """Return the model with merged adapters; its save_pretrained also saves diffusion_config.json."""
    args = model_args.exported_diffusion
    config, vocabulary = model_args.exported_as
    vocabulary.additions.record(tokenizer, "template")  # LLaMA-Factory applies it before it loads the model
    check_all_trained(vocabulary)
    args.diffusion_stage = args.diffusion_stage or "ddm-sft"
    model = load_diffusion_model(tokenizer, vocabulary, model_args, args, _GENERATION_ARGS)
    config = resolve_config(config, vocabulary.mask, model_args, _GENERATION_ARGS, args)
    _save_with(model, config, model_args)
    _exported.append(Path(model_args.export_dir))
    return model


def without_modelfile(export: Callable[..., Any], args: Any) -> Any:
    """Run LLaMA-Factory's export, and remove the Modelfile of a diffusion model, which Ollama cannot run."""
    _exported.clear()
    result = export(args)
    for folder in _exported:
        (folder / "Modelfile").unlink(missing_ok=True)
        logger.info_rank0(
            f"The Modelfile was removed from {folder}: Ollama cannot run a diffusion model. "
            f"{folder / CARD} shows how to generate text."
        )
    return result


def _save_with(model: Any, config: DiffusionConfig, model_args: Any) -> None:
    save_model = model.save_pretrained
    adapters = tuple(model_args.adapter_name_or_path or ())
    origin = Origin(origin_of(model_args.model_name_or_path), None, "full", adapters=adapters)

    def save_pretrained(save_directory: str | Path, **kwargs: Any) -> None:
        save_model(save_directory, **kwargs)
        is_local = Path(save_directory) == Path(model_args.export_dir)  # else a temporary folder to push
        path = str(save_directory if is_local else model_args.export_hub_model_id)
        write(save_directory, card(Path(path).resolve().name, path, config, origin))
        config.save(save_directory)

    model.save_pretrained = save_pretrained
