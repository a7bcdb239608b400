"""Loads the model of a server by the path that `do_predict` takes, from LLaMA-Factory's parsed arguments."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llamafactory.data.template import TEMPLATES
from llamafactory.extras.misc import get_current_device
from llamafactory.model import load_config

from ...generation.generator import TextGenerator
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.length_heads import LengthPredictors
from ...modeling.model_info import max_positions
from ...sampling import SamplingSettings
from ...sampling.keywords import with_keywords
from ...utils.registry import did_you_mean
from ..logs import get_logger, hide_harmless_messages
from ..model.loader import load_diffusion_model, load_diffusion_tokenizer, sources
from ..resolve.checks import check_checkpoint_folders
from ..resolve.model_names import resolve_model_names
from ..resolve.plan import resolve_run
from .defaults import served_settings

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
        chosen: keys that the YAML sets.
        canvas: largest number of tokens of prompt and answer together; None if nothing limits it.
        canvas_is: what sets `canvas`, for messages.
        max_new_tokens: tokens of an answer whose request does not say; None for all of the canvas.
        start: whether a chat begins with the start token, as there is no template and the model continues text.
    """

    generator: TextGenerator
    template: Any
    defaults: SamplingSettings
    chosen: frozenset[str]
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
    if data_args.template is not None and data_args.template not in TEMPLATES:
        raise ValueError(f"template: {data_args.template} does not exist{did_you_mean(data_args.template, TEMPLATES)}")
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
    defaults = finetuning_args.sampling_settings(generating_args, user_keys, seed=0, tokenizer=plan.tokenizer)
    defaults = served_settings(defaults, user_keys)
    if "do_sample" in user_keys and not generating_args.do_sample:
        defaults = with_keywords(defaults, {"temperature": 0.0})
    canvas, canvas_is = _canvas(plan.config, model.config, data_args, user_keys)
    max_new_tokens = _max_new_tokens(plan.config, generating_args, user_keys)
    start = plan.config.template is None and plan.template is TEMPLATES["empty"]
    return ServedModel(generator, plan.template, defaults, user_keys, canvas, canvas_is, max_new_tokens, start)


def _canvas(
    config: DiffusionConfig, model_config: Any, data_args: Any, user_keys: frozenset[str]
) -> tuple[int | None, str]:
    """Return the largest number of tokens of prompt and answer together, and what sets it."""
    if "cutoff_len" in user_keys:
        return data_args.cutoff_len, "cutoff_len"
    trained = config.canvas if config.variable_length is None else config.variable_length.canvas
    positions = max_positions(model_config)
    if trained is None or (positions is not None and positions <= trained):
        return positions, "the positions of the model"
    return trained, "the rows that the model was trained on; cutoff_len raises it"


def _max_new_tokens(config: DiffusionConfig, generating_args: Any, user_keys: frozenset[str]) -> int | None:
    """Return the number of tokens of an answer whose request does not say; None for what the prompt leaves."""
    if "max_new_tokens" in user_keys:
        return generating_args.max_new_tokens
    if config.train_on_padding is False and config.attention == "full":
        logger.warning_rank0(
            "This model was finetuned with train_on_padding: false, so its answers fill the whole canvas, which has "
            f"{_TOKENS} tokens unless a request sets max_tokens; set max_new_tokens to the length of the answers."
        )
        return _TOKENS
    knows = "cutoff_len" in user_keys or config.canvas is not None or config.variable_length is not None
    return None if knows else _TOKENS


def _check_keys(user_keys: frozenset[str], generating_args: Any) -> None:
    for key, remedy in _AUTOREGRESSIVE_KEYS.items():
        if key in user_keys:
            raise ValueError(f"{key}: {remedy}; remove the key")
    if "max_new_tokens" in user_keys and generating_args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {generating_args.max_new_tokens}")
