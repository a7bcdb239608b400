"""The keys of `llamafactory-ddm eval`; a key that LLaMA-Factory also has keeps its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..sampling.keywords import split_keys
from ..utils.keys import check_fields, key
from .local_data import check_task_data
from .scoring import SAMPLES


@dataclass
class EvalKeys:
    """The keys of an evaluation, beside those of generation."""

    model_name_or_path: str | None = key(None, "Folder or Hub name of a diffusion model.", kind="path")
    adapter_name_or_path: str | None = key(
        None, "Folder of an adapter. It names its model, so model_name_or_path may be left out.", kind="path"
    )
    task: str | None = key(None, "Required. Tasks of lm-evaluation-harness, separated by commas.", kind="text")
    task_dir: str | None = key(None, "Folder with the YAMLs of your own tasks.", kind="path")
    task_data: Any = key(
        None,
        "Local copies of data sets. Either a folder that holds a folder for each data set, named as on the Hub "
        "(`FOLDER/openai/gsm8k`), or a mapping of tasks or data sets to their folders (`{openai/gsm8k: FOLDER}`). The "
        "folder of a data set holds files such as `test.jsonl` (or `.json`, `.csv`, `.parquet`), in a subfolder for "
        "each configuration if there are several, or a snapshot from the Hub.",
        kind="text",
    )
    n_shot: int | None = key(None, "Number of examples in each prompt. Defaults to the task's.", kind="integer", low=0)
    max_samples: int | None = key(
        None, "Number of documents of each task, from the first. Defaults to all.", kind="integer", low=1
    )
    batch_size: int = key(16, "Rows in a forward pass. Results agree for every value, up to rounding.", low=1)
    save_dir: str | None = key(
        None,
        "Folder of the results; without it they are only printed. Finished requests are kept there, and the same "
        "command goes on where it was interrupted.",
        kind="path",
    )
    template: str | None = key(
        None,
        "LLaMA-Factory's template, in which each prompt is a user's turn. Defaults to none: the prompt as it is.",
        kind="text",
    )
    infer_dtype: str = key(
        "auto",
        "Type of the weights. auto: float32 on a CPU, else the type that they are stored in.",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    max_new_tokens: int | None = key(
        None, "Tokens to generate. Defaults to the task's (max_gen_toks), then to 256.", kind="integer", low=1
    )
    scoring: str = key(
        "bound",
        "How answers are scored. bound: by the evidence bound. llada and diffullama: as in the published evaluations.",
        choices=tuple(SAMPLES),
    )
    likelihood_samples: int | None = key(
        None,
        "Number of random masks from which the likelihood of an answer is estimated. With scoring: bound, an answer "
        "with at most that many masks gets all of them. Defaults to 32, with scoring: llada to 128.",
        kind="integer",
        low=16,
    )
    run_generated_code: bool = key(False, "Allow tasks that run code which the model wrote.")
    plugins: str | None = key(None, "Your own modules or .py files to import first.", kind="modules")

    def __post_init__(self) -> None:
        if isinstance(self.task, list | tuple):
            self.task = ",".join(map(str, self.task))
        for name in ("task", "template"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be text")
        check_fields(self)
        if not self.tasks:
            raise ValueError("task is missing; name tasks of lm-evaluation-harness, such as task: lambada_openai")
        if self.model_name_or_path is None and self.adapter_name_or_path is None:
            raise ValueError("model_name_or_path is missing; set it, or adapter_name_or_path")
        for name in ("task_dir", "save_dir"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_dir() and (name == "task_dir" or Path(path).exists()):
                raise ValueError(f"{name}: {path} is not a folder")

        check_task_data(self.task_data)

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks."""
        return [name.strip() for name in (self.task or "").split(",") if name.strip()]


def read_keys(values: Mapping[str, Any]) -> tuple[EvalKeys, dict[str, Any]]:
    """Return the keys of an evaluation, and those of generation.

    Raises:
        ValueError: for an unknown key or a value that is not allowed.
    """
    own, generation = split_keys(values, [field.name for field in fields(EvalKeys)], "llamafactory-ddm eval")
    return EvalKeys(**own), generation
