"""Which decoded tokens a denoising step edits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .logits import Measure
from .state import StepView
from .strategies import ranks

MEASURES: frozenset[Measure] = frozenset({"argmax", "top_log_prob"})
MAX_DEFAULT_RATIO = 0.5  # at which n committed tokens allow n edits
_TINY = 1e-9  # rounding: 7 tokens at a ratio of 0.3 allow 3 edits, not 2


@dataclass(frozen=True)
class Edits:
    """Replace decoded tokens of the current block that the model would no longer predict.

    A token is replaced by the most probable one of the model's own distribution: after guidance, penalties and
    suppression, before temperature. It is never less probable than the token that it replaces.

    Never edited are prompts and other fixed tokens, finished blocks, positions committed in the same step, a complete
    text, and what follows an EOS.

    Attributes:
        ratio: r in [0, 1). Once n positions of a block are committed, those of the current step included, the block
            may have had floor(n r / (1 - r)) edits in all, the most confident first. Edits that a step does not use
            remain for later steps. In the first step of a block no token is decoded yet, so none is edited.
        threshold: in (0, 1]; every token is replaced whose replacement has at least this probability. None is off.
        steps: edit steps that a block may take once it is fully decoded, as long as the previous step changed a token.
    Raises:
        ValueError: naming the YAML key, if a value is out of range or two exclude each other.
    Source: XDLM (arXiv 2602.01362) for the ratio; LLaDA2.1 (arXiv 2602.08676) for the threshold and the edit steps.
    Deviates: XDLM's published sampler lets edits reach the prompt and finished blocks.
    """

    ratio: float = 0.0
    threshold: float | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"edit_ratio must lie in [0, 1), got {self.ratio}")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"edit_threshold must lie in (0, 1], got {self.threshold}")
        if self.steps < 0:
            raise ValueError(f"edit_steps must be at least 0, got {self.steps}")
        if self.ratio and self.threshold is not None:
            raise ValueError(
                f"edit_ratio: {self.ratio} and edit_threshold: {self.threshold} are two rules for the same edits; "
                "remove one of them"
            )
        if self.steps and not self.active:
            raise ValueError(
                f"edit_steps: {self.steps} has no effect: editing is off; set edit_ratio > 0 or edit_threshold, or "
                "remove edit_steps"
            )

    @property
    def active(self) -> bool:
        """Whether anything may be edited."""
        return self.ratio > 0.0 or self.threshold is not None

    def allowance(self, view: StepView, n_committed: Tensor) -> Tensor:
        """Return [batch] int64, how many tokens of a row this step may edit by the ratio.

        Args:
            view: of this step.
            n_committed: [batch] int64, tokens that the step commits.
        """
        total = (view.is_decoded.sum(dim=1) + n_committed).double() * (self.ratio / (1.0 - self.ratio))
        return ((total + _TINY).floor().to(torch.int64) - view.block_edits).clamp(min=0)

    def candidates(self, view: StepView, max_committed: Tensor) -> Tensor:
        """Return [batch, length] bool, the decoded positions whose prediction the step needs.

        Args:
            view: of this step.
            max_committed: [batch] int64, largest number of tokens that the step may commit.
        """
        if self.threshold is not None:
            return view.is_decoded
        return view.is_decoded & (self.allowance(view, max_committed) > 0)[:, None]

    def edit_positions(
        self, view: StepView, z: Tensor, candidate: Tensor, commit: Tensor, argmax: Tensor, top_log_prob: Tensor
    ) -> Tensor:
        """Return [batch, length] bool, the candidates that are replaced by their most probable token.

        With `eos_last` no token becomes EOS while a position of the block is masked.

        Args:
            view: of this step.
            z: [batch, length] int64, the sequences before the step.
            candidate: [batch, length] bool, a subset of what `candidates` returned.
            commit: [batch, length] bool, the positions that the step commits.
            argmax: [batch, length] int64, the most probable token at each position.
            top_log_prob: [batch, length] float32, its log-probability in nats.
        """
        differs = candidate & (argmax != z)
        if view.plan.eos_last:
            differs &= ~(torch.isin(argmax, view.plan.eos_ids) & view.is_masked.any(dim=1, keepdim=True))
        if self.threshold is not None:
            return differs & (top_log_prob.exp() >= self.threshold)
        return differs & (ranks(top_log_prob, differs) < self.allowance(view, commit.sum(dim=1))[:, None])


def edits_of(ratio: float | None, threshold: float | None, steps: int, *, default: float) -> Edits:
    """Return the `Edits` of the YAML keys edit_ratio, edit_threshold and edit_steps.

    Args:
        ratio: None is the default, or 0 if there is a threshold.
        threshold: None is off.
        steps: edit steps of a block.
        default: the checkpoint's uniform_ratio, in [0, 1]; limited to `MAX_DEFAULT_RATIO`.
    Raises:
        ValueError: see `Edits`.
    """
    if ratio is None:
        ratio = 0.0 if threshold is not None else min(default, MAX_DEFAULT_RATIO)
    return Edits(ratio, threshold, steps)
