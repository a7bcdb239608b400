"""Plots of logged metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamafactory.extras.ploting import smooth

from ..logs import get_logger
from .loss_curves import MIN_SMOOTHED

logger = get_logger(__name__)


def plot_logs(folder: str | Path, log_history: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Save a plot of each key as training_<key>.png.

    Args:
        folder: folder of the plots.
        log_history: the trainer's.
        keys: metrics to plot; a key that was never logged gives a warning.
    """
    for key in keys:
        points = [(log["step"], log[key]) for log in log_history if key in log]
        if not points:
            logger.warning_rank0(f"plot_loss: {key} was not logged, so it is not plotted.")
            continue
        path = Path(folder) / f"training_{key.replace('/', '_')}.png"
        build_figure(points, key, f"{key} of {folder}").savefig(path, dpi=100)
        logger.info_rank0(f"{key} is plotted in {path}.")


def build_figure(points: Sequence[tuple[int, float]], key: str, title: str) -> Any:
    """Return a figure of (step, value), with a smoothed curve if there are many points."""
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in points], [value for _, value in points]
    figure = Figure()
    axes = figure.add_subplot()
    if len(points) < MIN_SMOOTHED:
        axes.plot(steps, values, color="#1f77b4", marker="o")
    else:
        axes.plot(steps, values, color="#1f77b4", alpha=0.4, label="measured")
        axes.plot(steps, smooth(values), color="#1f77b4", label="smoothed")
        axes.legend()
    axes.set(title=title, xlabel="step", ylabel=key)
    return figure
