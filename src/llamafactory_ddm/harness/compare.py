"""A comparison of several models: the evaluations, their differences on the same documents, tables and plot."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.group import Group

from .._version import __version__
from ..checkpoints.adapters import ADAPTER_CONFIG, base_of
from ..checkpoints.families import load_tokenizer
from ..checkpoints.hub import local_folder
from ..checkpoints.kind import check_kind, model_or_adapter
from ..checkpoints.weights import first_line
from ..generation.generator import error_prefix
from ..modeling.special_tokens import resolve_tokens
from ..utils.files import replacing
from ..utils.plugins import load_plugins
from ..utils.result_log import digest
from .autoregressive import AutoregressiveLM, load_template
from .compare_keys import Comparison, Evaluation
from .infilling import take_infill
from .keys import EvalKeys
from .model import DiffusionLM, plugins_digest
from .paired import MEAN, Statistic, matched, paired_difference, standard_error, values_by_document
from .parallelism import Curve, Point, accuracy_under_parallelism, plot
from .run import TaskSet, load_model, load_tasks, run_tasks, save

# Files that determine what a model computes.
_MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "length_predictors.json",
    "*.py",
)
_FINISHED = "evaluation.json"
_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@dataclass(frozen=True)
class _Outcome:
    """A finished evaluation.

    Attributes:
        evaluation: what was asked.
        results: the harness's, without samples.
        samples: the records of the documents by task.
    """

    evaluation: Evaluation
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    def metrics(self, task: str) -> list[tuple[str, str]]:
        """Return (metric, filter) of each metric of a task or group."""
        names = [name.partition(",") for name in self.results["results"].get(task, {}) if "," in name]
        return [(metric, filter_name) for metric, _, filter_name in names if not metric.endswith("_stderr")]

    def value(self, task: str, metric: str, filter_name: str) -> tuple[float, float | None]:
        """Return a metric and its standard error, None if the harness has none."""
        row = self.results["results"][task]
        error = row.get(f"{metric}_stderr,{filter_name}")
        return float(row[f"{metric},{filter_name}"]), float(error) if isinstance(error, int | float) else None

    def cost(self, task: str) -> tuple[int | None, float | None]:
        """Return the forward passes of a task, and generated tokens per forward pass.

        An autoregressive model generates one token a pass by construction; its passes are not counted.
        """
        config = self.results["config"]
        passes, tokens = config["forward_passes"].get(task), config["generated_tokens"].get(task)
        if self.evaluation.kind == "ar":
            is_generated = self.results["configs"].get(task, {}).get("output_type") == "generate_until"
            return None, 1.0 if is_generated else None
        return passes, tokens / passes if tokens is not None and passes else None


def compare(comparison: Comparison) -> dict[str, Any] | None:
    """Run the evaluations that are not finished, and write and return the comparison; None on processes but the first.

    Returns:
        What `comparison.json` holds.
    Raises:
        ValueError: if a task or model cannot be loaded, or does not fit the keys.
        OSError: if the results cannot be written.
    """
    for evaluation in comparison.evaluations:
        load_plugins(evaluation.keys.plugins)
        with error_prefix(f"models: {evaluation.model}"):
            _check_model(evaluation)
            _check_writable(evaluation.keys.save_dir)
    tasks = _load_tasks(comparison)
    if comparison.sweep is not None:
        _check_swept_tasks(comparison.sweep, tasks)
    fingerprints = _fingerprints(comparison, tasks)
    _run_unfinished(comparison, tasks, fingerprints)
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    outcomes = [_read(evaluation) for evaluation in comparison.evaluations]
    record: dict[str, Any] = {
        "tasks": comparison.common.tasks,
        "sweep": comparison.sweep,
        "results": [row for outcome in outcomes for row in _rows(outcome, tasks)],
        "differences": list(_differences(outcomes, tasks)),
        "parallelism": _parallelism(outcomes, tasks) if comparison.sweep is not None else [],
        "evaluations": [_settings(outcome) for outcome in outcomes],
    }
    folder = comparison.save_dir
    with replacing(folder / "comparison.json") as file:
        file.write(json.dumps(record, indent=2, default=str) + "\n")
    with replacing(folder / "comparison.md") as file:
        file.write(as_markdown(record) + "\n")
    panels = [(panel["title"], [_curve(curve) for curve in panel["curves"]]) for panel in record["parallelism"]]
    if panels:
        plot(panels, str(comparison.sweep), folder / "parallelism.png")
    else:
        (folder / "parallelism.png").unlink(missing_ok=True)  # of an earlier sweep
    return record


# Checks before a model is loaded.


def _check_model(evaluation: Evaluation) -> None:
    """Check that a folder holds the kind of model that the user says, with the tokens that the keys name.

    Raises:
        ValueError: if it does not, or there is no such template.
    """
    path, suppressed = _path(evaluation.keys), evaluation.sampling.get("suppress_tokens")
    config, template = check_kind(path, evaluation.kind), evaluation.keys.template
    is_its_own = config is not None and config.template is not None and config.template.name == template
    if suppressed is None and (template is None or is_its_own):
        return
    is_bare = evaluation.kind == "ar" and (Path(path) / ADAPTER_CONFIG).is_file()
    tokenizer = load_tokenizer(local_folder(base_of(path) if is_bare else path))
    if suppressed is not None:
        resolve_tokens(tokenizer, "suppress_tokens", suppressed)
    if template is not None and not is_its_own:
        load_template(template, tokenizer)


def _path(keys: EvalKeys) -> str:
    return model_or_adapter(keys.model_name_or_path, keys.adapter_name_or_path)


def _check_writable(save_dir: str | None) -> None:
    """Check that the folder of an evaluation can be made and written; nothing is made yet.

    Raises:
        ValueError: naming save_dir.
    """
    path = Path(str(save_dir)).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        cause = "cannot be written" if nearest.is_dir() else "is not a folder"
        raise ValueError(f"save_dir: {save_dir} cannot be written, as {nearest} {cause}; name another folder")


def _load_tasks(comparison: Comparison) -> TaskSet:
    """Load and check the tasks.

    Raises:
        ValueError: if one cannot be read, or does not fit a model.
    """
    common = comparison.common
    templates = [each.keys.template for each in comparison.evaluations if each.keys.template is not None]
    tasks = load_tasks(
        common.tasks,
        folder=common.task_dir,
        data=common.task_data,
        template=templates[0] if templates else None,
        run_generated_code=common.run_generated_code,
    )
    autoregressive = [each.model for each in comparison.evaluations if each.kind == "ar"]
    for name, task in tasks.single().items():
        if autoregressive and take_infill(task.config.generation_kwargs or {})[0]:
            raise ValueError(
                f"models: {autoregressive[0]}: kind: ar cannot fill the gaps of the task {name}; leave one of them out"
            )
    return tasks


def _check_swept_tasks(sweep: str, tasks: TaskSet) -> None:
    """Check that all tasks generate, and have an accuracy.

    Raises:
        ValueError: naming the first task that does not.
    """
    for name, task in tasks.single().items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(
                f"sweep: {sweep}: the task {name} scores likelihoods ({task.OUTPUT_TYPE}), which keys of generation "
                "such as diffusion_steps do not change; leave the task out, or remove sweep"
            )
        if not _accuracies(task):
            raise ValueError(
                f"sweep: {sweep}: the task {name} has no accuracy, a metric that is a mean over documents and where "
                "higher is better; leave the task out, or remove sweep"
            )


def _accuracies(task: Any) -> list[str]:
    """Return the metrics of a task that are means over documents where higher is better."""
    higher = task.higher_is_better()
    return [name for name, aggregate in task.aggregation().items() if aggregate is MEAN and higher.get(name)]


# Evaluations: run, kept, read.


def _fingerprints(comparison: Comparison, tasks: TaskSet) -> list[str]:
    """Return a digest of each evaluation's settings, model files and documents."""
    files: dict[str, str] = {}
    versions = [__version__, metadata.version("lm_eval")]
    content = digest({name: _task_content(task) for name, task in tasks.single().items()})
    found = []
    for evaluation in comparison.evaluations:
        keys = evaluation.keys
        name = _path(keys)
        if name not in files:
            with error_prefix(f"models: {evaluation.model}"):
                files[name] = _files_digest(name)
        settings = {
            word: value
            for word, value in asdict(keys).items()
            if word not in ("save_dir", "batch_size", "task_dir", "task_data", "plugins")
        }
        plugins = plugins_digest(keys.plugins)
        parts = [evaluation.kind, settings, dict(evaluation.sampling), plugins, files[name], versions, content]
        found.append(digest(parts))
    return found


