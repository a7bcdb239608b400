"""The output embedding and the loss of its logits in chunks of rows, so that [n, vocab] never exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Elements of the logits of one chunk. Smaller chunks read and write the gradient of the weight more often.
_ELEMENTS_AT_ONCE = {"cpu": 2**23}
_ELEMENTS_ELSEWHERE = 2**26
_ROWS_MULTIPLE = 16
_OUTPUTS_AT_ONCE = 2**13  # of a gradient that is computed in another dtype than it is summed in

# Logits of some rows, [rows, vocab], and which rows they are -> their part of the loss, and the sum of their terms.
Cost = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Plan:
    cost: Cost
    rows: int
    dtype: torch.dtype  # of the logits


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many rows of logits are computed at once on a type of device."""
    rows = _ELEMENTS_AT_ONCE.get(device, _ELEMENTS_ELSEWHERE) // vocabulary
    return max(_ROWS_MULTIPLE, rows // _ROWS_MULTIPLE * _ROWS_MULTIPLE)


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cost: Cost, *, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of the logits `hidden @ weight.T + bias`, a sum over rows, and the sum of its terms.

    A chunk's logits z and their gradient dL/dz are computed and dropped before the next chunk. The gradients

        dL/d hidden = dL/dz @ weight,    dL/d weight = sum over chunks of (dL/dz).T @ hidden

    are computed in the forward pass, where the logits are at hand; the backward pass multiplies them by the gradient
    of the loss. So there are three products, as without chunks. In float16 the gradient needs the factor of loss
    scaling before it is rounded, so there the backward pass computes the logits again. Under autocast the products
    have its dtype, as those of `torch.nn.functional.linear`. Sums over several chunks have float32 at least.

    Args:
        hidden: [n, width].
        weight: [vocab, width].
        bias: [vocab], or None.
        cost: gives the loss of some rows, differentiable in their logits; the parts of all rows add up to the loss.
        rows: n logits at once, at least 1; by default as many as `chunk_rows` says.
    Returns:
        The loss, and the sum of the terms, detached; both scalars of the dtype that `cost` returns.
    """
    device = hidden.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    plan = _Plan(cost, rows or chunk_rows(len(weight), device), dtype)
    loss, terms = _HeadLoss.apply(hidden, weight, bias, plan)  # type: ignore[no-untyped-call]
    return loss, terms


class _HeadLoss(torch.autograd.Function):
    """`head_loss` and its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        """Return the loss and the sum of the terms."""
        needed = ctx.needs_input_grad[:3]
        ctx.plan, ctx.recomputes, ctx.gradients = plan, plan.dtype == torch.float16, None
        if ctx.recomputes:
            ctx.save_for_backward(hidden, weight, bias)
            needed = (False, False, False)
        loss, terms, ctx.gradients = _run(hidden, weight, bias, plan, needed)
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias."""
        if ctx.recomputes:
            hidden, weight, bias = ctx.saved_tensors
            _, _, gradients = _run(hidden, weight, bias, ctx.plan, ctx.needs_input_grad[:3], grad)
        elif ctx.gradients is None:
            raise RuntimeError("the gradients of head_loss can be taken once only")
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if grad.device.type != "cpu" or grad.item() != 1.0:  # reading a number of a device would wait for it
                gradients = [None if value is None else value.mul_(grad) for value in gradients]
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (*(None if value is None else value.to(dtype) for value, dtype in pairs), None)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: _Plan,
    needed: tuple[bool, ...],
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the loss, the sum of the terms, and the `needed` gradients of hidden, weight and bias times `grad`."""
    with torch.autocast(hidden.device.type, enabled=False):
        h, w = hidden.detach().to(plan.dtype), weight.detach().to(plan.dtype)
        b = None if bias is None else bias.detach().to(plan.dtype)
        grad_hidden = torch.empty_like(h) if needed[0] else None
        sums = weight.dtype  # in half precision each addition would round, and small parts would be lost
        if len(h) > plan.rows:
            sums = torch.promote_types(sums, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sums) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if bias is not None and needed[2] else None
        losses, terms = [], []
        for start in range(0, max(1, len(h)), plan.rows):
            rows = slice(start, start + plan.rows)
            logits = functional.linear(h[rows], w, b)
            if not any(needed):
                loss, term = plan.cost(logits, rows)
            else:
                with torch.enable_grad():
                    loss, term = plan.cost(logits.requires_grad_(), rows)
                (of_logits,) = torch.autograd.grad(loss, logits, grad)
                if grad_hidden is not None:
                    torch.mm(of_logits, w, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_product(grad_weight, of_logits, h[rows])
                if grad_bias is not None:
                    grad_bias += of_logits.sum(dim=0)
            losses.append(loss.detach())
            terms.append(term.detach())
        if grad_weight is not None:  # it waits for the backward pass, so the float32 sum is not kept
            grad_weight = grad_weight.to(weight.dtype)
    return torch.stack(losses).sum(), torch.stack(terms).sum(), [grad_hidden, grad_weight, grad_bias]


def _add_product(total: Tensor, of_logits: Tensor, hidden: Tensor) -> None:
    """Add `of_logits.T @ hidden` to `total`, [vocab, width]."""
    if total.dtype == hidden.dtype:
        total.addmm_(of_logits.T, hidden)
        return
    for start in range(0, len(total), _OUTPUTS_AT_ONCE):
        outputs = slice(start, start + _OUTPUTS_AT_ONCE)
        total[outputs] += of_logits[:, outputs].T @ hidden
