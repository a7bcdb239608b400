"""All changes to LLaMA-Factory at run time: one table, checked first, applied once, undoable.

`docs/patches.md` describes each row. Only this file changes LLaMA-Factory's modules; `wrappers.py` has the
replacements, and `compatibility.py` the checks before them.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .compatibility import IncompatibleUpstream, incompatibilities
from .wrappers import (
    checked_parse_args,
    diffusion_init_adapter,
    diffusion_load_model,
    diffusion_load_tokenizer,
    dispatching_get_infer_args,
    dispatching_get_train_args,
    dispatching_run,
    hiding_parse_train_args,
    modelfile_free_export,
    refusing_get_eval_args,
    refusing_post_init,
    refusing_v1_launch,
    telling_print_env,
    whole_model_class,
    whole_peft_model,
    with_our_keys,
    with_our_labels,
)

CHECKED = ("0.9.4", "0.9.5")
_PARSER, _TUNER = "llamafactory.hparams.parser", "llamafactory.train.tuner"
_LOADER, _ADAPTER = "llamafactory.model.loader", "llamafactory.model.adapter"
_CONSTANTS, _ENV, _V1 = "llamafactory.extras.constants", "llamafactory.extras.env", "llamafactory.v1.launcher"

_RANDOM = "weights that a folder lacks would be random numbers"


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        target: "module:name" of the changed object; a name with * matches several lists.
        make: takes the old value and returns the new one. A function is replaced; a list or a dict is changed in
            place, as other modules hold it too.
        why: what goes wrong without the change.
        swept: whether modules that have imported the name get the replacement too.
        checked: versions of LLaMA-Factory that the change was tested with.
    """

    target: str
    make: Callable[[Any], Any]
    why: str
    swept: bool = True
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
# The applied changes: the target, and how to restore it.
_applied: list[tuple[str, Callable[[], None]]] = []


def is_active() -> bool:
    """Tell whether the patches are applied."""
    return _state.active


def status() -> str:
    """Return "active", or why the plugin is not."""
    return "active" if _state.active else _state.reason


def _rebind() -> None:
    """Rebind upstream's names in modules that may be loaded long after the parser."""
    for module in (_TUNER, _LOADER, _ADAPTER):
        if module in sys.modules:
            apply(module)


PATCHES = (
    Patch(f"{_PARSER}:_parse_args", checked_parse_args, "an unknown key gets no nearest match"),
    Patch(f"{_PARSER}:_parse_train_args", hiding_parse_train_args, "generation would need a data set"),
    Patch(
        f"{_PARSER}:get_train_args",
        functools.partial(dispatching_get_train_args, rebind=_rebind),
        "Megatron and v1 would train autoregressively in silence",
    ),
    Patch(
        f"{_PARSER}:get_infer_args",
        functools.partial(dispatching_get_infer_args, rebind=_rebind),
        "chat would run autoregressively in silence, and an export would not be a diffusion model any more",
    ),
    Patch(f"{_PARSER}:get_eval_args", refusing_get_eval_args, "a diffusion model would be asked for the next token"),
    Patch(f"{_PARSER}:*_ARGS", with_our_keys, "the keys and the stages would be unknown"),
    Patch(f"{_CONSTANTS}:TRAINING_STAGES", with_our_labels, "LlamaBoard would not offer the stages"),
    # Only the tuner's own names: run_pt and run_sft stay what they are in their packages.
    Patch(f"{_TUNER}:run_pt", dispatching_run, "stages based on pt would run as pt", swept=False),
    Patch(f"{_TUNER}:run_sft", dispatching_run, "stages based on sft would run as sft", swept=False),
    Patch(f"{_TUNER}:load_tokenizer", diffusion_load_tokenizer, "an export would lose the mask token", swept=False),
    Patch(f"{_TUNER}:load_model", diffusion_load_model, "an export would lose diffusion_config.json", swept=False),
    Patch(f"{_TUNER}:export_model", modelfile_free_export, "an export would hold a Modelfile that cannot work"),
    Patch(f"{_LOADER}:init_adapter", diffusion_init_adapter, "adapters would miss the mask token", swept=False),
    Patch(f"{_LOADER}:AutoModelForCausalLM", whole_model_class, _RANDOM, swept=False),
    Patch(f"{_LOADER}:AutoModelForImageTextToText", whole_model_class, _RANDOM, swept=False),
    Patch(f"{_ADAPTER}:PeftModel", whole_peft_model, _RANDOM, swept=False),
    Patch(
        f"{_ENV}:print_env",
        functools.partial(telling_print_env, status=status),
        "llamafactory-cli env would not say whether the plugin is active",
    ),
    Patch(f"{_V1}:launch", refusing_v1_launch, "the v1 trainer would reject the keys without saying why"),
)


# ---- what the finder calls ----


def after_parser(parser: ModuleType) -> None:
    """Apply the table to LLaMA-Factory's argument parser; on failure, leave it unpatched but refusing our stages.

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
            _change(patch)


def undo(*modules: str) -> None:
    """Restore everything that was changed, or what was changed in these modules."""
    for index in reversed(range(len(_applied))):
        target, restore = _applied[index]
        if not modules or target.partition(":")[0] in modules:
            restore()
            del _applied[index]
    if not modules or _PARSER in modules:
        _state.active, _state.reason = False, "undone"


def _change(patch: Patch) -> None:
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
            only = None if patch.swept else patch.module
            # A module that is imported later binds the replacement, so undoing searches all modules again.
            restore = functools.partial(_swap, name, replacement, original, only)
            _swap(name, original, replacement, only)
        _applied.append((patch.target, restore))


def _refill(holder: Any, content: Any) -> None:
    """Replace the content of a list or a dict in place."""
    content = content.copy()
    holder.clear()
    (holder.extend if isinstance(holder, list) else holder.update)(content)


def _swap(name: str, old: Any, new: Any, only: str | None) -> None:
    """Rebind `name` wherever it is `old`, in every loaded module or in one."""
    for path, module in list(sys.modules.items()):
        if only in (None, path) and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _refuse_our_stages(parser: ModuleType) -> None:
    """Make an unpatched LLaMA-Factory refuse our stages, which its chat and export would ignore."""
    kind: Any = vars(parser).get("FinetuningArguments")
    original = getattr(kind, "__dict__", {}).get("__post_init__")
    if original is not None:
        kind.__post_init__ = refusing_post_init(original, _state.reason)
        _applied.append(
            (f"{_PARSER}:FinetuningArguments", functools.partial(setattr, kind, "__post_init__", original))
        )
