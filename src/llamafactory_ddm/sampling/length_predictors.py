"""How long a text will be, from one forward before anything is written: predictors, and margins that hold.

A predictor gives each text a number of places by a margin; a larger margin gives no fewer. On texts whose length is
known, each has a least margin with which it would not have been cut, and the share of them that is to be covered says
which of these to take (split conformal prediction).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .forward import Denoiser

PredictorName = Literal["belief", "expected", "eos_quantile", "regressor", "token_classifier"]
UNTRAINED: tuple[PredictorName, ...] = ("belief", "expected", "eos_quantile")
TRAINED: tuple[PredictorName, ...] = ("regressor", "token_classifier")


@torch.no_grad()
def end_probability(
    denoiser: Denoiser,
    x: Tensor,
    *,
    editable: Tensor,
    mask_id: int,
    end_ids: Sequence[int],
    suppress: Sequence[int] = (),
    eos_penalty: float = 0.0,
) -> Tensor:
    """Return the probability that a place holds an end or a pad, by one forward with every editable place masked.

    As nothing but ends and pads follows an end, this is the probability that the text has ended by then.

    Args:
        denoiser: the model.
        x: [batch, length] int64; ids at editable places do not matter.
        editable: [batch, length] bool.
        mask_id: of [MASK]; never drawn.
        end_ids: the end-of-text token and the pads.
        suppress: further ids that are never drawn.
        eos_penalty: nats taken from the logits of `end_ids`.
    Returns:
        [batch, length] float32; 0 where a token is given.
    """
    z = x.masked_fill(editable, mask_id)
    place = editable.flatten().nonzero()[:, 0]
    ends = torch.tensor(sorted(end_ids), device=x.device)
    never = torch.tensor(sorted({mask_id, *suppress}), device=x.device)
    output = denoiser(z, place)
    parts: Iterable[Tensor] = (output,) if isinstance(output, Tensor) else output
    found = []
    for part in parts:
        logits = part.float().index_fill(1, never, float("-inf"))
        logits[:, ends] -= eos_penalty
        found.append((logits[:, ends].logsumexp(dim=1) - logits.logsumexp(dim=1)).exp())
    result = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
    return result.index_copy(0, place, torch.cat(found)).view_as(x)


@dataclass(frozen=True)
class FirstStep:
    """What one forward with every editable place masked says of each text.

    Attributes:
        editable: [batch, length] bool; each row has at least one such place.
        ended: [batch, length] float32, what `end_probability` returns.
        length: [batch] float32, a trained regressor's expected places, the end included; None without one.
        behind: [batch, length] float32, a trained classifier's probability that the text has ended by a place; None
            without one.
    """

    editable: Tensor
    ended: Tensor
    length: Tensor | None = None
    behind: Tensor | None = None

    def cpu(self) -> FirstStep:
        """Return it on the CPU."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.cpu()

        return FirstStep(self.editable.cpu(), self.ended.cpu(), moved(self.length), moved(self.behind))


