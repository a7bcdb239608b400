"""Quality of predicted lengths, cross-validated: each text is measured with thresholds from other texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling.length_predictors import PREDICTORS, FirstStep, calibrated_margin, up_to_block

FOLDS = 5


def least_margins(steps: Sequence[FirstStep], needed: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the calibration data of each predictor, [n] float64 in the order of the texts.

    Args:
        steps: batches of texts.
        needed: [batch] int64 for each batch, length of each text, EOS included.
    """
    return {
        name: torch.cat([predictor.least_margin(step, n) for step, n in zip(steps, needed, strict=True)])
        for name, predictor in PREDICTORS.items()
    }


def length_metrics(
    steps: Sequence[FirstStep],
    needed: Sequence[Tensor],
    coverage: float,
    *,
    given: Sequence[Tensor] | None = None,
    block: int = 1,
) -> dict[str, dict[str, float]]:
    """Return the quality of each predictor's canvas lengths, by five-fold cross-validation.

    Each fifth of the texts is measured with a threshold that is calibrated on the other four.

    `not_too_short`: fraction of texts that fit the predicted length. `mean_excess`: mean of max(0, predicted -
    needed). `rmse`: root mean square of predicted - needed. `tokens_saved`: mean of canvas - predicted. `canvas`: mean
    length of the canvas.

    Args:
        steps: batches of texts.
        needed: [batch] int64 for each batch, length of each text, EOS included.
        coverage: target of `not_too_short`, in (0, 1].
        given: [batch] int64 for each batch, fixed tokens before the positions to generate; 0 by default.
        block: lengths are rounded up to a multiple of this many tokens, as in generation.
    Raises:
        ValueError: if there are fewer texts than folds.
    """
    n = sum(map(len, needed))
    if n < FOLDS:
        raise ValueError(f"{n} held-out texts are too few to measure predicted lengths on; give at least {FOLDS}")
    fold = torch.arange(n) % FOLDS
    margins = least_margins(steps, needed)
    true = torch.cat(list(needed)).double()
    canvas = torch.cat([step.editable.sum(dim=1) for step in steps]).double()
    before = torch.zeros(n, dtype=torch.int64) if given is None else torch.cat(list(given))
    result: dict[str, dict[str, float]] = {}
    for name, predictor in PREDICTORS.items():
        margin = torch.zeros(n, dtype=torch.float64)
        for held_out in range(FOLDS):
            margin[fold == held_out] = calibrated_margin(name, margins[name][fold != held_out], coverage)
        own = torch.split(margin, [len(part) for part in needed])
        bound = torch.cat([predictor.places(step, part) for step, part in zip(steps, own, strict=True)])
        places = torch.minimum(up_to_block(before, bound, block).double(), canvas)
        result[name] = {
            "not_too_short": float((places >= true).double().mean()),
            "mean_excess": float((places - true).clamp(min=0.0).mean()),
            "rmse": float((places - true).square().mean().sqrt()),
            "tokens_saved": float((canvas - places).mean()),
            "canvas": float(canvas.mean()),
        }
    return result


def as_table(found: dict[str, dict[str, float]]) -> str:
    """Return the result of `length_metrics` as a text table."""
    lines = [f"{'predictor':<17}{'% not too short':>16}{'mean excess':>13}{'RMSE':>8}{'tokens saved':>14}"]
    for name, row in found.items():
        saved = f"{row['tokens_saved']:.1f} of {row['canvas']:.1f}"
        lines.append(
            f"{name:<17}{100 * row['not_too_short']:>16.1f}{row['mean_excess']:>13.1f}{row['rmse']:>8.1f}{saved:>14}"
        )
    return "\n".join(lines)
