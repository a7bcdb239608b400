"""Finished texts of an incomplete run on disk, so that an interrupted run resumes."""

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

import torch

from ...utils.files import explain_disk_errors, replacing

_FINGERPRINT = "fingerprint"


class Numbers:
    """A set of non-negative integers, stored as a bit set."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        self._count = 0
        for number in numbers:
            self.add(number)

    def add(self, number: int) -> None:
        """Add a number to the set."""
        index, bit = number >> 3, 1 << (number & 7)
        if index >= len(self._bits):
            self._bits.extend(bytes(index + 1 - len(self._bits)))
        self._count += not self._bits[index] & bit
        self._bits[index] |= bit

    def __contains__(self, number: int) -> bool:
        """Tell whether a number is in the set."""
        index = number >> 3
        return index < len(self._bits) and bool(self._bits[index] & (1 << (number & 7)))

    def __len__(self) -> int:
        """Return the number of elements."""
        return self._count


class Unfinished:
    """The finished texts of an incomplete run: one file for each process, one line for each text.

    Texts are read one at a time, as all of them may not fit into memory.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int, world: int) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.rank, self.world = rank, world
        self.path = folder / f"{rank}-of-{world}.jsonl"

    def open(self, *, resume: bool) -> Numbers:
        """Return the numbers of the finished texts, after deleting the files of other runs."""
        with explain_disk_errors(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier(self.world)
        found = self._paths() if resume else []
        done = Numbers(record["number"] for path in found for _, record in _records(path))
        barrier(self.world)  # nobody writes before all have read
        if self.rank == 0:
            for path in set(self.folder.glob("*.jsonl")) - set(found):
                path.unlink()
        barrier(self.world)
        mine = (record for _, record in _records(self.path)) if self.path in found else ()
        with explain_disk_errors(self.folder.parent):
            write_predictions(self.path, itertools.chain([{_FINGERPRINT: self.fingerprint}], mine))
        barrier(self.world)
        return done

    def add(self, record: dict[str, Any]) -> None:
        """Append a text."""
        with explain_disk_errors(self.folder.parent), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def collect(self, count: int) -> Collected:
        """Wait for the other processes and return all texts in order.

        Raises:
            RuntimeError: if a text is missing.
        """
        barrier(self.world)
        runs: list[Run] = []
        numbers = Numbers()
        for path in self._paths():
            last = None
            for offset, record in _records(path):
                number = record["number"]
                if last is None or number < last:
                    runs.append(Run(path, offset))
                runs[-1].count += 1
                last = number
                numbers.add(number)
        if len(numbers) != count:
            raise RuntimeError(f"{count - len(numbers)} texts are missing in {self.folder}; run it again to go on")
        return Collected(runs, count)

    def _paths(self) -> list[Path]:
        """Return the files of this run."""
        return [path for path in sorted(self.folder.glob("*.jsonl")) if _fingerprint_of(path) == self.fingerprint]


@dataclass
class Run:
    """Consecutive lines of a file with ascending numbers of texts.

    Attributes:
        path: path of the file.
        offset: offset of the first line in bytes.
        count: number of texts.
    """

    path: Path
    offset: int
    count: int = 0

    def records(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        """Yield the texts from an open file, which other runs may seek in."""
        offset = self.offset
        for _ in range(self.count):
            record = None
            while record is None or "number" not in record:
                file.seek(offset)
                record = _parsed(file.readline())
                offset = file.tell()
            yield record


class Collected:
    """All texts of a run in the order of their numbers, read from disk in each iteration."""

    def __init__(self, runs: list[Run], count: int) -> None:
        self._runs, self._count = runs, count

    def __len__(self) -> int:
        """Return the number of texts."""
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the texts."""
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb")) for path in {run.path for run in self._runs}}
            merged = heapq.merge(*(run.records(files[run.path]) for run in self._runs), key=itemgetter("number"))
            for _, same in itertools.groupby(merged, key=itemgetter("number")):
                yield next(same)


def _fingerprint_of(path: Path) -> Any:
    """Return the fingerprint in the first complete line of a file."""
    with open(path, "rb") as file:
        first = next((record for record in map(_parsed, file) if record is not None), {})
    return first.get(_FINGERPRINT)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the texts of a file with their offsets in bytes."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:  # bytes, as a text may hold other line separators
            record = _parsed(line)
            if record is not None and "number" in record:
                yield offset, record
            offset += len(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None for a line that an interruption truncated."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def barrier(world: int) -> None:
    """Wait until all processes are here."""
    if world > 1:
        torch.distributed.barrier()


def write_predictions(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically: `path` is the old file or the complete new one."""
    with explain_disk_errors(path.parent), replacing(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
