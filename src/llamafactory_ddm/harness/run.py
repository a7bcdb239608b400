"""An evaluation from its keys: the run, its record and its table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError, UndefinedError
from lm_eval.utils import handle_non_serializable, make_table

from ..checkpoints.adapters import ADAPTER_CONFIG, base_of
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
    if keys.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    manager = task_manager(keys.tasks, keys.task_dir, keys.task_data)
    names: list[str] = []
    for pattern in keys.tasks:
        matches = manager.match_tasks([pattern])
        if not matches:
            raise ValueError(f"task: {pattern} does not exist{did_you_mean(pattern, manager.all_tasks)}")
        names += matches
    tasks = [task for name in dict.fromkeys(names) for task in _load_task(name, manager, keys)]
    manager.check_used()
    model = DiffusionLM(
        _model_or_adapter(keys),
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
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=keys.n_shot,
            limit=keys.max_samples,
            batch_size=keys.batch_size,
            task_manager=manager,
            confirm_run_unsafe_code=keys.run_generated_code,
            bootstrap_iters=1000,
        )
    except (TemplateError, UndefinedError) as error:
        raise ValueError(
            f"task: {keys.task}: a Jinja expression (doc_to_text, doc_to_target, doc_to_choice) "
            f"fails on the documents ({error}); correct the task's YAML"
        ) from error
    if results is None:
        return None
    results["versions_of_packages"] = {name: metadata.version(name) for name in _PACKAGES}
    results["machine"] = {"device": str(model.device), "platform": platform.platform()}
    return dict(results)


def _model_or_adapter(keys: EvalKeys) -> str:
    """Return what to load: the adapter, which names its model, or the model.

    Raises:
        ValueError: if the folder holds no adapter, or the adapter names another model.
    """
    if keys.adapter_name_or_path is None:
        return str(keys.model_name_or_path)
    adapter = Path(keys.adapter_name_or_path)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"adapter_name_or_path: {adapter} holds no {ADAPTER_CONFIG}; name the folder of an adapter")
    base, given = base_of(adapter), keys.model_name_or_path
    if given is not None and given != base and Path(given).resolve() != Path(base).resolve():
        raise ValueError(
            f"model_name_or_path: {given} is not the model of the adapter {adapter}, which is {base}; remove "
            f"model_name_or_path, or set it to {base}"
        )
    return str(adapter)


def _load_task(name: str, manager: LocalTaskManager, keys: EvalKeys) -> list[Any]:
    """Return a task, a group or the tasks of a tag, checked before the model is loaded.

    Raises:
        ValueError: if its data or code cannot be read, or it needs what the keys do not allow.
    """
    try:
        loaded = manager.load([name])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task: {name} needs the Python module {error.name}: install the package that has it"
        ) from error
    except (OSError, DatasetGenerationError) as error:
        raise ValueError(
            f"task: {name}: its data set cannot be read ({_first_line(error)}). Paths of data_files are relative to "
            f"{Path.cwd()}. Run once with network access, or name a local copy: "
            f"task_data={{{manager.last_data_set}: FOLDER}}"
        ) from error
    except Exception as error:  # any: a task is YAML, Jinja and Python of its author
        raise ValueError(f"task: {name} cannot be loaded ({type(error).__name__}: {_first_line(error)})") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not keys.run_generated_code:
            raise ValueError(f"task: {name} runs code that the model wrote; allow it with run_generated_code: true")
        config = task.config
        try:
            if task.OUTPUT_TYPE == "generate_until":
                read_generation_keys(config.generation_kwargs or {})
                if take_infill(config.generation_kwargs or {})[0]:
                    check_no_template(keys.template)
        except ValueError as error:
            raise ValueError(f"task: {name}: generation_kwargs: {error}") from error
        metrics = [metric.get("metric") for metric in config.metric_list or ()]
        if task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in metrics:
            raise ValueError(
                f"task: {name}: exact_match is not computed for multiple choice; use acc in a copy of its YAML"
            )
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json`, `samples.jsonl` and `table.md` into a folder."""
    record = {name: value for name, value in results.items() if name != "samples"}
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(record, indent=2, default=handle_non_serializable) + "\n")
    with replacing(folder / "samples.jsonl") as file:
        for task, samples in results.get("samples", {}).items():
            for sample in samples:
                file.write(json.dumps({"task": task, **sample}, default=handle_non_serializable) + "\n")
    with replacing(folder / "table.md") as file:
        file.write(table(results) + "\n")


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown: the harness's table, and forward passes by task."""
    text = str(make_table(results)).rstrip()
    for task, passes in results["config"]["forward_passes"].items():
        error = results["config"]["likelihood_standard_error"].get(task)
        text += f"\n{task}: {passes} forward passes" + (
            f"; standard error of a likelihood {error:.3g} nats" if error is not None else ""
        )
    return text
