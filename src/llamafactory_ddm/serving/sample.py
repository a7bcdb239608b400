"""One sample of a request: the ordinary generation, in a greenlet that waits where it needs the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from greenlet import greenlet
from torch import Tensor

from ..data.canvas import Canvas
from ..generation.block_models import blocks_of_canvas
from ..generation.generator import TextGenerator
from ..modeling.joint_pass import Output, Part
from ..modeling.kv_cache import ColumnCache
from ..modeling.model_runner import ModelRunner
from ..sampling.strategies import Remasking
from .request import Answer, Event, Failure, Progress
from .text_stream import TextStream

if TYPE_CHECKING:
    from .server import Ticket


class _Stopped(Exception):
    """The text holds a stop string."""


class Sample:
    """A text that is generated from one forward pass to the next; one thread may use it.

    Attributes:
        ticket: of its request.
        number: number of the sample in the request.
        n_positions: positions that its canvas may come to.
        part: the forward pass that it waits for; None if it waits for none.
        is_over: whether it is finished.
    """

    def __init__(self, generator: TextGenerator, runner: ModelRunner, ticket: Ticket, number: int) -> None:
        """Prepare sample `number` of the ticket's request; nothing is computed before `resume`.

        Args:
            generator: of the model.
            runner: of the model, for what is computed of each sample apart.
            ticket: of the request.
            number: of the sample.
        """
        self.ticket, self.number = ticket, number
        self.n_positions = len(ticket.request.canvas)
        self.part: Part | None = None
        self.is_over = False
        self.n_passes = 0
        self._generator = generator.with_runner(_WaitingRunner(self, runner))
        self._stream = _stream_of(self._generator, ticket)
        self._greenlet: greenlet | None = None  # made in the thread that runs it
        self._result: Output | Exception | None = None
        self._events: list[Event] = []
        self._canvas, self._ids, self._n_steps = ticket.request.canvas, list[int](), 0

    def resume(self, error: Exception | None = None) -> list[Event]:
        """Go on to the next forward pass or to the end, and return the events on the way.

        Args:
            error: raised in place of the result of the forward pass; None for none.
        """
        if error is not None:
            self._result = error
        self.part = None
        if self._greenlet is None:
            self._greenlet = greenlet(self._run)
        self._greenlet.switch()
        events, self._events = self._events, []
        return events

    def take(self, output: Output | Exception) -> None:
        """Take the result of the forward pass, or the error that it ended with."""
        self._result = output

    def wait(self, part: Part) -> Output:
        """Return the result of a forward pass, once the thread has run it; called within the greenlet."""
        self.part, self._result = part, None
        greenlet.getcurrent().parent.switch()
        result, self._result = self._result, None
        if isinstance(result, Exception):
            raise result
        if result is None:
            raise RuntimeError("the sample went on without the result of its forward pass")
        self.n_passes += 1
        return result

    # ---- in the greenlet ----

    def _run(self) -> None:
        try:
            if isinstance(self._result, Exception):  # over before it began
                raise self._result
            for event in self._generate():
                self._events.append(event)
        except Exception as error:  # noqa: BLE001  it is the request's, and the server goes on
            error.__traceback__ = None  # whose frames keep tensors
            self._events.append(Failure(error))
        self.is_over = True

    def _generate(self) -> Iterator[Event]:
        """Generate the text; yields its last events."""
        request, generator, stream = self.ticket.request, self._generator, self._stream
        whole: str | None = None
        try:
            [sized] = generator.sized([request.canvas], request.settings)
            [filled] = generator.writer.write(
                [sized.canvas], request.settings, sample_indices=[self.number], watch=self._watch
            )
            result = generator.generated(filled)
            text, whole, n_tokens = result.predict, result.text, result.n_tokens
            is_stopped = stream.ends(filled.ids)
            end = stream.find_stop(text)
        except _Stopped:
            text, end = stream.stopped or "", len(stream.stopped or "")
        if end is not None:
            text, whole, is_stopped = text[:end], None, True
            n_tokens = stream.n_tokens(self._ids[stream.start :], text)
        rest = stream.finish(text)
        if rest:
            yield Progress(self.number, self._n_steps, rest)
        yield Answer(
            sample=self.number,
            text=text,
            whole=stream.whole(text) if whole is None else whole,
            finish_reason="stop" if is_stopped else "length",
            prompt_tokens=len(request.canvas) - request.canvas.n_editable,
            completion_tokens=n_tokens,
            num_forward_passes=self.n_passes,
            num_steps=self._n_steps,
        )

    def _watch(self, step: int, canvases: Sequence[Canvas], ids: list[list[int]]) -> None:
        """Note what a step decoded; see `writer.Watch`."""
        [canvas], [self._ids] = canvases, ids
        text = self._stream.advance(canvas, self._ids)
        shown = None
        if self.ticket.request.shows_canvas:
            shown = tuple(self._stream.pieces(self._ids))
        if text or shown is not None:
            self._events.append(Progress(self.number, self._n_steps, text, shown))
        self._n_steps += 1
        if self._stream.stopped is not None:
            raise _Stopped


class _WaitingRunner:
    """The `Runner` of one sample: its forward passes wait for those of other samples."""

    def __init__(self, sample: Sample, runner: ModelRunner) -> None:
        self._sample, self._runner = sample, runner

    def run(
        self,
        ids: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        head_index: Tensor,
        cache: ColumnCache | None = None,
    ) -> Output:
        """Wait for the pass, see `Runner`."""
        return self._sample.wait(Part(ids, mask, position_ids, head_index, cache))

    def logits(self, hidden: Tensor, outputs: int | None, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield logits, see `ModelRunner.logits`."""
        return self._runner.logits(hidden, outputs, rows_at_once)

    def close(self) -> None:
        """Do nothing: the model goes on serving others."""


def _stream_of(generator: TextGenerator, ticket: Ticket) -> TextStream:
    """Return the text stream of a request's sample."""
    request = ticket.request
    settings, config = request.settings, generator.config
    may_change = generator.edits(settings).active or isinstance(settings.strategy(), Remasking)

    def block_of(canvas: Canvas) -> list[int]:
        return [int(number) for number in blocks_of_canvas(canvas, settings, config)]

    return TextStream(
        generator.codec, request.canvas, generator.eos_ids, request.stop, block_of if may_change else None
    )
