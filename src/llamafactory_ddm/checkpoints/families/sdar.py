"""SDAR: a block-diffusion model continued from Qwen3, whose weights have Qwen3's names.

Source: SDAR (arXiv 2510.06303) and the configuration, code and generation script that it was published with. A token
attends to its own block and to the blocks before it; blocks are counted from the start of the text.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from ...modeling.diffusion_config import DiffusionConfig
from .base import ModelFamily, register_family, rope_theta

_logger = logging.getLogger(__name__)
_REQUIRED = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
# Switches of the published training code, with their published values; none changes what the model computes.
_TRAINING: dict[str, Any] = {
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "micro_forward": False,
    "skip_checkpoint": False,
    "use_deepep": False,
}
_OWN = ("architectures", "attn_implementation", "auto_map", "block_size", "mask_token_id", "model_type", *_TRAINING)
# Of transformers' own, absent from the published config.json.
_PLAIN = ("_name_or_path", "dtype", "is_causal", "layer_types", "rope_parameters", "torch_dtype")
_BLOCK_IN_NAME = re.compile(r"-b(\d+)$")
_ENGINE_MASK_ID = 151669  # that SGLang and LMDeploy assume, whatever config.json says
_DEFAULT_BLOCK = 4  # of the published models whose names give none
_NO_EXPERTS = (
    "model_type sdar_moe, SDAR with experts, is not supported; use a dense SDAR, such as SDAR-1.7B-Chat, SDAR-4B-Chat "
    "or SDAR-8B-Chat"
)


@register_family
class Sdar(ModelFamily):
    """A family whose logits at i predict token i, with block attention."""

    name = "sdar"
    title = "SDAR"
    model_class = Qwen3ForCausalLM
    shift = False
    attention = "block"
    published_code = (Path(__file__).with_name("configuration_sdar.py"),)

    @classmethod
    def standard_config(cls, raw: dict[str, Any]) -> Qwen3Config:
        """Return Qwen3's config: the published config, without the keys of the published code."""
        for key in _REQUIRED:
            raw[key]
        if raw.get("use_sliding_window"):
            raise ValueError(
                "config.json of this SDAR model has use_sliding_window: true, which SDAR's attention ignores and "
                "Qwen3's does not; it must be false"
            )
        config_class: Any = Qwen3Config
        settings = {key: value for key, value in raw.items() if key not in (*_OWN, "transformers_version")}
        return config_class(**settings, architectures=["Qwen3ForCausalLM"])  # type: ignore[no-any-return]

    @classmethod
    def complete(cls, raw: dict[str, Any], tokenizer: Any, folder: Path) -> dict[str, Any]:
        """Return `raw` with mask_token_id and block_size.

        Few published config.json have them. The mask token then is the tokenizer's, and the block length is in the
        folder's or repository's name (SDAR-4B-Chat-b16), or the published default.
        """
        mask_id, block = raw.get("mask_token_id"), raw.get("block_size")
        if mask_id is None:
            mask_id = tokenizer.mask_token_id
        if block is None:
            block = _block_length_of(folder)
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise ValueError(f"block_size in {folder}/config.json must be an integer of at least 1, got {block!r}")
        return {**raw, "mask_token_id": mask_id, "block_size": block}

    @classmethod
    def diffusion_config(cls, raw: dict[str, Any], tokenizer: Any) -> DiffusionConfig:
        """Return the diffusion config of a published model, for a `raw` that `complete` returned."""
        return replace(super().diffusion_config(raw, tokenizer), train_block_length=raw["block_size"])

    @classmethod
    def published_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any]:
        """Return SDAR's config.json, which names the configuration class of `published_code`.

        Warns of a mask token that engines would not find.
        """
        if diffusion_config.mask_token_id != _ENGINE_MASK_ID:
            _logger.warning(
                "the mask token %s has id %d, and SGLang and LMDeploy assume %d for an SDAR; to serve the model with "
                "them, train it with mask_token: <|MASK|>, the first token that is added to Qwen3's tokenizer",
                diffusion_config.mask_token,
                diffusion_config.mask_token_id,
                _ENGINE_MASK_ID,
            )
        settings = config.to_dict()
        dtype = settings.get("dtype") or settings.get("torch_dtype")
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
        raw = {
            **{key: value for key, value in settings.items() if key not in _PLAIN},
            **_TRAINING,
            "architectures": ["SDARForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
            "block_size": diffusion_config.train_block_length,
            "mask_token_id": diffusion_config.mask_token_id,
            "model_type": cls.name,
            "rope_scaling": scaling if is_scaled else None,
            "rope_theta": rope_theta(config),
        }
        if dtype is not None:
            raw["torch_dtype"] = str(dtype).removeprefix("torch.")
        return dict(sorted(raw.items()))

    @classmethod
    def published_generation_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any]:
        """Return SDAR's generation_config.json: the published script and the engines stop at its EOS tokens."""
        end_ids = diffusion_config.end_token_ids
        settings = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        settings["eos_token_id"] = config.eos_token_id if end_ids is None else list(end_ids)
        return {key: value for key, value in sorted(settings.items()) if value is not None}


@register_family
class SdarMoe(ModelFamily):
    """SDAR with experts, such as SDAR-30B-A3B-Chat: recognised, and refused."""

    name = "sdar_moe"
    title = "SDAR-MoE"
    model_class = Qwen3MoeForCausalLM
    shift = False
    attention = "block"

    @classmethod
    def standard_config(cls, raw: dict[str, Any]) -> Qwen3Config:
        """Refuse the model with a ValueError."""
        raise ValueError(_NO_EXPERTS)

    @classmethod
    def complete(cls, raw: dict[str, Any], tokenizer: Any, folder: Path) -> dict[str, Any]:
        """Refuse the model with a ValueError."""
        raise ValueError(f"{folder}: {_NO_EXPERTS}")


@cache
def _block_length_of(folder: Path) -> int:
    """Return the block length in the name of a folder or of its Hub repository, else the published default."""
    is_snapshot = folder.parent.name == "snapshots"  # of Hugging Face's cache: models--OWNER--NAME/snapshots/REVISION
    name = folder.parents[1].name if is_snapshot else folder.absolute().name
    match = _BLOCK_IN_NAME.search(name)
    if match:
        return int(match[1])
    _logger.warning(
        "config.json of %s has no block_size: the published default of %d tokens in a block is assumed; if the model "
        "was trained with another, add block_size to its config.json",
        folder,
        _DEFAULT_BLOCK,
    )
    return _DEFAULT_BLOCK
