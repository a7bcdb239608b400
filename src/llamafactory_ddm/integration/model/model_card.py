"""The model card (README.md) of a diffusion model: its origin, its usage, its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..._version import __version__
from ...checkpoints.hub import may_be_on_hub
from ...modeling.diffusion_config import DiffusionConfig
from ...utils.files import replacing
from ..logs import get_logger

logger = get_logger(__name__)
FILE_NAME = "README.md"
_TRAINING = {"ddm": "adapted by continual pre-training", "ddm-sft": "finetuned on prompts and responses"}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        base: folder or name of the base model; None if the model was trained from random weights.
        stage: `ddm` or `ddm-sft`; None for an export.
        finetuning_type: LLaMA-Factory's.
        datasets: names of the training data sets.
        adapters: adapters that an export merged into `base`.
    """

    base: str | None
    stage: str | None
    finetuning_type: str
    datasets: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def write_trained(trainer: Any, origin: Origin, name: str | None = None) -> None:
    """Write the card of the model that a trainer has saved; if writing fails, log a warning.

    Args:
        trainer: a DiffusionTrainer after training.
        origin: where the model comes from.
        name: title of the card; by default the name on the Hub or of output_dir.
    """
    folder = Path(trainer.args.output_dir)
    hub_name = trainer.args.hub_model_id if trainer.args.push_to_hub else None
    config = replace(trainer.diffusion_config, attention_ratio=trainer.reached_ratio())
    training = {**extract_hyperparameters_from_trainer(trainer), "steps": trainer.trained_steps()}
    results: dict[str, float] = {}
    training_ended = False
    for log in trainer.state.log_history:
        training_ended |= "train_runtime" in log  # later results belong to the saved weights
        if training_ended or log.get("step") == trainer.trained_steps():
            results |= {key: log[key] for key in log if key.startswith("eval_") and key.endswith("loss")}
    text = card(
        name or (hub_name or folder.resolve().name).rpartition("/")[2],
        hub_name or str(folder),
        config,
        origin,
        training=training,
        results=results,
    )
    write(folder, text)


def write(folder: str | Path, text: str) -> None:
    """Write README.md; if writing fails, log a warning, as the weights are already saved."""
    try:
        with replacing(Path(folder) / FILE_NAME) as file:
            file.write(text)
    except OSError as error:
        logger.warning_rank0(f"The model card {Path(folder) / FILE_NAME} could not be written ({error}).")


def card(
    name: str,
    path: str,
    config: DiffusionConfig,
    origin: Origin,
    *,
    training: dict[str, Any] | None = None,
    results: dict[str, float] | None = None,
) -> str:
    """Return the text of a model card, with its metadata for the Hub.

    Args:
        name: title of the card.
        path: folder or Hub name from which the model is loaded.
        config: the diffusion config.
        origin: where the model comes from.
        training: hyperparameters by name.
        results: evaluation losses by name.
    """
    metadata = yaml.safe_dump(_metadata(config, origin), sort_keys=False, allow_unicode=True)
    sections = [f"---\n{metadata}---\n\n# {name}\n", _summary(origin), _usage(path, origin), _process(config)]
    for title, values in (("Evaluation", results), ("Training", training)):
        if values:
            sections.append(f"## {title}\n\n" + "".join(f"- {key}: {value}\n" for key, value in values.items()))
    return "\n".join(sections)


def _is_adapter(origin: Origin) -> bool:
    return origin.finetuning_type == "lora"


def _metadata(config: DiffusionConfig, origin: Origin) -> dict[str, Any]:
    kind = "uniform-diffusion" if config.uniform_ratio == 1 else "masked-diffusion"
    tags = ["diffusion", kind, "diffusion-language-model", "llama-factory", "llamafactory-ddm"]
    data: dict[str, Any] = {
        "library_name": "llamafactory-ddm",
        "pipeline_tag": "text-generation",
        "license": "other",
        "tags": [*tags, origin.finetuning_type],
    }
    # The Hub accepts only names of its own models.
    if origin.base is not None and may_be_on_hub(origin.base) and not Path(origin.base).exists():
        data |= {"base_model": origin.base, "base_model_relation": "adapter" if _is_adapter(origin) else "finetune"}
    return data


def _summary(origin: Origin) -> str:
    return (
        f"{_origin_sentence(origin)}\n\n"
        "It fills all positions in parallel, starting from a masked sequence. Generation token by token "
        "(`model.generate` of transformers, vLLM, Ollama) gives no usable text.\n"
    )


def _origin_sentence(origin: Origin) -> str:
    if origin.stage is None:
        merged = f", with {' and '.join(origin.adapters)} merged into it" if origin.adapters else ""
        return f"A diffusion language model, exported from {origin.base}{merged} by llamafactory-ddm {__version__}."
    subject, method = "A diffusion language model", _TRAINING[origin.stage]
    if _is_adapter(origin):
        subject = f"A LoRA adapter that turns {origin.base} into a diffusion language model"
    elif origin.base is None:
        method = "trained from random weights"
    else:
        method += f" from {origin.base} ({origin.finetuning_type})"
    data = f" Data: {', '.join(origin.datasets)}." if origin.datasets else ""
    return (
        f"{subject}, {method}, with LLaMA-Factory (`stage: {origin.stage}`) and llamafactory-ddm {__version__}.{data}"
    )


def _usage(path: str, origin: Origin) -> str:
    base = f"The base model is loaded from `{origin.base}`.\n\n" if _is_adapter(origin) else ""
    return (
        f"## Usage\n\n{base}"
        "```bash\npip install llamafactory-ddm\n"
        f'llamafactory-ddm generate {path} --prompt "Once upon a time"\n```\n\n'
        "```python\nfrom llamafactory_ddm import load\n\n"
        f"model = load({path!r})\n"
        'print(model.generate("Once upon a time", max_new_tokens=64)[0])\n```\n'
    )


def _attention(config: DiffusionConfig) -> str:
    if config.attention == "block":
        return f"in blocks of {config.train_block_length} tokens, from left to right"
    return "full" if config.attention_ratio == 1 else f"annealed to {config.attention_ratio:.3f}, unfinished"


def _process(config: DiffusionConfig) -> str:
    properties = {
        "mask token": f"`{config.mask_token}` (id {config.mask_token_id})",
        "logits at position i predict": "token i + 1 (shift: true)" if config.shift else "token i (shift: false)",
        "noise": config.noise_process + (f", uniform_ratio {config.uniform_ratio}" if config.uniform_ratio else ""),
        "schedule": config.noise_schedule,
        "attention": _attention(config),
    }
    if config.variable_length is not None:
        variable_length = config.variable_length
        properties["variable length"] = f"{variable_length.format}, canvas of {variable_length.canvas} tokens"
    if config.sep_token is not None:
        properties["between prompt and response"] = f"`{config.sep_token}` (id {config.sep_token_id})"
    table = "".join(f"| {key} | {value} |\n" for key, value in properties.items())
    return f"## Diffusion process\n\n| | |\n|---|---|\n{table}"
