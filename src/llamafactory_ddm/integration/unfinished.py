"""Texts of a run that is not complete, so that an interruption loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .saving import explained


class Unfinished:
    """The texts of a run that is not complete: a file for each process, a line for each text."""

    def __init__(self, folder: Path, fingerprint: str, rank: int, world: int) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.rank, self.world = rank, world
        self.path = folder / f"{rank}-of-{world}.jsonl"

    def open(self, *, resume: bool) -> set[int]:
        """Return the numbers of the texts that are there, after dropping what is not of this run."""
        with explained(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier(self.world)
        found = self._read_all() if resume else []
        mine = [record for path, record in found if path == self.path]
        barrier(self.world)  # nobody writes before all have read
        if self.rank == 0:
            for path in set(self.folder.glob("*.jsonl")) - {path for path, _ in found}:
                path.unlink()
        barrier(self.world)
        with explained(self.folder.parent):
            _write_lines(self.path, [{"fingerprint": self.fingerprint}, *mine])
        barrier(self.world)
        return {record["number"] for _, record in found}

    def add(self, record: dict[str, Any]) -> None:
        """Append a text."""
        with explained(self.folder.parent), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def collect(self, count: int) -> list[dict[str, Any]]:
        """Wait for the other processes and return all texts in order.

        Raises:
            RuntimeError: if one is missing.
        """
        barrier(self.world)
        records = {record["number"]: record for _, record in self._read_all()}
        barrier(self.world)
        if len(records) != count:
            raise RuntimeError(f"{count - len(records)} texts are missing in {self.folder}; run it again to go on")
        return [records[number] for number in range(count)]

    def _read_all(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            # Not splitlines, which also splits at separators that a text may hold.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            parsed = [line for line in map(_parsed, lines) if line is not None]
            if parsed and parsed[0].get("fingerprint") == self.fingerprint:
                found += [(path, record) for record in parsed[1:] if "number" in record]
        return found


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the object of a line, or None for one that an interruption has cut short."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def barrier(world: int) -> None:
    """Wait for the other processes."""
    if world > 1:
        torch.distributed.barrier()


def write_predictions(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line, so that `path` is either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path.parent):
        _write_lines(path, records)


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    scratch = path.with_suffix(".jsonl.tmp")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
