"""Everything that is changed in LLaMA-Factory at run time: one table, checked first, applied once, undoable.

`docs/patches.md` describes each row. This is the only file that changes upstream's modules.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from packaging.version import Version

from .._version import __version__
from .stages import STAGES

SUPPORTED = ("0.9.4", "0.9.7")  # from, up to but not including
CHECKED = ("0.9.5",)


class IncompatibleUpstream(RuntimeError):
    """The LLaMA-Factory that is installed does not look as the patches need it."""


@dataclass(frozen=True)
class Patch:
    """One change: `make` takes what `target` ("module:attribute") holds and returns what it holds from then on."""

    target: str
    why: str
    make: Callable[[Any], Any]


_undo: list[Callable[[], None]] = []
_status = "llamafactory is not loaded"


def is_active() -> bool:
    """Tell whether the patches are applied."""
    return bool(_undo)


def status() -> str:
    """Return "active", or why the plugin is not."""
    return "active" if is_active() else _status


# ---- what the finder calls ----


def after_parser(parser: ModuleType) -> None:
    """Apply the table to upstream's argument parser, or say in one line why not."""
    global _status
    if is_active():
        return
    problems = incompatibilities(parser)
    if problems:
        _status = "; ".join(problems)
        raise IncompatibleUpstream(_status)
    for patch in PARSER_PATCHES:
        _apply(patch)
    _mix_in(parser)
    _add_labels()


def after_env(env: ModuleType) -> None:
    """Have `llamafactory-cli env` say whether the plugin is active."""
    original = env.print_env

    @functools.wraps(original)
    def print_env() -> None:
        original()
        __import__("llamafactory.hparams.parser")
        print(f"- `llamafactory-ddm` version: {__version__} ({status()})\n")  # noqa: T201

    env.print_env = print_env  # type: ignore[attr-defined]


def after_v1_launcher(launcher: ModuleType) -> None:
    """Have USE_V1 refuse a YAML of ours: that trainer is another program with other keys."""
    original = launcher.launch

    @functools.wraps(original)
    def launch() -> Any:
        from .hparams import check_environment

        for word in sys.argv[1:]:
            if Path(word).is_file() and re.search(
                rf"^stage:\s*[\"']?({'|'.join(STAGES)})\b", Path(word).read_text(), re.M
            ):
                check_environment()
        return original()

    launcher.launch = launch  # type: ignore[attr-defined]


# ---- the checks ----


def incompatibilities(parser: ModuleType) -> list[str]:
    """Return what keeps this LLaMA-Factory from being patched; empty if nothing does."""
    version = metadata.version("llamafactory")
    low, high = SUPPORTED
    if not Version(low) <= Version(Version(version).base_version) < Version(high):
        return [
            f"llamafactory {version} is not supported, which is >={low},<{high}: pip install "
            f"'llamafactory>={low},<{high}'"
        ]
    problems = []
    for name, words in {
        "_parse_args": ["parser", "args", "allow_extra_keys"],
        "_parse_train_args": ["args"],
        "get_train_args": ["args"],
        "get_infer_args": ["args"],
        "read_args": ["args"],
    }.items():
        function = getattr(parser, name, None)
        if function is None or list(inspect.signature(function).parameters)[: len(words)] != words:
            problems.append(f"llamafactory.hparams.parser.{name} has changed")
    upstream = getattr(parser, "FinetuningArguments", None)
    if upstream is None or not {"pt", "sft"} <= set(get_args(get_type_hints(upstream).get("stage"))):
        return [*problems, "the stages of llamafactory's FinetuningArguments have changed"]
    source = (Path(inspect.getfile(parser)).parents[1] / "train" / "tuner.py").read_text(encoding="utf-8")
    body = source[source.find("def _training_function") :]
    problems += [
        f"llamafactory's _training_function does not call {n}"
        for n in ("run_pt(", "run_sft(", "get_train_args(")
        if n not in body
    ]
    from .arguments import DiffusionArguments

    ours = {f.name for f in fields(DiffusionArguments)}
    for kind in {kind for name in ("_TRAIN_ARGS", "_INFER_ARGS") for kind in getattr(parser, name, ())}:
        taken = ours & {f.name for f in fields(kind)}
        if taken:
            problems.append(f"llamafactory's {kind.__name__} has keys of ours: {', '.join(sorted(taken))}")
    return problems


# ---- applying and undoing ----


def _apply(patch: Patch) -> None:
    """Replace the attribute, also where other modules of upstream have imported the parser's functions by name."""
    path, _, name = patch.target.partition(":")
    original = getattr(sys.modules[path], name)
    replacement = patch.make(original)
    only = None if path == "llamafactory.hparams.parser" else path
    _swap(name, original, replacement, only)
    # A module that is imported later binds the replacement, so undoing looks for it anew.
    _undo.append(functools.partial(_swap, name, replacement, original, only))


def _swap(name: str, old: Any, new: Any, only: str | None) -> None:
    for path, module in list(sys.modules.items()):
        swept = path == only if only else path.split(".")[0] == "llamafactory"
        if swept and vars(module).get(name) is old:
            setattr(module, name, new)


def _mix_in(parser: ModuleType) -> None:
    """Put the combined dataclass in place of upstream's in every list of dataclasses."""
    from .hparams import DiffusionFinetuningArguments

    upstream = parser.FinetuningArguments
    for kinds in (value for name, value in vars(parser).items() if name.endswith("_ARGS") and isinstance(value, list)):
        for place, kind in enumerate(kinds):
            if kind is upstream:
                kinds[place] = DiffusionFinetuningArguments
                _undo.append(functools.partial(kinds.__setitem__, place, upstream))


