"""Model families that were published with code of their own, one file each."""

from . import dream, llada, sdar  # importing registers them
from .base import (
    MODEL_FAMILIES,
    ModelFamily,
    WeightNames,
    detect_family,
    families_of_plain,
    family_of_converted,
    find_diffusion_config,
    load_tokenizer,
    raw_config,
    register_family,
)

__all__ = [
    "MODEL_FAMILIES",
    "ModelFamily",
    "WeightNames",
    "detect_family",
    "dream",
    "families_of_plain",
    "family_of_converted",
    "find_diffusion_config",
    "llada",
    "load_tokenizer",
    "raw_config",
    "register_family",
    "sdar",
]
