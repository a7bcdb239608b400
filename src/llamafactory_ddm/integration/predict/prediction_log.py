"""The log of finished texts that lets an interrupted `do_predict` resume, and the file of all predictions."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from ...utils.files import explain_disk_errors, replacing
from ...utils.processes import barrier

_FINGERPRINT = "fingerprint"


class IndexSet:
    """A set of non-negative integers, stored as a bit set."""

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        self._count = 0
        for index in indices:
            self.add(index)

    def add(self, index: int) -> None:
        """Add an integer to the set."""
        byte, bit = index >> 3, 1 << (index & 7)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._count += not self._bits[byte] & bit
        self._bits[byte] |= bit

    def __contains__(self, index: int) -> bool:
        """Tell whether an integer is in the set."""
        byte = index >> 3
        return byte < len(self._bits) and bool(self._bits[byte] & (1 << (index & 7)))

    def __len__(self) -> int:
        """Return the number of elements."""
        return self._count


class PredictionLog:
    """The finished texts of a run in progress: one file per process, one JSON line per text.

    Records are read one at a time, because all of them may not fit into memory.

    Attributes:
        folder: folder of the files; deleted when the run is complete.
        fingerprint: hash of everything that decides the texts; only a run with the same one resumes.
        path: file of this process.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int, world: int) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.rank, self.world = rank, world
        self.path = folder / f"{rank}-of-{world}.jsonl"

    def open(self, *, resume: bool) -> IndexSet:
        """Return the sample indices of the finished texts, after deleting the files of other runs."""
        with explain_disk_errors(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier(self.world)
        resumed_paths = self._paths() if resume else []
        finished = IndexSet(record["number"] for path in resumed_paths for _, record in _read_records(path))
        barrier(self.world)  # all processes read before one of them writes
        if self.rank == 0:
            for path in set(self.folder.glob("*.jsonl")) - set(resumed_paths):
                path.unlink()
        barrier(self.world)
        records = (record for _, record in _read_records(self.path)) if self.path in resumed_paths else ()
        with explain_disk_errors(self.folder.parent):
            write_predictions(self.path, itertools.chain([{_FINGERPRINT: self.fingerprint}], records))
        barrier(self.world)
        return finished

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of a finished text."""
        with explain_disk_errors(self.folder.parent), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def collect(self, count: int) -> OrderedRecords:
        """Wait for the other processes and return the records of all texts, by ascending sample index.

        Raises:
            RuntimeError: if a text is missing.
        """
        barrier(self.world)
        segments: list[Segment] = []
        finished = IndexSet()
        for path in self._paths():
            previous = None
            for offset, record in _read_records(path):
                index = record["number"]
                if previous is None or index < previous:
                    segments.append(Segment(path, offset))
                segments[-1].count += 1
                previous = index
                finished.add(index)
        if len(finished) != count:
            raise RuntimeError(
                f"{count - len(finished)} of {count} texts are missing in {self.folder}; start the run again to resume"
            )
        return OrderedRecords(segments, count)

    def _paths(self) -> list[Path]:
        """Return the files of this run."""
        return [path for path in sorted(self.folder.glob("*.jsonl")) if _read_fingerprint(path) == self.fingerprint]


@dataclass
class Segment:
    """Consecutive lines of a file with ascending sample indices.

    Attributes:
        path: path of the file.
        offset: offset of the first line in bytes.
        count: number of texts.
    """

    path: Path
    offset: int
    count: int = 0

    def records(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        """Yield the records from an open file, in which other segments may seek."""
        offset = self.offset
        for _ in range(self.count):
            record = None
            while record is None or "number" not in record:
                file.seek(offset)
                record = _parse_line(file.readline())
                offset = file.tell()
            yield record


class OrderedRecords:
    """The records of all texts of a run by ascending sample index, read from disk in each iteration."""

    def __init__(self, segments: list[Segment], count: int) -> None:
        self._segments, self._count = segments, count

    def __len__(self) -> int:
        """Return the number of texts."""
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the records, each sample index once."""
        with contextlib.ExitStack() as stack:
            paths = {segment.path for segment in self._segments}
            files = {path: stack.enter_context(open(path, "rb")) for path in paths}
            sorted_segments = (segment.records(files[segment.path]) for segment in self._segments)
            merged = heapq.merge(*sorted_segments, key=itemgetter("number"))
            for _, duplicates in itertools.groupby(merged, key=itemgetter("number")):
                yield next(duplicates)


def _read_fingerprint(path: Path) -> Any:
    """Return the fingerprint in the first complete line of a file."""
    with open(path, "rb") as file:
        first = next((record for record in map(_parse_line, file) if record is not None), {})
    return first.get(_FINGERPRINT)


def _read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a file with their offsets in bytes."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:  # as bytes, because a text may hold other line separators
            record = _parse_line(line)
            if record is not None and "number" in record:
                yield offset, record
            offset += len(line)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None for a line that an interruption truncated."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def write_predictions(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically: an interruption leaves the old file or the complete new one."""
    with explain_disk_errors(path.parent), replacing(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
