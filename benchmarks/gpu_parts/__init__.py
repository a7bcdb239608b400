"""The parts of `benchmarks/gpu.py`, in the order of their importance; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which runs in a process of its own.

    Attributes:
        name: on the command line; its function in `module` has the same name with underscores.
        module: of this package.
        seconds: its time limit in a run of ten minutes.
        imports: what its process imports while the part before it runs.
    """

    name: str
    module: str
    seconds: int
    imports: tuple[str, ...] = ()


_TRAINER = ("train_step",)
PARTS = (
    Part("environment", "environment", 60),
    Part("gradients", "training", 75, _TRAINER),
    Part("speed-1b", "speed", 100, _TRAINER),
    Part("speed-124m", "speed", 75, _TRAINER),
    Part("greedy", "generation", 75),
    Part("precision", "training", 60, _TRAINER),
    Part("draws", "generation", 60),
    Part("decoding", "generation", 90, ("decoding",)),
    Part("waits", "waits", 45, _TRAINER),
    Part("lora-7b", "speed", 90, (*_TRAINER, "peft")),
    Part("head", "head", 60, _TRAINER),
    Part("serving", "generation", 75, ("serving",)),
    Part("four-bit", "training", 60, (*_TRAINER, "peft")),
    Part("flash", "attention", 45, _TRAINER),
    Part("flex", "attention", 90, _TRAINER),
    Part("compile", "training", 120, _TRAINER),
)
