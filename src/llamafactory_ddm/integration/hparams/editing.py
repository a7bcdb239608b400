"""The YAML keys by which a sampler revises what it wrote, as a dataclass that is mixed into the keys of generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...sampling.edits import MOST_BY_DEFAULT, edits_of

INTEGERS: dict[str, tuple[int, int | None]] = {"edit_steps": (0, None)}
NUMBERS: dict[str, tuple[float, float]] = {
    "remask_cap": (0.0, 1.0),
    "edit_ratio": (0.0, 1.0),
    "edit_threshold": (0.0, 1.0),
}
OPEN_RANGES = {"edit_ratio": "[0, 1)", "edit_threshold": "(0, 1]"}  # an end is left out, which is refused later


@dataclass
class EditingKeys:
    """Arguments of `do_predict: true` that have decided tokens rewritten or masked again."""

    remask_cap: float = field(
        default=0.02,
        metadata={
            "help": (
                "Diffusion: with denoising_strategy: remdm, the highest probability with which a step masks a decided "
                "token again, in [0, 1]; 0 never does, which is random."
            )
        },
    )
    edit_ratio: float | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: r in [0, 1): once n tokens of a block are committed, the current step's included, up to "
                "n r / (1 - r) of its tokens may have been rewritten with what the model would now write, the most "
                "confident first. Defaults to the checkpoint's uniform_ratio, but at most 0.5; 0 for masked noise or "
                "with edit_threshold."
            )
        },
    )
    edit_threshold: float | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: probability in (0, 1] from which a decided token of the current block is rewritten with "
                "what the model would now write (LLaDA2.1's token editing). Defaults to never."
            )
        },
    )
    edit_steps: int = field(
        default=0,
        metadata={
            "help": (
                "Diffusion: with edit_ratio or edit_threshold, steps beyond diffusion_steps that a block may take "
                "after its last [MASK] is gone, as long as the step before changed something."
            )
        },
    )

    def check_edits(self) -> None:
        """Check the keys of edits against each other; what a checkpoint says comes later.

        Raises:
            ValueError: naming both keys.
        """
        edits_of(self.edit_ratio, self.edit_threshold, self.edit_steps, default=MOST_BY_DEFAULT)