def _task_content(task: Any) -> list[Any]:
    """Return what a task asks: its YAML, its documents and the examples that prompts may begin with."""
    config = task.config.to_dict()
    config.pop("metadata", None)  # its version, and where the YAML lies
    has_examples = task.config.fewshot_split is not None or task.config.training_split is not None
    examples = list(task.fewshot_docs() or ()) if has_examples else []
    return [task.VERSION, _without_addresses(config), list(task.eval_docs), examples]


def _without_addresses(value: Any) -> Any:
    """Return a value of a config with functions replaced by their source, which is the same in every process."""
    if isinstance(value, Mapping):
        return {word: _without_addresses(item) for word, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_addresses(item) for item in value]
    if not callable(value):
        return value
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # a built-in, or an object
        return getattr(value, "__qualname__", type(value).__qualname__)


def _files_digest(name: str) -> str:
    """Return a digest of a model's files, for an adapter with those of its base; for a Hub name, of the revision.

    Raises:
        ValueError: if a Hub name cannot be resolved.
    """
    folder = Path(local_folder(name))
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        try:
            config = cached_file(name, "config.json")
        except OSError as error:
            raise ValueError(f"{name} is no folder, and cannot be had from the Hub ({first_line(error)})") from error
        return digest([name, Path(str(config)).parent.name])
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    parts = [[path.name, _file_digest(path)] for path in paths]
    base = _files_digest(base_of(folder)) if (folder / ADAPTER_CONFIG).is_file() else None
    return digest([parts, base])


