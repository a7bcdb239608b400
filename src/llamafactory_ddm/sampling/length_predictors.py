"""Length predictors: from the statistics of one forward pass and a threshold to the length of a text, EOS included.

The work is divided in three: `generation.canvas_size` runs the forward pass over the fully masked canvas and cuts
canvases to the predicted length; this module holds the statistics, the predictors and the calibration of their
thresholds, on tensors alone; `modeling.length_heads` holds the two trained heads and the file of fitted predictors.

A predictor's length does not decrease with its threshold. For a text of known length, the minimal threshold is the
smallest one that predicts at least that length. The threshold in use is a quantile of these over calibration texts,
so that a new text fits with the required probability (split conformal prediction).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .prediction import Denoiser

PredictorName = Literal["eos_cdf", "expected", "eos_quantile", "regressor", "token_classifier"]
UNCALIBRATED: tuple[PredictorName, ...] = ("eos_cdf", "eos_quantile")  # whose threshold can be the coverage itself


@torch.no_grad()
def eos_probability(
    denoiser: Denoiser,
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    eos_ids: Sequence[int],
    suppress: Sequence[int] = (),
    eos_penalty: float = 0.0,
) -> Tensor:
    """Return the probability of EOS or padding at each position, from one forward pass over the fully masked canvas.

    Only EOS and padding follow EOS, so this is the probability that the text has ended by a position.

    Args:
        denoiser: the model.
        x: [batch, length] int64; ids at editable positions do not matter.
        editable: [batch, length] bool.
        mask_id: id of [MASK], which is never drawn.
        eos_ids: EOS and padding tokens.
        suppress: further ids that are never drawn.
        eos_penalty: nats subtracted from the logits of `eos_ids`.
    Returns:
        [batch, length] float32; 0 at fixed tokens.
    """
    z = x.masked_fill(editable, mask_id)
    flat_index = editable.flatten().nonzero()[:, 0]
    eos = torch.tensor(sorted(eos_ids), device=x.device)
    never = torch.tensor(sorted({mask_id, *suppress}), device=x.device)
    output = denoiser(z, flat_index)
    parts: Iterable[Tensor] = (output,) if isinstance(output, Tensor) else output
    probabilities = []
    for part in parts:
        logits = part.float().index_fill(1, never, float("-inf"))
        logits[:, eos] -= eos_penalty
        probabilities.append((logits[:, eos].logsumexp(dim=1) - logits.logsumexp(dim=1)).exp())
    result = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
    return result.index_copy(0, flat_index, torch.cat(probabilities)).view_as(x)


@dataclass(frozen=True)
class FirstStep:
    """The statistics of one forward pass over fully masked canvases that predictors read.

    Attributes:
        editable: [batch, length] bool; each row has at least one editable position.
        p_eos: [batch, length] float32, from `eos_probability`.
        expected_length: [batch] float32, the trained regressor's length, EOS included; None without one.
        p_ended: [batch, length] float32, the trained classifier's probability that the text has ended by a position;
            None without one.
    """

    editable: Tensor
    p_eos: Tensor
    expected_length: Tensor | None = None
    p_ended: Tensor | None = None

    def cpu(self) -> FirstStep:
        """Return it on the CPU."""
        values: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in vars(self).items()}
        return FirstStep(**values)


class LengthPredictor(Protocol):
    """Predicts the length of each text, EOS included."""

    @property
    def name(self) -> PredictorName:
        """Return the name used in YAML."""

    def lengths(self, step: FirstStep, threshold: float | Tensor) -> Tensor:
        """Return [batch] int64, from 1 to the row's number of editable positions, which infinity gives.

        `threshold` is one number for all rows, or [batch] float64.
        """

    def min_threshold(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64, the smallest threshold whose length is at least `needed`, [batch] int64."""


