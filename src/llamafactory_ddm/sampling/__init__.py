"""Sampling from masked diffusion models: one loop, and pluggable strategies that choose the positions to commit."""

from .edits import Edits
from .logits import LogitsConfig, filtered_log_probs
from .loop import SamplerOutput, denoising_step, sample
from .prediction import CachingDenoiser, Context, Denoiser
from .settings import SamplingSettings
from .state import Plan, SamplerState, StepView, start
from .strategies import STRATEGIES, Remasking, Strategy, get_strategy
from .tokens import TokenDraws, draw_tokens

__all__ = [
    "STRATEGIES",
    "CachingDenoiser",
    "Context",
    "Denoiser",
    "Edits",
    "LogitsConfig",
    "Plan",
    "Remasking",
    "SamplerOutput",
    "SamplerState",
    "SamplingSettings",
    "StepView",
    "Strategy",
    "TokenDraws",
    "denoising_step",
    "draw_tokens",
    "filtered_log_probs",
    "get_strategy",
    "sample",
    "start",
]
