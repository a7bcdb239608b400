"""The files of a source: found, checked, divided into shards and read in constant memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from .keys import Source

_JSON = re.compile(r"\.jsonl?(\.(gz|bz2|zst))?$")
_CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}
_ROWS = 256  # rows that are in memory at a time
_BUFFER = 1 << 20  # bytes
Row = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
        path: the file, or its URL.
        n_bytes: size of the part, for the progress bar.
        start: first row group of parquet, first byte of uncompressed JSON lines, else 0.
        stop: the one after the last.
    """

    path: str
    n_bytes: int
    start: int
    stop: int


def find_files(source: Source) -> list[tuple[str, int]]:
    """Return the files of a source in the order of its paths and of their names, with their sizes in bytes.

    Raises:
        ValueError: if a path matches no file of a known type, or cannot be reached.
    """
    found: dict[str, int] = {}
    for path in source.paths:
        try:
            system, root = fsspec.core.url_to_fs(path)
            names = system.glob(root) if re.search(r"[*?\[]", root) else [root]
            names = [file for name in names for file in (system.find(name) if system.isdir(name) else [name])]
            names = [name for name in sorted(names) if _is_data(name) and system.exists(name)]
            sizes = [int(system.size(name) or 0) for name in names]
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"sources: {path} cannot be reached ({error})") from error
        if not names:
            on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
            hint = f"; for a data set of the Hub write hf://datasets/{path}/FOLDER/*.parquet" if on_hub else ""
            raise ValueError(
                f"sources ({source.name}): {path} holds no .parquet, .jsonl or .json file; check the path, which is "
                f"relative to {Path.cwd()}{hint}"
            )
        local = isinstance(system, LocalFileSystem)
        found |= zip([name if local else system.unstrip_protocol(name) for name in names], sizes, strict=True)
    return list(found.items())


def _is_data(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith((".", "_")) and (base.endswith(".parquet") or bool(_JSON.search(base)))


def divide(source: Source, files: Sequence[tuple[str, int]], shard_bytes: float) -> list[tuple[Piece, ...]]:
    """Check the columns of the files and return the shards: pieces of about `shard_bytes` together.

    Raises:
        ValueError: if a file cannot be read or lacks a column, or the source has no document.
    """
    shard_bytes = max(1, round(shard_bytes))
    shards: list[tuple[Piece, ...]] = []
    shard: list[Piece] = []
    for path, size in files:
        for piece in _pieces(source, path, size, shard_bytes):
            last = shard[-1] if shard else None
            if last is not None and (last.path, last.stop) == (path, piece.start):
                shard[-1] = Piece(path, last.n_bytes + piece.n_bytes, last.start, piece.stop)
            else:
                shard.append(piece)
            if sum(one.n_bytes for one in shard) >= shard_bytes:
                shards.append(tuple(shard))
                shard = []
    shards += [tuple(shard)] if shard else []
    if not shards:
        raise ValueError(f"sources ({source.name}): its files are empty: {', '.join(path for path, _ in files[:3])}")
    return shards


def _pieces(source: Source, path: str, size: int, shard_bytes: int) -> Iterator[Piece]:
    columns = [source.text_column, *source.filters.columns]
    with _reading(path), _open(path) as file:
        if path.endswith(".parquet"):
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(source, path, columns, table.schema_arrow.names)
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
            for index, group in enumerate(groups):
                if group.num_rows:
                    yield Piece(path, group.total_byte_size, index, index + 1)
            return
        first = next(_json_rows(path, file, 0, None), None)
        if first is None:
            return
        _check_columns(source, path, columns, list(first[0]))
    step = size if _codec(path) else shard_bytes
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield Piece(path, stop - start, start, stop)


def _check_columns(source: Source, path: str, needed: Sequence[str], present: Sequence[str]) -> None:
    for column in needed:
        if column not in present:
            key = "text_column" if column == source.text_column else "filters"
            raise ValueError(
                f"{key}: {path} (source {source.name}) has no column {column!r}; it has "
                f"{', '.join(map(repr, present))}"
            )


def read_rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[Row, float]]:
    """Yield the rows of a piece, and how much of the piece has been read, from 0 to 1.

    Raises:
        ValueError: if the file cannot be read, naming it.
    """
    with _reading(piece.path), _open(piece.path) as file:
        if not piece.path.endswith(".parquet"):
            yield from _json_rows(piece.path, file, piece.start, None if _codec(piece.path) else piece.stop)
            return
        table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
        groups = list(range(piece.start, piece.stop))
        n_rows, n_read = sum(table.metadata.row_group(index).num_rows for index in groups), 0
        names = list(dict.fromkeys(columns))
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=names, use_threads=False):
            for row in batch.to_pylist():
                n_read += 1
                yield row, n_read / n_rows


def _json_rows(path: str, file: IO[bytes], start: int, stop: int | None) -> Iterator[tuple[Row, float]]:
    """Yield the objects of the lines that begin in [start, stop)."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1
    while stop is None or position < stop:
        line = file.readline()
        if not line:
            return
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"sources: {path}: the line at byte {position} is not JSON ({error}); write one object per line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"sources: {path}: the line at byte {position} is no object; write one per line")
            yield row, 0.0 if stop is None else min(1.0, (position - start) / max(1, stop - start))
        position += len(line)


def _codec(path: str) -> str | None:
    return _CODECS.get(path.rsplit(".", 1)[-1])


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    with fsspec.open(path, "rb") as file:
        codec = _codec(path)
        if codec is None:
            yield file
        else:
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
                yield io.BufferedReader(stream, _BUFFER)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors of reading it."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, ValueError) and str(error).startswith("sources"):
            raise
        raise ValueError(f"sources: {path} cannot be read ({' '.join(str(error).split())})") from error
