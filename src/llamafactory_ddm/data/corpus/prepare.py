"""`prepare-data` from sources to a folder that `tokenized_path` reads; a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.files import replacing
from .blocks import write_json, write_split
from .duplicates import find_duplicates
from .encoder import Encoder
from .files import divide, find_files
from .keys import PrepareKeys, Source
from .mixture import count_rows, file_name, mix_file, mixed_files
from .pool import run_jobs
from .shards import Shard, hash_shard, tokenise_shard

WORK = "unfinished"  # folder that is there until the blocks are complete
REPORT = "prepare_data.json"
_PLAN = "plan.json"
# Keys that may differ between a run that was killed and the one that goes on.
_FREE = ("preprocessing_num_workers", "tokenized_path")


def is_unfinished(folder: str | Path) -> bool:
    """Tell whether a run of `prepare-data` was killed before the blocks in `folder` were complete."""
    return (Path(folder) / WORK).is_dir()


@dataclass(frozen=True)
class Preparation:
    """A run of `prepare-data`.

    Attributes:
        keys: its keys.
        encoder: the tokenizer.
        shards: of all sources, in order.
        settings: what the blocks depend on.
    """

    keys: PrepareKeys
    encoder: Encoder
    shards: list[Shard]
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the blocks go."""
        return Path(str(self.keys.tokenized_path))

    @property
    def work(self) -> Path:
        """Where everything else goes until the blocks are complete."""
        return self.folder / WORK


def plan(keys: PrepareKeys, encoder: Encoder) -> Preparation:
    """Find the files and divide them into shards.

    Raises:
        ValueError: if a source is empty or lacks a column, or the folder holds something else.
    """
    folder, mixes = Path(str(keys.tokenized_path)), keys.mix_strategy != "concat"
    cut: list[tuple[Source, Any]] = []
    files: dict[str, list[tuple[str, int]]] = {}
    for source in keys.all_sources():
        files[source.name] = find_files(source, folder)
        cut += [(source, pieces) for pieces in divide(source, files[source.name], keys.shard_size * 1e6)]
    shards = []
    for index, (source, pieces) in enumerate(cut):
        name = file_name(index, len(cut))
        outputs = {"train": folder / WORK / "parts" / name if mixes else folder / "train" / name}
        if keys.val_size:
            outputs["validation"] = folder / "validation" / name
        marker, hashes = folder / WORK / f"{index:05d}.json", folder / WORK / "hashes" / f"{index:05d}.npy"
        shards.append(Shard(source, pieces, outputs, marker, hashes, None, keys.cutoff_len, keys.val_size))
    settings = {name: value for name, value in vars(keys).items() if name not in _FREE}
    settings |= {"tokenizer": encoder.digest(), "files": files}
    return Preparation(keys, encoder, shards, json.loads(json.dumps(settings)))


