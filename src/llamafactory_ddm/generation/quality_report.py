"""The table and the figure of `llamafactory-ddm quality`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..utils.labels import legend_label, table_cell

if TYPE_CHECKING:
    from .quality_run import Outcome

# Number -> head of its column, and format.
_COLUMNS = {
    "perplexity": ("perplexity", ".3g"),
    "nats_per_byte": ("nats / byte", ".2f"),
    "distinct_1": ("distinct-1", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "entropy": ("entropy", ".2f"),
    "repetition_4": ("rep-4", ".3f"),
    "tokens": ("tokens", ".1f"),
}
_PANELS = {
    "perplexity": "generative perplexity",
    "distinct_2": "distinct-2",
    "entropy": "token entropy (nats)",
}


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        value: the mean over seeds.
        low: the smallest value; with one seed the value minus its standard error.
        high: the largest value; with one seed the value plus its standard error.
        is_range: whether there are several seeds.
    """

    value: float
    low: float
    high: float
    is_range: bool

    def __format__(self, numbers: str) -> str:
        """Return value and error, or the range, with `numbers` the format of each."""
        low, value, high = (format(number, numbers) for number in (self.low, self.value, self.high))
        if self.is_range:
            return low if low == high else f"{low} to {high}"
        return value if self.low == self.high else f"{value} ± {self.high - self.value:{numbers}}"


def grouped(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Return the outcomes that differ in the seed alone together, in their order."""
    groups: dict[Any, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.model, outcome.strategy, outcome.steps), []).append(outcome)
    return list(groups.values())


def spread(group: Sequence[Outcome], name: str) -> Spread | None:
    """Return a number of one setting over its seeds, or None if a seed lacks it."""
    found = [outcome.numbers[name] for outcome in group]
    values = [each.value for each in found if each is not None]
    if len(values) < len(found):
        return None
    if len(values) > 1:
        mean = sorted((min(values), statistics.fmean(values), max(values)))[1]  # rounding can move it out of the range
        return Spread(mean, min(values), max(values), True)
    error = (found[0].error if found[0] is not None else None) or 0.0
    return Spread(values[0], values[0] - error, values[0] + error, False)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the numbers as a Markdown table, a row for each model, strategy and number of steps."""
    head = ["model", "strategy", "steps", *(name for name, _ in _COLUMNS.values()), "passes"]
    rows = [head]
    for group in grouped(outcomes):
        first = group[0]
        cells = [table_cell(first.model), first.strategy or "", "" if first.steps is None else str(first.steps)]
        for name, (_, numbers) in _COLUMNS.items():
            found = spread(group, name)
            cells.append("" if found is None else format(found, numbers))
        rows.append([*cells, f"{statistics.fmean(outcome.forwards for outcome in group):.1f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def page(outcomes: Sequence[Outcome], record: Mapping[str, Any]) -> str:
    """Return `quality.md`: what was measured, the table, and the first text of each setting."""
    keys, judge = record["keys"], record["judge"]
    n_seeds = len({outcome.seed for outcome in outcomes})
    spread_of = f"Ranges are over {n_seeds} seeds." if n_seeds > 1 else "± is the standard error over the texts."
    per_seed = " and seed" if n_seeds > 1 else ""
    empty = sum(not score.ids for outcome in outcomes for score in outcome.judged)
    lines = [
        f"{keys['n_texts']} texts of up to {keys['length']} tokens in each setting{per_seed}. "
        f"Judge: {judge['judge_model']}; all numbers are on its tokens of the decoded text. {spread_of}"
        + (f" {empty} texts are empty." if empty else ""),
        "",
        table(outcomes),
        "",
        "The first text of each setting:",
        "",
    ]
    for group in grouped(outcomes):
        first = group[0]
        name = f"{first.model}, {first.strategy}, {first.steps} steps" if first.strategy else first.model
        name = " ".join(name.split())
        lines += [f"- {name}:", "", *(f"      {line}" for line in first.texts[0].text.splitlines() or [""]), ""]
    return "\n".join(lines).rstrip() + "\n"


def figure(outcomes: Sequence[Outcome]) -> Any:
    """Return a figure: perplexity, distinct-2 and entropy against the number of steps, on a logarithmic axis.

    A line is a model with a strategy; an autoregressive model is a horizontal line. Bars are the range over seeds, or
    with one seed the standard error.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    groups = grouped(outcomes)
    curves: dict[tuple[str, str | None], list[list[Outcome]]] = {}
    for group in groups:
        curves.setdefault((group[0].model, group[0].strategy), []).append(group)
    n_models = len({model for (model, strategy) in curves if strategy is not None})
    steps = sorted({group[0].steps for group in groups if group[0].steps is not None})
    drawing = Figure(figsize=(10.5, 3.5), layout="constrained")
    panels = drawing.subplots(1, len(_PANELS))
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        for number, ((model, strategy), of_curve) in enumerate(curves.items()):
            color = f"C{number % 10}"
            found = [(group[0].steps, spread(group, name)) for group in of_curve]
            points = [(step, each) for step, each in found if each is not None]
            if not points:
                continue
            low = [each.value - each.low for _, each in points]
            high = [each.high - each.value for _, each in points]
            values = [each.value for _, each in points]
            if strategy is None:
                axes.axhline(values[0], color=color, linestyle="--", label=legend_label(model))
                axes.axhspan(values[0] - low[0], values[0] + high[0], color=color, alpha=0.15, linewidth=0)
                continue
            label = strategy if n_models == 1 else legend_label(f"{model}, {strategy}")
            x = [step for step, _ in points]
            axes.errorbar(x, values, yerr=[low, high], color=color, marker="o", capsize=3, label=label)
        if steps:
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        if name == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="denoising steps", title=title)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))
    return drawing
