"""Replacements of LLaMA-Factory's functions: each function here takes the original and returns its replacement."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import _errors
from ..._version import __version__
from ..hparams.stages import STAGES, requested_stage

# Keys that are hidden from upstream's checks: with them, upstream requires a data set and packages of its metrics.
_HIDDEN_KEYS = ("do_predict", "predict_with_generate")


def checked_parse_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the keys before LLaMA-Factory's parser reads them."""

    @functools.wraps(original)
    def _parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        from ..hparams.parser import check_keys
        from ..hparams.upstream_keys import check_values

        args = sys.modules["llamafactory.hparams.parser"].read_args(args)
        if not allow_extra_keys:
            check_keys(parser, args)
        if isinstance(args, dict) and requested_stage(args) in STAGES:
            args = check_values(parser.dataclass_types, args)
        return original(parser, args, allow_extra_keys)

    return _parse_args


def checked_parse_train_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the keys of our stages together, and hide those that upstream's checks of the base stage refuse."""

    @functools.wraps(original)
    def _parse_train_args(args: Any = None) -> Any:
        from ..hparams.parser import Parsed, check_supported, user_keys

        args = sys.modules["llamafactory.hparams.parser"].read_args(args)
        parsed = original(args)
        model_args, data_args, training_args, finetuning_args, generating_args = parsed
        if finetuning_args.diffusion_stage is not None:
            check_supported(finetuning_args, model_args, data_args, training_args)
            if data_args.packing and finetuning_args.stage == "pt":
                # LLaMA-Factory subtracts one for packing, as sft needs it; packed rows of pt have cutoff_len tokens.
                data_args.cutoff_len += 1
            # `get_train_args` restores the hidden keys.
            finetuning_args.parsed = Parsed(
                user_keys=frozenset(user_keys(args)),
                resume=training_args.resume_from_checkpoint,
                generating_args=generating_args,
                hidden={key: getattr(training_args, key) for key in _HIDDEN_KEYS},
            )
            for key in _HIDDEN_KEYS:
                setattr(training_args, key, False)
        return parsed

    return _parse_train_args


def dispatching_get_train_args(original: Callable[..., Any], rebind: Callable[[], None]) -> Callable[..., Any]:
    """Refuse other trainers for our stages, restore the hidden keys, and prepare the dispatch."""

    @functools.wraps(original)
    def get_train_args(args: Any = None) -> Any:
        from ..data.templates import register_templates
        from ..hparams.parser import check_environment
        from ..logs import hide_harmless_messages

        _errors.install()
        register_templates()
        args = sys.modules["llamafactory.hparams.parser"].read_args(args)
        # Checked before parsing, as another trainer may import its packages, and after, as argparse allows --stag.
        if requested_stage(args) in STAGES:
            check_environment()
            with hide_harmless_messages(on_cpu=_runs_on_cpu(args)):
                parsed = original(args)
        else:
            parsed = original(args)
        model_args, _, training_args, finetuning_args, _ = parsed
        if finetuning_args.diffusion_stage is None:
            from ..resolve.autoregressive_use import check_training

            check_training(model_args, training_args, finetuning_args)
        else:
            check_environment()
            for key, value in finetuning_args.parsed.hidden.items():
                setattr(training_args, key, value)
        rebind()
        return parsed

    return get_train_args


def _runs_on_cpu(args: Any) -> bool:
    from llamafactory.extras.misc import get_current_device

    return (isinstance(args, dict) and bool(args.get("use_cpu"))) or get_current_device().type == "cpu"


