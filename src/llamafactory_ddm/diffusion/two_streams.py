"""The two streams of block diffusion: which columns a row has, and which of them a column sees.

A row holds a clean and a noised copy of its text, [clean | noisy], with the same positions. The clean stream encodes
finished blocks, the noisy one predicts the masked tokens of each block. Columns on which no scored token depends are
left out: noised blocks without a masked token, such as those of a prompt, and clean blocks that no scored token
follows. The noisy stream also has the positions that a document lacks up to the end of its last block, with [MASK].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Source: BD3-LM (arXiv 2503.09573) for the two streams in one row; which columns are left out is ours.


@dataclass(frozen=True)
class Columns:
    """The columns of a batch of rows of two streams.

    Attributes:
        source: [batch, columns] int64, which of [clean | noisy], [batch, length + noisy_length], each column holds.
        is_used: [batch, columns] bool, False for columns that only fill a row up.
        place: [batch, length + noisy_length] int64, the column of each of [clean | noisy]; any number for those left
            out.
        is_plain: whether the rows have no padding, hold one document each, and have all columns except the clean ones
            of the last block. Then the columns follow from their number alone.
    """

    source: Tensor
    is_used: Tensor
    place: Tensor
    is_plain: bool


def arrange_columns(
    block: Tensor, noisy_block: Tensor, is_masked: Tensor, is_first: Tensor, document: Tensor | None
) -> Columns:
    """Return the columns that the scored tokens of a batch depend on.

    Args:
        block: [batch, length] int64, the number of each token's block in its row, -1 for padding.
        noisy_block: [batch, noisy_length] int64, those of the noisy stream: `block`, and what completes last blocks.
        is_masked: [batch, length] bool, scored tokens of the noisy stream.
        is_first: [batch, length] bool, scored tokens that the clean stream predicts at the end of the block before.
        document: [batch, length] int64, index of the packed document of each token; None if a row is one document.
    """
    n_blocks = int(block.amax()) + 1
    is_token, number = block >= 0, block.clamp(min=0)
    masked = torch.zeros(len(block), max(n_blocks, 1), dtype=torch.int64, device=block.device)
    masked = masked.scatter_add_(1, number, (is_masked & is_token).long())
    of_document = torch.zeros_like(block) if document is None else document
    scored = block.masked_fill(~(is_masked | is_first), -1)
    last = torch.full((len(block), int(of_document.amax()) + 1), -1, dtype=torch.int64, device=block.device)
    last = last.scatter_reduce(1, of_document, scored, "amax")
    is_noisy_token = (noisy_block >= 0) & (masked.gather(1, noisy_block.clamp(min=0)) > 0)
    keep = torch.cat([is_token & (block < last.gather(1, of_document)), is_noisy_token], dim=1)
    n_columns = max(int(keep.sum(dim=1).amax()), 1)
    source = (~keep).long().argsort(dim=1, stable=True)[:, :n_columns]
    whole = torch.cat([block < n_blocks - 1, torch.ones_like(is_noisy_token)], dim=1)
    return Columns(
        source=source,
        is_used=keep.gather(1, source),
        place=keep.cumsum(dim=1) - 1,
        is_plain=document is None and bool(is_token.all()) and torch.equal(keep, whole),
    )


def sees(
    query_block: Tensor, query_is_noisy: Tensor, key_block: Tensor, key_is_noisy: Tensor, same_document: Tensor
) -> Tensor:
    """Return whether a column may attend to another, apart from itself; the tensors broadcast.

    A clean query sees the clean keys of its own block and of the blocks before it; a noisy query sees the clean keys
    of the blocks before its own and the noisy keys of its own block. Padding sees nothing and is not seen.

    Args:
        query_block: int64, number of the query's block in its row, -1 for padding.
        query_is_noisy: bool, whether the query is in the noisy stream.
        key_block: int64.
        key_is_noisy: bool.
        same_document: bool, whether both are of one document.
    """
    before = ~key_is_noisy & same_document & (key_block < query_block)
    is_token = (query_block >= 0) & (key_block >= 0)
    return is_token & (before | ((query_block == key_block) & (query_is_noisy == key_is_noisy)))


def visible_pairs(block: Tensor, is_noisy: Tensor, document: Tensor | None = None) -> int:
    """Return how many pairs of query and key `sees` allows, without the matrix of all pairs.

    Args:
        block: [batch, columns] or [columns] int64, the number of each column's block in its row, -1 for padding.
        is_noisy: the same shape, bool.
        document: the same shape, int64; None if a row is one document.
    """
    columns = block.shape[-1]
    block, is_noisy = block.reshape(-1, columns), is_noisy.reshape(-1, columns)
    is_token, number = block >= 0, block.clamp(min=0)
    zeros = torch.zeros(len(block), max(int(block.amax()) + 1, 1), dtype=torch.int64)
    clean = zeros.scatter_add(1, number, (is_token & ~is_noisy).long())
    noisy = zeros.scatter_add(1, number, (is_token & is_noisy).long())
    before = clean.cumsum(dim=1) - clean  # clean columns of earlier blocks
    if document is not None:
        of_block = zeros.scatter_reduce(1, number, document.reshape(-1, columns) * is_token, "amax")
        first = torch.full((len(zeros), int(of_block.amax()) + 1), int(before.amax()), dtype=torch.int64)
        before = before - first.scatter_reduce(1, of_block, before, "amin").gather(1, of_block)
    return int(((clean + noisy) * before + clean.square() + noisy.square()).sum())
