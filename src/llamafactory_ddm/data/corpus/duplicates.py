"""Finds documents with the same text across all shards, from files of hashes, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_BUCKET = 4_000_000  # hashes that are compared at a time


def find_duplicates(files: Sequence[Path]) -> list[Path]:
    """Write, beside each file of hashes, the indices of documents whose hash an earlier document has.

    A hash of 0 belongs to no document. Hashes are compared in buckets by their highest bits.

    Args:
        files: of the shards, in order; each holds [n] uint64.
    Returns:
        The files of indices, in the same order.
    """
    outputs = [file.with_suffix(".duplicates.npy") for file in files]
    if all(output.is_file() for output in outputs):
        return outputs
    n_hashes = sum(len(np.load(file, mmap_mode="r")) for file in files)
    bits = max(0, int(np.ceil(np.log2(max(1, n_hashes / _BUCKET)))))
    found: list[list[np.ndarray]] = [[] for _ in files]
    for bucket in range(1 << bits):
        hashes, shards, rows = [], [], []
        for index, file in enumerate(files):
            values = np.load(file, mmap_mode="r")
            where = np.flatnonzero((values != 0) & (values >> np.uint64(64 - bits) == bucket if bits else values != 0))
            hashes.append(values[where])
            shards.append(np.full(len(where), index, dtype=np.int32))
            rows.append(where)
        value, shard, row = map(np.concatenate, (hashes, shards, rows))
        order = np.argsort(value, kind="stable")
        repeated = order[1:][value[order][1:] == value[order][:-1]]
        for index in np.unique(shard[repeated]):
            found[index].append(row[repeated[shard[repeated] == index]])
    for output, parts in zip(outputs, found, strict=True):
        scratch = output.with_suffix(".tmp.npy")
        np.save(scratch, np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *parts])))
        scratch.replace(output)
    return outputs