class LengthPredictor(Protocol):
    """Gives each text a number of places, its end included."""

    @property
    def name(self) -> PredictorName:
        """Return the name used in YAML."""

    def places(self, step: FirstStep, margin: float | Tensor) -> Tensor:
        """Return [batch] int64, at least 1 and at most the row's editable places; infinity gives all of them.

        `margin` is one for all or [batch] float64, one for each row.
        """

    def least_margin(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64, the least margin that gives a row the places `needed`, [batch] int64, or more."""


@dataclass(frozen=True)
class ByPlace:
    """A text is taken to end at the first place whose statistic, made monotone, exceeds the margin.

    Args:
        name: `belief`: the probability that the text has ended by then, as the model sees it; the margin is a
            probability. `eos_quantile`: the share of the row's places at which an end is less probable; the margin is
            a quantile. `token_classifier`: what a trained head says of the place's hidden state.
    Source: variable-length DiffuGPT's published code for `eos_quantile` and `token_classifier`.
    Deviates: the published code interpolates the quantile q of the scores of a row's n places, so the place with j
        lower ones exceeds it from j > q (n - 1); here from j > q n, one rank later at most, as the statistic is the
        share j / n.
    """

    name: PredictorName

    def statistic(self, step: FirstStep) -> Tensor:
        """Return [batch, length] float64 in [0, 1], rising from left to right over the editable places."""
        value = step.ended if self.name != "token_classifier" else step.behind
        if value is None:
            raise ValueError(_UNFITTED.format(self.name))
        value = value.double().masked_fill(~step.editable, -1.0)
        if self.name == "eos_quantile":
            given = (~step.editable).sum(dim=1, keepdim=True)  # they are the lowest
            lower = torch.searchsorted(value.sort(dim=1).values, value) - given
            value = (lower / (step.editable.shape[1] - given)).double().masked_fill(~step.editable, -1.0)
        return value.cummax(dim=1).values

    def places(self, step: FirstStep, margin: float | Tensor) -> Tensor:
        """Return [batch] int64, the places up to and with the first that exceeds the margin."""
        before = (self.statistic(step) <= _column(margin, step)) & step.editable
        return torch.minimum(before.sum(dim=1) + 1, step.editable.sum(dim=1))

    def least_margin(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64, the statistic of the place before the last one needed; -1 where one place does."""
        inside = step.editable & (step.editable.cumsum(dim=1) < needed[:, None])
        return self.statistic(step).masked_fill(~inside, -1.0).amax(dim=1)


@dataclass(frozen=True)
class ByEstimate:
    """A text gets its estimated places, with a margin in the logarithm of one and their number.

    Args:
        name: `expected`: the mean of the distribution that the model's own probabilities make, the sum over places of
            the probability that the text has not ended before; `regressor`: what a trained head says of the mean
            hidden state.
    Source: variable-length DiffuGPT's published code for `regressor`.
    """

    name: PredictorName

    def estimate(self, step: FirstStep) -> Tensor:
        """Return [batch] float64, places."""
        if self.name == "regressor":
            if step.length is None:
                raise ValueError(_UNFITTED.format(self.name))
            return step.length.double()
        by_then = step.ended.double().masked_fill(~step.editable, 0.0).cummax(dim=1).values
        return 1.0 + (1.0 - by_then).masked_fill(~step.editable, 0.0).sum(dim=1)

    def places(self, step: FirstStep, margin: float | Tensor) -> Tensor:
        """Return [batch] int64, the estimate with its margin, rounded up."""
        most = step.editable.sum(dim=1).double()
        bound = torch.expm1(torch.log1p(self.estimate(step)) + _column(margin, step)[:, 0]).ceil()
        return torch.minimum(bound.clamp(min=1.0), most).long()

    def least_margin(self, step: FirstStep, needed: Tensor) -> Tensor:
        """Return [batch] float64; as places are rounded up, a little more than one fewer is enough."""
        return torch.log1p(needed.double() - 1.0 + _A_LITTLE) - torch.log1p(self.estimate(step))


def _column(margin: float | Tensor, step: FirstStep) -> Tensor:
    """Return [batch, 1] or [1, 1] float64."""
    return torch.as_tensor(margin, dtype=torch.float64, device=step.editable.device).reshape(-1, 1)


_A_LITTLE = 1e-3  # places
_UNFITTED = "length_predictor: {} is a trained one; train it with llamafactory-ddm fit-length"
PREDICTORS: dict[str, LengthPredictor] = {
    "belief": ByPlace("belief"),
    "expected": ByEstimate("expected"),
    "eos_quantile": ByPlace("eos_quantile"),
    "regressor": ByEstimate("regressor"),
    "token_classifier": ByPlace("token_classifier"),
}


def up_to_block(given: int | Tensor, places: int | Tensor, block: int) -> Any:
    """Return how many places, `places` at least, make a canvas with `given` tokens a multiple of `block` long."""
    return -(-(given + places) // block) * block - given


def margin_for(least_margins: Tensor, coverage: float) -> float:
    """Return the margin with which a new text is not cut with a probability of at least `coverage`.

    Args:
        least_margins: [n] float64, of texts that are exchangeable with the new one.
        coverage: in (0, 1].
    Returns:
        The ceil((n + 1) coverage)-th smallest; infinity where that is more than n.
    Raises:
        ValueError: if `coverage` is out of range.
    Source: Vovk et al. 2005; Gupta et al. 2022 (arXiv 1910.10562) for nested sets.
    """
    check_coverage(coverage)
    n = len(least_margins)
    rank = math.ceil((n + 1) * coverage - 1e-9)
    return math.inf if rank > n else float(least_margins.sort().values[rank - 1])


def calibrated_margin(name: str, least_margins: Tensor, coverage: float) -> float:
    """Return the margin that covers, see `margin_for`; that of `belief` is never below the coverage.

    So where texts show the model's belief to be too bold it is corrected, and where they show it to be too cautious it
    is not.
    """
    margin = margin_for(least_margins, coverage)
    return max(margin, coverage) if name == "belief" else margin


def default_margin(name: str, coverage: float, why: str = "they have not been fitted") -> float:
    """Return the margin of a predictor that is not calibrated: the coverage itself, as a probability.

    Args:
        name: of the predictor.
        coverage: in (0, 1].
        why: there is no calibrated margin.
    Raises:
        ValueError: if `coverage` is out of range, or the predictor's margin is no probability.
    """
    check_coverage(coverage)
    if name not in ("belief", "eos_quantile"):
        raise ValueError(
            f"length_predictor: {name} needs a margin that was chosen on texts whose length is known, and there is "
            f"none, as {why}; run llamafactory-ddm fit-length, or use belief"
        )
    return coverage


def check_coverage(coverage: float) -> None:
    """Check a probability.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
