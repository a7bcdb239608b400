"""What identifies a model and its tokenizer, so that results which were kept are not read for another one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..modeling.length_heads import LengthPredictors
from ..modeling.model_info import weights_digest
from ..utils.result_log import digest
from .generator import TextGenerator

# What a config says of its files.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")


def generator_identity(generator: TextGenerator) -> dict[str, Any]:
    """Return digests of a diffusion model: see `model_identity`; of its diffusion config and its length predictors."""
    lengths = generator.sizer.lengths
    return {
        **model_identity(generator.model, generator.tokenizer, generator.config.mask_token),
        "diffusion_config": digest(asdict(generator.config)),
        "lengths": None if lengths is None else lengths_digest(lengths),
    }


def model_identity(model: Any, tokenizer: Any, mask_token: str | None = None) -> dict[str, Any]:
    """Return the type of the weights and digests: of weights, config, vocabulary without mask token, and decoding."""
    vocabulary = sorted(item for item in tokenizer.get_vocab().items() if item[0] != mask_token)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoding = [
        tokenizer.special_tokens_map,
        sorted(tokenizer.all_special_ids),
        getattr(tokenizer, "clean_up_tokenization_spaces", None),
        None if backend is None else json.loads(backend.to_str())["decoder"],
    ]
    return {
        "weights": weights_digest(model),
        "config": digest(config),
        "tokenizer": digest(vocabulary),
        "decoding": digest(decoding),
        "dtype": str(model.dtype),
    }


def lengths_digest(lengths: LengthPredictors) -> str:
    """Return a digest of fitted heads and of the calibration."""
    thresholds = {name: values.tolist() for name, values in lengths.min_thresholds.items()}
    heads = {name: values.tolist() for name, values in lengths.heads.state_dict().items()}
    return digest([lengths.canvas, thresholds, heads])
