"""The table of all changes to LLaMA-Factory at run time, and the functions that apply and undo them.

`docs/patches.md` describes each row. Only this file changes LLaMA-Factory's modules; `wrappers.py` has the
replacements, and `compatibility.py` the checks that precede them.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from .compatibility import IncompatibleUpstream, incompatibilities, web_incompatibilities
from .wrappers import (
    checked_model_class,
    checked_parse_args,
    checked_parse_train_args,
    checked_peft_model,
    diffusion_init_adapter,
    diffusion_load_model,
    diffusion_load_tokenizer,
    dispatching_engine,
    dispatching_get_infer_args,
    dispatching_get_train_args,
    dispatching_run,
    dispatching_run_api,
    dispatching_run_chat,
    export_without_modelfile,
    extended_create_app,
    print_env_with_status,
    refusing_get_eval_args,
    refusing_post_init,
    refusing_v1_launch,
    with_our_keys,
    with_our_labels,
)

CHECKED = ("0.9.4", "0.9.5")
_PARSER, _TUNER = "llamafactory.hparams.parser", "llamafactory.train.tuner"
_LOADER, _ADAPTER = "llamafactory.model.loader", "llamafactory.model.adapter"
_ENGINE, _API = "llamafactory.chat.hf_engine", "llamafactory.api.app"
_CHAT = "llamafactory.chat.chat_model"
_CONSTANTS, _ENV, _V1 = "llamafactory.extras.constants", "llamafactory.extras.env", "llamafactory.v1.launcher"
_WEB, _COMPONENTS = "llamafactory.webui", "llamafactory.webui.components"

_RANDOM = "weights missing from a folder would be randomly initialised"


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        target: "module:name" of the changed object; a name with * stands for all lists and dicts that match it.
        make: returns the new value of the old one. Lists and dicts are changed in place, because other modules hold
            them too.
        why: what goes wrong without the change.
        in_all_modules: whether the name is replaced in every module that has imported it, or in the target's only.
        checked: versions of LLaMA-Factory that the change was tested with.
    """

    target: str
    make: Callable[[Any], Any]
    why: str
    in_all_modules: bool = True
    checked: tuple[str, ...] = CHECKED

    @property
    def module(self) -> str:
        """The module of the target."""
        return self.target.partition(":")[0]


@dataclass
class _State:
    active: bool = False
    reason: str = "llamafactory is not loaded"


_state = _State()
# The applied changes: the target, and the function that restores it.
_applied: list[tuple[str, Callable[[], None]]] = []


def is_active() -> bool:
    """Tell whether the patches are applied."""
    return _state.active


def status() -> str:
    """Return "active", or the reason why the plugin is not."""
    return "active" if _state.active else _state.reason


def _rebind() -> None:
    """Patch modules that may be loaded long after the parser."""
    for module in (_TUNER, _LOADER, _ADAPTER):
        if module in sys.modules:
            apply(module)


def _web(name: str) -> Callable[[Any], Any]:
    """Return a replacement in `integration.webui`, by module:name; it is imported when it is applied."""
    module, _, function = name.partition(":")
    return lambda original: getattr(import_module(f"..webui.{module}", __package__), function)(original)


