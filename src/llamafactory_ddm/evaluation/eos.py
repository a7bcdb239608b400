"""How well a model predicts EOS: at the first denoising step, and by quarter of the canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.collators import response_start
from ..diffusion.noise import Stream, k_smallest_mask
from ..diffusion.rng import keyed_uniform

# Fractions of the text, without EOS, that are revealed; at 1 only EOS and padding are masked.
REVEALED = (0.0, 0.25, 0.5, 0.75, 1.0)
QUARTERS = 4
_COUNTS = 6  # rows, P(EOS), top-1, reciprocal rank, error of the length, its square
_CONFUSION = 4  # true and false positives, false and true negatives

# [batch, length] bool of what is masked -> [n_masked, vocab] logits in row-major order, [MASK] excluded.
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EosRows:
    """Rows whose position of EOS is known, on the CPU.

    Attributes:
        maskable: [batch, length] bool, tokens that the model can predict.
        is_padding: [batch, length] bool, positions outside the canvas.
        end: [batch] int64, position of EOS; rows without one (-1) do not count.
        seed: seed of the revealed tokens and of the cuts.
        sample_index: [batch] int64, index of each row in the evaluation set.
    """

    maskable: Tensor
    is_padding: Tensor
    end: Tensor
    seed: int
    sample_index: Tensor


def last_text(maskable: Tensor, end: Tensor) -> Tensor:
    """Return `maskable` without the responses before the one that ends at `end`; earlier turns of a chat stay fixed.

    Args:
        maskable: [batch, length] bool.
        end: [batch] int64, position of EOS, -1 where a row has none.
    Returns:
        [batch, length] bool.
    """
    return maskable & (torch.arange(maskable.shape[1]) >= response_start(maskable, end)[:, None])


def columns() -> int:
    """Return the number of columns of `statistics`."""
    return len(REVEALED) * _COUNTS + QUARTERS * _CONFUSION


def statistics(batch: EosRows, logits: Logits, *, eos_ids: Sequence[int], pad_ids: Sequence[int]) -> Tensor:
    """Return each row's contribution to the sums that `metrics` takes.

    Args:
        batch: rows with their positions of EOS.
        logits: returns the model's logits at the masked positions.
        eos_ids: ids of the tokens that end a text; any of them counts as EOS.
        pad_ids: ids of padding.
    Returns:
        [batch, columns()] float64 on the CPU, to be summed over rows; 0 for a row without EOS.
    """
    eos_or_pad = torch.tensor(sorted({*eos_ids, *pad_ids}))
    parts = [_first_step(batch, share, logits, sorted(eos_ids), eos_or_pad) for share in REVEALED]
    parts += [_quarter(batch, number, logits, eos_or_pad) for number in range(QUARTERS)]
    return torch.cat(parts, dim=1) * (batch.end >= 0)[:, None]


def hidden_after_revealing(batch: EosRows, share: float) -> Tensor:
    """Return the masked positions when floor(share n) random ones of a row's n text tokens are revealed.

    EOS and everything after it is always masked.

    Returns:
        [batch, length] bool.
    """
    position = torch.arange(batch.maskable.shape[1])
    text = batch.maskable & (position < batch.end[:, None])
    count = (text.sum(dim=1).double() * share).floor().long()
    u = keyed_uniform(batch.seed, Stream.EVALUATION_REVEAL, batch.sample_index, batch.maskable.shape[1])
    return batch.maskable & ~k_smallest_mask(u, text, count)


def _first_step(batch: EosRows, share: float, logits: Logits, eos_ids: Sequence[int], eos_or_pad: Tensor) -> Tensor:
    """Return [batch, 6] float64, the numbers that `_COUNTS` lists."""
    masked = hidden_after_revealing(batch, share)
    predicted = logits(masked)
    row_and_column = masked.nonzero()
    at_end = row_and_column[:, 1] == batch.end[row_and_column[:, 0]]
    row = row_and_column[at_end, 0]
    logits_at_end = predicted[at_end.to(predicted.device)].float()
    eos_logits = logits_at_end[:, list(eos_ids)]
    result = torch.zeros(len(masked), _COUNTS, dtype=torch.float64)
    result[row, 0] = 1.0
    result[row, 1] = (eos_logits.logsumexp(dim=1) - logits_at_end.logsumexp(dim=1)).exp().cpu().double()
    rank = (logits_at_end > eos_logits.amax(dim=1, keepdim=True)).sum(dim=1).cpu().double() + 1.0
    result[row, 2] = (rank == 1).double()
    result[row, 3] = 1.0 / rank
    # The predicted length is the first position where EOS or padding is the most probable token, else the canvas.
    is_end = torch.isin(predicted.argmax(dim=1).cpu(), eos_or_pad)
    length = masked.shape[1] - batch.is_padding.sum(dim=1)
    first = length.scatter_reduce(0, row_and_column[is_end, 0], row_and_column[is_end, 1], "amin")
    error = (first - batch.end).abs().double()
    result[row, 4], result[row, 5] = error[row], error[row] ** 2
    return result


def _quarter(batch: EosRows, number: int, logits: Logits, eos_or_pad: Tensor) -> Tensor:
    """Return [batch, 4] float64: true and false positives, false and true negatives after a cut in this quarter."""
    length = batch.maskable.shape[1] - batch.is_padding.sum(dim=1)
    u = keyed_uniform(batch.seed, Stream.EVALUATION_CUT, batch.sample_index, QUARTERS)[:, number].double()
    cut = ((number + u) / QUARTERS * length).floor().long()
    position = torch.arange(batch.maskable.shape[1])
    masked = batch.maskable & (position >= cut[:, None])
    predicted = torch.isin(logits(masked).argmax(dim=1).cpu(), eos_or_pad)
    row, column = masked.nonzero().unbind(dim=1)
    true = column >= batch.end[row]
    result = torch.zeros(len(masked), _CONFUSION, dtype=torch.float64)
    for index, kind in enumerate((true & predicted, ~true & predicted, true & ~predicted, ~true & ~predicted)):
        result[:, index].index_add_(0, row, kind.double())
    return result


def metrics(total: Tensor) -> dict[str, dict[str, float]]:
    """Return the metrics of statistics that are summed over rows.

    `revealed 0.25` and so on describe the first denoising step with this fraction of the text revealed. At the true
    position of EOS they hold the mean probability of EOS (`p_eos`), how often EOS is the most probable token (`top1`)
    and its mean reciprocal rank (`mrr`). The predicted length is the first position where EOS or padding is the most
    probable token; `length_mae` and `length_rmse` are its mean absolute and root mean square error in tokens.

    `quarter 1` to `quarter 4` describe one denoising step with everything masked after a random cut in this quarter of
    the canvas. They hold `accuracy`, `precision`, `recall` and `f1`, per token, of telling EOS and padding from text;
    a ratio without cases is 0.

    Args:
        total: [columns()] float64.
    Raises:
        ValueError: if no row has EOS.
    Source: the published evaluation of variable-length DiffuGPT.
    Deviates: the published evaluation generates after the cut; this one takes a single step.
    """
    values = total.tolist()
    n_rows = values[0]
    if n_rows == 0:
        raise ValueError("eval_dataset holds no row with EOS; set variable_length, and check eval_dataset")
    result: dict[str, dict[str, float]] = {}
    for index, share in enumerate(REVEALED):
        _, p_eos, top1, mrr, error, square = values[index * _COUNTS : (index + 1) * _COUNTS]
        result[f"revealed {share:g}"] = {
            "p_eos": p_eos / n_rows,
            "top1": top1 / n_rows,
            "mrr": mrr / n_rows,
            "length_mae": error / n_rows,
            "length_rmse": (square / n_rows) ** 0.5,
        }
    for index in range(QUARTERS):
        low = len(REVEALED) * _COUNTS + index * _CONFUSION
        tp, fp, fn, tn = values[low : low + _CONFUSION]
        result[f"quarter {index + 1}"] = {
            "accuracy": (tp + tn) / max(tp + fp + fn + tn, 1.0),
            "precision": tp / max(tp + fp, 1.0),
            "recall": tp / max(tp + fn, 1.0),
            "f1": 2 * tp / max(2 * tp + fp + fn, 1.0),
        }
    return result
