"""A file of weights with other names, without reading the weights into memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_AT_ONCE = 2**24  # bytes


def write_renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> dict[str, int]:
    """Copy a safetensors file, bit for bit but for the names; holds a few MB at a time.

    Args:
        source: a file that has been checked.
        target: the file to write.
        rename: gives the new name, or None for a weight to leave out.
    Returns:
        The new names with their sizes in bytes.
    Source: the safetensors format, a header in JSON and the weights one after another.
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header: dict[str, Any] = json.loads(old.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        entries: dict[str, Any] = {}
        ranges: list[tuple[int, int]] = []
        place = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            name = rename(key)
            if name is None:
                continue
            begin, end = entry["data_offsets"]
            entries[name] = {**entry, "data_offsets": [place, place + end - begin]}
            ranges.append((data + begin, data + end))
            place += end - begin
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        new.write(struct.pack("<Q", len(text)) + text)
        for begin, end in ranges:
            _copy(old, new, begin, end)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}


def _copy(old: BinaryIO, new: BinaryIO, begin: int, end: int) -> None:
    old.seek(begin)
    while begin < end:
        part = old.read(min(_AT_ONCE, end - begin))
        if not part:
            raise ValueError(f"{old.name} is shorter than its header says; download it again")
        new.write(part)
        begin += len(part)
