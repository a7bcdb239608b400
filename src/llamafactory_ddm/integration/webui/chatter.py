"""Upstream's web chat with the denoising of a diffusion model shown in place of the answer until that is there."""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...serving.request import Answer, Event, Failure, Progress, Request
from ...serving.server import ServerBusy
from ..data.templates import takes_one_question
from ..logs import get_logger
from .fields import CHAT_KEYS, chat_keys
from .live_canvas import LiveCanvas, escaped
from .texts import failed_caption, one_question_caption, step_caption

logger = get_logger(__name__)
MAX_UPDATES = 16  # of the page, a second
# What a user can mend, or wait for; anything else is a bug, whose traceback is logged.
_USER_ERRORS = (ValueError, TimeoutError, ServerBusy)
Page = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # the shown messages, and those that the model gets
_template_lock = threading.Lock()


def is_diffusion(engine: Any) -> bool:
    """Tell whether an engine of upstream's chat is ours; None is no engine."""
    return engine is not None and hasattr(engine, "server")


def diffusion_chat_model(original: type[Any]) -> type[Any]:
    """Return upstream's WebChatModel with live denoising; other models are served as before."""

    class DiffusionWebChatModel(original):  # type: ignore[misc]
        def stream(self, chatbot: list[Any], messages: list[Any], *rest: Any) -> Generator[Page, None, None]:
            """Answer the last message; `rest` ends with the values of `CHAT_KEYS` if the page has their fields."""
            n_upstream = len(inspect.signature(original.stream).parameters) - 3
            upstream, ours = rest[:n_upstream], dict(zip(CHAT_KEYS, rest[n_upstream:], strict=False))
            if is_diffusion(self.engine):
                yield from _Answering(self, original, upstream, ours).pages(chatbot, messages)
            else:
                yield from original.stream(self, chatbot, messages, *upstream)

        def load_model(self, data: Any) -> Generator[str, None, None]:
            """Load a model; where ours refuses the arguments, say so in the page."""
            try:
                yield from original.load_model(self, data)
            except ValueError as error:
                import gradio as gr

                gr.Warning(escaped(str(error)))
                yield str(error)

        def unload_model(self, data: Any) -> Generator[str, None, None]:
            """Unload the model, and end the thread that owns it."""
            engine = self.engine
            yield from original.unload_model(self, data)
            if self.engine is None and is_diffusion(engine):
                engine.close()

    DiffusionWebChatModel.__name__ = DiffusionWebChatModel.__qualname__ = original.__name__
    return DiffusionWebChatModel


class _Answering:
    """One answer. Upstream's `stream` runs on it in place of the chat model, whose `stream_chat` it replaces.

    That `stream_chat` yields "" for what only the canvas shows, so that upstream yields a page then too, in which
    `pages` puts the canvas for the answer so far.
    """

    def __init__(self, chat_model: Any, original: type[Any], upstream: tuple[Any, ...], ours: Mapping[str, Any]):
        self._chat_model, self._original, self._upstream = chat_model, original, upstream
        self._ours = ours
        arguments = inspect.signature(original.stream).bind_partial(None, None, None, *upstream).arguments
        self._lang = str(arguments.get("lang") or "en")
        self._enable_thinking = arguments.get("enable_thinking")
        self._canvas: LiveCanvas | None = None  # None once the answer is complete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat_model, name)

    def pages(self, chatbot: list[dict[str, Any]], messages: list[dict[str, Any]]) -> Generator[Page, None, None]:
        """Yield the page after each update; an error takes the place of the answer, and the question is forgotten."""
        try:
            with contextlib.closing(self._original.stream(self, chatbot, messages, *self._upstream)) as pages:
                for shown, history in pages:
                    if self._canvas is None:
                        yield shown, history
                    else:
                        yield [*shown[:-1], {"role": "assistant", "content": self._canvas_html()}], messages
        except _USER_ERRORS as error:
            yield self._failed_page(chatbot, error), messages[:-1]
        except Exception as error:
            logger.exception("a message of the web chat was not answered")
            yield self._failed_page(chatbot, error), messages[:-1]

    def _failed_page(self, chatbot: list[dict[str, Any]], error: Exception) -> list[dict[str, Any]]:
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"⚠️ {escaped(f'{failed_caption(self._lang)}: {reason}')}"
        shown = chatbot[:-1] if chatbot and chatbot[-1]["role"] == "assistant" else chatbot
        return [*shown, {"role": "assistant", "content": text}]

    def stream_chat(self, messages: Any, system: Any = None, tools: Any = None, **keywords: Any) -> Iterator[str]:
        """Yield the answer in pieces, "" where only the canvas changed."""
        request = self._prepare(messages, system, tools, keywords)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine = self._chat_model.engine
        self._canvas = LiveCanvas(engine.tokenizer.convert_ids_to_tokens(engine.generator.eos_ids))
        ticket = engine.server.submit(request, events.put)
        try:
            yield from self._pieces(events.get)
        finally:
            ticket.cancel()  # nothing to do if it is over

    def _prepare(self, messages: Any, system: Any, tools: Any, keywords: dict[str, Any]) -> Request:
        """Return the request of a message, whose sampling keys are those of the page."""
        engine = self._chat_model.engine
        keywords.pop("skip_special_tokens", None)  # its field is hidden, as a canvas has no other text
        overrides = {**keywords, **chat_keys(self._ours)}
        if takes_one_question(engine.template) and len(messages) > 1:
            if len(messages) == 3:  # the second question of a chat
                import gradio as gr

                gr.Info(one_question_caption(self._lang))
            messages = messages[-1:]
        with _template_lock:  # upstream sets the switch on the template, which all pages share
            if self._enable_thinking is not None:
                engine.template.enable_thinking = self._enable_thinking
            request: Request = engine.prepare(messages, system or None, tools or None, **overrides)
        return replace(request, shows_canvas=True)

    def _pieces(self, next_event: Callable[..., Event]) -> Iterator[str]:
        """Yield the text of the events, at most `MAX_UPDATES` times a second but for the last.

        Raises:
            Exception: the error of a request that failed.
        """
        text, is_new, due = "", False, time.monotonic()
        while True:
            wait = due - time.monotonic() if is_new else None
            if wait is not None and wait <= 0:
                yield text
                text, is_new, due = "", False, time.monotonic() + 1 / MAX_UPDATES
                continue
            try:
                event = next_event(timeout=wait)
            except queue.Empty:
                continue
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Answer):
                self._canvas = None
                yield text
                return
            text, is_new = text + event.text, True
            self._take_canvas(event)

    def _take_canvas(self, event: Progress) -> None:
        if self._canvas is not None and event.canvas is not None:
            self._canvas.update(event.step + 1, event.canvas)

    def _canvas_html(self) -> str:
        canvas = self._canvas
        if canvas is None or not len(canvas):
            return ""
        return canvas.html(step_caption(self._lang, canvas.step, canvas.n_decoded, len(canvas)))


def defaults_of(engine: Any) -> dict[str, Any]:
    """Return the values of `CHAT_KEYS` that an engine uses unless a request says otherwise."""
    steps = engine.defaults.diffusion_steps if "diffusion_steps" in engine.served.chosen else 0
    own = {"chat_steps": steps, "seed": None}
    return {name: own[name] if name in own else getattr(engine.defaults, name) for name in CHAT_KEYS}