def _run_unfinished(comparison: Comparison, tasks: TaskSet, fingerprints: Sequence[str]) -> None:
    """Run the evaluations that are not finished under these settings.

    Raises:
        ValueError: if an autoregressive model is to be evaluated in several processes.
    """
    unfinished = [
        (evaluation, fingerprint)
        for evaluation, fingerprint in zip(comparison.evaluations, fingerprints, strict=True)
        if not _is_finished(Path(str(evaluation.keys.save_dir)), fingerprint)
    ]
    for evaluation, _ in unfinished:
        if evaluation.kind == "ar" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"models: {evaluation.model}: kind: ar runs in one process; start without torchrun, or leave this "
                "model out, or compare it alone first: finished evaluations are not repeated"
            )
    loaded: tuple[Any, DiffusionLM] | None = None
    for evaluation, fingerprint in unfinished:
        # A sweep loads a model once.
        identity = [evaluation.model, {**asdict(evaluation.keys), "save_dir": None}]
        with error_prefix(f"models: {evaluation.model}"):
            if loaded is not None and loaded[0] == identity:
                model: Any = loaded[1].with_sampling(evaluation.sampling, evaluation.keys.save_dir)
            else:
                loaded = None
                _free()
                if evaluation.kind == "ar":
                    model = _load_autoregressive(evaluation)
                else:
                    model = load_model(evaluation.keys, evaluation.sampling)
                    loaded = (identity, model)
            results = run_tasks(tasks, model, evaluation.keys)
            del model
        if results is not None:
            folder = Path(str(evaluation.keys.save_dir))
            (folder / _FINISHED).unlink(missing_ok=True)
            save(results, folder)
            with replacing(folder / _FINISHED) as file:
                file.write(json.dumps({"settings": fingerprint, "results": _results_digest(folder)}) + "\n")