def _add_labels() -> None:
    constants: Any = __import__("llamafactory.extras.constants", fromlist=["TRAINING_STAGES"])
    for stage in STAGES.values():
        constants.TRAINING_STAGES[stage.label] = stage.name
        _undo.append(functools.partial(constants.TRAINING_STAGES.pop, stage.label, None))


def undo() -> None:
    """Put back everything that was changed."""
    while _undo:
        _undo.pop()()


# ---- the replacements ----


def _checked_parse_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        from .hparams import check_keys

        args = sys.modules["llamafactory.hparams.parser"].read_args(args)
        if not allow_extra_keys:
            check_keys(parser, args)
        return original(parser, args, allow_extra_keys)

    return _parse_args


def _hiding_parse_train_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _parse_train_args(args: Any = None) -> Any:
        from .hparams import check_together

        parsed = original(args)
        model_args, data_args, training_args, finetuning_args, generating_args = parsed
        if finetuning_args.diffusion_stage is not None:
            check_together(finetuning_args, model_args, data_args, training_args)
            finetuning_args.generating_args = generating_args
            if data_args.packing and finetuning_args.stage == "pt":
                # Upstream takes one token off for sft's packing, and pt never gives it back: rows have cutoff_len
                # tokens.
                data_args.cutoff_len += 1
            finetuning_args.resume_requested = training_args.resume_from_checkpoint
            # Upstream's checks want a data set for every prediction; generation needs none. get_train_args puts it
            # back.
            finetuning_args.predict_requested, training_args.do_predict = training_args.do_predict, False
        return parsed

    return _parse_train_args


def _dispatching_get_train_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_train_args(args: Any = None) -> Any:
        from .hparams import check_environment, requested_stage

        args = sys.modules["llamafactory.hparams.parser"].read_args(args)
        if requested_stage(args) in STAGES:
            check_environment()
        parsed = original(args)
        model_args, _, training_args, finetuning_args, _ = parsed
        if finetuning_args.diffusion_stage is None:
            _warn_of_diffusion_model(model_args.model_name_or_path, f"stage: {finetuning_args.stage}")
        else:
            training_args.do_predict = finetuning_args.predict_requested
        _patch_tuner()
        return parsed

    return get_train_args


def _refusing_get_infer_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_infer_args(args: Any = None) -> Any:
        parsed = original(args)
        model_args, _, finetuning_args, _ = parsed
        if finetuning_args.diffusion_stage is None:
            _warn_of_diffusion_model(model_args.model_name_or_path, "this command")
        elif model_args.export_dir is not None:
            raise ValueError(
                f"there is nothing to export for stage: {finetuning_args.diffusion_stage}: its output_dir is a "
                "complete "
                "Hugging Face folder already; copy it"
            )
        else:
            raise ValueError(
                f"this command does not serve stage: {finetuning_args.diffusion_stage}; generate with do_predict: "
                "true and "
                "llamafactory-cli train"
            )
        return parsed

    return get_infer_args


def _warn_of_diffusion_model(folder: str | None, what: str) -> None:
    if folder is not None and (Path(folder) / "diffusion_config.json").is_file():
        from llamafactory.extras import logging

        logging.get_logger(f"llamafactory.{__name__}").warning_rank0(
            f"{folder} is a diffusion model (it holds diffusion_config.json), but {what} treats it as autoregressive; "
            f"use one of {', '.join(f'stage: {name}' for name in STAGES)} to go on with it as what it is."
        )


def _patch_tuner() -> None:
    """Have upstream's run_pt and run_sft hand our stages to their runners; the prelude of callbacks stays "
    "upstream's."""
    tuner: Any = sys.modules.get("llamafactory.train.tuner")
    if tuner is None:
        return
    for patch in TUNER_PATCHES:
        if not hasattr(getattr(tuner, patch.target.partition(":")[2]), "llamafactory_ddm"):
            _apply(patch)


def _dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, *rest: Any) -> Any:
        stage = STAGES.get(getattr(finetuning_args, "diffusion_stage", None) or "")
        if stage is None:
            return original(model_args, data_args, training_args, finetuning_args, *rest)
        callbacks = rest[-1] if rest else None
        return stage.load_runner()(
            model_args, data_args, training_args, finetuning_args, finetuning_args.generating_args, callbacks
        )

    run.llamafactory_ddm = True  # type: ignore[attr-defined]
    return run


PARSER_PATCHES = (
    Patch("llamafactory.hparams.parser:_parse_args", "an unknown key gets its nearest match", _checked_parse_args),
    Patch("llamafactory.hparams.parser:_parse_train_args", "generation needs no data set", _hiding_parse_train_args),
    Patch(
        "llamafactory.hparams.parser:get_train_args",
        "keeps the real stage, prepares dispatch",
        _dispatching_get_train_args,
    ),
    Patch(
        "llamafactory.hparams.parser:get_infer_args",
        "no autoregressive chat with a diffusion stage",
        _refusing_get_infer_args,
    ),
)
TUNER_PATCHES = (
    Patch("llamafactory.train.tuner:run_pt", "runs the stages based on pt", _dispatch),
    Patch("llamafactory.train.tuner:run_sft", "runs the stages based on sft", _dispatch),
)