@dataclass(frozen=True)
class FirstAbove:
    """The text ends at the first position whose statistic exceeds the threshold.

    With s(i) the running maximum of a statistic over the editable positions 1..n, the length is
    min(n, 1 + |{i : s(i) <= threshold}|).

    Args:
        name: the statistic. `eos_cdf`: the probability of EOS or padding at i, read as P(text has ended by i).
            `eos_quantile`: the fraction of the n positions with a lower probability of EOS than i.
            `token_classifier`: P(text has ended by i) of a trained head on the hidden state.
    Source: variable-length DiffuGPT's published code for `eos_quantile` and `token_classifier`.
    Deviates: the published code interpolates the quantile q of the n probabilities, so a position with j lower ones
        exceeds it from j > q (n - 1); here from j > q n, at most one rank later, as the statistic is j / n.
    """

    name: PredictorName

    def statistic(self, step: FirstStep) -> Tensor:
        """Return [batch, length] float64, s in [0, 1] at editable positions, not decreasing from left to right."""
        value = step.p_eos if self.name != "token_classifier" else step.p_ended
        if value is None:
            raise ValueError(_NOT_TRAINED.format(self.name))
        value = value.double().masked_fill(~step.editable, -1.0)
        if self.name == "eos_quantile":
            n_fixed = (~step.editable).sum(dim=1, keepdim=True)  # fixed tokens, at -1, rank lowest
            lower = torch.searchsorted(value.sort(dim=1).values, value) - n_fixed
            value = (lower / (step.editable.shape[1] - n_fixed)).double().masked_fill(~step.editable, -1.0)
        return value.cummax(dim=1).values

    def lengths(self, step: FirstStep, threshold: float | Tensor) -> Tensor:
        """Return [batch] int64, see `LengthPredictor.lengths`."""
        before = (self.statistic(step) <= _column(threshold, step)) & step.editable
        return torch.minimum(before.sum(dim=1) + 1, step.editable.sum(dim=1))

    def min_threshold(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64, s(needed - 1); -1 where `needed` is 1."""
        inside = step.editable & (step.editable.cumsum(dim=1) < needed[:, None])
        return self.statistic(step).masked_fill(~inside, -1.0).amax(dim=1)


@dataclass(frozen=True)
class ScaledEstimate:
    """The length is an estimate L, scaled: ceil((1 + L) exp(threshold) - 1).

    Args:
        name: the estimate. `expected`: the mean length 1 + sum_i (1 - P(ended by i)), with the running maximum of the
            probability of EOS as P(ended by i). `regressor`: a trained head on the mean hidden state.
    Source: variable-length DiffuGPT's published code for `regressor`.
    """

    name: PredictorName

    def estimate(self, step: FirstStep) -> Tensor:
        """Return [batch] float64, L."""
        if self.name == "regressor":
            if step.expected_length is None:
                raise ValueError(_NOT_TRAINED.format(self.name))
            return step.expected_length.double()
        ended = step.p_eos.double().masked_fill(~step.editable, 0.0).cummax(dim=1).values
        return 1.0 + (1.0 - ended).masked_fill(~step.editable, 0.0).sum(dim=1)

    def lengths(self, step: FirstStep, threshold: float | Tensor) -> Tensor:
        """Return [batch] int64, see `LengthPredictor.lengths`."""
        n_editable = step.editable.sum(dim=1).double()
        scaled = torch.expm1(torch.log1p(self.estimate(step)) + _column(threshold, step)[:, 0]).ceil()
        return torch.minimum(scaled.clamp(min=1.0), n_editable).long()

    def min_threshold(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64, log(needed + 1e-3) - log(1 + L): lengths are rounded up from `needed` - 1 + 1e-3."""
        return torch.log1p(needed.double() - 1.0 + _ROUNDED_UP) - torch.log1p(self.estimate(step))


def _column(threshold: float | Tensor, step: FirstStep) -> Tensor:
    """Return [batch, 1] or [1, 1] float64."""
    return torch.as_tensor(threshold, dtype=torch.float64, device=step.editable.device).reshape(-1, 1)


_ROUNDED_UP = 1e-3  # tokens
_NOT_TRAINED = "length_predictor: {} has to be trained; run llamafactory-ddm fit-length"
PREDICTORS: dict[str, LengthPredictor] = {
    "eos_cdf": FirstAbove("eos_cdf"),
    "expected": ScaledEstimate("expected"),
    "eos_quantile": FirstAbove("eos_quantile"),
    "regressor": ScaledEstimate("regressor"),
    "token_classifier": FirstAbove("token_classifier"),
}


def round_up_to_block(n_fixed: int | Tensor, n_editable: int | Tensor, block: int) -> Any:
    """Return the smallest number of editable positions, at least `n_editable`, with which the canvas is k blocks long.

    The canvas has `n_fixed` further positions, and a block has `block`.
    """
    return -(-(n_fixed + n_editable) // block) * block - n_fixed


def conformal_threshold(min_thresholds: Tensor, coverage: float) -> float:
    """Return the threshold with which a new text fits the predicted length with probability `coverage` or more.

    It is the ceil((n + 1) coverage)-th smallest of the n minimal thresholds; infinity where that rank exceeds n.

    Args:
        min_thresholds: [n] float64, of texts that are exchangeable with the new one.
        coverage: in (0, 1].
    Raises:
        ValueError: if `coverage` is out of range.
    Source: Vovk et al. 2005; Gupta et al. 2022 (arXiv 1910.10562) for nested sets.
    """
    check_coverage(coverage)
    n = len(min_thresholds)
    rank = math.ceil((n + 1) * coverage - 1e-9)
    return math.inf if rank > n else float(min_thresholds.sort().values[rank - 1])


def calibrated_threshold(name: str, min_thresholds: Tensor, coverage: float) -> float:
    """Return `conformal_threshold`; for `eos_cdf` at least the coverage.

    So calibration corrects a model that predicts EOS too early, and does not shorten the canvas of one that predicts
    it too late.
    """
    threshold = conformal_threshold(min_thresholds, coverage)
    return max(threshold, coverage) if name == "eos_cdf" else threshold


def uncalibrated_threshold(name: str, coverage: float, reason: str) -> float:
    """Return the threshold of a predictor without calibration: the coverage itself.

    Args:
        name: of the predictor.
        coverage: in (0, 1].
        reason: why there is no calibration, for the message.
    Raises:
        ValueError: if `coverage` is out of range, or the predictor needs calibration.
    """
    check_coverage(coverage)
    if name not in UNCALIBRATED:
        raise ValueError(
            f"length_predictor: {name} needs calibration, but {reason}; run llamafactory-ddm fit-length, or set "
            f"length_predictor: {' or '.join(UNCALIBRATED)}"
        )
    return coverage


def check_coverage(coverage: float) -> None:
    """Check a probability.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"length_coverage must lie in (0, 1], got {coverage}")
