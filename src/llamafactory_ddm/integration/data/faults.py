"""Finds the cause when LLaMA-Factory cannot prepare a data set: the file, the example or message, and the remedy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetsError
from llamafactory.data.converter import DATASET_CONVERTERS
from llamafactory.data.parser import get_dataset_list
from llamafactory.extras.constants import DATA_CONFIG, FILEEXT2TYPE

from ...utils.registry import did_you_mean

_TEXT_COLUMNS = ("prompt", "query", "response", "system", "tools")
_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
# Common role names, by the tag that declares them.
_COMMON_ROLES = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt", "bot", "model"),
    "observation_tag": ("observation", "tool", "tool_response", "function_response", "ipython"),
    "function_tag": ("function_call", "function", "tool_call"),
    "system_tag": ("system", "developer"),
}
_TEXT_FILES = ("json", "csv", "text")


class DataFault(ValueError):
    """A fault in a data set; its message is appended to the name of the data set."""


def find_fault(names: list[str], data_args: Any) -> str | None:
    """Return the name and the fault of the first faulty data set, or None.

    Faults that make LLaMA-Factory fail are searched first, then faults for which it silently drops an example.

    Args:
        names: names in dataset_info.json.
        data_args: LLaMA-Factory's.
    """
    for check_dropped in (False, True):
        for name in names:
            try:
                _check_data_set(name, data_args, check_dropped=check_dropped)
            except DataFault as fault:
                return f"{name}{' ' if str(fault).startswith('has ') else ': '}{fault}"
    return None


def _check_data_set(name: str, data_args: Any, *, check_dropped: bool) -> None:
    attr = _load_entry(name, data_args)
    check_example = _check_alpaca if attr.formatting == "alpaca" else _check_messages
    columns: dict[str, None] = {}
    first_fault: DataFault | None = None
    for number, example in enumerate(_read_examples(attr, data_args)):
        columns.update(dict.fromkeys(example))
        if first_fault is None:
            try:
                check_example(example, attr, check_dropped=check_dropped)
            except DataFault as fault:
                first_fault = DataFault(f"example {number} {fault}")
    keys = _TEXT_COLUMNS if attr.formatting == "alpaca" else ("messages", "system", "tools")
    for key in keys:
        column = getattr(attr, key)
        optional = attr.formatting == "openai" and key != "messages"
        if column is not None and columns and column not in columns and not optional:
            raise DataFault(
                f"has no column {column!r}, the {key} of its entry in dataset_info.json (or of its formatting's "
                f"default); it has {', '.join(map(repr, columns))}. Add the column to the data, or set {key} under "
                "columns"
            )
    if first_fault is not None:
        raise first_fault


def _load_entry(name: str, data_args: Any) -> Any:
    _check_listed(name, data_args.dataset_dir)
    try:
        (attr,) = get_dataset_list([name], data_args.dataset_dir)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataFault(
            f"its entry in dataset_info.json is malformed ({type(error).__name__}: {error}); it needs a file_name, "
            "and columns and tags, if present, must be objects"
        ) from error
    if attr.formatting not in DATASET_CONVERTERS:
        raise DataFault(
            f"its entry in dataset_info.json has formatting: {attr.formatting}; set it to one of "
            f"{', '.join(DATASET_CONVERTERS)}"
        )
    return attr


def _check_listed(name: str, folder: str | dict[str, Any]) -> None:
    """Check that a data set has an entry in the dataset_info.json of a local folder."""
    if isinstance(folder, dict) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    path = Path(folder) / DATA_CONFIG
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFault(f"{path} cannot be read ({error}); correct dataset_dir, or the file") from error
    if isinstance(known, dict) and name not in known:
        raise DataFault(
            f"{path} has no entry of this name{did_you_mean(name, known)}; correct the name, or add an entry"
        )


def _read_examples(attr: Any, data_args: Any) -> Iterator[dict[str, Any]]:
    """Yield the examples in a data set's files; nothing if the files are not local."""
    path = Path(str(data_args.dataset_dir)) / attr.dataset_name
    if attr.load_from != "file" or not path.exists():
        return
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        file_type = FILEEXT2TYPE.get(file.suffix[1:])
        if file_type in _TEXT_FILES:
            _check_utf8(file)
        if file_type == "json":
            yield from _read_json(file)
        elif file_type is not None:
            try:
                yield from load_dataset(file_type, data_files=str(file), split="train")
            except (DatasetsError, ValueError) as error:
                raise DataFault(f"{file} cannot be read as {file_type} ({error.__cause__ or error})") from error


