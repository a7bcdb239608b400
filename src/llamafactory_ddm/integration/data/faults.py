"""Finds the fault in a data set that LLaMA-Factory could not prepare: the file, example, message, and what to do."""

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
from llamafactory.extras.constants import FILEEXT2TYPE

_TEXT = ("prompt", "query", "response", "system", "tools")
_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
# Usual names of roles, by the tag that names them.
_USUAL = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt", "bot", "model"),
    "observation_tag": ("observation", "tool", "tool_response", "function_response", "ipython"),
    "function_tag": ("function_call", "function", "tool_call"),
    "system_tag": ("system", "developer"),
}
_READABLE = ("json", "csv", "text")


class DataFault(ValueError):
    """A fault in a data set; the message follows the name of the data set."""


def find_fault(names: list[str], data_args: Any) -> str | None:
    """Return the name and the fault of the first faulty data set, or None.

    Faults that make LLaMA-Factory fail come before faults for which it drops an example.

    Args:
        names: names in dataset_info.json.
        data_args: LLaMA-Factory's.
    """
    for leaves_out in (False, True):
        for name in names:
            try:
                _check(name, data_args, leaves_out=leaves_out)
            except DataFault as fault:
                return f"{name}{' ' if str(fault).startswith('has ') else ': '}{fault}"
    return None


def _check(name: str, data_args: Any, *, leaves_out: bool) -> None:
    attr = _entry(name, data_args)
    columns: dict[str, None] = {}
    first: DataFault | None = None
    for number, row in enumerate(_rows(attr, data_args)):
        columns.update(dict.fromkeys(row))
        if first is None:
            try:
                check = _of_fields if attr.formatting == "alpaca" else _of_messages
                check(row, attr, leaves_out=leaves_out)
            except DataFault as fault:
                first = DataFault(f"example {number} {fault}")
    keys = _TEXT if attr.formatting == "alpaca" else ("messages", "system", "tools")
    for key in keys:
        column = getattr(attr, key)
        optional = attr.formatting == "openai" and key != "messages"
        if column is not None and columns and column not in columns and not optional:
            raise DataFault(
                f"has no column {column!r}, which its entry in dataset_info.json (or the default of its formatting) "
                f"names as {key}; it has {', '.join(map(repr, columns))}. Add the column to the data, or name the "
                "right one under columns"
            )
    if first is not None:
        raise first


def _entry(name: str, data_args: Any) -> Any:
    try:
        (attr,) = get_dataset_list([name], data_args.dataset_dir)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataFault(
            f"its entry in dataset_info.json cannot be read ({type(error).__name__}: {error}); it needs a file_name, "
            "and columns and tags, if there are any, are tables of names"
        ) from error
    if attr.formatting not in DATASET_CONVERTERS:
        raise DataFault(
            f"its entry in dataset_info.json says formatting: {attr.formatting}; it is one of "
            f"{', '.join(DATASET_CONVERTERS)}"
        )
    return attr


