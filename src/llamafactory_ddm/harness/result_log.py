"""Results of finished requests on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResultLog:
    """Results by request and settings, appended to `FOLDER/requests-RANK.jsonl` as they are finished.

    A line holds the settings' fingerprint, the request's key and its result, so that results under other settings are
    never read. Each process appends to a file of its own and reads those of all.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, rank: int = 0) -> None:
        """Read the results that are in `folder` for these settings; None keeps none."""
        self.fingerprint = digest(settings)
        self.found: dict[str, Any] = {}
        self._path: Path | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"requests-{rank}.jsonl"
        for path in sorted(folder.glob("requests-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the process was killed while it wrote this line
                if entry["settings"] == self.fingerprint:
                    self.found[entry["request"]] = entry["result"]
        self._end_last_line()

    def add(self, results: Mapping[str, Any]) -> None:
        """Append results by the keys of their requests."""
        self.found.update(results)
        if self._path is None or not results:
            return
        lines = (
            json.dumps({"settings": self.fingerprint, "request": key, "result": result}) + "\n"
            for key, result in results.items()
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def _end_last_line(self) -> None:
        """End a line that was cut, so that the next one is not joined to it."""
        if self._path is not None and self._path.is_file():
            content = self._path.read_bytes()
            if content and not content.endswith(b"\n"):
                with self._path.open("ab") as file:
                    file.write(b"\n")


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
