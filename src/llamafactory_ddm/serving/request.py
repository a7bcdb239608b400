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
        n: number of samples, which take other random numbers each.
        stop: strings before which a text ends.
        shows_canvas: whether each `Progress` has the canvas.
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
    """What a step of a sample gave; there is none for a step without news.

    Attributes:
        sample: number of the sample, from 0.
        step: number of the step, from 0.
        text: the text that is final since the last event. Joined over all events it is the answer.
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
        whole: the same with the fixed tokens before and after it.
        finish_reason: `stop` at EOS or a stop string, else `length`.
        prompt_tokens: fixed tokens of the canvas, the start token included.
        completion_tokens: tokens of `text`.
        num_forward_passes: forward passes that the text needed.
        num_steps: denoising steps that it took.
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