def _free() -> None:
    """Free the memory of the model before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_finished(folder: Path, fingerprint: str) -> bool:
    """Tell whether the folder holds the results of this evaluation as it wrote them."""
    try:
        kept = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
        return bool(kept == {"settings": fingerprint, "results": _results_digest(folder)})
    except (OSError, ValueError):
        return False


def _results_digest(folder: Path) -> str:
    return digest([_file_digest(folder / name) for name in ("results.json", "samples.jsonl")])


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_autoregressive(evaluation: Evaluation) -> AutoregressiveLM:
    """Return the autoregressive model of an evaluation.

    Raises:
        ValueError: if it cannot be loaded.
    """
    keys = evaluation.keys
    name = _path(keys)
    is_adapter = (Path(name) / ADAPTER_CONFIG).is_file()
    try:
        return AutoregressiveLM(
            base_of(name) if is_adapter else name,
            adapter=name if is_adapter else None,
            dtype=keys.infer_dtype,
            batch_size=keys.batch_size,
            max_new_tokens=keys.max_new_tokens,
            template=keys.template,
            results_folder=keys.save_dir,
            **evaluation.sampling,
        )
    except OSError as error:
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error


def _read(evaluation: Evaluation) -> _Outcome:
    """Return a finished evaluation from its folder."""
    folder = Path(str(evaluation.keys.save_dir))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    samples: dict[str, list[dict[str, Any]]] = {}
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            sample = json.loads(line)
            samples.setdefault(sample.pop("task"), []).append(sample)
    return _Outcome(evaluation, results, samples)


# What is written.


def _rows(outcome: _Outcome, tasks: TaskSet) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of each task and group."""
    single = tasks.single()
    for task in outcome.results["results"]:
        passes, tokens_per_pass = outcome.cost(task)
        for metric, filter_name in outcome.metrics(task):
            value, error = outcome.value(task, metric, filter_name)
            if error is None and task in single:  # the harness computes it for few metrics
                values = list(values_by_document(outcome.samples[task], metric, filter_name).values())
                statistic = _statistic(single[task], metric)
                error = standard_error(values, statistic) if _is_of_values(statistic, values, value) else None
            yield {
                "task": task,
                "metric": metric,
                "filter": filter_name,
                "higher_is_better": outcome.results.get("higher_is_better", {}).get(task, {}).get(metric),
                "model": outcome.evaluation.model,
                "sweep_value": outcome.evaluation.value,
                "value": value,
                "standard_error": error,
                "forward_passes": passes,
                "tokens_per_forward_pass": tokens_per_pass,
            }


def _pairs(outcomes: Sequence[_Outcome]) -> Iterator[tuple[_Outcome, _Outcome]]:
    """Yield (baseline, other): each model and the first under the same value, and each value and a model's first."""
    first_model = outcomes[0].evaluation.model
    first_of: dict[str, _Outcome] = {}
    for other in outcomes:
        name, value = other.evaluation.model, other.evaluation.value
        if name not in first_of:
            first_of[name] = other
        else:
            yield first_of[name], other
        if name != first_model:
            for baseline in outcomes:
                same = baseline.evaluation.value == value or None in (baseline.evaluation.value, value)
                if baseline.evaluation.model == first_model and same:
                    yield baseline, other


def _differences(outcomes: Sequence[_Outcome], tasks: TaskSet) -> Iterator[dict[str, Any]]:
    """Yield the difference of each pair on each metric of each task and group.

    A metric whose reported value is not the aggregate of the documents' values is left out.
    """
    for pair in _pairs(outcomes):
        baseline, other = (_label(each.evaluation) for each in pair)
        for name, item in {**tasks.single(), **tasks.groups()}.items():
            for metric, filter_name in pair[1].metrics(name):
                compute = _group_difference if name in tasks.groups() else _difference
                found = compute(item, metric, filter_name, pair)
                if found is not None:
                    yield {
                        "task": name,
                        "metric": metric,
                        "filter": filter_name,
                        "baseline": baseline,
                        "model": other,
                        "difference": found.value,
                        "standard_error": found.error,
                        "documents": found.documents,
                    }


@dataclass(frozen=True)
class _Difference:
    """A difference of a metric with its standard error, None for a single document, and the number of documents."""

    value: float
    error: float | None
    documents: int


def _difference(task: Any, metric: str, filter_name: str, pair: tuple[_Outcome, _Outcome]) -> _Difference | None:
    """Return the difference of a metric of a task; None if a reported value is not that of the documents' values."""
    name, statistic = task.task_name, _statistic(task, metric)
    values = [values_by_document(each.samples.get(name, ()), metric, filter_name) for each in pair]
    labels = (_label(pair[0].evaluation), _label(pair[1].evaluation))
    first, second = matched(values[0], values[1], labels, f"task: {name}, {metric}")
    for outcome, own in zip(pair, (first, second), strict=True):
        if not _is_of_values(statistic, own, outcome.value(name, metric, filter_name)[0]):
            return None
    return _Difference(*paired_difference(first, second, statistic), len(first))


