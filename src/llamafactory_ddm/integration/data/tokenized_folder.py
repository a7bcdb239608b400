"""`tokenized_path`: saves the settings of prepared rows with them, and checks them when a run reads the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from llamafactory.extras.misc import has_tokenized_data

from ...data.corpus.prepare import is_unfinished

SETTINGS_FILE = "llamafactory_ddm.json"
_N_SAMPLE = 64  # tokens of the first row


def has_prepared_rows(data_args: Any) -> bool:
    """Tell whether tokenized_path holds prepared rows; if not, the run prepares rows and saves them there.

    Raises:
        ValueError: if tokenized_path is a file, or prepare-data has not finished it.
    """
    path = data_args.tokenized_path
    if path is not None and is_unfinished(path):
        raise ValueError(
            f"tokenized_path: {path} is half written: llamafactory-ddm prepare-data was interrupted; run it again, "
            "and it goes on where it stopped"
        )
    if path is not None and Path(path).is_file():
        raise ValueError(f"tokenized_path: {path} is a file; name a folder of prepared rows, or a new one")
    return path is not None and bool(has_tokenized_data(path))


@contextmanager
def explain_open_errors(path: str) -> Iterator[None]:
    """Replace errors of opening tokenized_path by one that names the key.

    Raises:
        ValueError: if the folder cannot be opened.
    """
    try:
        yield
    except (OSError, DatasetsError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenized_path: {path} cannot be opened ({error}); name a folder that an earlier run with this key "
            "made, or one that does not exist"
        ) from error


def row_settings(stage: str, data_args: Any, *, variable: bool) -> dict[str, Any]:
    """Return the YAML keys that determine the rows of a run, except the stage, which their columns show."""
    settings: dict[str, Any] = {"packing": bool(data_args.packing), "variable_length": variable}
    if stage == "ddm-sft":
        settings |= {key: getattr(data_args, key, None) for key in ("template", "train_on_prompt", "mask_history")}
    return settings


def write_row_settings(path: str, settings: dict[str, Any], dataset_module: dict[str, Any], tokenizer: Any) -> None:
    """Save the settings of prepared rows, and the beginning of the first row."""
    ids: list[int] = []
    for split in dataset_module.values():
        rows = next(iter(split.values())) if isinstance(split, dict) else split
        ids = ids or (list(rows[0]["input_ids"][:_N_SAMPLE]) if len(rows) else [])
    text = json.dumps({**settings, "ids": ids, "text": tokenizer.decode(ids)}, indent=2, ensure_ascii=False)
    (Path(path) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def check_row_settings(path: str, settings: dict[str, Any], tokenizer: Any) -> None:
    """Check that prepared rows have the settings of this run; rows without a settings file are not checked.

    Raises:
        ValueError: if a setting differs, naming the key.
    """
    file = Path(path) / SETTINGS_FILE
    if not file.is_file():
        return
    with explain_open_errors(path):
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        ids, text = list(stored["ids"]), stored["text"]
    for key, value in settings.items():
        # Rows of variable length also serve without that key if they are short enough; that is checked later.
        if stored.get(key, value) != value and not (key == "variable_length" and not value):
            raise ValueError(
                f"tokenized_path: {path} was prepared with {key}: {_yaml(stored[key])}, but {key} is {_yaml(value)}; "
                f"set {key}: {_yaml(stored[key])}, or prepare the rows again in another folder"
            )
    if tokenizer.decode(ids) != text:
        raise ValueError(
            f"tokenized_path: {path} was prepared with another tokenizer, which decodes its first row to "
            f"{text[:40]!r}; this run's decodes it to {tokenizer.decode(ids)[:40]!r}. Prepare the rows again in "
            "another folder"
        )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
