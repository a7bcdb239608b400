"""LLaDA and Dream: published with code of their own, but a Llama and a Qwen2 underneath.

LLaDA calls its weights otherwise; Dream's have Qwen2's names. Both differ from those models in attending to all
tokens, which is not in the weights. The tables say which names and settings mean the same.

Source: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487) and the configurations that they were published with.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

_TOP = {
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.ff_out.": "lm_head.",
}
_BLOCK = {
    "attn_norm.": "input_layernorm.",
    "ff_norm.": "post_attention_layernorm.",
    "q_proj.": "self_attn.q_proj.",
    "k_proj.": "self_attn.k_proj.",
    "v_proj.": "self_attn.v_proj.",
    "attn_out.": "self_attn.o_proj.",
    "ff_proj.": "mlp.gate_proj.",
    "up_proj.": "mlp.up_proj.",
    "ff_out.": "mlp.down_proj.",
}
_IN_BLOCK = re.compile(r"(?P<top>model\.(?:transformer\.blocks|layers)\.)(?P<number>\d+\.)(?P<rest>.*)")
_OURS, _THEIRS = "model.layers.", "model.transformer.blocks."
# What makes a LLaDA a Llama; with another value it is neither.
_AS_LLAMA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


@dataclass(frozen=True)
class LladaLayout:
    """Names of LLaDA's weights, and Llama's.

    Attributes:
        name: for messages.
        embedding: what begins the names of the input embedding, as Llama has them.
    """

    name: str = "LLaDA"
    embedding: str = "model.embed_tokens."

    def to_standard(self, key: str) -> str:
        """Return Llama's name of one of LLaDA's.

        Raises:
            ValueError: if it is none of LLaDA's.
        """
        return self._renamed(key, _THEIRS, _OURS, {**_TOP}, _BLOCK)

    def to_published(self, key: str) -> str:
        """Return LLaDA's name of one of Llama's.

        Raises:
            ValueError: if it is none of Llama's.
        """
        turned = [{standard: published for published, standard in table.items()} for table in (_TOP, _BLOCK)]
        return self._renamed(key, _OURS, _THEIRS, *turned)

    def _renamed(self, key: str, before: str, after: str, top: dict[str, str], block: dict[str, str]) -> str:
        inside = _IN_BLOCK.fullmatch(key)
        if inside is not None and inside["top"] == before:
            start, rest, table = after + inside["number"], inside["rest"], block
        else:
            start, rest, table = "", key, top
        for old, new in table.items():
            if rest.startswith(old):
                return start + new + rest.removeprefix(old)
        raise ValueError(f"{key} is no name of the layout of {self.name}")


LLADA = LladaLayout()


@dataclass(frozen=True)
class OwnCode:
    """A kind of model that was published with code of its own.

    Attributes:
        name: for messages.
        model_type: in its config.json.
        standard_type: of the model that it is underneath.
        shift: whether its logits at i predict token i + 1.
    """

    name: str
    model_type: str
    standard_type: str
    shift: bool


KINDS = (OwnCode("LLaDA", "llada", "llama", shift=False), OwnCode("Dream", "Dream", "qwen2", shift=True))


def kind_of(raw: dict[str, Any]) -> OwnCode | None:
    """Return the kind that a config.json is of, or None for a model of transformers."""
    return next((kind for kind in KINDS if raw.get("model_type") == kind.model_type), None)


def kind_behind(model_type: str, shift: bool) -> OwnCode | None:
    """Return the kind that a converted model was, by what it is underneath and by its shift."""
    return next((kind for kind in KINDS if (kind.standard_type, kind.shift) == (model_type, shift)), None)


def raw_config(folder: str | Path) -> dict[str, Any]:
    """Return what config.json of a folder says, or nothing where there is none.

    Raises:
        ValueError: if it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(raw).__name__}; download it again")
    return raw


def standard_config(raw: dict[str, Any], kind: OwnCode) -> Any:
    """Return the config of transformers' model that a published one is underneath.

    Raises:
        ValueError: if a setting is missing, or one that no such model has.
    """
    try:
        return _llama_config(raw) if kind.standard_type == "llama" else _qwen2_config(raw)
    except KeyError as error:
        raise ValueError(f"config.json of this {kind.name} lacks {error}; download it again") from error


def _llama_config(raw: dict[str, Any]) -> Any:
    others = {key: raw[key] for key, value in _AS_LLAMA.items() if raw.get(key, value) != value}
    if others:
        said = ", ".join(f"{key}: {value!r}" for key, value in others.items())
        raise ValueError(f"this LLaDA is no Llama underneath, as its config.json says {said}; it cannot be converted")
    heads = int(raw["n_heads"])
    make: Any = LlamaConfig
    return make(
        vocab_size=int(raw.get("embedding_size") or raw["vocab_size"]),
        hidden_size=int(raw["d_model"]),
        intermediate_size=int(raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"]),
        num_hidden_layers=int(raw["n_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=1 if raw.get("multi_query_attention") else int(raw.get("n_kv_heads") or heads),
        max_position_embeddings=int(raw["max_sequence_length"]),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(raw["rope_theta"]),
        tie_word_embeddings=bool(raw.get("weight_tying", False)),
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw.get("pad_token_id"),
        architectures=["LlamaForCausalLM"],
    )


def _qwen2_config(raw: dict[str, Any]) -> Any:
    ours = ("model_type", "architectures", "auto_map", "mask_token_id", "transformers_version")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mask_token_id"):
        raw[key]
    make: Any = Qwen2Config
    return make(**{key: value for key, value in raw.items() if key not in ours}, architectures=["Qwen2ForCausalLM"])


def published_config(config: Any, kind: OwnCode, mask_id: int) -> dict[str, Any]:
    """Return what config.json of the published kind would say of a model.

    Args:
        config: of transformers.
        kind: see there.
        mask_id: of [MASK].
    """
    if kind.standard_type == "qwen2":
        raw = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
        code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
        return {
            **raw,
            "rope_theta": _rope_theta(config),
            "model_type": kind.model_type,
            "architectures": ["DreamModel"],
            "auto_map": code,
            "mask_token_id": mask_id,
        }
    names = ("AutoModel", "AutoModelForCausalLM")
    code = {"AutoConfig": "configuration_llada.LLaDAConfig", **dict.fromkeys(names, "modeling_llada.LLaDAModelLM")}
    return {
        **_AS_LLAMA,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "auto_map": code,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "flash_attention": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": config.initializer_range,
        "layer_norm_with_affine": True,
        "mask_token_id": mask_id,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": kind.model_type,
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "pad_token_id": config.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_full_precision": True,
        "rope_theta": _rope_theta(config),
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": bool(config.tie_word_embeddings),
    }


def _rope_theta(config: Any) -> float:
    """Return the base of the rotary angles; it has moved within the config."""
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)
