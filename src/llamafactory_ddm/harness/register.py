"""The name `llamafactory_ddm` in lm-evaluation-harness's registry of models."""

from __future__ import annotations

from types import ModuleType

NAME = "llamafactory_ddm"


def register_model(module: ModuleType) -> None:
    """Register the model type once `lm_eval.models` is imported; its class is imported when a run asks for it."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="llamafactory_ddm.harness.model:DiffusionLM")
