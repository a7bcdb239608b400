"""The files of a source: found, checked, divided into shards and read in constant memory."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from .keys import Source

_JSON = re.compile(r"\.jsonl?(\.(gz|bz2|zst))?$")
_CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}
_METADATA = ("dataset_info.json", "dataset_infos.json")  # that lie beside the files of many data sets
_ROWS = 256  # rows of parquet that are in memory at a time, at most
_ROW_BYTES = 1 << 24  # their size
_CHECKED_AT_ONCE = 16  # files, as a check of a remote one mostly waits
_CHECKED_ROWS = 1000  # of a file of lines, among which each column must occur
_BUFFER = 1 << 20  # bytes
# Remote files are checked in blocks of 64 KB. Lines are read in blocks of 8 MB, parquet, whose columns lie in
# different places, in blocks of 2 MB; a process holds 32 MB of them.
_CHECKING: dict[str, Any] = {"block_size": 1 << 16, "cache_type": "readahead"}
_FETCHING: dict[str, Any] = {"block_size": 1 << 23, "cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
_FETCHING_COLUMNS = _FETCHING | {"block_size": 1 << 21, "cache_options": {"maxblocks": 16}}
# Errors of remote file systems that are no OSError, by the module that defines them.
_REMOTE_ERRORS = {"httpx": "HTTPError", "aiohttp": "ClientError", "botocore.exceptions": "BotoCoreError"}
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


def find_files(source: Source, skipped: str | Path | None = None) -> list[tuple[str, int]]:
    """Return the files of a source in the order of its paths and of their names, with their sizes in bytes.

    Of a folder they are those at any depth, without hidden ones, and without metadata of the data set.

    Args:
        source: the source.
        skipped: a folder on this machine that is left out of the folders around it.
    Raises:
        ValueError: if a path matches no file of a known type, or cannot be reached.
    """
    found: dict[str, int] = {}
    for path in source.paths:
        remote = "://" in path and not path.startswith(("file://", "local://"))
        try:
            system, root = fsspec.core.url_to_fs(path)
            local = isinstance(system, LocalFileSystem)
            inner = os.path.abspath(skipped) if local and skipped is not None else None
            is_glob = re.search(r"[*?\[]", root) and not (local and system.exists(root))
            roots = sorted(system.glob(root)) if is_glob else [root]
            names = [name for one in roots for name in _below(system, one, inner) if _is_data(name)]
            sizes = [int(system.size(name) or 0) for name in names]
        except _errors(ValueError, ImportError, NotImplementedError) as error:
            hint = _hint(path, error) if remote else ""
            raise ValueError(f"sources: {path} cannot be reached ({_one_line(error)}){hint}") from error
        if not names:
            on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
            hint = f"; for a data set of the Hub write hf://datasets/{path}/FOLDER/*.parquet" if on_hub else ""
            raise ValueError(
                f"sources ({source.name}): {path} holds no .parquet, .jsonl or .json file; check the path"
                f"{'' if remote else f', which is relative to {Path.cwd()}'}{hint}"
            )
        found |= zip([name if local else system.unstrip_protocol(name) for name in names], sizes, strict=True)
    return list(found.items())


def _hint(path: str, error: BaseException) -> str:
    """Return what to do about an error of a remote file system."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_name = isinstance(error, FileNotFoundError | ValueError | NotImplementedError)
    if path.startswith("hf://") and (is_name or status in (401, 403, 404)):
        return (
            "; check the name, as in hf://datasets/OWNER/NAME/FOLDER; if the data set is private or gated, ask for "
            "access on its page, then log in with `hf auth login` or set HF_TOKEN"
        )
    return "; check the address and the network, or download the files and name their folder"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return OSError, the error types of the remote file systems that are loaded, and `others`."""
    remote = [getattr(sys.modules[name], error) for name, error in _REMOTE_ERRORS.items() if name in sys.modules]
    return (OSError, *remote, *others)


def _below(system: Any, root: str, skipped: str | None) -> list[str]:
    """Return a file itself, the files of a folder in order, without those in `skipped`, or nothing if it is absent."""
    if not system.isdir(root):
        try:
            system.info(root)  # `exists` also returns False if the file system cannot be reached
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # on the Hub, that there is no such data set, or none for this user
                raise
            return []
        return [root]
    names = sorted(system.find(root))
    if skipped is not None and not Path(root).is_relative_to(skipped):
        names = [name for name in names if not Path(name).is_relative_to(skipped)]
    inside = [(name, name[len(root) :].strip("/").split("/")) for name in names]
    return [
        name
        for name, parts in inside
        if parts[-1] not in _METADATA and not any(part.startswith((".", "_")) for part in parts)
    ]


def _is_data(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith((".", "_")) and (base.endswith(".parquet") or bool(_JSON.search(base)))


def divide(source: Source, files: Sequence[tuple[str, int]], shard_bytes: float) -> list[tuple[Piece, ...]]:
    """Check the columns of the files and return the shards: pieces of about `shard_bytes` together.

    Files are checked in several threads; of several errors, that of the first file is raised.

    Raises:
        ValueError: if a file cannot be read or lacks a column, or the source has no document.
    """
    shard_bytes = max(1, round(shard_bytes))
    shards: list[tuple[Piece, ...]] = []
    shard: list[Piece] = []
    n_bytes = 0
    with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
        checked = pool.map(lambda file: _pieces(source, file[0], file[1], shard_bytes), files)
        for piece in chain.from_iterable(checked):
            last = shard[-1] if shard else None
            if last is not None and (last.path, last.stop) == (piece.path, piece.start):
                shard[-1] = Piece(last.path, last.n_bytes + piece.n_bytes, last.start, piece.stop)
            else:
                shard.append(piece)
            n_bytes += piece.n_bytes
            if n_bytes >= shard_bytes:
                shards.append(tuple(shard))
                shard, n_bytes = [], 0
    shards += [tuple(shard)] if shard else []
    if not shards:
        raise ValueError(f"sources ({source.name}): its files are empty: {', '.join(path for path, _ in files[:3])}")
    return shards


def _pieces(source: Source, path: str, size: int, shard_bytes: int) -> list[Piece]:
    """Check the columns of a file, and return it in pieces."""
    columns = [source.text_column, *source.filters.columns]
    with _reading(path), _open(path, _CHECKING) as (file, _):
        if path.endswith(".parquet"):
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(source, path, columns, table.schema_arrow.names)
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
            return [
                Piece(path, group.total_byte_size, index, index + 1)
                for index, group in enumerate(groups)
                if group.num_rows
            ]
        present: dict[str, None] = {}
        n_rows = 0
        for row, _ in islice(_json_rows(path, file, 0, None), _CHECKED_ROWS):
            present |= dict.fromkeys(row)
            n_rows += 1
            if present.keys() >= set(columns):
                break
        if not n_rows:
            return []
        _check_columns(source, path, columns, list(present))
    step = size if _codec(path) else shard_bytes
    return [Piece(path, min(step, size - start), start, min(start + step, size)) for start in range(0, size, step)]


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
    is_parquet = piece.path.endswith(".parquet")
    with _reading(piece.path), _open(piece.path, _FETCHING_COLUMNS if is_parquet else _FETCHING) as (file, stored):
        if not is_parquet:
            is_compressed = _codec(piece.path) is not None
            for row, position in _json_rows(piece.path, file, piece.start, None if is_compressed else piece.stop):
                done = stored.tell() if is_compressed else position - piece.start
                yield row, min(1.0, done / max(1, piece.stop - piece.start))
            return
        table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        groups = list(range(piece.start, piece.stop))
        metadata = table.metadata
        n_rows, n_read = sum(metadata.row_group(index).num_rows for index in groups), 0
        names = list(dict.fromkeys(columns))
        row_bytes = max(metadata.row_group(n).total_byte_size / max(1, metadata.row_group(n).num_rows) for n in groups)
        size = max(1, min(_ROWS, int(_ROW_BYTES / max(1, row_bytes))))
        for batch in table.iter_batches(batch_size=size, row_groups=groups, columns=names, use_threads=False):
            for row in batch.to_pylist():
                n_read += 1
                yield row, n_read / n_rows


def _json_rows(path: str, file: IO[bytes], start: int, stop: int | None) -> Iterator[tuple[Row, int]]:
    """Yield the objects of the lines that begin in [start, stop), and where they begin."""
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
                    f"sources: {path}: the line at byte {position} is not JSON ({error}); write one object per line, "
                    "or leave out a file that holds no documents by naming the others with a glob"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"sources: {path}: the line at byte {position} is no object; write one per line")
            yield row, position
        position += len(line)


def _codec(path: str) -> str | None:
    return _CODECS.get(path.rsplit(".", 1)[-1])


@contextmanager
def _open(path: str, fetching: dict[str, Any]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield the content of a file, decompressed, and the file as it is stored.

    Args:
        path: the file, or its URL.
        fetching: how much of a remote file is fetched at once.
    """
    system, name = fsspec.core.url_to_fs(path)
    codec, buffer = _codec(path), min(_BUFFER, fetching["block_size"])
    with system.open(name, "rb", **fetching) as file:
        cache = vars(file.cache) if isinstance(file, AbstractBufferedFile) else None
        try:
            if codec is not None:
                with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
                    yield io.BufferedReader(stream, buffer), file
            elif cache is not None and not path.endswith(".parquet"):
                yield io.BufferedReader(file, buffer), file  # `readline` of fsspec copies a block for each line
            else:
                yield file, file
        finally:
            if cache is not None:
                cache.clear()  # fsspec's cache is a reference cycle: free its blocks now, not at the next collection


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors of reading it."""
    try:
        yield
    except _errors(pyarrow.ArrowException) as error:
        hint = _hint(path, error) if "://" in path else ""
        raise ValueError(f"sources: {path} cannot be read ({_one_line(error)}){hint}") from error
