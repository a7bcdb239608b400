"""An evaluation from its keys: the run, its record and its table."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import tqdm
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError, UndefinedError
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.utils import handle_non_serializable, make_table
from torch.utils import collect_env

from ..checkpoints.kind import model_or_adapter
from ..utils.files import replacing
from ..utils.plugins import load_plugins
from ..utils.registry import did_you_mean
from .infilling import check_no_template, take_infill
from .keys import EvalKeys
from .local_data import LocalTaskManager, task_manager
from .model import DiffusionLM, read_generation_keys

_PACKAGES = ("llamafactory-ddm", "llamafactory", "lm_eval", "transformers", "torch")


def evaluate(keys: EvalKeys, sampling: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the harness's results with the record of the run; None on all processes but the first.

    Raises:
        ValueError: if a task or the model cannot be loaded, or a task does not fit the keys.
    """
    load_plugins(keys.plugins)
    tasks = load_tasks(
        keys.tasks,
        folder=keys.task_dir,
        data=keys.task_data,
        template=keys.template,
        run_generated_code=keys.run_generated_code,
    )
    return run_tasks(tasks, load_model(keys, sampling), keys)


def load_model(keys: EvalKeys, sampling: Mapping[str, Any]) -> DiffusionLM:
    """Return the diffusion model that the keys name.

    Raises:
        ValueError: if it cannot be loaded, or a value is not allowed.
    """
    return DiffusionLM(
        model_or_adapter(keys.model_name_or_path, keys.adapter_name_or_path),
        dtype=keys.infer_dtype,
        batch_size=keys.batch_size,
        scoring=keys.scoring,
        likelihood_samples=keys.likelihood_samples,
        max_new_tokens=keys.max_new_tokens,
        template=keys.template,
        plugins=keys.plugins,
        results_folder=keys.save_dir,
        **sampling,
    )


