"""An evaluation from its keys: the run, its record and its table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from ..utils.files import replacing
from ..utils.registry import did_you_mean
from .keys import EvalKeys
from .model import DiffusionLM

_PACKAGES = ("llamafactory-ddm", "llamafactory", "lm_eval", "transformers", "torch")


def evaluate(keys: EvalKeys, sampling: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the harness's results with the record of the run; None on all processes but the first.

    Raises:
        ValueError: if a task does not exist, or the model cannot be loaded.
    """
    manager = TaskManager(include_path=keys.task_dir)
    tasks = [name.strip() for name in str(keys.task).split(",") if name.strip()]
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"task: {name} does not exist{did_you_mean(name, manager.all_tasks)}")
        try:
            loaded = manager.load([name])["tasks"]
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"task: {name}: its data set cannot be read ({reason}); run once with network access, or copy the "
                "task's YAML into task_dir, with dataset_path: json and data_files that name a local copy"
            ) from error
        if not keys.run_generated_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded.values()):
            raise ValueError(f"task: {name} runs code that the model wrote; allow it with run_generated_code: true")
    model = DiffusionLM(
        str(keys.model_name_or_path or keys.adapter_name_or_path),
        dtype=None if keys.infer_dtype == "auto" else keys.infer_dtype,
        batch_size=keys.batch_size,
        scoring=keys.scoring,  # type: ignore[arg-type]
        likelihood_samples=keys.likelihood_samples,
        max_new_tokens=keys.max_new_tokens,
        template=keys.template,
        plugins=keys.plugins,
        results_folder=keys.save_dir,
        **sampling,
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=manager.match_tasks(tasks),
        num_fewshot=keys.n_shot,
        limit=keys.max_samples,
        batch_size=keys.batch_size,
        task_manager=manager,
        confirm_run_unsafe_code=keys.run_generated_code,
        bootstrap_iters=1000,
    )
    if results is None:
        return None
    results["versions_of_packages"] = {name: metadata.version(name) for name in _PACKAGES}
    results["machine"] = {"device": str(model.device), "platform": platform.platform()}
    return dict(results)


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json` and `table.md` into a folder."""
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