def dispatching_get_infer_args(original: Callable[..., Any], rebind: Callable[[], None]) -> Callable[..., Any]:
    """Mark the export of a diffusion model, and have our engine serve it."""

    @functools.wraps(original)
    def get_infer_args(args: Any = None) -> Any:
        from ..data.templates import register_templates
        from ..hparams.parser import Parsed, check_supported, user_keys
        from ..resolve.autoregressive_use import check_autoregressive, find_diffusion_models
        from ..resolve.serving_stage import with_stage

        register_templates()
        _errors.install()
        args = with_stage(sys.modules["llamafactory.hparams.parser"].read_args(args))
        parsed = original(args)
        model_args, data_args, finetuning_args, generating_args, *_ = parsed
        stage = finetuning_args.diffusion_stage
        if model_args.export_dir is not None:
            from ..resolve.model_names import resolve_model_names

            resolve_model_names(model_args)
            if stage is not None or next(find_diffusion_models(model_args), None) is not None:
                rebind()
                model_args.exported_diffusion = finetuning_args
        elif stage is None:
            check_autoregressive(model_args, None)
        else:
            check_supported(finetuning_args, model_args, data_args)
            finetuning_args.parsed = Parsed(user_keys=frozenset(user_keys(args)), generating_args=generating_args)
        return parsed

    return get_infer_args


def refusing_get_eval_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse LLaMA-Factory's evaluation, which scores the next token, for diffusion models."""

    @functools.wraps(original)
    def get_eval_args(args: Any = None) -> Any:
        from ..resolve.autoregressive_use import check_autoregressive

        parsed = original(args)
        check_autoregressive(parsed[0], parsed[3].diffusion_stage)
        return parsed

    return get_eval_args


def diffusion_load_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Export the tokenizer that a diffusion model was trained with."""

    @functools.wraps(original)
    def load_tokenizer(model_args: Any) -> Any:
        if getattr(model_args, "exported_diffusion", None) is None:
            return original(model_args)
        from ..model.export import exported_tokenizer

        return exported_tokenizer(model_args)

    return load_tokenizer


def diffusion_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Export a diffusion model with its diffusion_config.json."""

    @functools.wraps(original)
    def load_model(tokenizer: Any, model_args: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(model_args, "exported_diffusion", None) is None:
            return original(tokenizer, model_args, *args, **kwargs)
        from ..model.export import exported_model

        return exported_model(tokenizer, model_args)

    return load_model


def export_without_modelfile(original: Callable[..., Any]) -> Callable[..., Any]:
    """Remove the Modelfile from the export of a diffusion model."""

    @functools.wraps(original)
    def export_model(args: Any = None) -> Any:
        from ..model.export import without_modelfile

        return without_modelfile(original, args)

    return export_model


def diffusion_init_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Call a diffusion run's `AdapterSetup` before and after adapters are added or merged."""

    @functools.wraps(original)
    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        from ..model.adapter import current_setup

        setup = current_setup()
        if setup is None:
            return original(config, model, model_args, finetuning_args, is_trainable)
        setup.prepare_base(model)
        with setup.explain_shape_mismatch():
            model = original(config, model, model_args, finetuning_args, is_trainable)
        setup.finish(model)
        return model

    return init_adapter


def checked_model_class(original: Any) -> Any:
    """In a diffusion run, check that a checkpoint holds every weight of its model."""

    class Checked(original):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, **kwargs: Any) -> Any:  # as upstream's loader calls it
            from ...checkpoints.load_model import load_whole
            from ..model.adapter import current_setup

            return original.from_pretrained(**kwargs) if current_setup() is None else load_whole(original, **kwargs)

    Checked.__name__ = Checked.__qualname__ = original.__name__
    return Checked


def checked_peft_model(original: Any) -> Any:
    """In a diffusion run, check that a folder holds every weight of its adapter."""

    class Checked(original):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, model: Any, model_id: Any, **kwargs: Any) -> Any:
            from ...checkpoints.load_model import load_whole_adapter
            from ..model.adapter import current_setup

            if current_setup() is not None:
                return load_whole_adapter(original, model, model_id, **kwargs)
            return original.from_pretrained(model, model_id, **kwargs)

    Checked.__name__ = Checked.__qualname__ = original.__name__
    return Checked


def dispatching_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """Run our stages with their own runner, and other stages with the original."""

    @functools.wraps(original)
    def run(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, *rest: Any) -> Any:
        stage = STAGES.get(getattr(finetuning_args, "diffusion_stage", None) or "")
        if stage is None:
            return original(model_args, data_args, training_args, finetuning_args, *rest)
        callbacks = rest[-1] if rest else None
        return stage.load_runner()(
            model_args, data_args, training_args, finetuning_args, finetuning_args.parsed.generating_args, callbacks
        )

    return run


