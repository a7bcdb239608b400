"""How often the host waits for the GPU: in a denoising step, and in a training step."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample
from llamafactory_ddm.sampling.budget import split_by_position
from llamafactory_ddm.sampling.loop import denoising_step

from .machine import Machine
from .models import SMALL_GPT2, TOY_GPT2, Shape, make_model
from .report import Report
from .steps import Stepper, rows_of, trainer_of

BLOCK, STEPS = 8, 12
GREEDY_CLAIM, NUCLEUS_CLAIM = 1, 2  # waits of a denoising step, the first one left out


@dataclass
class Waits:
    """Waits for the GPU, which PyTorch warns of.

    Attributes:
        counts: of each `counted` block.
        places: how often each file and line waited.
    """

    counts: list[int] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the waits of the block."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [one for one in caught if "synchroniz" in str(one.message)]
        self.counts.append(len(found))
        self.places.update(f"{Path(one.filename).name}:{one.lineno}" for one in found)

    def said(self) -> str:
        """Return the places that waited most often."""
        return ", ".join(f"{place} {count} times" for place, count in self.places.most_common(3))


def waits(machine: Machine, report: Report) -> None:
    """Count the waits of denoising and training steps."""
    # With more tokens than those among which an accelerator looks for the end of a nucleus first.
    shape = TOY_GPT2 if machine.is_toy else replace(SMALL_GPT2, vocabulary=8192)
    model = make_model(shape).to(machine.device).eval()
    make_bidirectional(model)
    top_p = LogitsConfig(top_p=0.9)
    for kind in ("none", "prefix", "dual", "block"):
        for logits, name, claim in ((LogitsConfig(0.0), "greedy", GREEDY_CLAIM), (top_p, "top-p 0.9", NUCLEUS_CLAIM)):
            what = f"a denoising step, cache {kind}, {name}: waits"
            _try(machine, report, what, claim, lambda kind=kind, logits=logits: _sampling(model, shape, kind, logits))
    for kind in ("ar", "full", "annealed", "mixed", "block"):
        what = f"a training step, {'pt' if kind == 'ar' else f'ddm, {kind}'}: waits"
        _try(machine, report, what, None, lambda kind=kind: _training(machine, shape, kind))


def _try(machine: Machine, report: Report, what: str, claim: int | None, run: Callable[[], Waits]) -> None:
    """Report the largest number of waits of a step, but the first two, in which kernels are chosen and masks made."""
    if not machine.is_cuda:
        report.leave_out(what, "a CPU does not wait for itself")
        return
    try:
        found = run()
        typical = f"median {statistics.median(found.counts[2:]):g}"
        note = "; ".join(filter(None, [typical, found.said()]))
        report.add(what, float(max(found.counts[2:])), at_most=claim, note=note)
    except Exception as error:  # noqa: BLE001 - the others are measured
        report.fail(what, error)


def _sampling(model: Any, shape: Shape, kind: str, logits: LogitsConfig) -> Waits:
    found, length = Waits(), 32
    x = torch.randint(0, shape.mask_id, (4, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    position = torch.arange(length, device=model.device).expand(x.shape)
    editable = position >= 4
    rest: dict[str, Any] = {"block_length": BLOCK}
    if kind == "none":
        denoiser: Any = ModelDenoiser(model, shift=True)
    elif kind == "block":
        denoiser = BlockDenoiser(model, block_length=BLOCK, shift=True)
        rest = {"block": split_by_position(editable, position, BLOCK, shift=True)}
    else:
        denoiser = CachedDenoiser(model, kind=kind, shift=True)  # type: ignore[arg-type]

    def step(*args: Any, **kwargs: Any) -> Any:
        with found.counted():
            return denoising_step(*args, **kwargs)

    try:
        sample(
            denoiser,
            x,
            editable=editable,
            mask_id=shape.mask_id,
            steps=BLOCK // 2 if kind == "block" else STEPS,
            strategy=get_strategy("low_confidence"),
            logits=logits,
            step_function=step,
            **rest,
        )
    finally:
        denoiser.close()
    return found


def _training(machine: Machine, shape: Shape, kind: str) -> Waits:
    found = Waits()
    rows, _ = rows_of(kind, shape, 64, min(128, shape.positions))
    options = {"device": machine.device, "mask_id": shape.mask_id, "batch": 8, "training": {"bf16": True}}
    with trainer_of(kind, make_model(shape), rows, **options) as trainer:
        stepper = Stepper(trainer)
        for _ in range(8):
            with found.counted():
                stepper.step()
    return found