def run_tasks(tasks: TaskSet, model: Any, keys: EvalKeys) -> dict[str, Any] | None:
    """Return the harness's results with the record of the run; None on all processes but the first.

    Args:
        tasks: from `load_tasks`.
        model: a model of the harness.
        keys: of the evaluation.
    Raises:
        ValueError: if a task does not fit the model or its documents.
    """
    results = tasks.run(model, n_shot=keys.n_shot, max_samples=keys.max_samples)
    if results is None:
        return None
    results["versions_of_packages"] = {name: metadata.version(name) for name in _PACKAGES}
    results["machine"] = {"device": str(model.device), "platform": platform.platform()}
    return results


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are loaded and checked, to be run on a model as often as needed.

    Attributes:
        names: the names of the tasks, groups and tags that were asked for.
        items: the harness's tasks and groups.
        manager: the harness's.
        key: the user's key that named them, for messages.
        runs_code: whether tasks may run code that the model wrote.
    """

    names: list[str]
    items: list[Any]
    manager: LocalTaskManager
    key: str
    runs_code: bool

    def run(
        self,
        model: Any,
        *,
        n_shot: int | None = None,
        max_samples: int | None = None,
        hide_progress: bool = False,
    ) -> dict[str, Any] | None:
        """Return the harness's results; None on all processes but the first.

        It sets the seeds of Python, NumPy and torch.

        Args:
            model: a model of the harness.
            n_shot: examples in each prompt; None for the task's number.
            max_samples: documents of each task, from the first; None for all.
            hide_progress: whether the harness shows no progress bars.
        Raises:
            ValueError: if a task does not fit the model or its documents.
        """
        try:
            with _patched_harness(hide_progress):
                results = lm_eval.simple_evaluate(
                    model=model,
                    tasks=self.items,
                    num_fewshot=n_shot,
                    limit=max_samples,
                    batch_size=model.batch_size,
                    task_manager=self.manager,
                    confirm_run_unsafe_code=self.runs_code,
                    bootstrap_iters=1000,
                )
        except (TemplateError, UndefinedError) as error:
            raise ValueError(
                f"{self.key}: {', '.join(self.names)}: a Jinja expression (doc_to_text, doc_to_target, doc_to_choice) "
                f"fails on the documents ({error}); correct the task's YAML"
            ) from error
        if results is None:
            return None
        for name, task in self.single().items():
            if not any("," in column for column in results["results"].get(name, {})):
                raise ValueError(
                    f"{self.key}: {name}: none of its metrics ({', '.join(task.aggregation())}) is computed for "
                    f"output_type: {task.OUTPUT_TYPE}; correct metric_list in the task's YAML"
                )
        return dict(results)

    def single(self) -> dict[str, Any]:
        """Return the tasks by name, those of groups included."""
        found: dict[str, Any] = {}
        for item in self.items:
            tasks = item.get_all_tasks() if isinstance(item, Group) else [item]
            found.update({task.task_name: task for task in tasks})
        return found

    def groups(self) -> dict[str, Group]:
        """Return the groups by name, those within groups included."""
        groups = [group for item in self.items if isinstance(item, Group) for group in (item, *item.get_all_groups())]
        return {group.name: group for group in groups}

    def reported(self) -> dict[str, Any]:
        """Return what has metrics of its own, by name: tasks, and groups in place of the tasks that they average."""
        found: dict[str, Any] = {}
        for item in self.items:
            if not isinstance(item, Group):
                found[item.task_name] = item
            elif item.has_aggregation:
                found[item.name] = item
            else:
                found.update({task.task_name: task for task in item.get_all_tasks()})
        return found

    def metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of `results` by TASK_METRIC, their errors over documents by TASK_METRIC_stderr.

        Where a task has several filters, the filter's name follows that of the metric.
        """
        found: dict[str, float] = {}
        for name in self.reported():
            row = results["results"][name]
            filters = {key.partition(",")[2] for key in row if "," in key}
            for key, value in row.items():
                metric, comma, filter_name = key.partition(",")
                if comma and isinstance(value, int | float):
                    is_error = metric.endswith("_stderr")
                    full = _metric_name(name, metric.removesuffix("_stderr"), filter_name, len(filters))
                    found[f"{full}_stderr" if is_error else full] = float(value)
        return found

    def higher_is_better(self) -> dict[str, bool | None]:
        """Return for each metric, by the name that `metrics` gives it, whether a higher value is better, if known."""
        found: dict[str, bool | None] = {}
        for name, item in self.reported().items():
            tasks = item.get_all_tasks() if isinstance(item, Group) else [item]
            filters = list(dict.fromkeys(each.name for task in tasks for each in task._filters))
            directions = {metric: value for task in tasks for metric, value in task.higher_is_better().items()}
            metrics = [metric for task in tasks for metric in task.aggregation()]
            if isinstance(item, Group):
                metrics = [metric.metric for metric in item.aggregate_metric_list or ()]
            for metric in metrics:
                for filter_name in filters:
                    found[_metric_name(name, metric, filter_name, len(filters))] = directions.get(metric)
        return found


@contextmanager
def _patched_harness(hide_progress: bool) -> Iterator[None]:
    """Within this context the harness describes the machine once a process, as it takes seconds, and hides bars."""
    patches: list[tuple[Any, str, Any]] = [
        (collect_env, "get_pretty_env_info", _called_once(collect_env.get_pretty_env_info))
    ]
    if hide_progress:
        hidden = functools.partial(tqdm.tqdm, disable=True)
        patches += [(lm_eval.api.task, "tqdm", hidden), (tqdm, "tqdm", hidden)]
    before = [(place, name, getattr(place, name)) for place, name, _ in patches]
    try:
        for place, name, value in patches:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@functools.cache
def _called_once(function: Callable[[], str]) -> Callable[[], str]:
    return functools.cache(function)


def _metric_name(task: str, metric: str, filter_name: str, n_filters: int) -> str:
    return f"{task}_{metric}_{filter_name}" if n_filters > 1 else f"{task}_{metric}"


