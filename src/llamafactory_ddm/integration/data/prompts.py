"""Loads the examples of a data set to generate from: all of them, in order, with or without an answer."""

from __future__ import annotations

from typing import Any

from llamafactory.data.converter import DATASET_CONVERTERS, register_dataset_converter
from llamafactory.data.data_utils import merge_dataset, split_dataset
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list

_PREFIX = "prompts-of-"
# Columns that LLaMA-Factory reads by default, and that examples to generate from may lack.
_DEFAULT_COLUMNS = {"response": "output", "query": "input"}
_EMPTY_ANSWER = [{"role": "assistant", "content": ""}]


def load_examples(names: list[str], model_args: Any, data_args: Any, training_args: Any) -> Any:
    """Return the examples of data sets in LLaMA-Factory's standard format; a missing answer becomes an empty one.

    With val_size and without eval_dataset, return the validation split only.

    Args:
        names: names of data sets.
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's; its seed determines the split.
    Raises:
        ValueError: if a data set holds preferences.
    """
    _register_lenient_converters()
    data_sets = []
    for name, entry in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        if entry.ranking:
            raise ValueError(f"dataset: {name} holds preferences (ranking: true); name a data set of prompts")
        if _PREFIX + entry.formatting in DATASET_CONVERTERS:
            entry.formatting = _PREFIX + entry.formatting
        data_sets.append(_load_single_dataset(entry, model_args, data_args, training_args))
    merged = merge_dataset(data_sets, data_args, seed=training_args.seed)
    if data_args.eval_dataset or not data_args.val_size:
        return merged
    return split_dataset(merged, None, data_args, seed=training_args.seed)[1]["validation"]


def _register_lenient_converters() -> None:
    for name, converter in list(DATASET_CONVERTERS.items()):
        if not name.startswith(_PREFIX) and _PREFIX + name not in DATASET_CONVERTERS:
            register_dataset_converter(_PREFIX + name, _lenient_converter(converter))


def _lenient_converter(converter: type[Any]) -> type[Any]:
    """Return a subclass of a LLaMA-Factory converter that keeps examples without an answer."""

    class Lenient(converter):  # type: ignore[misc]
        def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
            converted = super().__call__(_add_missing_parts(self.dataset_attr, dict(example)))
            # The features inferred from an empty list would not match those of later examples.
            return {**converted, "_response": converted["_response"] or _EMPTY_ANSWER}

    Lenient.__name__ = Lenient.__qualname__ = f"Lenient{converter.__name__}"
    return Lenient


def _add_missing_parts(entry: Any, example: dict[str, Any]) -> dict[str, Any]:
    """Return an example with the default columns that LLaMA-Factory reads, and an answer to its last turn."""
    for key, default in _DEFAULT_COLUMNS.items():
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
