"""`llamafactory-cli chat` with a diffusion model: a terminal shows how each answer is denoised."""

from __future__ import annotations

import os
import queue
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from ..._errors import TRACEBACK
from ...generation.terminal import TerminalAnimation, printable
from ...serving.request import Answer, Event, Progress, Request
from ...serving.server import ServerBusy, Ticket
from ..data.templates import takes_one_question

if TYPE_CHECKING:
    from .engine import DiffusionEngine

WELCOME = "Welcome. `clear` removes the history, `exit` or Ctrl-D ends the chat, and Ctrl-C cancels an answer."
_ONE_TURN = "The template of this model takes one question at a time, so no history is kept."
_FRAME_SECONDS = 0.03  # the least time between two frames, so that a fast answer can be followed
_MAX_BEHIND = 32  # frames that may wait, about a second; the oldest are left out
_ROLE = "Assistant: "


class TerminalChat:
    """A conversation over stdin and a text stream; its history holds answered questions only."""

    def __init__(self, engine: DiffusionEngine, stream: TextIO | None = None) -> None:
        """Start without a history.

        Args:
            engine: the model with its server.
            stream: where answers are written; None for stdout.
        """
        self._engine = engine
        self._stream = sys.stdout if stream is None else stream
        self._has_history = not takes_one_question(engine.template)
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Answer lines of stdin until `exit` or the end of the input, then close the server."""
        with suppress(ImportError):  # `input` uses it
            import readline  # noqa: F401
        try:
            self._say(WELCOME if self._has_history else f"{WELCOME}\n{_ONE_TURN}")
            while (question := self._question()) is not None:
                if question == "clear":
                    self._messages = []
                    self._say("History has been removed.")
                else:
                    self._turn(question)
        finally:
            self._engine.close()

    def _turn(self, question: str) -> None:
        """Answer a question, and keep both in the history if that succeeds."""
        messages = [*self._messages, {"role": "user", "content": question}]
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            request = replace(self._engine.prepare(messages), shows_canvas=True)
            ticket = self._engine.server.submit(request, events.put)
        except (ValueError, ServerBusy) as error:
            self._report(error)
            return
        answer = self._answer(request, ticket, events)
        if answer is not None and self._has_history:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _answer(self, request: Request, ticket: Ticket, events: queue.SimpleQueue[Event]) -> str | None:
        """Show the answer to a request while it is written; returns None if it fails or Ctrl-C cancels it."""
        try:
            with _View(self._engine, request, self._stream) as view:
                view.start()
                while isinstance(event := events.get(), Progress):
                    view.show(event, is_recent=events.qsize() <= _MAX_BEHIND)
                if isinstance(event, Answer):
                    view.close(event.text)
                    return event.text
        except KeyboardInterrupt:
            self._say("The answer is cancelled.")
            return None
        finally:
            ticket.cancel()  # frees its place in the batch; does nothing once it is over
        self._report(event.error)
        return None

    def _question(self) -> str | None:
        """Return the next line that is not blank; None for `exit`, the end of the input, or Ctrl-C twice in a row."""
        was_interrupted = False
        while True:
            try:
                line = input("\nUser: ").strip()
            except UnicodeDecodeError:
                self._say("The input is not in the terminal's encoding; set both to UTF-8.")
            except EOFError:
                self._say("")
                return None
            except KeyboardInterrupt:
                self._say("")
                if was_interrupted:
                    return None
                was_interrupted = True
                self._say("Press Ctrl-C again or Ctrl-D to end the chat.")
            else:
                if line:
                    return None if line == "exit" else line

    def _report(self, error: Exception) -> None:
        """Print an error in one line, or its traceback on request."""
        if os.environ.get(TRACEBACK, "").lower() in ("1", "true", "yes"):
            traceback.print_exception(error, file=self._stream)
            return
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError | ServerBusy) and text else f"{type(error).__name__}: "
        self._say(f"error: {kind}{text}")

    def _say(self, text: str) -> None:
        _write(self._stream, f"{text}\n")


class _View:
    """Shows one answer: an animation on a terminal, and elsewhere the text as it becomes final."""

    def __init__(self, engine: DiffusionEngine, request: Request, stream: TextIO) -> None:
        self._stream = stream
        self._ends = frozenset(engine.tokenizer.convert_ids_to_tokens(list(engine.generator.eos_ids)))
        self._steps = engine.generator.max_steps([request.canvas], request.settings)
        self._animation = TerminalAnimation([_ROLE], stream=stream, delay=_FRAME_SECONDS)
        self._n_positions = request.canvas.n_editable
        self._is_closed = False

    def __enter__(self) -> _View:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call `close`."""
        self.close()

    def start(self) -> None:
        """Show that nothing is decoded yet."""
        if self._animation.is_live:
            self._draw(0, (None,) * self._n_positions)
        else:
            _write(self._stream, _ROLE)

    def show(self, progress: Progress, *, is_recent: bool) -> None:
        """Show a step; the animation leaves out one that is not recent, as the model is far ahead."""
        if not self._animation.is_live:
            _write(self._stream, progress.text)
        elif is_recent and progress.canvas is not None:
            self._draw(progress.step + 1, progress.canvas)

    def close(self, text: str | None = None) -> None:
        """End the view with the answer, or with what there is of it; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._animation.is_live:
            self._animation.close(None if text is None else f"{_ROLE}{text}")
        else:
            _write(self._stream, "\n")

    def _draw(self, step: int, canvas: tuple[str | None, ...]) -> None:
        """Draw the canvas up to its first EOS, as what follows that is no part of the answer."""
        end = next((i for i, piece in enumerate(canvas) if piece in self._ends), len(canvas))
        self._animation.update(step, max(step, self._steps), [_ROLE, *canvas[:end]])


def _write(stream: TextIO, text: str) -> None:
    """Write text at once: on a terminal without control characters, elsewhere as it is."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(printable(text, stream) if stream.isatty() else text.encode(encoding, "replace").decode(encoding))
    stream.flush()