def load_tasks(
    patterns: Sequence[str],
    *,
    folder: str | None,
    data: str | Mapping[str, str] | None = None,
    template: str | None = None,
    run_generated_code: bool,
    key: str = "task",
) -> TaskSet:
    """Load and check tasks, which needs no model.

    Args:
        patterns: names of tasks, groups and tags, with wildcards.
        folder: folder of the user's own tasks, or None.
        data: local copies of data sets; see `EvalKeys.task_data`.
        template: name of the template that prompts are put into, or None.
        run_generated_code: whether tasks may run code that the model wrote.
        key: the user's key that names the tasks.
    Raises:
        ValueError: for an unknown task, with the nearest one, or a task that cannot be read or is not allowed.
    """
    if run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    manager = task_manager(patterns, folder, data)
    names: list[str] = []
    for pattern in patterns:
        matches = manager.match_tasks([pattern])
        if not matches:
            raise ValueError(f"{key}: {pattern} does not exist{did_you_mean(pattern, manager.all_tasks)}")
        names += [name for name in matches if name not in names]
    items: list[Any] = []
    for name in names:
        items += _load_task(name, manager, template=template, run_generated_code=run_generated_code, key=key)
    manager.check_used()
    try:
        manager.load(items)
    except ValueError as error:  # a task by itself and within a group
        raise ValueError(f"{key}: {', '.join(names)}: {_first_line(error)}; name it once") from error
    return TaskSet(names, items, manager, key, run_generated_code)


def _load_task(
    name: str, manager: LocalTaskManager, *, template: str | None, run_generated_code: bool, key: str
) -> list[Any]:
    """Load and check a task; returns the harness's objects: a task, a group, or the tasks of a tag.

    Raises:
        ValueError: if its data or code cannot be read, or it needs what the keys do not allow.
    """
    try:
        loaded = manager.load([name])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: {name} needs the Python module {error.name}: install the package that has it"
        ) from error
    except (OSError, DatasetGenerationError) as error:
        cure = f"name a local copy: task_data={{{manager.last_data_set}: FOLDER}}"
        if key != "task":
            cure = f"copy the task's YAML into {key[:-1]}_dir, with data_files that name a local copy"
        raise ValueError(
            f"{key}: {name}: its data set cannot be read ({_first_line(error.__cause__ or error)}). Paths of "
            f"data_files are relative to {Path.cwd()}. Run once with network access, or {cure}"
        ) from error
    except Exception as error:  # any: a task is YAML, Jinja and Python of its author
        raise ValueError(f"{key}: {name} cannot be loaded ({type(error).__name__}: {_first_line(error)})") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not run_generated_code:
            raise ValueError(f"{key}: {name} runs code that the model wrote; allow it with run_generated_code: true")
        config = task.config
        try:
            if task.OUTPUT_TYPE == "generate_until":
                read_generation_keys(config.generation_kwargs or {})
                if take_infill(config.generation_kwargs or {})[0]:
                    check_no_template(template)
        except ValueError as error:
            raise ValueError(f"{key}: {name}: generation_kwargs: {error}") from error
        metrics = [metric.get("metric") for metric in config.metric_list or ()]
        for metric, function in task._metric_fn_list.items():
            if function is None and config.process_results is None:
                raise ValueError(
                    f"{key}: {name}: {metric} is not a metric of the harness{did_you_mean(metric, metric_registry)}; "
                    "correct metric_list in the task's YAML"
                )
        if task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in metrics:
            raise ValueError(
                f"{key}: {name}: exact_match is not computed for multiple choice; use acc in a copy of its YAML"
            )
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write `samples.jsonl`, `table.md` and, when they are complete, `results.json` into a folder."""
    record = {name: value for name, value in results.items() if name != "samples"}
    with replacing(folder / "samples.jsonl") as file:
        for task, samples in results.get("samples", {}).items():
            for sample in samples:
                file.write(json.dumps({"task": task, **sample}, default=handle_non_serializable) + "\n")
    with replacing(folder / "table.md") as file:
        file.write(table(results) + "\n")
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(record, indent=2, default=handle_non_serializable) + "\n")


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown: the harness's table, and forward passes by task."""
    text = str(make_table(results)).rstrip()
    config = results["config"]
    for task, passes in config["forward_passes"].items():
        text += f"\n{task}: {passes} forward passes"
        if (error := config["likelihood_standard_error"].get(task)) is not None:
            text += f"; standard error of a likelihood {error:.3g} nats"
        if (tokens := config["generated_tokens"].get(task)) is not None:
            text += f"; {tokens} tokens, {tokens / passes:.2f} per forward pass"
    return text
