"""How to sample, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

from .logits import LogitsConfig
from .loop import EarlyStop
from .strategies import Strategy, get_strategy


@dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled; the names are those of the YAML keys where there is one.

    Attributes:
        denoising_strategy: see `sampling.strategies`.
        diffusion_steps: denoising steps of a text, at most.
        block_length: tokens decided together, from left to right; None is all at once.
        logits: temperature, filters, penalty, guidance.
        confidence_threshold: of the strategy of this name.
        entropy_bound: of the strategy of this name, in nats.
        early_stop: when to commit all that is left of a block.
        stop_at_end: whether a text is left alone once its end and all before it are written; it stays the same text.
        length_coverage: give each text only so many places that it has ended with this probability, as the model sees
            it before anything is written; None gives it the whole canvas.
        seed: of every draw.
    """

    denoising_strategy: str = "low_confidence"
    diffusion_steps: int = 64
    block_length: int | None = None
    logits: LogitsConfig = field(default_factory=lambda: LogitsConfig(temperature=0.95, top_p=0.9))
    confidence_threshold: float = 0.9
    entropy_bound: float = 0.1
    early_stop: EarlyStop | None = None
    stop_at_end: bool = True
    length_coverage: float | None = None
    seed: int = 0

    def strategy(self) -> Strategy:
        """Return the strategy with its own parameter.

        Raises:
            ValueError: if there is none of this name, or the parameter is out of range.
        """
        return get_strategy(
            self.denoising_strategy, confidence_threshold=self.confidence_threshold, entropy_bound=self.entropy_bound
        )