def begin(preparation: Preparation) -> dict[str, Any] | None:
    """Check what the folder holds, and make the working folder; return the report if the blocks are complete.

    Raises:
        ValueError: if the folder holds something else, or was begun with other settings.
    """
    folder, file = preparation.folder, preparation.folder / REPORT
    unfinished = preparation.work / _PLAN
    if unfinished.is_file():
        _check_same(preparation, _stored(unfinished))
    elif file.is_file() and not preparation.work.is_dir():
        report = _stored(file)
        if not isinstance(report.get("settings"), dict):
            raise ValueError(f"tokenized_path: {file} is not of prepare-data; name a new folder, or empty this one")
        _check_same(preparation, report["settings"])
        missing = next((path for path in _block_files(preparation) if not path.is_file()), None)
        if missing is not None:
            raise ValueError(
                f"tokenized_path: {folder} was complete, but {missing} is gone; remove the folder to prepare it "
                "again, or name another one"
            )
        return report
    elif folder.is_dir() and {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {WORK}:
        raise ValueError(
            f"tokenized_path: {folder} holds files that are not of prepare-data; name a new folder, or empty this one"
        )
    preparation.work.mkdir(parents=True, exist_ok=True)
    write_json(unfinished, preparation.settings)
    return None


def _stored(file: Path) -> dict[str, Any]:
    """Return the content of a file that an earlier run has written.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"tokenized_path: {file} is damaged ({error}); remove its folder, or name a new one"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"tokenized_path: {file} is not of prepare-data; remove its folder, or name a new one")
    return found


def _block_files(preparation: Preparation) -> list[Path]:
    """Return the files of a complete folder, as `write_split` has listed them."""
    folder, found = preparation.folder, []
    for split in _splits(preparation):
        state = _stored(folder / split / "state.json")
        found += [folder / split / entry["filename"] for entry in state["_data_files"]]
    return found


def _splits(preparation: Preparation) -> list[str]:
    return ["train", *(["validation"] if preparation.keys.val_size else [])]


def _check_same(preparation: Preparation, stored: dict[str, Any]) -> None:
    for name, value in preparation.settings.items():
        if stored.get(name) == value:
            continue
        folder = preparation.folder
        if name == "tokenizer":
            raise ValueError(
                f"tokenized_path: {folder} was begun with another tokenizer than that of model_name_or_path (or other "
                "special tokens); name the model of that run, or another folder"
            )
        if name == "files":
            raise ValueError(
                f"sources: the files have changed since tokenized_path: {folder} was begun; restore them, or name "
                "another folder"
            )
        raise ValueError(
            f"tokenized_path: {folder} was begun with {name}: {stored.get(name)}, but {name} is {value}; set it as in "
            "that run, or name another folder"
        )


def make_blocks(preparation: Preparation) -> None:
    """Write all blocks that are not there yet.

    Raises:
        ValueError: if a document cannot be read, or a split gets no block.
    """
    shards = preparation.shards
    if preparation.keys.deduplicate:
        shards = _with_duplicates(preparation)
    todo = [shard for shard in shards if not shard.marker.is_file()]
    _run(preparation, tokenise_shard, todo, sum(shard.n_bytes for shard in todo), "tokenising")
    _check_blocks(preparation)
    if preparation.keys.mix_strategy != "concat":
        _mix(preparation)


def _run(preparation: Preparation, work: Callable[[Any, Any], None], jobs: Any, total: int, title: str) -> None:
    run_jobs(work, jobs, preparation.encoder, preparation.keys.preprocessing_num_workers, total, title)


def _with_duplicates(preparation: Preparation) -> list[Shard]:
    todo = [shard for shard in preparation.shards if not shard.hashes.is_file()]
    _run(preparation, hash_shard, todo, sum(shard.n_bytes for shard in todo), "hashing")
    files = find_duplicates([shard.hashes for shard in preparation.shards])
    return [replace(shard, duplicates=file) for shard, file in zip(preparation.shards, files, strict=True)]


def _marker(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _check_blocks(preparation: Preparation) -> None:
    keys = preparation.keys
    counts: Counter[tuple[str, str]] = Counter()
    for shard in preparation.shards:
        for split, n_blocks in _marker(shard.marker)["blocks"].items():
            counts[shard.source.name, split] += n_blocks
    for source in keys.all_sources():
        if not counts[source.name, "train"]:
            raise ValueError(
                f"sources ({source.name}): no document is kept, or all together are shorter than a block of "
                f"cutoff_len: {keys.cutoff_len} tokens; check text_column, filters, min_length and max_length, or "
                "lower cutoff_len"
            )
    if keys.val_size and not sum(n_blocks for (_, split), n_blocks in counts.items() if split == "validation"):
        raise ValueError(
            f"val_size: {keys.val_size}: the documents for validation do not fill a block of cutoff_len: "
            f"{keys.cutoff_len} tokens; raise val_size"
        )


def _parts(preparation: Preparation) -> list[list[tuple[Path, int]]]:
    """Return the files of each source, with their numbers of blocks."""
    parts: dict[str, list[tuple[Path, int]]] = {source.name: [] for source in preparation.keys.all_sources()}
    for shard in preparation.shards:
        parts[shard.source.name].append((shard.outputs["train"], int(_marker(shard.marker)["blocks"]["train"])))
    return list(parts.values())


def _file_rows(preparation: Preparation) -> int:
    width = preparation.keys.cutoff_len * np.dtype(preparation.encoder.dtype).itemsize
    return max(1, round(preparation.keys.shard_size * 1e6 / width))


def _mix(preparation: Preparation) -> None:
    keys, parts = preparation.keys, _parts(preparation)
    probabilities, repeats = keys.probabilities() or [], keys.mix_strategy == "interleave_over"
    jobs = mixed_files(
        preparation.folder / "train",
        preparation.work,
        parts,
        probabilities,
        keys.seed,
        repeats=repeats,
        length=keys.cutoff_len,
        file_rows=_file_rows(preparation),
    )
    n_rows = count_rows(
        [sum(n_blocks for _, n_blocks in files) for files in parts], probabilities, keys.seed, repeats=repeats
    )
    total = n_rows * keys.cutoff_len * np.dtype(preparation.encoder.dtype).itemsize
    _run(preparation, mix_file, (job for job in jobs if not job.marker.is_file()), total, "mixing")


def _split_files(preparation: Preparation, split: str) -> list[str]:
    """Return the names of the files of a split that hold blocks, in order."""
    if split == "train" and preparation.keys.mix_strategy != "concat":
        return sorted(path.name for path in (preparation.folder / "train").glob("data-*.arrow"))
    return [shard.outputs[split].name for shard in preparation.shards if _marker(shard.marker)["blocks"].get(split, 0)]


def write_metadata(preparation: Preparation) -> None:
    """Write what `datasets` needs to read the blocks."""
    splits = _splits(preparation)
    for split in splits:
        files = _split_files(preparation, split)
        digest = hashlib.sha256(json.dumps([preparation.settings, split]).encode()).hexdigest()[:16]
        write_split(preparation.folder / split, files, preparation.encoder.dtype, digest)
    write_json(preparation.folder / "dataset_dict.json", {"splits": splits})


def finish(preparation: Preparation) -> dict[str, Any]:
    """Write the report, remove the working folder, and return the report."""
    report = {"settings": preparation.settings, "sources": _counts(preparation), "train": _train_counts(preparation)}
    with replacing(preparation.folder / REPORT) as file:
        json.dump(report, file, indent=2, ensure_ascii=False)
    doomed = preparation.work.with_name(f".{WORK}")
    shutil.rmtree(doomed, ignore_errors=True)
    preparation.work.rename(doomed)  # at once, so that a kill leaves the folder finished
    shutil.rmtree(doomed, ignore_errors=True)
    return report


def _counts(preparation: Preparation) -> dict[str, dict[str, Any]]:
    """Return what became of the documents of each source."""
    sources: dict[str, dict[str, Any]] = {}
    for shard in preparation.shards:
        marker = _marker(shard.marker)
        into = sources.setdefault(
            shard.source.name,
            {"documents": 0, "kept": 0, "dropped": {}, "tokens": 0, "tokens_dropped": 0, "blocks": {}},
        )
        for name in ("documents", "kept", "tokens", "tokens_dropped"):
            into[name] += marker.get(name, 0)
        for name in ("dropped", "blocks"):
            into[name] = dict(Counter(into[name]) + Counter(marker[name]))
    return sources


def _train_counts(preparation: Preparation) -> dict[str, int]:
    """Return the number of blocks of each source in the training split."""
    names: Sequence[str] = [source.name for source in preparation.keys.all_sources()]
    if preparation.keys.mix_strategy == "concat":
        counts = [sum(n_blocks for _, n_blocks in files) for files in _parts(preparation)]
    else:
        markers = [_marker(path)["blocks"] for path in sorted(preparation.work.glob("mixed-*.json"))]
        counts = [sum(column) for column in zip(*markers, strict=True)]
    return dict(zip(names, counts, strict=True))
