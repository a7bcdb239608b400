"""Upstream's chat box and tabs with fields of ours: each function takes the original and returns its replacement.

The fields are made where upstream makes its own, so its saved configurations and its change of language hold them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..hparams.stages import STAGES
from .chatter import defaults_of, is_diffusion
from .fields import CHAT_KEYS, ONE_STAGE, PREDICT_KEYS, PREFIX, TRAINING_ROWS, make_field, shown_value, spec_of
from .texts import CHAT_TAB, PREDICT_TAB, TRAINING_TAB

MAX_CHATS = 64  # answers at a time; the server bounds what runs in one batch
_STAGE_OF_LABEL = {stage.label: stage.name for stage in STAGES.values()}
# Elements of the chat that depend on its model.
CHANGING = (
    CHAT_TAB,
    *(f"{PREFIX}{name}" for name in CHAT_KEYS),
    *("max_new_tokens", "top_p", "temperature", "skip_special_tokens", "mm_box"),
)


def with_chat_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add fields for `CHAT_KEYS` to the chat box, which are shown while its model is a diffusion model."""

    @functools.wraps(original)
    def create_chat_box(engine: Any, visible: bool = False) -> Any:
        from gradio.context import Context

        chatbot, messages, elements = original(engine, visible)
        box, fields = _make_box([CHAT_KEYS], is_open=True, visible=False, as_column=True)
        _move(box, before=elements["clear_btn"])
        elements = {**elements, CHAT_TAB: box, **fields}
        events = Context.root_block.fns.values()  # type: ignore[union-attr]
        answering = next(event for event in events if event.fn == engine.chatter.stream)
        answering.inputs = [*answering.inputs, *fields.values()]
        if is_diffusion(engine.chatter.engine):
            answering.concurrency_limit = MAX_CHATS  # they run in one batch
            for name, changes in chat_changes(engine.chatter.engine).items():
                vars(elements[name]).update(changes)
                elements[name].constructor_args.update(changes)  # of which gradio makes it anew at each update
            # gradio presets the first language, so upstream's page would never change to it and show no labels.
            engine.manager.get_elem_by_id("top.lang").value = None
        return chatbot, messages, elements

    return create_chat_box


def with_chat_fields_after_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Show the fields of the chat box once a diffusion model is loaded, at the values of that model."""

    @functools.wraps(original)
    def create_infer_tab(engine: Any) -> Any:
        import gradio as gr

        elements = original(engine)

        def changes() -> list[Any]:
            return [gr.update(**change) for change in chat_changes(engine.chatter.engine).values()]

        elements["info_box"].change(changes, outputs=[elements[name] for name in CHANGING], show_progress="hidden")
        return elements

    return create_infer_tab


def resuming_engine(original: type[Any]) -> type[Any]:
    """Return upstream's Engine, which shows the fields of the chat box in a page that is opened later too."""

    class DiffusionEngineOfPages(original):  # type: ignore[misc]
        def resume(self) -> Iterator[dict[Any, Any]]:
            import gradio as gr

            yield from original.resume(self)
            if not self.pure_chat and is_diffusion(self.chatter.engine):
                changes = chat_changes(self.chatter.engine)
                yield {self.manager.get_elem_by_id(f"infer.{name}"): gr.update(**changes[name]) for name in changes}

    DiffusionEngineOfPages.__name__ = DiffusionEngineOfPages.__qualname__ = original.__name__
    return DiffusionEngineOfPages