def _rows(attr: Any, data_args: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows in a data set's files; nothing if the files are not local."""
    path = Path(str(data_args.dataset_dir)) / attr.dataset_name
    if attr.load_from != "file" or not path.exists():
        return
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        kind = FILEEXT2TYPE.get(file.suffix[1:])
        if kind in _READABLE:
            _check_text(file)
        if kind == "json":
            yield from _json_rows(file)
        elif kind is not None:
            try:
                yield from load_dataset(kind, data_files=str(file), split="train")
            except (DatasetsError, ValueError) as error:
                raise DataFault(f"{file} cannot be read as {kind} ({error.__cause__ or error})") from error


def _check_text(file: Path) -> None:
    """Check that a file is UTF-8."""
    offset = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                start = (
                    f"line {number}, its byte {error.start + 1}, which is byte {offset + error.start + 1} of the file"
                )
                raise DataFault(
                    f"{file} is not UTF-8: {start}, is 0x{line[error.start]:02x} ({error.reason}); save it as UTF-8, "
                    f"as with iconv -f LATIN1 -t UTF-8 {os.path.basename(file)}"
                ) from error
            offset += len(line)


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        begins = next((line.strip()[:1] for line in stream if line.strip()), "")
        stream.seek(0)
        entries = _whole(file, stream.read()) if begins == "[" else _lines(file, stream)
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataFault(
                    f"entry {number} of {file} is {_said(entry)}, where an object with columns is expected"
                )
            yield entry


def _whole(file: Path, text: str) -> list[Any]:
    try:
        entries: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFault(
            f"{file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; mend that place"
        ) from error
    return entries


def _lines(file: Path, lines: Any) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFault(
                f"{file} is not JSON: line {number}, column {error.colno}: {error.msg}; each line must be one object "
                "(or the whole file one list of objects)"
            ) from error


def _of_fields(row: dict[str, Any], attr: Any, *, leaves_out: bool) -> None:
    """Check an example in alpaca format, with one column for each part."""
    for key in _TEXT:
        value = row.get(getattr(attr, key)) if getattr(attr, key) else None
        if value is not None and not isinstance(value, str):
            raise DataFault(
                f"has {_said(value)} in column {getattr(attr, key)!r}, where text is expected; write it as text, in "
                "quotes"
            )
    turns = row.get(attr.history) if attr.history else None
    for turn in turns or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataFault(
                f"has {_said(turn)} in column {attr.history!r}, which holds pairs of texts, a question and its answer"
            )
    if leaves_out and attr.response and row.get(attr.response) is None:
        raise DataFault(
            f"has no response: its column {attr.response!r} is empty; give each example one, or name the right column "
            "as response"
        )


def _of_messages(row: dict[str, Any], attr: Any, *, leaves_out: bool) -> None:
    """Check an example with a list of messages."""
    messages = row.get(attr.messages)
    if not isinstance(messages, list):
        if attr.messages in row:
            raise DataFault(f"has {_said(messages)} in column {attr.messages!r}, where a list of messages is expected")
        return
    if leaves_out and not messages:
        raise DataFault(f"has no message in column {attr.messages!r}; leave such examples out")
    for number, message in enumerate(messages):
        _of_message(message, attr, f"in message {number} of column {attr.messages!r}")
    if leaves_out:
        roles = [message[attr.role_tag] for message in messages]
        roles = roles[1:] if roles[0] == attr.system_tag else roles
        if attr.formatting == "openai":  # several results of tools in a row are one
            pairs = zip(roles, [None, *roles], strict=False)
            roles = [role for role, before in pairs if not role == before == attr.observation_tag]
        answers = [role in (attr.assistant_tag, attr.function_tag) for role in roles]
        if answers != [False, True] * (len(answers) // 2):
            raise DataFault(
                f"has messages of the roles {', '.join(map(str, roles))}: they must alternate, the user's before the "
                "assistant's, and end with an answer"
            )


def _of_message(message: Any, attr: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataFault(f"has {_said(message)} {where}, where a role and a content are expected")
    for tag in ("role_tag", "content_tag"):
        if getattr(attr, tag) not in message:
            raise DataFault(
                f"has no {getattr(attr, tag)!r} {where}, which has {', '.join(map(repr, message))}; name the right "
                f"one as {tag} under tags in dataset_info.json"
            )
    role, content = message[attr.role_tag], message[attr.content_tag]
    known = {tag: getattr(attr, tag) for tag in _TAGS if getattr(attr, tag) is not None}
    if role not in known.values():
        tag = next((tag for tag, usual in _USUAL.items() if role in usual), "observation_tag")
        raise DataFault(
            f"has the role {role!r} {where}, which its entry in dataset_info.json does not know: its tags are "
            f"{', '.join(f'{key}: {value}' for key, value in known.items())}. Add the role under tags, as in "
            f"{tag}: {role}"
        )
    calls = attr.formatting == "openai" and message.get("tool_calls")
    if not isinstance(content, str) and not calls:
        raise DataFault(
            f"has {_said(content)} for content {where} (role {role!r}), where text is expected; write it as text, or "
            "leave the example out"
        )


def _said(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}
    if value is None:
        return "nothing (null)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kinds.get(type(value), 'a ' + type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '...'})"


# What LLaMA-Factory and datasets raise for data that do not fit their entry.
_OF_DATA = (DatasetsError, AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError)


_NO_ROW = re.compile("sufficient samples|valid samples")


@contextmanager
def explain_dataset_errors(data_args: Any, names: list[str] | None = None) -> Iterator[None]:
    """Turn LLaMA-Factory's errors about data into one that says where the fault is and what to do.

    Args:
        data_args: LLaMA-Factory's.
        names: the data sets to generate from; None for the training and evaluation data.
    """
    try:
        yield
    except _OF_DATA as error:
        read = names or [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
        fault = find_fault(read, data_args)
        if fault is not None:
            raise ValueError(f"dataset: {fault}") from error
        cause = error.__cause__ or error
        if isinstance(cause, (SchemaInferenceError, StopIteration, IndexError)) or _NO_ROW.search(str(cause)):
            raise ValueError(no_block(data_args, names)) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"dataset: {', '.join(read)} could not be prepared ({type(cause).__name__}: {cause}); check the data "
            "against their entry in dataset_info.json"
        ) from error


def no_block(data_args: Any, names: list[str] | None = None) -> str:
    """Return the error message for data without a row to train on, or with `names` without a text to generate from."""
    if names:
        return f"dataset: {', '.join(names)} holds no text; check the file against its entry in dataset_info.json"
    packed = f", because all texts together are shorter than one block of cutoff_len: {data_args.cutoff_len} tokens"
    parts = " or, as streaming: true reads a local file in that many parts, set dataloader_num_workers: 1 or more"
    return (
        f"dataset: {dataset_names(data_args)} is empty or gives no row{packed if data_args.packing else ''}; "
        f"check the file, lower cutoff_len or set packing: false{parts if data_args.streaming else ''}"
    )


def dataset_names(data_args: Any) -> str:
    """Return the names of the training data sets, or else the evaluation data sets or tokenized_path, as text."""
    name = data_args.dataset or data_args.eval_dataset or data_args.tokenized_path
    return ", ".join(name) if isinstance(name, (list, tuple)) else str(name)


def check_not_empty(rows: Any, data_args: Any) -> None:
    """Check that there is at least one training row.

    Raises:
        ValueError: if the data set is empty.
    """
    if rows is None or (hasattr(rows, "__len__") and len(rows) == 0):
        raise ValueError(no_block(data_args))
