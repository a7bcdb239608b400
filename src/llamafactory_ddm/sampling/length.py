"""How long a text will be, from one forward before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .prediction import Denoiser


@torch.no_grad()
def end_probability(
    denoiser: Denoiser, x: Tensor, *, editable: Tensor, mask_id: int, end_ids: Sequence[int]
) -> Tensor:
    """Return the probability that a place holds an end or a pad, by one forward with every editable place masked.

    As nothing but ends and pads follows an end, this is the probability that the text has ended by then.

    Args:
        denoiser: the model.
        x: [batch, length] int64; ids at editable places do not matter.
        editable: [batch, length] bool.
        mask_id: of [MASK]; never drawn.
        end_ids: the end-of-text token and the pads.
    Returns:
        [batch, length] float32; 0 where a token is given.
    """
    z = x.masked_fill(editable, mask_id)
    place = editable.flatten().nonzero()[:, 0]
    ends = torch.tensor(sorted(end_ids), device=x.device)
    output = denoiser(z, place)
    parts: Iterable[Tensor] = (output,) if isinstance(output, Tensor) else output
    found = []
    for part in parts:
        logits = part.float().index_fill(1, torch.tensor([mask_id], device=x.device), float("-inf"))
        found.append((logits[:, ends].logsumexp(dim=1) - logits.logsumexp(dim=1)).exp())
    result = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
    return result.index_copy(0, place, torch.cat(found)).view_as(x)


def places_needed(ended: Tensor, editable: Tensor, coverage: float) -> Tensor:
    """Return how many editable places a row needs, its end included, so that the text has ended with a probability.

    Args:
        ended: [batch, length] float32, what `end_probability` returns; made monotone within a row.
        editable: [batch, length] bool.
        coverage: in (0, 1], the probability by the model's own belief.
    Returns:
        [batch] int64, at least 1 and at most the row's editable places, where nothing reaches `coverage`.
    Raises:
        ValueError: if `coverage` is out of range.
    """
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
    by_then = ended.masked_fill(~editable, 0.0).cummax(dim=1).values
    before = ((by_then < coverage) & editable).sum(dim=1)
    return torch.minimum(before + 1, editable.sum(dim=1))
