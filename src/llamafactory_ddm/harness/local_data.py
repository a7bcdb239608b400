"""Tasks of lm-evaluation-harness on local copies of their data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from ..utils.registry import did_you_mean


class LocalTaskManager(TaskManager):  # type: ignore[misc]
    """The harness's tasks, with folders in place of the data sets that `task_data` names."""

    def __init__(self, task_data: Mapping[str, str] | None, **options: Any) -> None:
        """Index the tasks.

        Args:
            task_data: folders by task, or by data set on the Hub; see `EvalKeys.task_data`.
            options: of the harness's task manager.
        """
        super().__init__(**options)
        self._factory = self._local = _LocalFactory(task_data or {})

    @property
    def last_data_set(self) -> str:
        """Return the name of the data set of the task that was loaded last."""
        return self._local.last_data_set

    def check_used(self) -> None:
        """Check that every folder of `task_data` took the place of a data set.

        Raises:
            ValueError: naming the first that did not, with the data sets of the loaded tasks.
        """
        for name in self._local.task_data:
            if name not in self._local.used:
                seen = sorted(self._local.seen)
                raise ValueError(
                    f"task_data: {name} is no task or data set of this evaluation, which has {', '.join(seen)}"
                    f"{did_you_mean(name, seen)}"
                )


class _LocalFactory(TaskFactory):  # type: ignore[misc]
    """Builds tasks whose data sets may be local folders."""

    def __init__(self, task_data: Mapping[str, str]) -> None:
        super().__init__()
        self.task_data = task_data
        self.used: set[str] = set()
        self.seen: set[str] = set()
        self.last_data_set = ""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the configuration of a task, as the harness reads it, with the local folder if there is one."""
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        names = [str(config[key]) for key in ("task", "dataset_path") if isinstance(config.get(key), str)]
        self.seen.update(names)
        self.last_data_set = names[-1] if names else ""
        for name in names:
            if name in self.task_data:
                self.used.add(name)
                return {**config, **local_data_set(Path(self.task_data[name]), config.get("dataset_name"))}
        return config


def local_data_set(folder: Path, name: str | None) -> dict[str, Any]:
    """Return the keys of a task that name a local data set.

    Args:
        folder: a snapshot of a data set from the Hub, whose README.md lists the configurations; or a folder with files
            of its splits, or with a subfolder of such files for each configuration.
        name: the configuration, or None.
    """
    if not (folder / "README.md").is_file():
        subfolder = folder / str(name)
        folder, name = (subfolder if subfolder.is_dir() else folder), None
    return {"dataset_path": str(folder.resolve()), "dataset_name": name, "dataset_kwargs": None}
