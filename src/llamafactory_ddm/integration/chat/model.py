"""Loads the model of a server by the path that `do_predict` takes, from LLaMA-Factory's parsed arguments."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llamafactory.extras.misc import get_current_device
from llamafactory.model import load_config

from ...generation.generator import TextGenerator
from ...modeling.length_heads import LengthPredictors
from ...modeling.model_info import max_positions
from ...sampling import SamplingSettings
from ..logs import get_logger, hide_harmless_messages
from ..model.loader import load_diffusion_model, load_diffusion_tokenizer, sources
from ..resolve.checks import check_checkpoint_folders
from ..resolve.model_names import resolve_model_names
from ..resolve.plan import resolve_run

logger = get_logger(__name__)
# A server resolves the model as generation does.
_GENERATION_ARGS = SimpleNamespace(do_train=False, do_eval=False, do_predict=True)
# Keys of LLaMA-Factory's generation that no diffusion model has -> the alternative.
_AUTOREGRESSIVE_KEYS = {
    "num_beams": "a diffusion model has no beam search",
    "length_penalty": "a diffusion model has no beam search",
    "max_length": "set max_new_tokens, or cutoff_len for prompt and answer together",
    "skip_special_tokens": "special tokens are always skipped",
}
_TOKENS = 256  # of an answer, where neither YAML, request nor checkpoint says how many


@dataclass(frozen=True)
class ServedModel:
    """A model and its settings.

    Attributes:
        generator: the model with its tokenizer.
        template: LLaMA-Factory's.
        defaults: settings of a request that sets none.
        canvas: largest number of tokens of prompt and answer together; None if nothing limits it.
        canvas_is: what sets `canvas`, for messages.
        max_new_tokens: tokens of an answer whose request does not say; None for all of the canvas.
        start: whether a chat needs the start token, as the model was not finetuned under a template.
    """

    generator: TextGenerator
    template: Any
    defaults: SamplingSettings
    canvas: int | None
    canvas_is: str
    max_new_tokens: int | None
    start: bool


def load_served(model_args: Any, data_args: Any, finetuning_args: Any, generating_args: Any) -> ServedModel:
    """Load model, adapters and tokenizer, and resolve template, settings and the size of the canvas.

    Raises:
        ValueError: for a mistake in the arguments, naming the key and the remedy.
    """
    user_keys = finetuning_args.parsed.user_keys
    _check_keys(user_keys, generating_args)
    device = get_current_device()
    # Prompts of a chat are those of finetuning, whichever stage is named.
    finetuning_args.stage, finetuning_args.diffusion_stage = "sft", "ddm-sft"
    model_args.device_map = {"": device}
    with hide_harmless_messages(on_cpu=device.type == "cpu"):
        resolve_model_names(model_args)
        check_checkpoint_folders(model_args, finetuning_args, _GENERATION_ARGS)
        if "cutoff_len" not in user_keys:
            data_args.cutoff_len = max_positions(load_config(model_args)) or data_args.cutoff_len
        tokenizer = load_diffusion_tokenizer(model_args, finetuning_args, _GENERATION_ARGS)
        plan = resolve_run(tokenizer, model_args, data_args, _GENERATION_ARGS, finetuning_args)
        model = load_diffusion_model(plan.tokenizer, plan.vocabulary, model_args, finetuning_args, _GENERATION_ARGS)
    lengths = LengthPredictors.find(sources(model_args, finetuning_args.checkpoint_dir)[0])
    generator = TextGenerator(model, plan.tokenizer, plan.config, lengths=lengths)
    defaults = _with_do_sample(
        finetuning_args.sampling_settings(generating_args, user_keys, seed=0, tokenizer=plan.tokenizer),
        generating_args,
        user_keys,
    )
    trained = None if plan.config.variable_length is None else plan.config.variable_length.canvas
    canvas, canvas_is = max_positions(model.config), "positions of the model"
    if "cutoff_len" in user_keys:
        canvas, canvas_is = data_args.cutoff_len, "cutoff_len"
    elif trained is not None and (canvas is None or trained < canvas):
        canvas, canvas_is = trained, "the canvas that the model was trained on; raise it with cutoff_len"
    max_new_tokens = generating_args.max_new_tokens if "max_new_tokens" in user_keys else None
    if max_new_tokens is None and trained is None and "cutoff_len" not in user_keys:
        max_new_tokens = _TOKENS
    return ServedModel(
        generator, plan.template, defaults, canvas, canvas_is, max_new_tokens, start=plan.config.template is None
    )


def _check_keys(user_keys: frozenset[str], generating_args: Any) -> None:
    for key, remedy in _AUTOREGRESSIVE_KEYS.items():
        if key in user_keys:
            raise ValueError(f"{key}: {remedy}; remove the key")
    if "max_new_tokens" in user_keys and generating_args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {generating_args.max_new_tokens}")


def _with_do_sample(settings: SamplingSettings, generating_args: Any, user_keys: frozenset[str]) -> SamplingSettings:
    from ...sampling.keywords import with_keywords

    if "do_sample" in user_keys and not generating_args.do_sample:
        return with_keywords(settings, {"temperature": 0.0})
    return settings