PATCHES = (
    Patch(f"{_PARSER}:_parse_args", checked_parse_args, "an unknown key would be reported without the nearest match"),
    Patch(f"{_PARSER}:_parse_train_args", checked_parse_train_args, "generation would need a data set"),
    Patch(
        f"{_PARSER}:get_train_args",
        functools.partial(dispatching_get_train_args, rebind=_rebind),
        "Megatron and v1 would silently train autoregressively",
    ),
    Patch(
        f"{_PARSER}:get_infer_args",
        functools.partial(dispatching_get_infer_args, rebind=_rebind),
        "serving would read our keys as unknown ones, and an export would no longer be a diffusion model",
    ),
    Patch(
        f"{_PARSER}:get_eval_args", refusing_get_eval_args, "a diffusion model would be evaluated on the next token"
    ),
    Patch(f"{_PARSER}:*_ARGS", with_our_keys, "the keys and the stages would be unknown"),
    Patch(f"{_CONSTANTS}:TRAINING_STAGES", with_our_labels, "LlamaBoard would not offer the stages"),
    # In the tuner only: run_pt and run_sft are unchanged in their own packages.
    Patch(f"{_TUNER}:run_pt", dispatching_run, "stages based on pt would run as pt", in_all_modules=False),
    Patch(f"{_TUNER}:run_sft", dispatching_run, "stages based on sft would run as sft", in_all_modules=False),
    Patch(
        f"{_TUNER}:load_tokenizer",
        diffusion_load_tokenizer,
        "an export would lose the mask token",
        in_all_modules=False,
    ),
    Patch(
        f"{_TUNER}:load_model",
        diffusion_load_model,
        "an export would lose diffusion_config.json",
        in_all_modules=False,
    ),
    Patch(f"{_TUNER}:export_model", export_without_modelfile, "an export would hold a Modelfile that cannot work"),
    Patch(
        f"{_LOADER}:init_adapter",
        diffusion_init_adapter,
        "adapters would be made for a model without the mask token",
        in_all_modules=False,
    ),
    Patch(f"{_LOADER}:AutoModelForCausalLM", checked_model_class, _RANDOM, in_all_modules=False),
    Patch(f"{_LOADER}:AutoModelForImageTextToText", checked_model_class, _RANDOM, in_all_modules=False),
    Patch(f"{_ADAPTER}:PeftModel", checked_peft_model, _RANDOM, in_all_modules=False),
    Patch(f"{_ENGINE}:HuggingfaceEngine", dispatching_engine, "chat would silently run autoregressively"),
    Patch(f"{_CHAT}:run_chat", dispatching_run_chat, "an error or Ctrl-C would end a chat"),
    Patch(f"{_API}:create_app", extended_create_app, "requests would be answered without our keys, seeds and checks"),
    Patch(
        f"{_API}:run_api",
        dispatching_run_api,
        "the API would be open to the network without a key, and SIGTERM would end the process as failed",
    ),
    Patch(
        f"{_ENV}:print_env",
        functools.partial(print_env_with_status, status=status),
        "llamafactory-cli env would not say whether the plugin is active",
    ),
    Patch(f"{_WEB}.chatter:WebChatModel", _web("chatter:diffusion_chat_model"), "the denoising would not be seen"),
    Patch(
        f"{_WEB}.runner:Runner",
        _web("runner:diffusion_runner"),
        "fields would have no effect, and prediction would be refused",
    ),
    Patch(
        f"{_WEB}.control:change_stage",
        _web("pages:packing_of_our_stages"),
        "stages based on pt would preset packing: false",
    ),
    Patch(f"{_WEB}.css:CSS", _web("live_canvas:with_our_css"), "a canvas would have no colours"),
    Patch(f"{_WEB}.locales:LOCALES", _web("texts:with_our_texts"), "our fields would have no labels"),
    Patch(
        f"{_COMPONENTS}.chatbot:create_chat_box",
        _web("pages:with_chat_fields"),
        "the chat would have no fields of denoising",
    ),
    Patch(
        f"{_COMPONENTS}.infer:create_infer_tab",
        _web("pages:with_chat_fields_after_loading"),
        "the fields would not follow the model that is loaded",
    ),
    Patch(f"{_WEB}.engine:Engine", _web("pages:resuming_engine"), "a page opened later would not have the fields"),
    Patch(
        f"{_COMPONENTS}.train:create_train_tab",
        _web("pages:with_training_fields"),
        "the training tab would have no fields of ours",
    ),
    Patch(
        f"{_COMPONENTS}.eval:create_eval_tab",
        _web("pages:with_predict_fields"),
        "prediction would have no fields of denoising",
    ),
    Patch(f"{_V1}:launch", refusing_v1_launch, "the v1 trainer would reject the keys without saying why"),
)


# ---- called by the import finder ----


def after_parser(parser: ModuleType) -> None:
    """Apply the table to LLaMA-Factory's argument parser; on failure, undo it and only refuse our stages.

    Raises:
        IncompatibleUpstream: if LLaMA-Factory lacks what the patches need.
    """
    if _state.active:
        return
    undo(_PARSER)
    try:
        problems = incompatibilities(parser)
        if problems:
            raise IncompatibleUpstream("; ".join(problems))
        apply(_PARSER)
        apply(_CONSTANTS)
    except BaseException as error:
        undo(_PARSER, _CONSTANTS)
        _state.reason = " ".join(str(error).split()) or type(error).__name__
        _refuse_our_stages(parser)
        raise
    _state.active = True