def _check_utf8(file: Path) -> None:
    """Check that a file is UTF-8."""
    offset = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position = f"line {number}, byte {error.start + 1} (byte {offset + error.start + 1} of the file)"
                raise DataFault(
                    f"{file} is not UTF-8: {position} is 0x{line[error.start]:02x} ({error.reason}); convert the "
                    f"file, for example with iconv -f LATIN1 -t UTF-8 {os.path.basename(file)}"
                ) from error
            offset += len(line)


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        first_character = next((line.strip()[:1] for line in stream if line.strip()), "")
        stream.seek(0)
        examples = _parse_list(file, stream.read()) if first_character == "[" else _parse_lines(file, stream)
        for number, example in enumerate(examples):
            if not isinstance(example, dict):
                raise DataFault(
                    f"example {number} of {file} is {_describe(example)}, expected an object with one key per column"
                )
            yield example


def _parse_list(file: Path, text: str) -> list[Any]:
    try:
        examples: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFault(
            f"{file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; correct the file"
        ) from error
    return examples


def _parse_lines(file: Path, lines: Any) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFault(
                f"{file} is not JSON: line {number}, column {error.colno}: {error.msg}; write one object per line "
                "(or the whole file as one list of objects)"
            ) from error


def _check_alpaca(row: dict[str, Any], attr: Any, *, check_dropped: bool) -> None:
    """Check an example in alpaca format, with one column for each part."""
    for key in _TEXT_COLUMNS:
        value = row.get(getattr(attr, key)) if getattr(attr, key) else None
        if value is not None and not isinstance(value, str):
            raise DataFault(
                f"has {_describe(value)} in column {getattr(attr, key)!r}, expected a string; write it as one, or "
                "remove the example"
            )
    turns = row.get(attr.history) if attr.history else None
    for turn in turns or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataFault(
                f"has {_describe(turn)} in column {attr.history!r}, expected pairs of strings [question, answer]"
            )
    if check_dropped and attr.response and row.get(attr.response) is None:
        raise DataFault(
            f"has no response: its column {attr.response!r} is empty; fill it in, or set response under columns to "
            "another column"
        )