def dispatching_engine(original: Any) -> Any:
    """Make the engine of a diffusion model in place of upstream's."""

    class Dispatching(original):  # type: ignore[misc]
        def __new__(cls, model_args: Any, data_args: Any, finetuning_args: Any, generating_args: Any) -> Any:
            if getattr(finetuning_args, "diffusion_stage", None) is None:
                return super().__new__(cls)
            from ..chat.engine import DiffusionEngine

            return DiffusionEngine(model_args, data_args, finetuning_args, generating_args)

    Dispatching.__name__ = Dispatching.__qualname__ = original.__name__
    return Dispatching


def dispatching_run_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    """Chat with a diffusion model in our terminal chat, and with others in upstream's."""

    @functools.wraps(original)
    def run_chat() -> Any:
        from ..resolve.serving_stage import serves_diffusion

        if not serves_diffusion(sys.modules["llamafactory.hparams.parser"].read_args(None)):
            return original()
        from ..chat.terminal import TerminalChat

        return TerminalChat(sys.modules["llamafactory.chat.chat_model"].ChatModel().engine).run()

    return run_chat


def extended_create_app(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the API of diffusion models to upstream's app, if the engine is ours."""

    @functools.wraps(original)
    def create_app(chat_model: Any) -> Any:
        from ..chat.engine import DiffusionEngine

        app = original(chat_model)
        if not isinstance(chat_model.engine, DiffusionEngine):
            return app
        from ..chat.api import extend

        return extend(app, chat_model.engine)

    return create_app


def dispatching_run_api(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serve a diffusion model on an address that is safe without a key, and finish its requests at the end."""

    @functools.wraps(original)
    def run_api() -> Any:
        from ..resolve.serving_stage import serves_diffusion

        if not serves_diffusion(sys.modules["llamafactory.hparams.parser"].read_args(None)):
            return original()
        from ..chat.api import run

        return run(sys.modules["llamafactory.api.app"])

    return run_api


def print_env_with_status(original: Callable[..., Any], status: Callable[[], str]) -> Callable[..., Any]:
    """Print in `llamafactory-cli env` whether the plugin is active."""

    @functools.wraps(original)
    def print_env() -> None:
        original()
        __import__("llamafactory.hparams.parser")  # the plugin is activated when this is imported
        print(f"- `llamafactory-ddm` version: {__version__} ({status()})\n")  # noqa: T201

    return print_env


def refusing_v1_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a command line with our stages before the v1 trainer reads it, which has other keys."""

    @functools.wraps(original)
    def launch() -> Any:
        if names_our_stage(sys.argv[1:]):
            from ..hparams.parser import check_environment

            check_environment()
        return original()

    return launch


def refusing_post_init(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """Refuse our stages while the plugin is not active, as LLaMA-Factory checks `stage` in training only."""

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if getattr(self, "stage", None) in tuple(STAGES):
            raise ValueError(f"stage: {self.stage} needs llamafactory-ddm, which is not active: {reason}")
        original(self)

    return __post_init__


def with_our_keys(dataclasses: list[Any]) -> list[Any]:
    """Return the dataclasses, with the subclass that has our keys in place of FinetuningArguments."""
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    from ..hparams.parser import DiffusionFinetuningArguments

    return [DiffusionFinetuningArguments if item is FinetuningArguments else item for item in dataclasses]


def with_our_labels(stages: dict[str, str]) -> dict[str, str]:
    """Return LlamaBoard's labels of stages with ours added."""
    return {**stages, **{stage.label: stage.name for stage in STAGES.values()}}


def names_our_stage(argv: list[str]) -> bool:
    """Tell whether the command line, or a YAML or JSON that it names, sets one of our stages."""
    if requested_stage(argv) in STAGES or any(f"stage={name}" in argv for name in STAGES):
        return True
    pattern = re.compile(rf"""^[\s{{,]*["']?stage["']?\s*:\s*["']?({"|".join(STAGES)})["']?\s*([,#}}]|$)""", re.M)
    files = [Path(argument) for argument in argv if argument.endswith((".yaml", ".yml", ".json"))]
    return any(f.is_file() and pattern.search(f.read_text(encoding="utf-8", errors="replace")) for f in files)