def after_tuner(tuner: ModuleType) -> None:
    """Apply the changes to LLaMA-Factory's stages and export before they are called."""
    if _state.active:
        apply(tuner.__name__)


def after_engine(engine: ModuleType) -> None:
    """Make chat, API and web chat serve diffusion models, and prepare the loader, which this module has imported."""
    if _state.active:
        apply(engine.__name__)
        _rebind()


def after_chat_model(chat_model: ModuleType) -> None:
    """Show the denoising of a diffusion model in `llamafactory-cli chat`."""
    if _state.active:
        apply(chat_model.__name__)


def after_api(api: ModuleType) -> None:
    """Give the API of a diffusion model its routes."""
    if _state.active:
        apply(api.__name__)


def after_web_pages(pages: ModuleType) -> None:
    """Apply the changes to LLaMA-Factory's web pages, which this module has imported and not yet made.

    Raises:
        IncompatibleUpstream: if they lack what the patches need; they are then as upstream made them.
    """
    if not _state.active:
        return
    from ..data.templates import register_templates

    modules = dict.fromkeys(patch.module for patch in PATCHES if patch.module.startswith(f"{_WEB}."))
    problems = [] if {target.partition(":")[0] for target, _ in _applied} & set(modules) else web_incompatibilities()
    if problems:
        raise IncompatibleUpstream(f"in the web pages, as {'; '.join(problems)}")
    register_templates()  # for the list of templates
    for module in modules:
        apply(module)


def after_env(env: ModuleType) -> None:
    """Make `llamafactory-cli env` print whether the plugin is active."""
    apply(env.__name__)


def after_v1_launcher(launcher: ModuleType) -> None:
    """Make the v1 launcher (USE_V1) refuse command lines with our stages."""
    apply(launcher.__name__)


# ---- applying and undoing ----


def apply(module: str) -> None:
    """Apply the rows of a loaded module that are not applied yet."""
    done = {target for target, _ in _applied}
    for patch in PATCHES:
        if patch.module == module and patch.target not in done:
            _apply_patch(patch)


def undo(*modules: str) -> None:
    """Restore everything that was changed, or only what was changed in these modules."""
    for index in reversed(range(len(_applied))):
        target, restore = _applied[index]
        if not modules or target.partition(":")[0] in modules:
            restore()
            del _applied[index]
    if not modules or _PARSER in modules:
        _state.active, _state.reason = False, "undone"


def _apply_patch(patch: Patch) -> None:
    module, pattern = sys.modules[patch.module], patch.target.partition(":")[2]
    for name in fnmatch.filter(list(vars(module)), pattern):
        original = vars(module)[name]
        if isinstance(original, (list, dict)):
            restore = functools.partial(_refill, original, original.copy())
            _refill(original, patch.make(original))
        elif "*" in pattern:
            continue
        else:
            replacement = patch.make(original)
            only_module = None if patch.in_all_modules else patch.module
            # Modules that are imported later bind the replacement, so restoring searches all modules again.
            restore = functools.partial(_swap, name, replacement, original, only_module)
            _swap(name, original, replacement, only_module)
        _applied.append((patch.target, restore))


def _refill(container: Any, content: Any) -> None:
    """Replace the content of a list or a dict in place."""
    content = content.copy()
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _swap(name: str, old: Any, new: Any, only_module: str | None) -> None:
    """Rebind `name` where it is `old`, in every loaded module or in one."""
    for path, module in list(sys.modules.items()):
        if only_module in (None, path) and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _refuse_our_stages(parser: ModuleType) -> None:
    """Make an unpatched LLaMA-Factory refuse our stages, which its chat and export would ignore."""
    arguments_class: Any = vars(parser).get("FinetuningArguments")
    original = getattr(arguments_class, "__dict__", {}).get("__post_init__")
    if original is not None:
        arguments_class.__post_init__ = refusing_post_init(original, _state.reason)
        _applied.append(
            (f"{_PARSER}:FinetuningArguments", functools.partial(setattr, arguments_class, "__post_init__", original))
        )
