"""Tasks of lm-evaluation-harness on local copies of their data sets."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ..utils.registry import did_you_mean

# Suffix of a file -> the loader of `datasets` that reads it.
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def check_task_data(task_data: object) -> None:
    """Check that `task_data` is None, a folder, or a mapping of names to folders.

    Raises:
        ValueError: naming the value that is not.
    """
    if task_data is None:
        return
    if isinstance(task_data, Mapping):
        named = {f"task_data: {name}": path for name, path in task_data.items()}
    else:
        named = {"task_data": task_data}
    for name, path in named.items():
        if not isinstance(path, str) or not Path(path).is_dir():
            raise ValueError(f"{name}: {path} is not a folder; name a folder of data sets, or {{DATA_SET: FOLDER}}")


class LocalTaskManager(TaskManager):  # type: ignore[misc]
    """The harness's tasks, with local copies of the data sets that `task_data` names."""

    def __init__(self, task_data: str | Mapping[str, str] | None, **options: Any) -> None:
        """Index the tasks.

        Args:
            task_data: see `EvalKeys.task_data`.
            options: of the harness's task manager.
        """
        super().__init__(**options)
        self._factory = self._local = _LocalFactory(task_data)

    def is_complete(self, name: str) -> bool:
        """Tell whether a task, or a group with all its members, is in the index."""
        entry = self.task_index.get(name)
        if entry is None or entry.kind == Kind.TAG:
            return False
        if entry.kind != Kind.GROUP:
            return True
        members = load_yaml(entry.yaml_path, resolve_func=False)["task"] if entry.yaml_path else [{}]
        return all(isinstance(member, str) and self.is_complete(member) for member in members)

    @property
    def last_data_set(self) -> str:
        """Return the name by which `task_data` can name the data of the task that was loaded last."""
        return self._local.last_data_set

    def check_used(self) -> None:
        """Check that a folder has one of the data sets which were loaded, and that a mapping names no other.

        Raises:
            ValueError: naming the folder, or the first name, with the tasks and data sets that were loaded.
        """
        seen, given = sorted(self._local.seen), self._local.task_data
        if isinstance(given, str) and not self._local.has_found:
            raise ValueError(
                f"task_data: {given} has no folder of a task or data set of this evaluation, which has "
                f"{', '.join(seen)}; name the folder that holds one, such as FOLDER of FOLDER/openai/gsm8k"
            )
        for name in given if isinstance(given, Mapping) else ():
            if name not in seen:
                raise ValueError(
                    f"task_data: {name} is no task or data set of this evaluation, which has {', '.join(seen)}"
                    f"{did_you_mean(name, seen)}"
                )


def task_manager(
    names: Sequence[str], task_dir: str | None, task_data: str | Mapping[str, str] | None
) -> LocalTaskManager:
    """Return a task manager that has these tasks.

    To index all tasks of the harness takes many seconds, so only the folders that define these are, if that suffices.
    """
    own = [] if task_dir is None else [task_dir]
    for folders in ([], _harness_folders(names)):
        manager = LocalTaskManager(task_data, include_path=[*folders, *own], include_defaults=False)
        if all(manager.is_complete(name) for name in names):
            return manager
    return LocalTaskManager(task_data, include_path=task_dir)


def _harness_folders(names: Iterable[str]) -> list[str]:
    """Return the folders of the harness that define tasks or groups of these names."""
    either = "|".join(map(re.escape, names)).encode()
    defines = re.compile(rb"^(?:task|group):\s*[\"']?(?:" + either + rb")[\"']?\s*$", re.MULTILINE)
    root = Path(lm_eval.tasks.__file__).parent
    return sorted({str(path.parent) for path in root.rglob("*.yaml") if defines.search(path.read_bytes())})


class _LocalFactory(TaskFactory):  # type: ignore[misc]
    """Builds tasks whose data sets may be local."""

    def __init__(self, task_data: str | Mapping[str, str] | None) -> None:
        super().__init__()
        self.task_data = task_data
        self.seen: set[str] = set()
        self.last_data_set = ""
        self.has_found = False

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the configuration of a task as the harness reads it, with its local data set if there is one."""
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        names = [config[key] for key in ("task", "dataset_path") if isinstance(config.get(key), str)]
        self.seen.update(names)
        self.last_data_set = next((name for name in names[::-1] if name not in _LOADERS.values()), "")
        folder = self._folder(names)
        self.has_found |= folder is not None
        return config if folder is None else {**config, **local_data_set(folder, config.get("dataset_name"))}

    def _folder(self, names: Sequence[str]) -> Path | None:
        """Return the folder of the first name that has one."""
        if isinstance(self.task_data, Mapping):
            return next((Path(self.task_data[name]) for name in names if name in self.task_data), None)
        root = None if self.task_data is None else Path(self.task_data)
        return next((root / name for name in names if (root / name).is_dir()), None) if root is not None else None


def local_data_set(folder: Path, name: str | None) -> dict[str, Any]:
    """Return the keys of a task that name a local data set.

    Args:
        folder: a snapshot of a data set from the Hub, which has a README.md that lists the configurations, or no files
            of splits at its top; or a folder with files of its splits, or a subfolder of such files for each
            configuration.
        name: the configuration, or None.
    Raises:
        FileNotFoundError: if there is no file of a split.
        ValueError: if the files have several formats.
    """
    card = folder / "README.md"
    own = folder / name if name is not None and (folder / name).is_dir() else folder
    paths = sorted(path for path in own.iterdir() if path.suffix in _LOADERS)
    if card.is_file() and (not paths or re.search("^configs:", card.read_text(encoding="utf-8"), re.MULTILINE)):
        return {"dataset_path": str(folder.resolve()), "dataset_name": name, "dataset_kwargs": None}
    files = defaultdict(list)
    for path in paths:
        files[path.stem.partition("-")[0]].append(str(path.resolve()))  # test-00000-of-00002.parquet
    if not files:
        raise FileNotFoundError(f"{own} has no file of a split, such as test.jsonl; allowed are {', '.join(_LOADERS)}")
    loaders = {_LOADERS[path.suffix] for path in paths}
    if len(loaders) > 1:
        raise ValueError(f"{own} has files of several formats ({', '.join(sorted(loaders))}); keep those of one")
    return {"dataset_path": loaders.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": dict(files)}}
