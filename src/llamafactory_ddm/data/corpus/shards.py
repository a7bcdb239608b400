"""Turns one shard of a source into files of blocks: read, filter, tokenise, pack."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import write_json, writing
from .encoder import Encoder
from .files import Piece, Row, read_rows
from .keys import Source
from .pool import report_progress

_DOCUMENTS = 256  # that are tokenised together, at most
_CHARACTERS = 1 << 20  # of them; the tokenizer takes about 75 bytes of memory for each

INVALID = "invalid Unicode"  # reason for a text that no tokenizer takes


@dataclass(frozen=True)
class Shard:
    """A part of a source.

    Attributes:
        source: where its documents come from.
        pieces: its parts of files.
        outputs: split -> file of its blocks; `validation` is absent if there is no such split.
        marker: written when the files are complete, with the counts.
        hashes: file of the hashes of its documents, for deduplicate.
        duplicates: file of the indices of its documents that are duplicates; None keeps all.
        length: ids of a block.
        val_size: fraction of the documents in `validation`.
    """

    source: Source
    pieces: tuple[Piece, ...]
    outputs: dict[str, Path]
    marker: Path
    hashes: Path
    duplicates: Path | None
    length: int
    val_size: float

    @property
    def n_bytes(self) -> int:
        """Size of the input."""
        return sum(piece.n_bytes for piece in self.pieces)


def text_hash(text: str) -> int:
    """Return 64 bits of a hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def read_documents(shard: Shard) -> Iterator[tuple[str, Row]]:
    """Yield the texts of a shard with their columns, and report progress; a missing text is empty.

    Raises:
        ValueError: if a text is no string.
    """
    column = shard.source.text_column
    for piece in shard.pieces:
        reported = 0
        for row, fraction in read_rows(piece, [column, *shard.source.filters.columns]):
            text = row.get(column)
            if not isinstance(text, str | None):
                raise ValueError(f"text_column: {column} of {piece.path} holds {text!r}, expected text")
            yield text or "", row
            done = int(fraction * piece.n_bytes)
            if done > reported:
                report_progress(done - reported)
                reported = done
        report_progress(piece.n_bytes - reported)


def _reason_to_drop(shard: Shard, text: str, row: Row) -> str | None:
    """Return why a document is dropped: its text has half of a surrogate pair, or a filter; None if it is kept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return INVALID
    return shard.source.filters.reason_to_drop(text, row)


def hash_shard(shard: Shard, _encoder: Encoder) -> None:
    """Write the hashes of a shard's documents that pass the filters; 0 for others."""
    hashes = [
        0 if _reason_to_drop(shard, text, row) else max(1, text_hash(text)) for text, row in read_documents(shard)
    ]
    shard.hashes.parent.mkdir(parents=True, exist_ok=True)
    scratch = shard.hashes.with_suffix(".tmp.npy")
    np.save(scratch, np.array(hashes, dtype=np.uint64))
    scratch.replace(shard.hashes)


def tokenise_shard(shard: Shard, encoder: Encoder) -> None:
    """Write the blocks of a shard, then its marker."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    blocks: dict[str, int] = {}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(writing(path, shard.length, encoder.dtype, encoder.bos_id))
            for split, path in shard.outputs.items()
        }
        waiting: dict[str, list[str]] = {split: [] for split in writers}
        n_waiting = dict.fromkeys(writers, 0)  # characters

        def flush(split: str) -> None:
            for ids in encoder.encode(waiting[split]):
                counts["tokens"] += len(ids)
                writers[split].add(ids)
            waiting[split], n_waiting[split] = [], 0

        for text in _kept(shard, counts, dropped):
            split = "train"
            if shard.val_size and text_hash(text) < shard.val_size * 2.0**64:
                split = "validation"
            waiting[split].append(text)
            n_waiting[split] += len(text)
            if len(waiting[split]) == _DOCUMENTS or n_waiting[split] >= _CHARACTERS:
                flush(split)
        for split in writers:
            flush(split)
    for split, writer in writers.items():
        blocks[split] = writer.n_blocks
        counts["tokens_dropped"] += writer.n_left
    write_json(shard.marker, {"blocks": blocks, "dropped": dropped, **counts})


def _kept(shard: Shard, counts: Counter[str], dropped: Counter[str]) -> Iterator[str]:
    """Yield the texts that are kept, and count."""
    duplicates: Any = () if shard.duplicates is None else set(np.load(shard.duplicates).tolist())
    for index, (text, row) in enumerate(read_documents(shard)):
        counts["documents"] += 1
        reason = _reason_to_drop(shard, text, row)
        if reason is None and index in duplicates:
            reason = "deduplicate"
        if reason is None:
            counts["kept"] += 1
            yield text
        else:
            dropped[reason] += 1
