"""Results of finished requests on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class ResultLog:
    """Results by request and settings, appended to `FOLDER/requests-RANK.jsonl` as they are finished.

    A line holds the settings' fingerprint, the request's key and its result, so that results under other settings are
    never read. Each process appends to a file of its own and reads those of all.
    """

    def __init__(self, folder: Path | None, *, rank: int = 0) -> None:
        """Open the log in `folder` for writing; None keeps results in memory alone.

        Raises:
            OSError: if the folder cannot be written.
        """
        self.results: dict[str, Any] = {}
        self.fingerprint = ""
        self._folder = folder
        self._file: IO[str] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"requests-{rank}.jsonl"
            is_cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
            self._file = path.open("a", encoding="utf-8")
            if is_cut:  # a process was killed while it wrote this line
                self._file.write("\n")

    def read_earlier(self, settings: Mapping[str, Any]) -> None:
        """Read the results that earlier runs kept for these settings."""
        self.fingerprint = digest(settings)
        for path in sorted(self._folder.glob("requests-*.jsonl")) if self._folder is not None else ():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a line that was cut
                if entry["settings"] == self.fingerprint:
                    self.results[entry["request"]] = entry["result"]

    def add(self, request: str, result: Any) -> None:
        """Keep the result of a request."""
        self.results[request] = result
        if self._file is not None:
            entry = {"settings": self.fingerprint, "request": request, "result": result}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