def _group_difference(
    group: Group, metric: str, filter_name: str, pair: tuple[_Outcome, _Outcome]
) -> _Difference | None:
    """Return the difference of a group's mean over its tasks; None if a reported value is not such a mean.

    With weights w_t, the documents of task t or 1, W their sum, and differences d_t with errors e_t of tasks whose
    documents are independent,

        difference = sum over t of w_t d_t / W, error = sqrt( sum over t of (w_t e_t)^2 ) / W
    """
    config = next((each for each in group.aggregate_metric_list or () if each.metric == metric), None)
    names = [task.task_name for task in group.get_all_tasks()]
    names = [name for name in names if (metric, filter_name) in pair[1].metrics(name)]
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    parts = [_difference(tasks[name], metric, filter_name, pair) for name in names]
    found = [part for part in parts if part is not None]
    if config is None or not found or len(found) < len(parts):
        return None
    weights = [part.documents if config.weight_by_size else 1 for part in found]
    whole = sum(weights)
    for outcome in pair:
        values = [outcome.value(name, metric, filter_name)[0] for name in names]
        mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / whole
        if not _is_close(mean, outcome.value(group.name, metric, filter_name)[0]):
            return None
    value = math.fsum(weight * part.value for weight, part in zip(weights, found, strict=True)) / whole
    errors = [part.error for part in found if part.error is not None]
    error = None
    if len(errors) == len(found):
        error = math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))) / whole
    return _Difference(value, error, sum(part.documents for part in found))


def _statistic(task: Any, metric: str) -> Statistic:
    """Return how the harness makes one number of the documents' values."""
    statistic: Statistic = task.aggregation().get(metric, MEAN)
    return statistic


def _is_of_values(statistic: Statistic, values: Sequence[Any], reported: float) -> bool:
    """Tell whether the reported number is made of these values."""
    return bool(values) and _is_close(statistic(values), reported)


def _is_close(value: float, reported: float) -> bool:
    return math.isclose(value, reported, rel_tol=1e-6, abs_tol=1e-9)


def _parallelism(outcomes: Sequence[_Outcome], tasks: TaskSet) -> list[dict[str, Any]]:
    """Return for each accuracy of each task the points and AUP of each model."""
    panels = []
    for name, task in tasks.single().items():
        accuracies = _accuracies(task)
        for metric, filter_name in outcomes[0].metrics(name):
            if metric not in accuracies:
                continue
            points: dict[str, list[Point]] = {}
            for outcome in outcomes:
                value, error = outcome.value(name, metric, filter_name)
                _, tokens_per_pass = outcome.cost(name)
                label = "" if outcome.evaluation.value is None else str(outcome.evaluation.value)
                point = Point(tokens_per_pass or 0.0, 100 * value, None if error is None else 100 * error, label)
                points.setdefault(outcome.evaluation.model, []).append(point)
            if not all(0 <= point.accuracy <= 100 for each in points.values() for point in each):
                continue  # a score of another range
            best = max(point.accuracy for each in points.values() for point in each)
            curves = [
                Curve(model, tuple(each), accuracy_under_parallelism(each, best)) for model, each in points.items()
            ]
            title = f"{name}, {metric}" + (f" ({filter_name})" if filter_name != "none" else "")
            panels.append({"title": title, "task": name, "best": best, "curves": [asdict(curve) for curve in curves]})
    return panels


def _curve(record: Mapping[str, Any]) -> Curve:
    return Curve(record["name"], tuple(Point(**point) for point in record["points"]), record["score"])


def _settings(outcome: _Outcome) -> dict[str, Any]:
    """Return what is needed to repeat an evaluation."""
    evaluation, results = outcome.evaluation, outcome.results
    return {
        "model": evaluation.model,
        "kind": evaluation.kind,
        "sweep_value": evaluation.value,
        "folder": evaluation.keys.save_dir,
        "keys": {**{word: value for word, value in asdict(evaluation.keys).items() if value is not None}},
        "generation_keys": dict(evaluation.sampling),
        "model_settings": results["config"]["model_settings"],
        "machine": results["machine"],
        "versions_of_packages": results["versions_of_packages"],
        "versions_of_tasks": results.get("versions"),
        "seeds": {name: results["config"].get(name) for name in _SEEDS},
        "n_samples": results["n-samples"],
        "n_shot": results["n-shot"],
    }


