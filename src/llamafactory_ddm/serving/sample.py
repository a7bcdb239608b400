"""One sample of a request: ordinary generation in a greenlet, which waits wherever it needs the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..data.canvas import Canvas
from ..generation.block_models import blocks_of_canvas
from ..generation.generator import TextGenerator
from ..modeling.denoiser import ModelDenoiser
from ..modeling.model_runner import ModelPass, ModelRunner, PassOutput
from ..sampling.edits import Edits
from ..sampling.logits import LogitsConfig
from ..sampling.prediction import CachingDenoiser, Context, Denoiser
from ..sampling.state import Plan, SamplerState
from ..sampling.strategies import Remasking, Strategy
from .joint_step import StepRequest, StepResult
from .request import Answer, Event, Failure, Progress
from .text_stream import TextStream
from .waiting import Waiting

if TYPE_CHECKING:
    from .server import Ticket


class _Stopped(Exception):
    """The text contains a stop string."""


class Sample(Waiting):
    """Generates one answer, a denoising step at a time.

    It waits for a `StepRequest`, whose result is a `StepResult`, or for a `ModelPass`, whose result is a `PassOutput`.

    Attributes:
        ticket: of its request.
        number: number of the sample in the request, from 0.
        n_positions: length of the request's canvas, which bounds that of the sample.
        n_passes: forward passes in which it took part.
        events: those that the server has not sent yet.
    """

    def __init__(self, generator: TextGenerator, runner: ModelRunner, ticket: Ticket, number: int) -> None:
        """Prepare sample `number` of the ticket's request; nothing is computed before `resume`.

        Args:
            generator: of the model.
            runner: of the model, for the logits of hidden states.
            ticket: of the request.
            number: of the sample.
        """
        super().__init__(self._run)
        self.ticket, self.number = ticket, number
        self.n_positions = len(ticket.request.canvas)
        self.n_passes = 0
        self.events: list[Event] = []
        self._generator = generator.with_runner(_WaitingRunner(self, runner), self._take_step)
        self._stream = _stream_of(self._generator, ticket)
        self._ids: list[int] = []
        self._n_steps = 0

    # ---- in the greenlet ----

    def _run(self) -> None:
        try:
            for event in self._generate():
                self.events.append(event)
        except Exception as error:  # noqa: BLE001  it is the request's, and the server goes on
            error.__traceback__ = None  # whose frames keep tensors
            self.events.append(Failure(error))

    def _take_step(
        self,
        denoiser: Denoiser | CachingDenoiser,
        state: SamplerState,
        plan: Plan,
        *,
        strategy: Strategy,
        logits: LogitsConfig,
        edits: Edits | None = None,
        context: Context | None = None,
    ) -> SamplerState:
        """Wait for a denoising step; see `sampling.loop.StepFunction`."""
        if not isinstance(denoiser, ModelDenoiser):
            raise TypeError(f"{type(denoiser).__name__} is not a ModelDenoiser")
        result: StepResult = self.wait(StepRequest(denoiser, state, plan, strategy, logits, edits, context))
        self.n_passes += result.n_passes
        return result.state

    def _generate(self) -> Iterator[Event]:
        """Generate the text; yield its last events."""
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
        """Add the events of a step; see `writer.Watch`."""
        [canvas], [self._ids] = canvases, ids
        text = self._stream.advance(canvas, self._ids)
        shown = None
        if self.ticket.request.shows_canvas:
            shown = tuple(self._stream.pieces(self._ids))
        if text or shown is not None:
            self.events.append(Progress(self.number, self._n_steps, text, shown))
        self._n_steps += 1
        if self._stream.stopped is not None:
            raise _Stopped


class _WaitingRunner:
    """The `Runner` of one sample: its forward passes wait for those of other samples."""

    def __init__(self, sample: Sample, runner: ModelRunner) -> None:
        self._sample, self._runner = sample, runner

    def run(self, one: ModelPass) -> PassOutput:
        """Wait for the pass, see `Runner`."""
        output: PassOutput = self._sample.wait(one)
        self._sample.n_passes += 1
        return output

    def logits(self, hidden: Tensor, outputs: int | None, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield logits, see `ModelRunner.logits`."""
        return self._runner.logits(hidden, outputs, rows_at_once)

    def close(self) -> None:
        """Do nothing: other samples still use the model."""


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
