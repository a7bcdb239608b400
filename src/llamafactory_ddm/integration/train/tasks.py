"""`eval_tasks`: tasks of lm-evaluation-harness in each evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...generation.generator import TextGenerator
from ...modeling.prompt_template import PromptTemplate
from ...utils.plugins import load_plugins
from ...utils.processes import broadcast_from_first
from ...utils.random_state import unchanged_random_state
from ...utils.registry import did_you_mean
from ..hparams.sampling import SETTINGS_KEYS, UPSTREAM_KEYS


def load_eval_tasks(training_args: Any, finetuning_args: Any, template: PromptTemplate | None) -> Any:
    """Return the `TaskSet` of eval_tasks, loaded before the model; None without eval_tasks.

    If metric_for_best_model is a metric of a task and the YAML does not set greater_is_better, it is set to what the
    task says.

    Args:
        training_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        template: what the run puts prompts into, or None.
    Raises:
        ValueError: if a task or the metric for the best model does not exist, or a task cannot be used.
    """
    if not finetuning_args.eval_tasks:
        return None
    from ...harness.run import load_tasks  # lm-eval is optional

    load_plugins(finetuning_args.plugins)
    with training_args.main_process_first(desc="load eval_tasks"), unchanged_random_state():
        tasks = load_tasks(
            finetuning_args.eval_task_names,
            folder=finetuning_args.eval_task_dir,
            template=_name(template),
            run_generated_code=finetuning_args.run_generated_code,
            key="eval_tasks",
        )
    _resolve_best_metric(tasks, training_args, finetuning_args.parsed.user_keys)
    return tasks


def _resolve_best_metric(tasks: Any, training_args: Any, user_keys: frozenset[str]) -> None:
    """Check that metric_for_best_model, if it names a task, is one of its metrics, and set greater_is_better."""
    name = training_args.metric_for_best_model
    if name is None:
        return
    name = name if name.startswith("eval_") else f"eval_{name}"
    higher_is_better = {f"eval_{metric}": higher for metric, higher in tasks.higher_is_better().items()}
    if name in higher_is_better:
        if "greater_is_better" not in user_keys and higher_is_better[name] is not None:
            training_args.greater_is_better = higher_is_better[name]
    elif any(name.startswith(f"eval_{task}_") for task in tasks.names):
        raise ValueError(
            f"metric_for_best_model: {training_args.metric_for_best_model} is no metric of eval_tasks"
            f"{did_you_mean(name, higher_is_better)}; they give {', '.join(higher_is_better)}"
        )


@dataclass(frozen=True)
class TaskEvaluation:
    """Evaluates the model in training on tasks, as `llamafactory-ddm eval` evaluates a saved one.

    Attributes:
        tasks: the `TaskSet`.
        generator: the model in training.
        sampling: keys of generation that the user wrote; they take precedence over those of a task.
        max_samples: documents of each task; None for all.
        max_new_tokens: tokens to generate; None for what the task says.
        batch_size: rows in a forward pass.
        hide_progress: whether no progress bars are shown.
    """

    tasks: Any
    generator: TextGenerator
    sampling: Mapping[str, Any]
    max_samples: int | None
    max_new_tokens: int | None
    batch_size: int
    hide_progress: bool

    def metrics(self, world: int) -> dict[str, float]:
        """Return the metrics by `eval_TASK_METRIC`; called on every process, and the same on all.

        Raises:
            ValueError: if a document does not fit the model, or its logits are NaN or infinite.
        """
        from ...harness.model import DiffusionLM

        model = DiffusionLM(
            self.generator,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            template=_name(self.generator.config.template),
            hide_progress=self.hide_progress,
            **self.sampling,
        )
        results = self.tasks.run(model, max_samples=self.max_samples, hide_progress=self.hide_progress)
        found = {} if results is None else self.tasks.metrics(results)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        shared: dict[str, float] = broadcast_from_first(metrics, world)
        return shared


def _name(template: PromptTemplate | None) -> str | None:
    return None if template is None else template.name or ""


def user_sampling(finetuning_args: Any, generating_args: Any, user_keys: frozenset[str]) -> dict[str, Any]:
    """Return the keys of generation that the user wrote, by name."""
    ours = {name: getattr(finetuning_args, name) for name in SETTINGS_KEYS if name in user_keys}
    upstream = {
        name: getattr(generating_args, name)
        for name in UPSTREAM_KEYS
        if name in user_keys and name != "max_new_tokens" and UPSTREAM_KEYS[name] not in ours
    }
    return {name: value for name, value in {**ours, **upstream}.items() if value is not None}
