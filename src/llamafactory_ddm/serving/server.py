"""`Server`: a thread that owns the model and denoises the texts of many requests at once.

Each sample of a request runs ordinary generation in a greenlet, which waits at each denoising step. Once all samples
wait, the server takes their steps together, and each sample continues with its own result. So samples join and leave
the batch between two steps, whatever their settings. A text does not depend on the other samples, except for rounding:
the sums of a matrix product depend on its shape.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..generation.generator import TextGenerator
from ..modeling.joint_pass import run_joint, together
from ..modeling.model_runner import ModelPass, ModelRunner, PassOutput
from ..sampling.state import MAX_SAMPLES
from .joint_step import JointSteps, StepRequest, StepResult
from .request import Answer, Cancelled, Event, Failure, Request
from .sample import Sample
from .waiting import Waiting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        max_rows: largest number of samples in the batch.
        max_positions: largest sum of the lengths of their canvases.
        max_queue: largest number of samples that wait.
    """

    max_rows: int = 32
    max_positions: int = 32768
    max_queue: int = 256

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_positions", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class ServerBusy(RuntimeError):
    """The server takes no request now: its queue is full, or it is closing."""


@dataclass
class Stats:
    """What a server has done since its start.

    Attributes:
        answered: requests that got all their answers.
        failed: requests that failed, not counting cancelled ones.
        cancelled: requests that were cancelled.
        passes: joint forward passes.
        rows: sum of the rows of these passes.
        columns: sum of their positions, without padding.
        tokens: tokens of answers.
        seconds_model: seconds in joint forward passes and in their output embeddings.
        seconds_busy: seconds with a sample in the batch.
    """

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    passes: int = 0
    rows: int = 0
    columns: int = 0
    tokens: int = 0
    seconds_model: float = 0.0
    seconds_busy: float = 0.0


