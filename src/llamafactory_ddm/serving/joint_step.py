"""One denoising step of many samples.

Samples with the same settings are one batch of the sampler. The server then joins the forward passes of all these
batches, whatever their settings. A step of a batch waits for the device twice, for any number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..modeling.denoiser import Answers, ModelDenoiser
from ..modeling.denoiser_rows import DenoiserRows
from ..modeling.model_runner import ModelPass, PassOutput
from ..sampling.edits import Edits
from ..sampling.logits import LogitsConfig
from ..sampling.loop import denoising_step
from ..sampling.prediction import Context, Denoiser
from ..sampling.rows import own_steps, restacked, split_states, stack_contexts, stack_plans, stack_states
from ..sampling.state import Plan, SamplerState
from ..sampling.strategies import Strategy
from ..utils.devices import integers_on

# Runs passes, and returns the output of each or the error that it raised.
RunPasses = Callable[[Sequence[ModelPass]], Sequence[PassOutput | Exception]]


@dataclass(frozen=True, eq=False)
class StepRequest:
    """The arguments with which one sample calls `denoising_step`."""

    denoiser: ModelDenoiser
    state: SamplerState
    plan: Plan
    strategy: Strategy
    logits: LogitsConfig
    edits: Edits | None
    context: Context | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Return the settings that the requests of one batch must share."""
        try:
            hash(self.strategy)
            strategy: Any = self.strategy
        except TypeError:  # somebody's own
            strategy = id(self.strategy)
        plan = self.plan
        return (strategy, self.logits, self.edits, plan.mask_id, plan.stop_at_eos, plan.eos_last)


@dataclass(frozen=True, eq=False)
class StepResult:
    """The result of a step of one sample.

    Attributes:
        state: after the step.
        n_passes: forward passes of the step.
    """

    state: SamplerState
    n_passes: int


class JointSteps:
    """Takes the steps of requests with the same `key`; caches what does not change between steps."""

    def __init__(self, outputs: int | None, project: Callable[[Tensor, int | None], Iterator[Tensor]]) -> None:
        """Prepare; nothing is computed yet.

        Args:
            outputs: number of ids that get a logit, from 0; None for all.
            project: yields the logits of hidden states, see `ModelRunner.logits`.
        """
        self._outputs, self._project = outputs, project
        self._constants: tuple[list[Plan], Plan, Context, DenoiserRows] | None = None
        self._latest: tuple[list[SamplerState], SamplerState] | None = None

    def take(self, requests: Sequence[StepRequest], run: RunPasses) -> list[StepResult | Exception]:
        """Return the result of each request, or the error that it ended with."""
        errors: dict[int, Exception] = {}
        try:
            return self._take(requests, run, errors)
        except Exception as error:  # noqa: BLE001  the request's, whatever it is
            if len(requests) == 1:
                return [errors.get(0, error)]
            # Logits that are unusable are found before the forward pass, so the steps of others are taken now. A text
            # whose pass failed ends, as its denoiser has noted the columns that the pass should have cached.
            return [errors.get(number) or self.take([one], run)[0] for number, one in enumerate(requests)]

    def _take(
        self, requests: Sequence[StepRequest], run: RunPasses, errors: dict[int, Exception]
    ) -> list[StepResult | Exception]:
        first, states = requests[0], [request.state for request in requests]
        plan, context, denoisers = self._constants_of(requests)
        if self._latest is not None and _same(self._latest[0], states):
            state = self._latest[1]
        else:
            state = stack_states(states)
        rows = _Rows(denoisers, state.z, self._outputs, self._project, run, errors)
        after = denoising_step(
            rows, state, plan, strategy=first.strategy, logits=first.logits, edits=first.edits, context=context
        )
        after = own_steps(after, states)
        on_host = after.z.cpu()  # one wait for all rows, whose texts are read next
        news = [
            replace(new, on_host=on_host[number : number + 1, : new.z.shape[1]])
            if rows.goes_on[number]
            else replace(states[number], finished=True)
            for number, new in enumerate(split_states(after, states))
        ]
        self._latest = (news, restacked(after))
        return [
            errors.get(number) or StepResult(new, n_passes)
            for number, (new, n_passes) in enumerate(zip(news, rows.n_passes, strict=True))
        ]

    def _constants_of(self, requests: Sequence[StepRequest]) -> tuple[Plan, Context, DenoiserRows]:
        plans = [request.plan for request in requests]
        if self._constants is None or not _same(self._constants[0], plans):
            states = [request.state for request in requests]
            context = stack_contexts([request.context for request in requests], states)
            denoisers = DenoiserRows(
                [request.denoiser for request in requests],
                [state.z.shape[1] for state in states],
                states[0].z.device,
            )
            self._constants = (plans, stack_plans(plans), context, denoisers)
        return self._constants[1:]


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))