def _check_messages(row: dict[str, Any], attr: Any, *, check_dropped: bool) -> None:
    """Check an example with a list of messages."""
    messages = row.get(attr.messages)
    if not isinstance(messages, list):
        if attr.messages in row:
            raise DataFault(f"has {_describe(messages)} in column {attr.messages!r}, expected a list of messages")
        return
    if check_dropped and not messages:
        raise DataFault(f"has no message in column {attr.messages!r}; remove such examples")
    for number, message in enumerate(messages):
        _check_message(message, attr, f"in message {number} of column {attr.messages!r}")
    if check_dropped:
        roles = [message[attr.role_tag] for message in messages]
        roles = roles[1:] if roles[0] == attr.system_tag else roles
        if attr.formatting == "openai":  # consecutive tool results count as one
            pairs = zip(roles, [None, *roles], strict=False)
            roles = [role for role, previous in pairs if not role == previous == attr.observation_tag]
        is_answer = [role in (attr.assistant_tag, attr.function_tag) for role in roles]
        if is_answer != [False, True] * (len(is_answer) // 2):
            raise DataFault(
                f"has messages with the roles {', '.join(map(str, roles))}; user and assistant must alternate, "
                "starting with the user and ending with the assistant"
            )


def _check_message(message: Any, attr: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataFault(f"has {_describe(message)} {where}, expected an object with a role and a content")
    for tag in ("role_tag", "content_tag"):
        if getattr(attr, tag) not in message:
            raise DataFault(
                f"has no {getattr(attr, tag)!r} {where}, which has {', '.join(map(repr, message))}; set {tag} under "
                "tags in dataset_info.json to one of them"
            )
    role, content = message[attr.role_tag], message[attr.content_tag]
    tags = {tag: getattr(attr, tag) for tag in _TAGS if getattr(attr, tag) is not None}
    if role not in tags.values():
        tag = next((tag for tag, roles in _COMMON_ROLES.items() if role in roles), "observation_tag")
        raise DataFault(
            f"has the role {role!r} {where}, but the tags of its entry in dataset_info.json are "
            f"{', '.join(f'{key}: {value}' for key, value in tags.items())}; add the role under tags, for example "
            f"{tag}: {role}"
        )
    calls = attr.formatting == "openai" and message.get("tool_calls")
    if not isinstance(content, str) and not calls:
        raise DataFault(
            f"has {_describe(content)} as content {where} (role {role!r}), expected a string; write it as one, "
            "or remove the example"
        )


def _describe(value: Any) -> str:
    """Return the JSON type of a value and its beginning, as text."""
    types = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{types.get(type(value), 'a ' + type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '...'})"


# Raised by LLaMA-Factory and datasets if the data do not match their entry in dataset_info.json.
_ERRORS = (DatasetsError, AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError)
_NO_ROW = re.compile("sufficient samples|valid samples")


@contextmanager
def explain_dataset_errors(data_args: Any, names: list[str] | None = None) -> Iterator[None]:
    """Replace LLaMA-Factory's errors about data by one that names the data set, the fault and the remedy.

    Args:
        data_args: LLaMA-Factory's.
        names: the data sets to generate from; None for the training and evaluation data.
    Raises:
        ValueError: in place of any error about data.
    """
    try:
        yield
    except _ERRORS as error:
        data_sets = names or [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
        fault = find_fault(data_sets, data_args)
        if fault is not None:
            raise ValueError(f"dataset: {fault}") from error
        cause = error.__cause__ or error
        if isinstance(cause, (SchemaInferenceError, StopIteration, IndexError)) or _NO_ROW.search(str(cause)):
            raise ValueError(_no_row_message(data_args, names)) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"dataset: {', '.join(data_sets)} could not be prepared ({type(cause).__name__}: {cause}); check the data "
            "against their entry in dataset_info.json"
        ) from error


def _no_row_message(data_args: Any, names: list[str] | None = None) -> str:
    """Return the error message for training data without a row, or for data to generate from without a text."""
    if names:
        return f"dataset: {', '.join(names)} has no text; check the file against its entry in dataset_info.json"
    cause = (
        f", because all texts together are shorter than one block of cutoff_len: {data_args.cutoff_len} tokens; check "
        "the file, lower cutoff_len, or set packing: false"
    )
    remedies = cause if data_args.packing else "; check the file"
    workers = ", or set dataloader_num_workers to at least 1, as streaming: true splits a local file by that number"
    return f"dataset: {dataset_names(data_args)} has no row{remedies}{workers if data_args.streaming else ''}"


def dataset_names(data_args: Any) -> str:
    """Return the names of the training data sets, else of the evaluation data sets, else tokenized_path, as text."""
    name = data_args.dataset or data_args.eval_dataset or data_args.tokenized_path
    return ", ".join(name) if isinstance(name, (list, tuple)) else str(name)


def check_not_empty(rows: Any, data_args: Any) -> None:
    """Check that there is at least one training row.

    Raises:
        ValueError: if the data set is empty.
    """
    if rows is None or (hasattr(rows, "__len__") and len(rows) == 0):
        raise ValueError(_no_row_message(data_args))