@dataclass(eq=False)
class Ticket:
    """A submitted request.

    Attributes:
        request: the request.
        on_event: called with each event.
        deadline: `time.monotonic()` after which it fails; None for never.
        is_over: whether all its answers, or its failure, have been sent.
    """

    request: Request
    on_event: Callable[[Event], None]
    deadline: float | None
    _n_open: int = field(init=False)
    _is_cancelled: bool = field(default=False, init=False)
    is_over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._n_open = self.request.n

    def cancel(self) -> None:
        """Cancel the request; its samples leave the batch before the next step. May be called from any thread."""
        self._is_cancelled = True

    def why_over(self) -> Exception | None:
        """Return the error of a request that was cancelled or took too long, or None."""
        if self._is_cancelled:
            return Cancelled("the request was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return TimeoutError(f"the request took longer than {self.request.timeout:g} seconds")
        return None

    def emit(self, event: Event) -> bool:
        """Send an event unless the request is over; return whether this event ends it."""
        if self.is_over:
            return False
        if isinstance(event, Answer):
            self._n_open -= 1
        self.is_over = isinstance(event, Failure) or self._n_open == 0
        try:
            self.on_event(event)
        except Exception as error:  # noqa: BLE001  the receiver is gone, say its event loop is closed
            logger.debug("an event was not received: %s", error)
            self._is_cancelled = True
        return self.is_over


class Server:
    """Denoises the texts of many requests at once, in a thread of its own."""

    def __init__(self, generator: TextGenerator, limits: Limits | None = None) -> None:
        """Start the thread; `generator` must not be used elsewhere until `close`."""
        self.generator = generator
        self.limits = limits or Limits()
        self.stats = Stats()
        self._changed = threading.Condition()
        self._queue: deque[Sample] = deque()
        self._running: list[Sample] = []
        self._results: dict[Sample, Any] = {}
        self._steps: dict[Any, JointSteps] = {}
        self._is_closing = False
        generator.sizer.try_cache()  # runs the model, which is the thread's from now on
        self._runner = ModelRunner(generator.model)
        self._outputs = generator.sizer.n_ids
        self._thread = threading.Thread(target=self._work, name="denoising", daemon=True)
        self._thread.start()
        # A thread that is in the model while the interpreter ends would abort the process.
        atexit.register(self.close, drain=False)

    @property
    def n_running(self) -> int:
        """Return the number of samples in the batch."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Return the number of samples that wait."""
        return len(self._queue)

    def check(self, request: Request) -> None:
        """Check a request.

        Raises:
            ValueError: naming the key that is wrong.
        """
        if not 1 <= request.n <= min(self.limits.max_queue, MAX_SAMPLES):
            raise ValueError(
                f"n: {request.n} must lie between 1 and {self.limits.max_queue}, the samples that may wait"
            )
        if any(not word for word in request.stop):
            raise ValueError("stop: '' ends every text at once; give a longer string")
        editable = request.canvas.editable
        if request.stop and sum(is_gap for is_gap, _ in itertools.groupby(editable)) > 1:
            raise ValueError(f"stop: {request.stop[0]!r} has no effect on a text with several gaps; remove it")
        if len(request.canvas) > self.limits.max_positions:
            raise ValueError(
                f"prompt and max_tokens have {len(request.canvas)} positions, but this server takes at most "
                f"{self.limits.max_positions}; shorten the prompt, or generate fewer tokens"
            )
        self.generator.check([request.canvas], request.settings)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request; may be called from any thread.

        Args:
            request: see `Request`.
            on_event: called with each event in the server's thread, so it must be quick.
        Raises:
            ValueError: see `check`.
            ServerBusy: if the queue is full, or the server is closing.
        """
        self.check(request)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        ticket = Ticket(request, on_event, deadline)
        with self._changed:
            if self._is_closing:
                raise ServerBusy("the server is closing")
            if len(self._queue) + request.n > self.limits.max_queue:
                raise ServerBusy(f"{len(self._queue)} texts wait already, of at most {self.limits.max_queue}")
            self._queue.extend(Sample(self.generator, self._runner, ticket, number) for number in range(request.n))
            self._changed.notify()
        return ticket

    def answers(self, request: Request) -> list[Answer]:
        """Return the answers to a request, in the order of its samples.

        Raises:
            Exception: what ended the request, and see `submit`.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        self.submit(request, events.put)
        answers: list[Answer] = []
        while len(answers) < request.n:
            event = events.get()
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Answer):
                answers.append(event)
        return sorted(answers, key=lambda answer: answer.sample)

    def close(self, *, drain: bool = True) -> None:
        """End the thread, and stop using the model.

        Args:
            drain: whether running and waiting samples are finished first; else their requests are cancelled.
        """
        with self._changed:
            self._is_closing = True
            if not drain:
                for sample in (*self._queue, *self._running):
                    sample.ticket.cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:  # which may collect garbage that holds the server
            self._thread.join()
        atexit.unregister(self.close)

    # ---- in the thread ----

    def _work(self) -> None:
        # The greenlets enter and leave no_grad in any order, so it is on for all of them.
        torch.set_grad_enabled(False)
        while self._admit():
            start = time.perf_counter()
            try:
                for sample in list(self._running):
                    self._resume(sample)
                self._compute(self._running)
            except Exception as error:  # a bug, say of somebody's own strategy; without the thread all would hang
                logger.exception("a denoising step failed, and the requests in the batch with it")
                self._abandon(error)
            self.stats.seconds_busy += time.perf_counter() - start
        self._runner.close()

    def _abandon(self, error: Exception) -> None:
        """End the requests of all samples in the batch with an error."""
        samples, self._running = self._running, []
        self._results, self._steps = {}, {}
        for sample in samples:
            self._emit(sample.ticket, Failure(error))

    def _admit(self) -> bool:
        """Wait for work, and move samples from the queue to the batch; return False if the server is to end."""
        with self._changed:
            while not self._queue and not self._running:
                if self._is_closing:
                    return False
                self._changed.wait()
            n_positions = sum(sample.n_positions for sample in self._running)
            gone = self._take_gone()
            while self._queue and len(self._running) < self.limits.max_rows:
                n_positions += self._queue[0].n_positions
                if self._running and n_positions > self.limits.max_positions:
                    break
                self._running.append(self._queue.popleft())
            self._running += gone  # which `_resume` ends without a step
        return True

    def _take_gone(self) -> list[Sample]:
        """Take the samples out of the queue whose request was cancelled, or is over for another reason."""
        gone = [sample for sample in self._queue if sample.ticket.is_over or sample.ticket.why_over() is not None]
        for sample in gone:
            self._queue.remove(sample)
        return gone

    def _resume(self, sample: Sample) -> None:
        """Let a sample run to its next step, or to its end."""
        ticket, result = sample.ticket, self._results.pop(sample, None)
        error = Cancelled("another text of the request failed") if ticket.is_over else ticket.why_over()
        try:
            sample.resume(error or result)
        except Exception as failure:  # noqa: BLE001  before its start
            sample.events.append(Failure(failure))
        events, sample.events = sample.events, []
        for event in events:
            self._emit(ticket, event)
        if sample.is_over:
            self._running.remove(sample)

    def _emit(self, ticket: Ticket, event: Event) -> None:
        if ticket.is_over:
            return
        if isinstance(event, Answer):
            self.stats.tokens += event.completion_tokens
        if ticket.emit(event):
            if not isinstance(event, Failure):
                self.stats.answered += 1
            elif isinstance(event.error, Cancelled):
                self.stats.cancelled += 1
            else:
                self.stats.failed += 1

    def _compute(self, samples: Sequence[Sample]) -> None:
        """Compute what each sample waits for."""
        groups: dict[Any, list[Sample]] = {}
        for sample in samples:
            if isinstance(sample.request, StepRequest):
                groups.setdefault(sample.request.key, []).append(sample)
        self._steps = {key: self._steps.get(key) or JointSteps(self._outputs, self._project) for key in groups}
        tasks = [_StepTask(self._steps[key], group) for key, group in groups.items()]
        single = [sample for sample in samples if isinstance(sample.request, ModelPass)]
        for task in tasks:
            task.resume()
        while True:
            waiting = [task for task in tasks if not task.is_over]
            asked = [task.request for task in waiting] + [[sample.request] for sample in single]
            if not asked:
                break
            outputs = iter(self._run([one for passes in asked for one in passes]))
            answers = [[next(outputs) for _ in passes] for passes in asked]
            for task, answer in zip(waiting, answers[: len(waiting)], strict=True):
                task.resume(answer)
            for sample, answer in zip(single, answers[len(waiting) :], strict=True):
                self._results[sample] = answer[0]
            single = []
        for task in tasks:
            self._results.update(zip(task.samples, task.results, strict=True))

    def _run(self, passes: Sequence[ModelPass]) -> list[PassOutput | Exception]:
        """Run passes, those of similar width joined."""
        outputs: list[PassOutput | Exception | None] = [None] * len(passes)
        for numbers in together(self.generator.model, passes):
            results = self._run_joint([passes[number] for number in numbers])
            for number, result in zip(numbers, results, strict=True):
                outputs[number] = result
        return [output for output in outputs if output is not None]

    def _run_joint(self, passes: Sequence[ModelPass]) -> list[PassOutput | Exception]:
        """Run passes as one; if that fails, run each half separately, down to the pass that fails."""
        start = time.perf_counter()
        try:
            outputs = run_joint(self._runner, passes)
        except Exception as error:  # noqa: BLE001  whatever it is, other requests must go on
            error.__traceback__ = None  # whose frames keep the tensors of the pass
            self.stats.seconds_model += time.perf_counter() - start
            if len(passes) == 1:
                return [error]
            logger.warning("a joint forward pass of %d texts failed and is divided: %s", len(passes), error)
            half = len(passes) // 2
            return self._run_joint(passes[:half]) + self._run_joint(passes[half:])
        self.stats.seconds_model += time.perf_counter() - start
        self.stats.passes += 1
        self.stats.rows += sum(one.n_rows for one in passes)
        self.stats.columns += sum(one.ids.numel() for one in passes)
        return list(outputs)

    def _project(self, hidden: Tensor, outputs: int | None) -> Iterator[Tensor]:
        """Yield the logits of hidden states, and add their time to `stats`."""
        parts = self._runner.logits(hidden, outputs)
        while True:
            start = time.perf_counter()
            part = next(parts, None)
            self.stats.seconds_model += time.perf_counter() - start
            if part is None:
                return
            yield part


class _StepTask(Waiting):
    """The joint step of samples with the same settings; it waits for the outputs of a list of forward passes."""

    def __init__(self, steps: JointSteps, samples: Sequence[Sample]) -> None:
        super().__init__(self._take)
        self.samples = samples
        self.results: list[StepResult | Exception] = []
        self._steps = steps

    def _take(self) -> None:
        self.results = self._steps.take([sample.request for sample in self.samples], self.wait)
