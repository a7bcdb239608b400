"""Sampling from masked diffusion models: one loop, with the choice of tokens and of positions as parts of it."""

from .draws import Draws, draw_tokens
from .logits import LogitsConfig, filtered_log_probs
from .loop import SamplerOutput, StableStop, denoise_step, sample
from .prediction import Context, Denoiser
from .settings import SamplingSettings
from .state import Plan, SamplerState, Turn, start
from .strategies import STRATEGIES, Strategy, get_strategy, register

__all__ = [
    "STRATEGIES",
    "Context",
    "Denoiser",
    "Draws",
    "LogitsConfig",
    "Plan",
    "SamplerOutput",
    "SamplerState",
    "SamplingSettings",
    "StableStop",
    "Strategy",
    "Turn",
    "denoise_step",
    "draw_tokens",
    "filtered_log_probs",
    "get_strategy",
    "register",
    "sample",
    "start",
]
