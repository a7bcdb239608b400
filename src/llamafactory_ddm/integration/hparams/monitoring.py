"""The YAML keys of what a run shows while it trains: generated texts, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.keys import key

# Key -> the key without which it has no effect.
NEEDS = {
    **dict.fromkeys(("sample_prompts", "sample_count", "sample_length"), "sample_steps"),
    **dict.fromkeys(("eval_task_dir", "eval_task_samples", "run_generated_code"), "eval_tasks"),
}


@dataclass
class MonitoringKeys:
    """Keys of texts and tasks during training."""

    sample_steps: int | None = key(
        None,
        "Every so many optimiser steps, generate texts with the present weights: into the log, samples.jsonl and "
        "TensorBoard. 0, or leaving it out, turns it off.",
        kind="integer",
        low=0,
    )
    # A YAML may give a list; upstream's command-line parser allows one type in the annotation.
    sample_prompts: str | None = key(
        None,
        "Prompts of these texts; each gives one text. Defaults to no prompt with stage: ddm, and with stage: ddm-sft "
        "to the first prompts of the evaluation data, or of the training data if there is none.",
        kind="texts",
    )
    sample_count: int | None = key(
        None,
        "Number of these texts. Defaults to 4, or one for each of sample_prompts.",
        kind="integer",
        low=1,
        high=64,
    )
    sample_length: int | None = key(
        None,
        "Tokens to generate for each of these texts. Defaults to max_new_tokens, then to what the prompt leaves of "
        "cutoff_len.",
        kind="integer",
        low=1,
    )
    eval_tasks: str | None = key(
        None,
        "Tasks of lm-evaluation-harness that each evaluation runs too; their metrics are called eval_TASK_METRIC.",
        kind="names",
    )
    eval_task_dir: str | None = key(None, "Folder with the YAMLs of your own tasks, for eval_tasks.", kind="path")
    eval_task_samples: int | None = key(
        None, "Number of documents of each of eval_tasks, from the first. Defaults to all.", kind="integer", low=1
    )
    run_generated_code: bool = key(False, "Allow tasks in eval_tasks that run code which the model wrote.")

    def check_monitoring(self) -> None:
        """Check the keys that depend on each other.

        Raises:
            ValueError: naming both keys.
        """
        for name, needed in NEEDS.items():
            if getattr(self, name) != getattr(MonitoringKeys, name) and getattr(self, needed) is None:
                raise ValueError(f"{name}: has no effect without {needed}; set {needed}, or remove {name}")
        if self.sample_prompts is not None and self.sample_count is not None:
            raise ValueError(
                f"sample_count: {self.sample_count} and sample_prompts exclude each other, as each prompt gives one "
                "text; remove one of them"
            )
        if self.eval_tasks == "":
            raise ValueError("eval_tasks is empty; name tasks of lm-evaluation-harness, or remove it")

    @property
    def eval_task_names(self) -> list[str]:
        """Return the names of the tasks."""
        return self.eval_tasks.split(",") if self.eval_tasks else []
