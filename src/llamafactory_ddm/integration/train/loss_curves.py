"""Curves of several runs in one plot, from the logs that LLaMA-Factory writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...utils.files import replacing
from ...utils.labels import legend_label
from ...utils.registry import did_you_mean

STATE, LOG = "trainer_state.json", "trainer_log.jsonl"
# Names in trainer_log.jsonl that differ from those of trainer_state.json.
_RENAMED = {"lr": "learning_rate"}
_NO_METRICS = {"step", "epoch", "percentage", "total_steps", "current_steps"}
FORMATS = ("png", "pdf", "svg")
MIN_SMOOTHED = 20  # fewer values are not smoothed

# key -> values by step, ascending
Curves = dict[str, dict[int, float]]


def read_curves(folder: Path) -> Curves:
    """Return all logged numbers of a run by key and step.

    Both files are read; where both have a value, that of trainer_log.jsonl counts, which a run appends to while it
    trains. A trainer_state.json that is ahead of the log is of an earlier run in the same folder, and is left out.
    Without trainer_state.json, the newest checkpoint's is read. When a resumed run repeats steps, the later line
    counts, and lines of the abandoned steps after it are dropped.

    Raises:
        ValueError: if the folder has no log, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the output_dir of a run")
    states = [folder / STATE] if (folder / STATE).is_file() else _checkpoints(folder)[-1:]
    log = folder / LOG
    if not states and not log.is_file():
        raise ValueError(f"{folder} has no log: neither {STATE} nor {LOG} is there; give the output_dir of a run")
    curves: Curves = {}
    history: Any = []
    for state in states:
        content = _parsed(str(state), _read(state))
        history = content.get("log_history") if isinstance(content, Mapping) else None
        if not isinstance(history, list):
            raise ValueError(f"{state} has no log_history; copy the run's folder again")
        curves = _by_key(history)
    if log.is_file():
        lines = _read(log).split("\n")
        last = len(lines) - 1  # what follows the last line feed: nothing, or a line that is being written
        entries = [
            _parsed(f"line {number} of {log}", line) for number, line in enumerate(lines[:last], 1) if line.strip()
        ]
        if _last_step(history) > _last_step(entries) >= 0:
            curves = {}
        for key, values in _by_key(entries).items():
            curves[key] = dict(sorted({**curves.get(key, {}), **values}.items()))
    return curves


def _checkpoints(folder: Path) -> list[Path]:
    """Return the trainer_state.json of the checkpoints, in the order of their steps."""
    found = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name.split("-")[-1]))


def _step(entry: Any) -> int | None:
    step = entry.get("step", entry.get("current_steps")) if isinstance(entry, Mapping) else None
    return step if isinstance(step, int) else None


def _last_step(entries: Sequence[Any]) -> int:
    """Return the step of the last entry that has one, or -1."""
    return next((step for entry in reversed(entries) if (step := _step(entry)) is not None), -1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); copy the run's folder again") from error


def _parsed(subject: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{subject} is not valid JSON ({error}); copy the run's folder again, or delete what a killed run left"
        ) from error


def _by_key(entries: Iterable[Any]) -> Curves:
    curves: Curves = {}
    last = -1
    for entry in entries:
        step = _step(entry)
        if step is None:
            continue
        if step < last:  # a resumed run
            curves = {key: {at: y for at, y in values.items() if at < step} for key, values in curves.items()}
        last = step
        for name, value in entry.items():
            if name not in _NO_METRICS and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(_RENAMED.get(name, name), {})[step] = float(value)
    return {key: values for key, values in curves.items() if values}


def moving_average(values: Sequence[float], n: int) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, n in all; at the ends there are fewer."""
    before, after = (n - 1) // 2, n // 2
    windows = [values[max(0, at - before) : at + after + 1] for at in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot_runs(runs: Mapping[str, Path], keys: Sequence[str], out: Path, smooth: int = 1) -> list[str]:
    """Plot each key in a panel, with a curve for each run.

    Args:
        runs: output folders by the name in the legend.
        keys: what to plot.
        out: the picture.
        smooth: the number of logged values whose mean is drawn, the values themselves being drawn faintly; curves of
            fewer than `MIN_SMOOTHED` values are not smoothed.
    Returns:
        What a reader should know: the runs that did not log a key.
    Raises:
        ValueError: if a folder has no log, or no run logged a key.
        OSError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure

    curves = {name: read_curves(folder) for name, folder in runs.items()}
    known = sorted({key for each in curves.values() for key in each})
    for key in keys:
        if key not in known:
            hint = did_you_mean(key, known) or f"; logged: {', '.join(known) or 'nothing'}"
            raise ValueError(f"--keys: no run logged {key}{hint}")
    notes = [f"{name} logged no {key}" for key in keys for name in runs if key not in curves[name]]
    figure = Figure(figsize=(5.6 * len(keys), 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, name in enumerate(runs):
            points = curves[name].get(key, {})
            steps, values = list(points), list(points.values())
            style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o" if len(points) < MIN_SMOOTHED else None}
            if smooth > 1 and len(points) >= MIN_SMOOTHED:
                axes.plot(steps, values, color=style["color"], alpha=0.25)
                values = moving_average(values, smooth)
            if points:
                axes.plot(steps, values, label=legend_label(name), markersize=4, **style)
        axes.set(xlabel="step", ylabel=key)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(out, "wb") as file:
        figure.savefig(file, format=out.suffix[1:].lower(), dpi=100)
    return notes
