"""`tokenized_path`: the settings of prepared rows are saved with them, and checked when the folder is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from llamafactory.extras.misc import has_tokenized_data

FACTS = "llamafactory_ddm.json"
_SAMPLE = 64  # tokens


def is_opened(data_args: Any) -> bool:
    """Tell whether a run reads its rows from tokenized_path; otherwise it prepares them, and may save them there.

    Raises:
        ValueError: if tokenized_path is a file.
    """
    path = data_args.tokenized_path
    if path is not None and Path(path).is_file():
        raise ValueError(f"tokenized_path: {path} is a file; name the folder that holds prepared rows, or a new one")
    return path is not None and bool(has_tokenized_data(path))


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Turn errors of opening tokenized_path into one that names the key.

    Raises:
        ValueError: if the folder cannot be opened.
    """
    try:
        yield
    except (OSError, DatasetsError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenized_path: {path} holds no rows that can be opened ({error}); name a folder that an earlier run "
            "with this key made, or one that does not exist"
        ) from error


def facts_of(stage: str, data_args: Any, *, variable: bool) -> dict[str, Any]:
    """Return the YAML keys that decide the rows of a run; their columns tell the stage."""
    facts: dict[str, Any] = {"packing": bool(data_args.packing), "variable_length": variable}
    if stage == "ddm-sft":
        facts |= {key: getattr(data_args, key, None) for key in ("template", "train_on_prompt", "mask_history")}
    return facts


def write_facts(path: str, facts: dict[str, Any], dataset_module: dict[str, Any], tokenizer: Any) -> None:
    """Save the settings of prepared rows, and the beginning of the first row."""
    first: list[int] = []
    for rows in dataset_module.values():
        part = next(iter(rows.values())) if isinstance(rows, dict) else rows
        first = first or (list(part[0]["input_ids"][:_SAMPLE]) if len(part) else [])
    text = json.dumps({**facts, "ids": first, "text": tokenizer.decode(first)}, indent=2, ensure_ascii=False)
    (Path(path) / FACTS).write_text(text + "\n", encoding="utf-8")


def check_facts(path: str, facts: dict[str, Any], tokenizer: Any) -> None:
    """Check the settings of prepared rows against this run; rows without a settings file are not checked.

    Raises:
        ValueError: if a setting differs, naming the key.
    """
    file = Path(path) / FACTS
    if not file.is_file():
        return
    with opening(path):
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        ids, text = list(known["ids"]), known["text"]
    for key, value in facts.items():
        # Whole texts can be used without variable_length if they are short enough, which is checked later.
        if known.get(key, value) != value and not (key == "variable_length" and not value):
            raise ValueError(
                f"tokenized_path: {path} was made with {key}: {_yaml(known[key])}, and {key} is {_yaml(value)}; set "
                "it as it was then, or prepare the rows again in another folder"
            )
    if tokenizer.decode(ids) != text:
        raise ValueError(
            f"tokenized_path: {path} was made with another tokenizer, under which its first row begins with "
            f"{text[:40]!r}; here it would be {tokenizer.decode(ids)[:40]!r}. Prepare the rows again in another folder"
        )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
