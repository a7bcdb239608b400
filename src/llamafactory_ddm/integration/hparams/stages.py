"""The values of the YAML key `stage` that this package adds to LLaMA-Factory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A value of the YAML key `stage`.

    Attributes:
        name: the value.
        base: the upstream stage whose argument checks and data processing it shares.
        runner: `module:function` that runs it, imported when first used.
        label: its name in LlamaBoard.
        finetuning_types: values of finetuning_type that it supports.
    """

    name: str
    base: str
    runner: str
    label: str
    finetuning_types: tuple[str, ...]

    def load_runner(self) -> Callable[..., Any]:
        """Import and return the function that runs the stage."""
        module, _, function = self.runner.partition(":")
        runner: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return runner


STAGES: dict[str, Stage] = {}


def register(stage: Stage) -> None:
    """Add a stage.

    Raises:
        ValueError: if the name is taken.
    """
    if stage.name in STAGES:
        raise ValueError(f"stage {stage.name!r} is registered already")
    STAGES[stage.name] = stage


def requested_stage(args: Any) -> str | None:
    """Return the stage that unparsed arguments set: a dict, or command-line arguments, of which the last counts."""
    if isinstance(args, dict):
        stage = args.get("stage")
        return stage if isinstance(stage, str) else None
    argv = [str(argument) for argument in args or ()]
    stage = None
    for index, argument in enumerate(argv):
        if argument == "--stage" and index + 1 < len(argv):
            stage = argv[index + 1]
        elif argument.startswith("--stage="):
            stage = argument.partition("=")[2]
    return stage


register(
    Stage(
        name="ddm",
        base="pt",
        runner="llamafactory_ddm.integration.workflow:run",
        label="Diffusion Adaptation",
        finetuning_types=("full", "freeze", "lora"),
    )
)
register(
    Stage(
        name="ddm-sft",
        base="sft",
        runner="llamafactory_ddm.integration.workflow:run",
        label="Diffusion Finetuning",
        finetuning_types=("full", "freeze", "lora"),
    )
)
