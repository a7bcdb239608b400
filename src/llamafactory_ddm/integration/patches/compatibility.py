"""Checks, before patching, that the installed LLaMA-Factory has the functions and arguments that the patches need."""

from __future__ import annotations

import ast
import inspect
import itertools
from dataclasses import fields, is_dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from packaging.version import Version

from ..hparams.diffusion import DiffusionArguments

SUPPORTED = ("0.9.4", "0.9.7")  # from (inclusive), to (exclusive)
_SERVED_ARGS = ["model_args", "data_args", "finetuning_args", "generating_args"]
# Function of hparams.parser -> its parameters, and the replaced functions that it must call by name.
_FUNCTIONS: dict[str, tuple[list[str], list[str]]] = {
    "_parse_args": (["parser", "args", "allow_extra_keys"], []),
    "_parse_train_args": (["args"], ["_parse_args"]),
    "get_train_args": (["args"], ["_parse_train_args"]),
    "get_infer_args": (["args"], []),
    "get_eval_args": (["args"], []),
    "read_args": (["args"], []),
}
# File of serving -> the functions, or classes by their __init__, that are replaced or called, with their parameters.
# The files are read, not imported, which is slow.
_SERVING: dict[str, dict[str, list[str]]] = {
    "chat/hf_engine.py": {"HuggingfaceEngine": ["self", *_SERVED_ARGS]},
    "chat/base_engine.py": {"BaseEngine": ["self", *_SERVED_ARGS]},
    "chat/chat_model.py": {"ChatModel": ["self", "args"], "run_chat": []},
    "api/app.py": {"create_app": ["chat_model"], "run_api": []},
    "api/chat.py": {"_process_request": ["request"]},
}
_TRAIN_ARGS = ["ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments"]
# First and last arguments that _training_function passes to run_pt and run_sft, by position.
_FIRST_ARGUMENTS, _LAST_ARGUMENT = ["model_args", "data_args", "training_args", "finetuning_args"], "callbacks"
# Function of a module of webui -> its first parameters.
_WEB_FUNCTIONS = {
    "chatter:WebChatModel.stream": ["self", "chatbot", "messages"],
    "chatter:WebChatModel.load_model": ["self", "data"],
    "chatter:WebChatModel.unload_model": ["self", "data"],
    "runner:Runner._parse_train_args": ["self", "data"],
    "runner:Runner._parse_eval_args": ["self", "data"],
    "manager:Manager.get_base_elems": ["self"],
    "control:change_stage": ["training_stage"],
    "components.chatbot:create_chat_box": ["engine", "visible"],
    **{f"components.{tab}:create_{tab}_tab": ["engine"] for tab in ("train", "eval", "infer")},
}


class IncompatibleUpstream(RuntimeError):
    """The installed LLaMA-Factory lacks what the patches need."""


def incompatibilities(parser: ModuleType) -> list[str]:
    """Return the reasons why this LLaMA-Factory cannot be patched; an empty list if it can.

    Args:
        parser: llamafactory.hparams.parser, unpatched.
    """
    version = _version()
    low, high = SUPPORTED
    if not Version(low) <= Version(Version(version).base_version) < Version(high):
        return [f"llamafactory {version} is not supported: pip install 'llamafactory>={low},<{high}'"]
    return [
        *_changed_functions(parser),
        *_changed_arguments(parser),
        *_changed_dispatch(parser),
        *_changed_serving(parser),
    ]


def web_incompatibilities() -> list[str]:
    """Return the reasons why the web pages cannot be patched; an empty list if they can. Imports them."""
    problems = []
    for name, parameters in _WEB_FUNCTIONS.items():
        module, _, path = name.partition(":")
        function: Any = import_module(f"llamafactory.webui.{module}")
        for part in path.split("."):
            function = getattr(function, part, None)
        found = list(inspect.signature(function).parameters) if inspect.isfunction(function) else None
        if found is None or found[: len(parameters)] != parameters:
            problems.append(f"llamafactory.webui.{module} has no {path}({', '.join(parameters)}, ...)")
    for module, name, kind in (("locales", "LOCALES", dict), ("css", "CSS", str)):
        if not isinstance(getattr(import_module(f"llamafactory.webui.{module}"), name, None), kind):
            problems.append(f"llamafactory.webui.{module} has no {name}")
    return problems