class _Rows:
    """The denoisers of several samples, used as one `CachingDenoiser` for one step.

    Attributes:
        n_passes: forward passes of each row.
        goes_on: whether each row was unfinished before the step.
    """

    def __init__(
        self,
        denoisers: DenoiserRows,
        z: Tensor,
        outputs: int | None,
        project: Callable[[Tensor, int | None], Iterator[Tensor]],
        run: RunPasses,
        errors: dict[int, Exception],
    ) -> None:
        """Prepare; `errors` takes those of rows whose forward pass failed, whose logits are zeros."""
        self._denoisers, self._errors = denoisers, errors
        self.n_passes = [0] * len(z)
        self.goes_on = [False] * len(z)
        self._outputs, self._project, self._run = outputs, project, run
        self._computed = [0] * len(z)
        self._device = z.device

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int = 0) -> Tensor:
        """Return [batch, n] int64: whether the row is unfinished, then the numbers that its denoiser needs."""
        own = self._denoisers.questions(z, asked, scope, branch)
        return torch.cat([scope.any(dim=1, keepdim=True).long(), own], dim=1)

    def step(self, scope: Tensor, branch: int = 0, answers: Answers | None = None) -> Denoiser:
        """Return the denoiser of the step, see `CachingDenoiser`."""
        if answers is None:
            raise RuntimeError("the rows of a joint step need the answers to their questions")
        self.goes_on = [bool(is_unfinished) for is_unfinished, *_ in answers]
        own = [numbers for _, *numbers in answers]

        def denoise(z: Tensor, flat_index: Tensor) -> Iterator[Tensor]:
            return self._logits(z, flat_index, scope, branch, own)

        return denoise

    def take_computed(self) -> Tensor:
        """Return [batch] int64, the tokens of each row that went through the model."""
        return integers_on(self._device, self._computed)

    def _logits(self, z: Tensor, flat_index: Tensor, scope: Tensor, branch: int, answers: Answers) -> Iterator[Tensor]:
        by_row = self._denoisers.passes(z, flat_index, scope, branch, answers)
        numbers = [number for number, one in enumerate(by_row) if one is not None]
        passes = [one for one in by_row if one is not None]
        for number, one in zip(numbers, passes, strict=True):
            self.n_passes[number] += 1
            self._computed[number] += one.ids.numel()
        results = self._run(passes)
        failed = {n: one for n, one in zip(numbers, results, strict=True) if isinstance(one, Exception)}
        self._errors.update(failed)
        sample = next((one for one in results if not isinstance(one, Exception)), None)
        if sample is None:
            raise failed[numbers[0]]
        outputs = [
            _zeros(sample, answers[number][0]) if isinstance(result, Exception) else result
            for number, result in zip(numbers, results, strict=True)
        ]
        yield from self._joined(outputs)

    def _joined(self, outputs: Sequence[PassOutput]) -> Iterator[Tensor]:
        """Yield the logits of all rows."""
        logits = [values for _, values in outputs if values is not None]
        if logits:
            yield torch.cat(logits)[:, : self._outputs]
        else:
            yield from self._project(torch.cat([hidden for hidden, _ in outputs]), self._outputs)


def _zeros(like: PassOutput, count: int) -> PassOutput:
    """Return zeros for `count` positions, with the width, type and device of another output."""
    hidden, logits = like
    return hidden.new_zeros(count, hidden.shape[1]), None if logits is None else logits.new_zeros(
        count, logits.shape[1]
    )