def _label(evaluation: Evaluation) -> str:
    return evaluation.model if evaluation.value is None else f"{evaluation.model}, {evaluation.value}"


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the tables of a comparison."""
    lines = []
    for heading, columns in _table_columns(record):
        lines += [*heading, *_results_table(record["results"], columns), ""]
    if record["differences"]:
        lines += [
            "## Differences on the same documents",
            "",
            "| task | metric | model | minus | difference | documents |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for row in record["differences"]:
            names = (row["task"], _metric(row), row["model"], row["baseline"])
            difference = _with_error(row["difference"], row["standard_error"], sign="+")
            lines.append(f"| {' | '.join(map(_cell, names))} | {difference} | {row['documents']} |")
        lines.append("")
    if record["parallelism"]:
        lines += ["## Accuracy under parallelism", "", "| task and metric | model | AUP |", "|---|---|---|"]
        for panel in record["parallelism"]:
            title = _cell(panel["title"])
            lines += [f"| {title} | {_cell(curve['name'])} | {curve['score']:.2f} |" for curve in panel["curves"]]
        lines.append("")
    lines += [
        "## Settings",
        "",
        "| model | kind | weights | type | device | seed | template | likelihoods | generation |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for each in record["evaluations"]:
        settings = each["model_settings"]
        swept = "" if each["sweep_value"] is None else f", {each['sweep_value']}"
        keys = {**each["generation_keys"], "max_new_tokens": settings["max_new_tokens"]}
        generation = "; ".join(f"{word}: {value}" for word, value in keys.items() if value is not None)
        is_exact = each["kind"] == "ar"
        likelihoods = "exact" if is_exact else f"{settings['scoring']}, {settings['likelihood_samples']} masks"
        seed = settings["sampling"].get("seed", 0)
        cells = (
            f"{each['model']}{swept}",
            each["kind"],
            settings["weights"],
            settings["dtype"].removeprefix("torch."),
            each["machine"]["device"],
            seed,
            settings["template"] or "none",
            likelihoods,
            generation or "defaults",
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    first = record["evaluations"][0]
    documents = [
        f"{task} (version {first['versions_of_tasks'].get(task)}, {first['n_shot'].get(task)} shots, "
        f"{n['effective']} of {n['original']} documents)"
        for task, n in first["n_samples"].items()
    ]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in each["versions_of_packages"].items())
        for each in record["evaluations"]
    )
    lines += ["", f"Tasks: {', '.join(documents)}.", "", f"Versions: {'; or '.join(versions)}."]
    return "\n".join(lines)


def _table_columns(record: Mapping[str, Any]) -> list[tuple[list[str], list[tuple[str, tuple[str, Any]]]]]:
    """Return a heading, and (title, (model, value)) of each column, for each table of results."""
    ids = [(each["model"], each["sweep_value"]) for each in record["evaluations"]]
    if record["sweep"] is None:
        return [([], [(model, (model, value)) for model, value in ids])]
    tables = []
    for model in dict.fromkeys(model for model, _ in ids):
        columns = [
            ("not swept" if value is None else f"{record['sweep']} {value}", (name, value))
            for name, value in ids
            if name == model
        ]
        tables.append(([f"## {_cell(model)}", ""], columns))
    return tables


def _results_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, tuple[str, Any]]]) -> list[str]:
    """Return a table with a row for each metric, and two for what each task took."""
    cells: dict[tuple[str, str], dict[tuple[str, Any], str]] = {}
    for row in rows:
        column = (row["model"], row["sweep_value"])
        cells.setdefault((row["task"], _metric(row)), {})[column] = _with_error(row["value"], row["standard_error"])
    passes: dict[tuple[str, str], dict[tuple[str, Any], str]] = {}
    tokens: dict[tuple[str, str], dict[tuple[str, Any], str]] = {}
    for row in rows:
        column = (row["model"], row["sweep_value"])
        if row["forward_passes"] is not None:
            passes.setdefault((row["task"], "forward passes"), {})[column] = str(row["forward_passes"])
        if row["tokens_per_forward_pass"] is not None:
            cell = f"{row['tokens_per_forward_pass']:.2f}"
            tokens.setdefault((row["task"], "tokens per forward pass"), {})[column] = cell
    everything = [
        (name, values)
        for task in dict.fromkeys(task for task, _ in cells)
        for part in (cells, passes, tokens)
        for name, values in part.items()
        if name[0] == task
    ]
    lines = ["| task | metric | " + " | ".join(_cell(title) for title, _ in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for (task, metric), values in everything:
        shown = [values.get(column, "") for _, column in columns]
        if any(shown):
            lines.append(f"| {_cell(task)} | {metric} | {' | '.join(shown)} |")
    return lines


def _metric(row: Mapping[str, Any]) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[row.get("higher_is_better")]
    filter_name = "" if row["filter"] == "none" else f" ({row['filter']})"
    return f"{row['metric']}{filter_name}{arrow}"


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    return _number(value, sign) + ("" if error is None else f" ± {_number(error)}")


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10_000 else f"{value:{sign}.3e}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
