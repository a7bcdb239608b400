"""Interleaves the blocks of several sources with probabilities, as LLaMA-Factory interleaves examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .blocks import BlockFiles, write_json, writing
from .encoder import Encoder
from .pool import report_progress

_DRAWS = 1000  # that `datasets` takes from its generator at a time
_BATCH_IDS = 1 << 20
Choices = npt.NDArray[np.int64]


def draws(probabilities: Sequence[float], seed: int) -> Iterator[Choices]:
    """Yield the indices of the sources, without end, as `datasets.interleave_datasets` draws them."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.choice(len(probabilities), size=_DRAWS, p=probabilities)


def count_rows(lengths: Sequence[int], probabilities: Sequence[float], seed: int, *, repeats: bool) -> int:
    """Return the number of rows until the first source ends or, with `repeats`, until each has ended once.

    Args:
        lengths: number of blocks of each source.
        probabilities: of the sources.
        seed: of the draws.
        repeats: whether a source that has ended begins again.
    """
    counts, n_rows = np.zeros(len(lengths), dtype=np.int64), 0
    ends: list[int | None] = [None] * len(lengths)
    for chosen in draws(probabilities, seed):
        for index, length in enumerate(lengths):
            where = np.flatnonzero(chosen == index)
            if ends[index] is None and counts[index] + len(where) >= length:
                ends[index] = n_rows + int(where[length - counts[index] - 1]) + 1
            counts[index] += len(where)
        n_rows += len(chosen)
        known = [end for end in ends if end is not None]
        if known and (len(known) == len(ends) or not repeats):
            return max(known) if repeats else min(known)
    raise AssertionError("draws do not end")


@dataclass(frozen=True)
class MixedFile:
    """A file of the mixture.

    Attributes:
        output: the file.
        marker: written when it is complete.
        parts: files of each source with their numbers of blocks.
        starts: blocks that each source has given to earlier files.
        choices: [n] the source of each block.
        length: ids of a block.
    """

    output: Path
    marker: Path
    parts: tuple[tuple[tuple[Path, int], ...], ...]
    starts: tuple[int, ...]
    choices: Choices
    length: int


def mixed_files(
    folder: Path,
    markers: Path,
    parts: Sequence[Sequence[tuple[Path, int]]],
    probabilities: Sequence[float],
    seed: int,
    *,
    repeats: bool,
    length: int,
    file_rows: int,
) -> Iterator[MixedFile]:
    """Yield the files of the mixture.

    Args:
        folder: where they go.
        markers: folder of the markers.
        parts: files of each source with their numbers of blocks.
        probabilities: of the sources.
        seed: of the draws.
        repeats: whether a source that has ended begins again.
        length: ids of a block.
        file_rows: blocks of a file.
    """
    lengths = [sum(n_blocks for _, n_blocks in files) for files in parts]
    n_rows = count_rows(lengths, probabilities, seed, repeats=repeats)
    n_files = -(-n_rows // file_rows)
    stream, starts = draws(probabilities, seed), np.zeros(len(parts), dtype=np.int64)
    drawn = np.zeros(0, dtype=np.int64)
    for index in range(n_files):
        size = min(file_rows, n_rows - index * file_rows)
        while len(drawn) < size:
            drawn = np.concatenate([drawn, next(stream)])
        choices, drawn = drawn[:size], drawn[size:]
        yield MixedFile(
            folder / file_name(index, n_files),
            markers / f"mixed-{index:05d}.json",
            tuple(map(tuple, parts)),
            tuple(starts.tolist()),
            choices,
            length,
        )
        starts += np.bincount(choices, minlength=len(parts))


def file_name(index: int, count: int) -> str:
    """Return the name that `datasets` gives to the file of a split."""
    return f"data-{index:05d}-of-{count:05d}.arrow"


def mix_file(job: MixedFile, encoder: Encoder) -> None:
    """Write a file of the mixture, then its marker with the number of blocks of each source."""
    sources = [BlockFiles(files, job.length) for files in job.parts]
    lengths = [int(source.ends[-1]) for source in sources]
    positions = list(job.starts)
    step = max(1, _BATCH_IDS // job.length)
    with writing(job.output, job.length, encoder.dtype) as writer:
        for start in range(0, len(job.choices), step):
            chosen = job.choices[start : start + step]
            rows: Any = np.empty((len(chosen), job.length), dtype=encoder.dtype)
            for index, source in enumerate(sources):
                where = np.flatnonzero(chosen == index)
                rows[where] = _read_around(source, positions[index], len(where), lengths[index], rows.dtype)
                positions[index] += len(where)
            writer.write_blocks(rows)
            report_progress(rows.nbytes)
    counts = np.bincount(job.choices, minlength=len(sources)).tolist()
    write_json(job.marker, {"blocks": counts})


def _read_around(source: BlockFiles, start: int, count: int, length: int, dtype: Any) -> Any:
    """Return `count` blocks from `start` on, beginning again where the source ends."""
    parts = [np.empty((0, source.length), dtype=dtype)]
    while count:
        first = start % length
        size = min(count, length - first)
        parts.append(source.read(first, first + size))
        start, count = start + size, count - size
    return np.concatenate(parts)
