"""Does a model know where its text ends? Measured at the first denoising step, and by quarter of the canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.noise import Stream, k_smallest_mask
from ..diffusion.rng import keyed_uniform

# Shares of the text, without its end, that are given; at 1 all of it is, and the end alone is to be found.
REVEALED = (0.0, 0.25, 0.5, 0.75, 1.0)
QUARTERS = 4
_COUNTS = 6  # rows, P(end), top-1, reciprocal rank, error of the length, its square
_CONFUSION = 4  # true and false positives, false and true negatives

# [batch, length] bool of what is masked -> [n_masked, vocab] logits in row-major order, [MASK] excluded.
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EndRows:
    """Rows whose end is known, on the CPU.

    Attributes:
        maskable: [batch, length] bool, tokens that the model can predict.
        is_padding: [batch, length] bool, what lies outside of the canvas.
        end: [batch] int64, index of the end-of-text token; rows without one (-1) are left out.
        seed: of what is revealed and where rows are cut.
        sample_index: [batch] int64, ordinals within the evaluation set.
    """

    maskable: Tensor
    is_padding: Tensor
    end: Tensor
    seed: int
    sample_index: Tensor


def last_text(maskable: Tensor, end: Tensor) -> Tensor:
    """Return `maskable` without what comes before the text that ends at `end`: earlier answers of a chat stay given.

    Args:
        maskable: [batch, length] bool.
        end: [batch] int64, index of the end-of-text token, -1 where a row has none.
    Returns:
        [batch, length] bool.
    """
    place = torch.arange(maskable.shape[1])
    given = torch.where(~maskable & (place < end[:, None]), place, -1).amax(dim=1, keepdim=True)
    return maskable & (place > given)


def columns() -> int:
    """Return how many numbers `statistics` gives for a row."""
    return len(REVEALED) * _COUNTS + QUARTERS * _CONFUSION


def statistics(batch: EndRows, logits: Logits, *, end_ids: Sequence[int], pad_ids: Sequence[int]) -> Tensor:
    """Return what each row adds to the metrics.

    Args:
        batch: rows with their ends.
        logits: gives the model's logits where a row is masked.
        end_ids: of the tokens that end a text, of which any will do.
        pad_ids: of what stands behind them.
    Returns:
        [batch, columns()] float64 on the CPU, to be summed over rows; 0 for a row without an end.
    """
    ends = torch.tensor(sorted({*end_ids, *pad_ids}))
    parts = [_first_step(batch, share, logits, sorted(end_ids), ends) for share in REVEALED]
    parts += [_quarter(batch, number, logits, ends) for number in range(QUARTERS)]
    return torch.cat(parts, dim=1) * (batch.end >= 0)[:, None]


def hidden_after_revealing(batch: EndRows, share: float) -> Tensor:
    """Return what is masked once floor(share * n) of a row's n text tokens, drawn at random, are given.

    The end and everything behind it is always masked.

    Returns:
        [batch, length] bool.
    """
    place = torch.arange(batch.maskable.shape[1])
    text = batch.maskable & (place < batch.end[:, None])
    count = (text.sum(dim=1).double() * share).floor().long()
    u = keyed_uniform(batch.seed, Stream.EVALUATION_REVEAL, batch.sample_index, batch.maskable.shape[1])
    return batch.maskable & ~k_smallest_mask(u, text, count)


def _first_step(batch: EndRows, share: float, logits: Logits, end_ids: Sequence[int], ends: Tensor) -> Tensor:
    """Return [batch, 6] float64: see `_COUNTS`."""
    masked = hidden_after_revealing(batch, share)
    found = logits(masked)
    place = masked.nonzero()
    at_end = place[:, 1] == batch.end[place[:, 0]]
    row = place[at_end, 0]
    there = found[at_end.to(found.device)].float()
    own = there[:, list(end_ids)]
    result = torch.zeros(len(masked), _COUNTS, dtype=torch.float64)
    result[row, 0] = 1.0
    result[row, 1] = (own.logsumexp(dim=1) - there.logsumexp(dim=1)).exp().cpu().double()
    rank = (there > own.amax(dim=1, keepdim=True)).sum(dim=1).cpu().double() + 1.0
    result[row, 2] = (rank == 1).double()
    result[row, 3] = 1.0 / rank
    # The text is as long as the first place where the model would write an end, or as the canvas.
    ended = torch.isin(found.argmax(dim=1).cpu(), ends)
    length = masked.shape[1] - batch.is_padding.sum(dim=1)
    first = length.scatter_reduce(0, place[ended, 0], place[ended, 1], "amin")
    error = (first - batch.end).abs().double()
    result[row, 4], result[row, 5] = error[row], error[row] ** 2
    return result


def _quarter(batch: EndRows, number: int, logits: Logits, ends: Tensor) -> Tensor:
    """Return [batch, 4] float64: true and false positives, false and true negatives behind a cut in a quarter."""
    length = batch.maskable.shape[1] - batch.is_padding.sum(dim=1)
    u = keyed_uniform(batch.seed, Stream.EVALUATION_CUT, batch.sample_index, QUARTERS)[:, number].double()
    cut = ((number + u) / QUARTERS * length).floor().long()
    place = torch.arange(batch.maskable.shape[1])
    masked = batch.maskable & (place >= cut[:, None])
    said = torch.isin(logits(masked).argmax(dim=1).cpu(), ends)
    row, column = masked.nonzero().unbind(dim=1)
    true = column >= batch.end[row]
    result = torch.zeros(len(masked), _CONFUSION, dtype=torch.float64)
    for index, kind in enumerate((true & said, ~true & said, true & ~said, ~true & ~said)):
        result[:, index].index_add_(0, row, kind.double())
    return result


def metrics(total: Tensor) -> dict[str, dict[str, float]]:
    """Return the metrics of summed statistics.

    `revealed 0.25` and so on hold, at the first denoising step with so much of the text given, at the true place of
    the end the mean probability of a token that ends a text (`p_eos`), how often one is the most probable (`top1`) and
    its mean reciprocal rank (`mrr`); and the mean absolute and root mean square error in tokens of the length, which
    is where an end or a pad is first the most probable token (`length_mae`, `length_rmse`).

    `quarter 1` to `quarter 4` hold `accuracy`, `precision`, `recall` and `f1` of telling text from what is none (the
    end and the padding), per token behind a cut at a random place of that quarter of the canvas, in one step; a ratio
    without a case is 0.

    Args:
        total: [columns()] float64.
    Raises:
        ValueError: if no row has an end.
    Source: the published evaluation of variable-length DiffuGPT; which generates behind the cut, where this takes one
        step.
    """
    values = total.tolist()
    n_rows = values[0]
    if n_rows == 0:
        raise ValueError("no row has an end to be found; set variable_length, and look at eval_dataset")
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
        hit, false, missed, right = values[low : low + _CONFUSION]
        result[f"quarter {index + 1}"] = {
            "accuracy": (hit + right) / max(hit + false + missed + right, 1.0),
            "precision": hit / max(hit + false, 1.0),
            "recall": hit / max(hit + missed, 1.0),
            "f1": 2 * hit / max(2 * hit + false + missed, 1.0),
        }
    return result
