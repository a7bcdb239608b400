"""The output embedding with its loss: all logits at once, in chunks of rows, and by fused kernels of other packages.

The batch is that of a GPU in examples/llama2_full_ddm.yaml: 8 rows of 2,048 tokens. Their times t are spread evenly
over (0, 1), so half of all tokens are masked. The loss of a token has the weight 1/t. For weighted losses Liger
computes the logits twice; its usual path, a sum without weights, is measured too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llamafactory_ddm.diffusion.chunked_head import head_loss
from llamafactory_ddm.diffusion.losses import masked_cross_entropy

from .machine import Machine
from .report import Report
from .steps import relative_error

LOSS_LIMIT, GRADIENT_LIMIT = 0.01, 0.05  # of bfloat16
TIMED = 5


@dataclass(frozen=True)
class Size:
    """The size of an output embedding and of a batch; `chunk` is that of our head, by default as in training."""

    width: int
    vocabulary: int
    rows: int
    length: int
    chunk: int | None = None


SIZES = (Size(4096, 32000, 8, 2048), Size(4096, 151936, 8, 2048))
TOY_SIZES = (Size(32, 64, 4, 16, chunk=12), Size(32, 160, 4, 16, chunk=12))


@dataclass
class Batch:
    """What a head computes its loss from.

    Attributes:
        hidden: [n, width] bfloat16, of the scored tokens.
        weight: [vocabulary, width] bfloat16, of the output embedding.
        targets: [n] int64.
        weights: [n] float32, of the losses of the tokens; with the factor 1 / tokens of the batch.
        chunk: rows of the logits that our head computes at once; None for as many as in training.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor
    chunk: int | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return what gets a gradient."""
        return self.hidden, self.weight


Head = Callable[[Batch], Tensor]


def make_batch(size: Size, device: str) -> Batch:
    """Return random hidden states whose targets are likely, as those of a trained model are.

    The filter of cut cross-entropy leaves out what has a small probability, and without likely targets all has.
    """
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(size.vocabulary, size.width, device=device)).bfloat16()
    t = (torch.arange(size.rows, device=device) + 0.5) / size.rows
    scored = (t * size.length).round().long()
    weights = (1.0 / (t * size.rows * size.length)).repeat_interleave(scored)
    targets = torch.randint(0, size.vocabulary, (len(weights),), device=device)
    rows = weight[targets].float()
    towards = rows * (math.log(size.vocabulary) / rows.square().sum(dim=1, keepdim=True))
    hidden = (torch.randn_like(rows) + towards).bfloat16()
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), targets, weights, size.chunk)


def all_at_once(batch: Batch) -> Tensor:
    """Compute the loss of all logits, as with `logits_chunk: 0`."""
    losses = masked_cross_entropy(functional.linear(batch.hidden, batch.weight), batch.targets)
    return (losses * batch.weights).sum()


def in_chunks(batch: Batch) -> Tensor:
    """Compute the loss as training does."""

    def cost(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        losses = masked_cross_entropy(logits, batch.targets[rows])
        return (losses * batch.weights[rows]).sum(), losses.sum()

    return head_loss(batch.hidden, batch.weight, None, cost, rows=batch.chunk)[0]


def liger(batch: Batch, *, is_weighted: bool = True, **options: Any) -> Tensor:
    """Compute the loss by Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none" if is_weighted else "sum", **options)
    result: Tensor = loss(batch.weight, batch.hidden, batch.targets)
    return (result * batch.weights).sum() if is_weighted else result


def cut(batch: Batch, **options: Any) -> Tensor:
    """Compute the loss by cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", **options)
    return (losses * batch.weights).sum()


OURS: dict[str, Head] = {"all logits at once": all_at_once, "in chunks": in_chunks}
# Package -> name -> its loss, and whether that has the weights 1/t.
OTHERS: dict[str, dict[str, tuple[Head, bool]]] = {
    "liger_kernel": {
        "Liger": (liger, True),
        "Liger, float32 sums": (partial(liger, accum_dtype=torch.float32), True),
        "Liger, no weights": (partial(liger, is_weighted=False), False),
        "Liger, no weights, float32 sums": (partial(liger, is_weighted=False, accum_dtype=torch.float32), False),
    },
    "cut_cross_entropy": {
        "CCE": (cut, True),
        "CCE, no filter": (partial(cut, filter_eps=None), True),
    },
}


def head(machine: Machine, report: Report) -> None:
    """Time the heads, and compare their losses and gradients with those of float32 logits."""
    others: dict[str, tuple[Head, bool]] = {}
    for package, heads in OTHERS.items():
        if not machine.is_cuda:
            report.leave_out(package, "needs a GPU")
        elif find_spec(package) is None:
            report.leave_out(package, f"{package} is not installed")
        else:
            others |= heads
    for size in TOY_SIZES if machine.is_toy else SIZES:
        batch = make_batch(size, machine.device)
        what = f"vocabulary {size.vocabulary}, {len(batch.targets)} tokens"
        expected = _exact(batch)
        for name, run in OURS.items():
            _measure(machine, report, f"{what}, {name}", run, batch, expected, is_ours=True)
        without = None
        for name, (run, is_weighted) in others.items():
            if not is_weighted and without is None:
                without = _exact(batch, is_weighted=False)
            try:
                _measure(machine, report, f"{what}, {name}", run, batch, expected if is_weighted else without)
            except Exception as error:  # noqa: BLE001 - the other heads are measured
                report.fail(f"{what}, {name}", error)
        del batch, expected, without
        machine.release()


def _exact(batch: Batch, *, is_weighted: bool = True) -> list[Tensor]:
    """Return the loss and the gradients of float32 logits, all at once."""
    hidden, weight = (leaf.detach().float().requires_grad_() for leaf in batch.leaves)
    losses = functional.cross_entropy(hidden @ weight.T, batch.targets, reduction="none")
    loss = (losses * batch.weights).sum() if is_weighted else losses.sum()
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def _run(run: Head, batch: Batch) -> list[Tensor]:
    """Return the loss and the gradients of the hidden states and of the weight."""
    loss = run(batch)
    return [loss.detach(), *torch.autograd.grad(loss, batch.leaves)]


def _measure(
    machine: Machine,
    report: Report,
    what: str,
    run: Head,
    batch: Batch,
    expected: list[Tensor] | None,
    *,
    is_ours: bool = False,
) -> None:
    """Report the errors, the time and the memory of a forward and a backward pass."""
    assert expected is not None
    got = _run(run, batch)  # also compiles kernels
    limits = (LOSS_LIMIT, GRADIENT_LIMIT, GRADIENT_LIMIT) if is_ours else (None, None, None)
    names = ("loss", "gradient of the hidden states", "gradient of the weight")
    for name, value, reference, limit in zip(names, got, expected, limits, strict=True):
        report.add(f"{what}: relative error of the {name}", relative_error(value.float(), reference), at_most=limit)
    del got, value
    machine.release()
    before = machine.allocated()
    memory = machine.peak_memory(partial(_run, run, batch)) - before
    seconds = statistics.median(machine.seconds(partial(_run, run, batch)) for _ in range(TIMED))
    report.add(f"{what}: forward and backward", 1000 * seconds, "ms")
    report.add(f"{what}: peak memory beyond the inputs", memory / 1e9, "GB")