def _version() -> str:
    try:
        return metadata.version("llamafactory")
    except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH has no metadata
        return str(import_module("llamafactory.extras.env").VERSION)


def _changed_functions(parser: ModuleType) -> list[str]:
    problems = []
    for name, (parameters, calls) in _FUNCTIONS.items():
        function = getattr(parser, name, None)
        if not inspect.isfunction(function):
            problems.append(f"llamafactory.hparams.parser has no function {name}")
        elif list(inspect.signature(function).parameters)[: len(parameters)] != parameters or not set(calls) <= set(
            inspect.unwrap(function).__code__.co_names
        ):
            problems.append(f"llamafactory.hparams.parser.{name} has changed")
    return problems


def _changed_arguments(parser: ModuleType) -> list[str]:
    upstream: Any = getattr(parser, "FinetuningArguments", None)
    if upstream is None or not {"pt", "sft"} <= set(get_args(get_type_hints(upstream).get("stage"))):
        return ["the stages of llamafactory's FinetuningArguments have changed"]
    problems = []
    if [dataclass.__name__ for dataclass in getattr(parser, "_TRAIN_ARGS", ())] != _TRAIN_ARGS:
        problems.append("llamafactory.hparams.parser._TRAIN_ARGS has changed")
    our_keys = {field.name for field in fields(DiffusionArguments)}
    lists: list[list[Any]] = [
        value for name, value in vars(parser).items() if name.endswith("_ARGS") and isinstance(value, list)
    ]
    for dataclass in dict.fromkeys(itertools.chain.from_iterable(lists)):
        duplicates = our_keys & {field.name for field in fields(dataclass)} if is_dataclass(dataclass) else set()
        if duplicates:
            problems.append(f"llamafactory's {dataclass.__name__} has keys of ours: {', '.join(sorted(duplicates))}")
    return problems


def _parsed(parser: ModuleType, file: str) -> ast.Module | str:
    """Return the source of a file of LLaMA-Factory, or why it cannot be read."""
    path = Path(inspect.getfile(parser)).parents[1] / file
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return f"{path} cannot be read ({error})"


def _changed_serving(parser: ModuleType) -> list[str]:
    """Check the engine, the API and what serving calls of them."""
    problems = []
    for file, expected in _SERVING.items():
        tree = _parsed(parser, file)
        if isinstance(tree, str):
            problems.append(tree)
            continue
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for name, parameters in expected.items():
            node: Any = found.get(name)
            if isinstance(node, ast.ClassDef):
                functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                node = next((item for item in functions if item.name == "__init__"), None)
            if node is None or [argument.arg for argument in node.args.args][: len(parameters)] != parameters:
                problems.append(f"llamafactory's {file} has no {name}({', '.join(parameters)})")
        if file == "chat/chat_model.py":
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            imported = {(node.module, alias.name) for node in nodes for alias in node.names}
            for module, name in (("hf_engine", "HuggingfaceEngine"), ("hparams", "get_infer_args")):
                if (module, name) not in imported:
                    problems.append(f"llamafactory's {file} does not import {name} from {module}")
    return problems


def _changed_dispatch(parser: ModuleType) -> list[str]:
    """Check how `_training_function` calls the stages; reads its source, because importing train.tuner is slow."""
    tree = _parsed(parser, "train/tuner.py")
    if isinstance(tree, str):
        return [tree]
    calls: dict[str, list[str]] = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name == "_training_function":
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    calls[node.func.id] = [arg.id if isinstance(arg, ast.Name) else "?" for arg in node.args]
    problems = [
        f"llamafactory's _training_function does not call {name}"
        for name in ("run_pt", "run_sft", "get_train_args")
        if name not in calls
    ]
    problems += [
        f"llamafactory's _training_function calls {name} with other arguments"
        for name in ("run_pt", "run_sft")
        if name in calls and (calls[name][:4] != _FIRST_ARGUMENTS or calls[name][-1] != _LAST_ARGUMENT)
    ]
    return problems
