"""Packs ids into blocks and writes them as Arrow files that `datasets` reads memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow

from ...utils.files import replacing
from .encoder import Ids

_BATCH = 1 << 20  # ids of a record batch, at least one block


class BlockWriter:
    """Concatenates ids, and writes each full block; what is left at the end is dropped.

    Attributes:
        n_blocks: blocks so far.
        n_left: ids that do not fill a block yet.
    """

    def __init__(self, file: IO[bytes], length: int, dtype: npt.DTypeLike, bos_id: int | None = None) -> None:
        """Write to an open file.

        Args:
            file: the destination.
            length: ids of a block.
            dtype: their type.
            bos_id: replaces the first id of each block; None leaves it.
        """
        self.length, self.bos_id = length, bos_id
        self.n_blocks, self.n_left = 0, 0
        self._batch = max(1, _BATCH // length) * length
        self._left: list[Ids] = []
        self._schema = block_schema(dtype)
        self._writer = pyarrow.ipc.new_stream(file, self._schema)

    def add(self, ids: Ids) -> None:
        """Append ids."""
        self._left.append(ids)
        self.n_left += len(ids)
        if self.n_left >= self._batch:
            self._flush()

    def close(self) -> None:
        """Write the last blocks."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self.n_left < self.length:
            return
        ids = np.concatenate(self._left)
        n_used = len(ids) // self.length * self.length
        self._left, self.n_left = [ids[n_used:]], len(ids) - n_used
        blocks = np.ascontiguousarray(ids[:n_used].reshape(-1, self.length))
        if self.bos_id is not None:
            blocks[:, 0] = self.bos_id
        for start in range(0, len(blocks), self._batch // self.length):
            self.write_blocks(blocks[start : start + self._batch // self.length])

    def write_blocks(self, blocks: Ids) -> None:
        """Write whole blocks.

        Args:
            blocks: [n, length].
        """
        offsets = np.arange(len(blocks) + 1, dtype=np.int32) * self.length
        column = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(blocks.reshape(-1)))
        self._writer.write_batch(pyarrow.record_batch([column], schema=self._schema))
        self.n_blocks += len(blocks)


def block_schema(dtype: npt.DTypeLike) -> pyarrow.Schema:
    """Return the schema of a file of blocks: `input_ids`, a list of integers, with the metadata of `datasets`."""
    name = np.dtype(dtype).name
    feature = {"feature": {"dtype": name, "_type": "Value"}, "_type": "Sequence"}
    metadata = json.dumps({"info": {"features": {"input_ids": feature}}})
    field = pyarrow.field("input_ids", pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(dtype))))
    return pyarrow.schema([field], {"huggingface": metadata})


@contextmanager
def writing(path: Path, length: int, dtype: npt.DTypeLike, bos_id: int | None = None) -> Iterator[BlockWriter]:
    """Yield a writer of a file that appears when it is complete."""
    with replacing(path, "wb") as file:
        writer = BlockWriter(file, length, dtype, bos_id)
        yield writer
        writer.close()


class BlockFiles:
    """Blocks in several memory-mapped files, as one sequence."""

    def __init__(self, files: Sequence[tuple[Path, int]], length: int) -> None:
        """Open no file yet.

        Args:
            files: the files, and the number of blocks in each.
            length: ids of a block.
        """
        self.files, self.length = [file for file in files if file[1]], length
        self.ends = np.cumsum([n_blocks for _, n_blocks in self.files])

    def read(self, start: int, stop: int) -> Ids:
        """Return the blocks [start, stop) as one array [stop - start, length]."""
        parts = []
        while start < stop:
            index = int(np.searchsorted(self.ends, start, side="right"))
            path, n_blocks = self.files[index]
            first = start - (int(self.ends[index]) - n_blocks)
            count = min(stop - start, n_blocks - first)
            parts.append(self._read_file(path, first, count))
            start += count
        return np.concatenate(parts)

    def _read_file(self, path: Path, first: int, count: int) -> Ids:
        with pyarrow.memory_map(str(path)) as source:
            column = pyarrow.ipc.open_stream(source).read_all().column("input_ids").slice(first, count)
            chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
            return np.concatenate(chunks).reshape(count, self.length)


def write_split(folder: Path, files: Sequence[str], dtype: npt.DTypeLike, digest: str) -> None:
    """Write what `datasets.load_from_disk` reads beside the files of a split.

    Args:
        folder: of the split; its name is that of the split.
        files: names of the files, in order.
        dtype: type of the ids.
        digest: identifies the rows.
    """
    feature = {"feature": {"dtype": np.dtype(dtype).name, "_type": "Value"}, "_type": "Sequence"}
    info: dict[str, Any] = {"features": {"input_ids": feature}, "citation": "", "description": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": digest,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    for name, content in (("dataset_info.json", info), ("state.json", state)):
        write_json(folder / name, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file as a whole."""
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
