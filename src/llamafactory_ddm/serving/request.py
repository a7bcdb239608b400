"""A request to the server, and the events that answer it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..data.canvas import Canvas
from ..sampling import SamplingSettings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """Texts to generate.

    Attributes:
        canvas: prompt and positions to generate, from `TextGenerator`.
        settings: how to sample, the seed included.
        n: number of samples; each takes its own random numbers.
        stop: strings that end a text; they are not part of it.
        shows_canvas: whether each `Progress` includes the canvas.
        timeout: seconds from submission after which the request fails; None for no limit.
    """

    canvas: Canvas
    settings: SamplingSettings
    n: int = 1
    stop: tuple[str, ...] = ()
    shows_canvas: bool = False
    timeout: float | None = None


@dataclass(frozen=True)
class Progress:
    """What a step of a sample changed. A step that neither finishes text nor shows the canvas sends none.

    Attributes:
        sample: number of the sample, from 0.
        step: number of the step, from 0.
        text: the text that has become final since the last event. All of them joined are the answer.
        canvas: text of each position from the first generated one on, None for [MASK], if the request shows it.
    """

    sample: int
    step: int
    text: str
    canvas: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """The text of a sample.

    Attributes:
        sample: number of the sample, from 0.
        text: what was generated, up to the first EOS or stop string.
        whole: the same, with the text of the fixed tokens around it.
        finish_reason: `stop` at EOS or a stop string, else `length`.
        prompt_tokens: fixed tokens of the canvas, the start token included.
        completion_tokens: tokens of `text`.
        num_forward_passes: forward passes in which this sample took part.
        num_steps: denoising steps of this sample.
    """

    sample: int
    text: str
    whole: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    num_forward_passes: int
    num_steps: int


@dataclass(frozen=True)
class Failure:
    """The end of a request that failed.

    Attributes:
        error: a ValueError for a wrong request, TimeoutError, `Cancelled`, or what the model raised.
    """

    error: Exception


class Cancelled(Exception):
    """The request was cancelled."""


# A request is over after `n` answers, or one failure.
Event = Progress | Answer | Failure
