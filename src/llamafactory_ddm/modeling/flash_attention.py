"""Flash attention over rows with padding and packed documents, as segments of one long row.

Flash attention takes no mask. Its variant for variable lengths takes a batch as one row of tokens, and where its
segments begin; tokens attend within their segment only. Here the segments are the documents of all rows, and the
padding of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def segments(shape: tuple[int, int], is_padding: Tensor | None, document: Tensor | None) -> dict[str, Any]:
    """Return where the segments of a batch begin; reads values, so it is meant for tensors on the CPU.

    A batch of one row has segments in any case: without them transformers would look for documents in the positions of
    a single row, in each layer, and wait for the device.

    Args:
        shape: rows and columns of the batch.
        is_padding: [batch, length] bool; None if there is none.
        document: [batch, length] int64, index of the packed document of each token, which differs from that of the
            document beside it; None if a row is one document.
    Returns:
        `cu_seq_lens`: [segments + 1] int32, the first token of each segment in the flattened batch, and the end; and
        `max_length`: length of the longest. Empty if each row is one segment, unless the batch has one row.
    """
    rows, length = shape
    if is_padding is None and document is None and rows > 1:
        return {}
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[:, 0] = True
    for value in (is_padding, document):
        if value is not None:
            begins[:, 1:] |= (value[:, 1:] != value[:, :-1]).cpu()
    first = begins.flatten().nonzero()[:, 0]
    bounds = torch.cat([first, torch.tensor([rows * length])])
    return {"cu_seq_lens": bounds.to(torch.int32), "max_length": int(bounds.diff().max())}


def segment_arguments(placement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by which transformers passes the segments to flash attention.

    Args:
        placement: holds what `segments` returned, `cu_seq_lens` on the device.
    """
    if "cu_seq_lens" not in placement:
        return {}
    bounds, longest = placement["cu_seq_lens"], placement["max_length"]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
