"""Stack the rows of several sampler calls, so that one `denoising_step` takes a step of each.

Rows do not depend on each other, so a row's step is the same in any batch. Shorter rows are padded on the right with
fixed tokens that are not text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..utils.devices import integers_on
from .prediction import Context
from .state import Plan, SamplerState

# What a field of a row is padded with.
_STATE_PADDING = {"z": 0, "is_masked": False, "committed": -1}
_PLAN_PADDING = {"editable_index": 0, "block": -1, "block_steps": 0, "budget": 0, "reveal_probability": 0}
_STEP = 2**40  # the number of the joint step; no call has as many steps


def stack_states(states: Sequence[SamplerState]) -> SamplerState:
    """Return the states of several calls as one."""
    stacked: dict[str, Any] = {
        name: _stack([getattr(state, name) for state in states], _STATE_PADDING.get(name)) for name in _TENSORS
    }
    return SamplerState(**stacked, step=_STEP)


def stack_plans(plans: Sequence[Plan]) -> Plan:
    """Return the plans of several calls as one; they agree in all fields that are not per row."""
    first = plans[0]
    stacked = {
        field.name: _stack([getattr(plan, field.name) for plan in plans], _PLAN_PADDING.get(field.name))
        for field in fields(Plan)
        if isinstance(getattr(first, field.name), Tensor) and field.name not in ("eos_ids", "seed")
    }
    seeds = [_wrapped(plan.seed) for plan in plans for _ in plan.sample_index]
    seed = integers_on(first.sample_index.device, seeds)
    changes: dict[str, Any] = {**stacked, "seed": seed, "steps": max(plan.steps for plan in plans)}
    return replace(first, **changes)


def stack_contexts(contexts: Sequence[Context | None], states: Sequence[SamplerState]) -> Context:
    """Return the contexts of several calls as one."""
    given = [context or Context() for context in contexts]
    empty = [torch.zeros_like(state.is_masked) for state in states]
    no_text = [one if context.no_text is None else context.no_text for context, one in zip(given, empty, strict=True)]
    prompt = None
    if any(context.prompt is not None for context in given):
        rows = [one if context.prompt is None else context.prompt for context, one in zip(given, empty, strict=True)]
        prompt = _stack(rows, False)
    return Context(no_text=_stack(no_text, True), prompt=prompt)


def own_steps(stacked: SamplerState, states: Sequence[SamplerState]) -> SamplerState:
    """Return the state after a joint step, with the joint step's number in `committed` replaced by each call's own.

    Args:
        stacked: the state after the step.
        states: those of the calls, before the step.
    """
    steps = integers_on(stacked.z.device, [[state.step] for state in states for _ in range(len(state.z))])
    return replace(stacked, committed=torch.where(stacked.committed == _STEP, steps, stacked.committed))


def restacked(stacked: SamplerState) -> SamplerState:
    """Turn the state after a joint step, from `own_steps`, into what `stack_states` would return for the next step."""
    return replace(stacked, step=_STEP, nfe=0, finished=False)


def split_states(stacked: SamplerState, states: Sequence[SamplerState]) -> list[SamplerState]:
    """Return the states of the calls after a joint step.

    Args:
        stacked: after the step, from `own_steps`.
        states: of the calls before it.
    """
    sizes = [len(state.z) for state in states]
    columns = {name: getattr(stacked, name).split(sizes) for name in _TENSORS}
    result = []
    for number, state in enumerate(states):
        own: dict[str, Any] = {name: columns[name][number] for name in _TENSORS}
        for name in _STATE_PADDING:
            own[name] = own[name][:, : state.z.shape[1]]
        result.append(SamplerState(**own, step=state.step + 1, nfe=int(stacked.nfe) + state.nfe))
    return result


_OTHERS = ("step", "nfe", "finished", "on_host")
_TENSORS = tuple(field.name for field in fields(SamplerState) if field.name not in _OTHERS)


def _stack(values: Sequence[Tensor], padding: Any) -> Tensor:
    """Return the rows of all values, padded on the right with `padding`; None if they need none."""
    if padding is not None:
        width = max(value.shape[1] for value in values)
        values = [functional.pad(value, (0, width - value.shape[1]), value=padding) for value in values]
    return torch.cat(list(values))


def _wrapped(seed: int | Tensor) -> int:
    """Return a seed in [0, 2**64) as int64."""
    if isinstance(seed, Tensor):
        raise TypeError("plans that are stacked already cannot be stacked again")
    return seed - 2**64 if seed >= 2**63 else seed
