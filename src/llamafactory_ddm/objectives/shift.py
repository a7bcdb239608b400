"""The shift by one of autoregressive models: which hidden state predicts which token.

With `shift` (DiffuLLaMA) the logits at position i - 1 predict token i, as in the autoregressive model that the weights
come from, and token 0 is never predicted. All other code indexes logits by the token that they predict.
"""

from __future__ import annotations

from torch import Tensor


def predictable(maskable: Tensor, shift: bool) -> Tensor:
    """Return `maskable` without the tokens that the model cannot predict: with `shift`, position 0.

    Args:
        maskable: [batch, length] bool.
        shift: whether logits at i - 1 predict token i.
    Returns:
        [batch, length] bool.
    """
    if not shift:
        return maskable
    result = maskable.clone()
    result[:, 0] = False
    return result


def head_index(select: Tensor, shift: bool) -> Tensor:
    """Return the flat indices of the hidden states that predict the selected tokens.

    Args:
        select: [batch, length] bool, the tokens to predict.
        shift: whether logits at i - 1 predict token i.
    Returns:
        [n_selected] int64 into [batch * length], in row-major order of `select`.
    Raises:
        ValueError: if `shift` is set and position 0, which is never predicted, is selected.
    """
    if shift and bool(select[:, 0].any()):
        raise ValueError("with shift the first token of a sequence is never predicted; leave position 0 unselected")
    return source_index(select.flatten().nonzero()[:, 0], shift)


def source_index(flat_index: Tensor, shift: bool) -> Tensor:
    """Return the flat indices of the hidden states that predict the tokens at `flat_index`: i - 1 with `shift`.

    Args:
        flat_index: [n] int64 into [batch * length].
        shift: whether logits at i - 1 predict token i.
    """
    return flat_index - int(shift)
