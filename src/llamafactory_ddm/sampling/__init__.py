"""Sampling from masked diffusion models: one loop, with the choice of tokens and of positions as parts of it."""

from .edits import Edits
from .forward import Context, Denoiser
from .logits import LogitsConfig, filtered_log_probs
from .loop import SamplerOutput, denoise_step, sample
from .settings import SamplingSettings
from .state import Plan, SamplerState, Turn, start
from .strategies import STRATEGIES, Remasking, Strategy, get_strategy
from .tokens import Draws, draw_tokens

__all__ = [
    "STRATEGIES",
    "Context",
    "Denoiser",
    "Draws",
    "Edits",
    "LogitsConfig",
    "Plan",
    "Remasking",
    "SamplerOutput",
    "SamplerState",
    "SamplingSettings",
    "Strategy",
    "Turn",
    "denoise_step",
    "draw_tokens",
    "filtered_log_probs",
    "get_strategy",
    "sample",
    "start",
]