def chat_changes(engine: Any) -> dict[str, dict[str, Any]]:
    """Return what to change in the elements of the chat that `CHANGING` names, for its engine; None is no engine."""
    if not is_diffusion(engine):
        shown = {CHAT_TAB: {"visible": False}, "skip_special_tokens": {"visible": True}}
        return {name: shown.get(name, {}) for name in CHANGING}
    longest = {"maximum": engine.max_new_tokens, "value": engine.max_new_tokens} if engine.max_new_tokens else {}
    logits, hidden, defaults = engine.defaults.logits, {"visible": False}, defaults_of(engine)
    fields = {f"{PREFIX}{name}": {"value": shown_value(name, value)} for name, value in defaults.items()}
    for name in defaults:
        needs = spec_of(name).needs
        if needs is not None:
            fields[f"{PREFIX}{name}"]["visible"] = defaults[needs[0]] in needs[1]
    return {
        CHAT_TAB: {"visible": True},
        **fields,
        "max_new_tokens": {"minimum": 1, **longest},
        "top_p": {"value": logits.top_p},
        "temperature": {"minimum": 0, "value": logits.temperature},
        "skip_special_tokens": hidden,
        "mm_box": hidden,
    }


def with_training_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add fields for the diffusion keys to the training tab, which are shown while the stage is one of ours."""

    @functools.wraps(original)
    def create_train_tab(engine: Any) -> Any:
        import gradio as gr

        box, fields = _make_box(TRAINING_ROWS, visible=False)
        with _inputs(engine.manager, fields.values()):
            elements = original(engine)
        _move(box, before=elements["freeze_tab"])

        def show(label: str) -> list[Any]:
            stage = _STAGE_OF_LABEL.get(label)
            return [
                gr.update(visible=stage is not None),
                *(gr.update(visible=one == stage) for one in ONE_STAGE.values()),
            ]

        outputs = [box, *(fields[f"{PREFIX}{name}"] for name in ONE_STAGE)]
        elements["training_stage"].change(show, [elements["training_stage"]], outputs, queue=False)
        return {**elements, TRAINING_TAB: box, **fields}

    return create_train_tab


def with_predict_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add fields for `PREDICT_KEYS` to the tab "Evaluate & Predict"."""

    @functools.wraps(original)
    def create_eval_tab(engine: Any) -> Any:
        box, fields = _make_box([PREDICT_KEYS])
        with _inputs(engine.manager, fields.values()):
            elements = original(engine)
        _move(box, before=elements["cmd_preview_btn"].parent)
        return {**elements, PREDICT_TAB: box, **fields}

    return create_eval_tab


def packing_of_our_stages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Preset packing for a stage as upstream does for the stage that it is based on."""

    @functools.wraps(original)
    def change_stage(training_stage: str = next(iter(_STAGE_OF_LABEL))) -> Any:
        dataset, packing = original(training_stage)
        stage = _STAGE_OF_LABEL.get(training_stage)
        return dataset, packing if stage is None else STAGES[stage].base == "pt"

    return change_stage


def _make_box(
    rows: Iterable[Iterable[str]], *, is_open: bool = False, visible: bool = True, as_column: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return an accordion with the fields of keys, row by row, and those fields by name."""
    import gradio as gr

    fields = {}
    with gr.Accordion(open=is_open, visible=visible) as box:
        for row in rows:
            with gr.Column() if as_column else gr.Row():
                fields.update({f"{PREFIX}{name}": make_field(name) for name in row})
    for name in [name.removeprefix(PREFIX) for name in fields]:
        needs = spec_of(name).needs
        if needs is not None:
            _show_where(fields[f"{PREFIX}{name}"], fields[f"{PREFIX}{needs[0]}"], needs[1])
    return box, fields


def _show_where(field: Any, other: Any, values: Collection[Any]) -> None:
    """Show a field while another one has one of these values."""
    import gradio as gr

    field.visible = other.value in values
    other.change(lambda value: gr.update(visible=value in values), [other], [field], queue=False)


def _move(block: Any, *, before: Any) -> None:
    """Move a block of a page to the place before another one."""
    block.parent.children.remove(block)
    block.parent = before.parent
    siblings = block.parent.children
    siblings.insert(siblings.index(before), block)


@contextmanager
def _inputs(manager: Any, fields: Iterable[Any]) -> Iterator[None]:
    """Let a tab of upstream's count fields of ours among those that it reads, saves and loads."""
    base = manager.get_base_elems
    manager.get_base_elems = lambda: base() | set(fields)
    try:
        yield
    finally:
        del manager.get_base_elems
