"""The examples of a data set to generate from: all of them in order, with or without an answer."""

from __future__ import annotations

from typing import Any

from llamafactory.data.converter import DATASET_CONVERTERS, register_dataset_converter
from llamafactory.data.data_utils import merge_dataset, split_dataset
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list

_PREFIX = "prompts-of-"
# Columns that an entry of dataset_info.json need not name, and that examples may lack.
_DEFAULTS = {"response": "output", "query": "input"}
_UNANSWERED = [{"role": "assistant", "content": ""}]


def examples(names: list[str], model_args: Any, data_args: Any, training_args: Any) -> Any:
    """Return the examples of data sets in LLaMA-Factory's standard format; a missing answer is an empty one.

    With val_size and without eval_dataset they are the validation split.

    Args:
        names: names of data sets.
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's; its seed decides the split.
    Raises:
        ValueError: if a data set holds preferences.
    """
    _register()
    parts = []
    for name, entry in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        if entry.ranking:
            raise ValueError(f"dataset: {name} holds preferences (ranking: true), which are no prompts")
        if _PREFIX + entry.formatting in DATASET_CONVERTERS:
            entry.formatting = _PREFIX + entry.formatting
        parts.append(_load_single_dataset(entry, model_args, data_args, training_args))
    rows = merge_dataset(parts, data_args, seed=training_args.seed)
    if data_args.eval_dataset or not data_args.val_size:
        return rows
    return split_dataset(rows, None, data_args, seed=training_args.seed)[1]["validation"]


def _register() -> None:
    for name, kind in list(DATASET_CONVERTERS.items()):
        if not name.startswith(_PREFIX) and _PREFIX + name not in DATASET_CONVERTERS:
            register_dataset_converter(_PREFIX + name, _lenient(kind))


def _lenient(kind: type[Any]) -> type[Any]:
    """Return a subclass of a LLaMA-Factory converter that keeps examples without an answer."""

    class Lenient(kind):  # type: ignore[misc]
        def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
            found = super().__call__(_completed(self.dataset_attr, dict(example)))
            # An empty list would have no element type, and later examples would not fit it.
            return {**found, "_response": found["_response"] or _UNANSWERED}

    Lenient.__name__ = Lenient.__qualname__ = f"Lenient{kind.__name__}"
    return Lenient


def _completed(entry: Any, example: dict[str, Any]) -> dict[str, Any]:
    """Return an example with the columns that LLaMA-Factory reads, and an answer to its last turn."""
    for key, default in _DEFAULTS.items():
        if getattr(entry, key, None) == default:
            example.setdefault(default, None)
    turns = example.get(entry.messages or "") if "messages" in vars(entry) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return example
    role, content = turns[-1].get(entry.role_tag), turns[-1].get(entry.content_tag)
    if role in (entry.user_tag, entry.observation_tag):
        turns = [*turns, {entry.role_tag: entry.assistant_tag, entry.content_tag: ""}]
    elif role == entry.assistant_tag and content is None and not turns[-1].get("tool_calls"):
        turns = [*turns[:-1], {**turns[-1], entry.content_tag: ""}]
    return {**example, entry.messages: turns}
