"""The evidence bound of held-out rows, and the cross-entropy by quarter of the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.likelihood import evaluation_times
from ..objectives.base import CleanBatch, Objective

# One seed for all runs, so that their evaluations draw the same noise and can be compared.
EVALUATION_SEED = 0
_QUARTERS = 4
# Statistics of a row: its bound, the number of tokens in it, then sum of terms and number of scored tokens by quarter,
# and last those of the tokens that are predicted from clean text alone (block diffusion).
N_STATISTICS = 2 + 2 * _QUARTERS + 2
_FIRST = 2 + 2 * _QUARTERS
# (noised ids [batch, length], flat indices [n], placement) -> logits [n, vocab]; see `CleanBatch.placement`.
BoundLogits = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def row_statistics(
    objective: Objective, clean: CleanBatch, logits: BoundLogits, *, samples: int, sample_index: Tensor
) -> Tensor:
    """Return each row's contribution to the sums that `bound_metrics` takes, [batch, N_STATISTICS] float64 on CPU.

    Args:
        objective: noise and loss.
        clean: a batch from `objective.clean`.
        logits: called once for each noise level, with ids on the CPU.
        samples: noise levels of a row.
        sample_index: [batch] int64, index of each row in the data set; noise depends on it alone.
    """
    statistics = torch.zeros(len(clean.x_0), N_STATISTICS, dtype=torch.float64)
    levels = evaluation_times(sample_index, samples)
    for noised in objective.evaluations(clean, levels, seed=EVALUATION_SEED, sample_index=sample_index):
        ids, index, placement = objective.evaluation_input(clean, noised)
        terms, bound = objective.evaluate(logits(ids, index, placement), clean, noised)
        statistics[:, 0] += bound / samples
        statistics[:, 1] = noised.n_counted
        row, token = noised.is_scored.nonzero().unbind(dim=1)
        level = noised.level[row] if noised.level.dim() == 1 else noised.level[row, token]
        column = 2 + 2 * (level * _QUARTERS).long()
        if noised.is_first is not None:
            column = torch.where(noised.is_first[row, token], _FIRST, column)
        statistics.index_put_((row, column), terms * noised.weight[row], accumulate=True)
        statistics.index_put_((row, column + 1), noised.weight[row], accumulate=True)
    return statistics


def bound_metrics(total: Sequence[float], *, prefix: str, term: str) -> dict[str, float]:
    """Return the metrics of a data set.

    `{prefix}_loss` is the evidence bound in nats per token, and `{prefix}_perplexity_bound` its exponential.
    `{prefix}_nll` is the cross-entropy in nats per masked token, and `{prefix}_nll_q1` to `q4` the same by quarter of
    the noise level. Under mixed noise `{prefix}_kl`, the divergence per token, replaces `nll`. Of a shifted block
    model, `{prefix}_nll_first` is the cross-entropy of the first tokens of blocks, which `{prefix}_nll` leaves out.

    Args:
        total: `row_statistics` summed over all rows, N_STATISTICS numbers.
        prefix: prefix of the names.
        term: `Objective.term`.
    Raises:
        ValueError: if no row holds a token to predict.
    """
    if not total[1]:
        raise ValueError("eval_dataset holds no token to predict; check eval_dataset, val_size and cutoff_len")
    loss = total[0] / total[1]
    terms, scored = sum(total[2:_FIRST:2]), sum(total[3:_FIRST:2])
    metrics = {f"{prefix}_loss": loss, f"{prefix}_perplexity_bound": math.exp(min(loss, 700.0))}
    if scored:
        metrics[f"{prefix}_{term}"] = terms / scored
    if total[_FIRST + 1]:
        metrics[f"{prefix}_{term}_first"] = total[_FIRST] / total[_FIRST + 1]
    for quarter in range(_QUARTERS):
        if total[3 + 2 * quarter]:
            metrics[f"{prefix}_{term}_q{quarter + 1}"] = total[2 + 2 * quarter] / total[3 + 2 * quarter]
    return metrics
