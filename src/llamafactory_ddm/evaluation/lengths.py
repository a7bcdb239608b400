"""The quality of predicted lengths, by cross-validation: each text is predicted with thresholds from other texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling.length_predictors import PREDICTORS, FirstStep, calibrated_threshold, round_up_to_block

FOLDS = 5


def min_thresholds(steps: Sequence[FirstStep], needed: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the calibration data of each predictor, [n] float64 in the order of the texts.

    Args:
        steps: batches of texts.
        needed: [batch] int64 for each batch, length of each text, EOS included.
    """
    return {
        name: torch.cat([predictor.min_threshold(step, n) for step, n in zip(steps, needed, strict=True)])
        for name, predictor in PREDICTORS.items()
    }


def length_metrics(
    steps: Sequence[FirstStep],
    needed: Sequence[Tensor],
    coverage: float,
    *,
    n_fixed: Sequence[Tensor] | None = None,
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
        n_fixed: [batch] int64 for each batch, number of fixed tokens before the positions to generate; 0 by default.
        block: lengths are rounded up to a multiple of this many tokens, as in generation.
    Raises:
        ValueError: if there are fewer texts than folds.
    """
    n = sum(map(len, needed))
    if n < FOLDS:
        raise ValueError(f"eval_dataset holds {n} texts, but {FOLDS}-fold cross-validation needs {FOLDS}; add texts")
    fold = torch.arange(n) % FOLDS
    calibration = min_thresholds(steps, needed)
    true_length = torch.cat(list(needed)).double()
    canvas = torch.cat([step.editable.sum(dim=1) for step in steps]).double()
    fixed = torch.zeros(n, dtype=torch.int64) if n_fixed is None else torch.cat(list(n_fixed))
    result: dict[str, dict[str, float]] = {}
    for name, predictor in PREDICTORS.items():
        threshold = torch.zeros(n, dtype=torch.float64)
        for held_out in range(FOLDS):
            threshold[fold == held_out] = calibrated_threshold(name, calibration[name][fold != held_out], coverage)
        per_batch = torch.split(threshold, [len(batch) for batch in needed])
        lengths = torch.cat([predictor.lengths(step, part) for step, part in zip(steps, per_batch, strict=True)])
        predicted = torch.minimum(round_up_to_block(fixed, lengths, block).double(), canvas)
        result[name] = {
            "not_too_short": float((predicted >= true_length).double().mean()),
            "mean_excess": float((predicted - true_length).clamp(min=0.0).mean()),
            "rmse": float((predicted - true_length).square().mean().sqrt()),
            "tokens_saved": float((canvas - predicted).mean()),
            "canvas": float(canvas.mean()),
        }
    return result


def as_table(metrics: dict[str, dict[str, float]]) -> str:
    """Return the result of `length_metrics` as a text table."""
    lines = [f"{'predictor':<17}{'% not too short':>16}{'mean excess':>13}{'RMSE':>8}{'tokens saved':>14}"]
    for name, row in metrics.items():
        saved = f"{row['tokens_saved']:.1f} of {row['canvas']:.1f}"
        lines.append(
            f"{name:<17}{100 * row['not_too_short']:>16.1f}{row['mean_excess']:>13.1f}{row['rmse']:>8.1f}{saved:>14}"
        )
    return "\n".join(lines)
