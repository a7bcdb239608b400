"""The output embedding and the loss of its logits in chunks of rows, so that [n, vocab] never exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    dtypes: tuple[torch.dtype, ...]  # one for each pair of factors; the first is also that of the logits


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many rows of logits are computed at once on a type of device."""
    rows = _ELEMENTS_AT_ONCE.get(device, _ELEMENTS_ELSEWHERE) // vocabulary
    return max(_ROWS_MULTIPLE, rows // _ROWS_MULTIPLE * _ROWS_MULTIPLE)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cost: Cost,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    rows: int | None = None,
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
        low_rank: the factors of a second product `inner @ outer.T` that is added to the logits, as by LoRA: inner
            [n, rank] and outer [vocab, rank].
        rows: n logits at once, at least 1; by default as many as `chunk_rows` says.
    Returns:
        The loss, and the sum of the terms, detached; both scalars of the dtype that `cost` returns.
    """
    device = hidden.device.type
    factors = [hidden, weight, *(low_rank or ())]
    if not torch.is_grad_enabled():
        factors, bias = [factor.detach() for factor in factors], None if bias is None else bias.detach()
    dtypes = tuple(_product_dtype(right, device) for right in factors[1::2])
    plan = _Plan(cost, rows or chunk_rows(len(weight), device), dtypes)
    loss, terms = _HeadLoss.apply(plan, bias, *factors)  # type: ignore[no-untyped-call]
    return loss, terms


def _product_dtype(weight: Tensor, device: str) -> torch.dtype:
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class _HeadLoss(torch.autograd.Function):
    """`head_loss` and its gradients."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, bias: Tensor | None, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the sum of the terms."""
        needed = ctx.needs_input_grad[1:]
        ctx.plan, ctx.recomputes, ctx.gradients = plan, torch.float16 in plan.dtypes, None
        if ctx.recomputes:
            ctx.save_for_backward(bias, *factors)
            needed = (False,) * len(needed)
        loss, terms, ctx.gradients = _run(plan, bias, factors, needed)
        ctx.dtypes = [None if value is None else value.dtype for value in (bias, *factors)]
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the bias and of the factors."""
        if ctx.recomputes:
            bias, *factors = ctx.saved_tensors
            _, _, gradients = _run(ctx.plan, bias, factors, ctx.needs_input_grad[1:], grad)
        elif ctx.gradients is None:
            raise RuntimeError("the gradients of head_loss can be taken once only")
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if grad.device.type != "cpu" or grad.item() != 1.0:  # reading a number of a device would wait for it
                gradients = [None if value is None else value.mul_(grad) for value in gradients]
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (None, *(None if value is None else value.to(dtype) for value, dtype in pairs))


def _run(
    plan: _Plan, bias: Tensor | None, factors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the loss, the sum of the terms, and the `needed` gradients of bias and factors times `grad`.

    Args:
        plan: the cost, the size of a chunk and the dtypes.
        bias: [vocab], or None.
        factors: left factor [n, k] and right factor [vocab, k] of the first product, then of the next.
        needed: whether a gradient is needed, for the bias and for each factor.
        grad: the gradient of the loss; None for 1.
    """
    with torch.autocast(factors[0].device.type, enabled=False):
        lefts, rights = (
            [factor.detach().to(dtype) for factor, dtype in zip(side, plan.dtypes, strict=True)]
            for side in (factors[::2], factors[1::2])
        )
        b = None if bias is None else bias.detach().to(plan.dtypes[0])
        n = len(lefts[0])

        def zeros(value: Tensor) -> Tensor:
            # In half precision each addition would round, and small parts would be lost.
            dtype = torch.promote_types(value.dtype, torch.float32) if n > plan.rows else value.dtype
            return torch.zeros_like(value, dtype=dtype)

        of_bias = zeros(bias) if bias is not None and needed[0] else None
        of_lefts = [torch.empty_like(left) if needs else None for left, needs in zip(lefts, needed[1::2], strict=True)]
        of_rights = [zeros(right) if needs else None for right, needs in zip(factors[1::2], needed[2::2], strict=True)]
        losses, terms = [], []
        for start in range(0, max(1, n), plan.rows):
            rows = slice(start, start + plan.rows)
            logits = functional.linear(lefts[0][rows], rights[0], b)
            for left, right in zip(lefts[1:], rights[1:], strict=True):
                logits += functional.linear(left[rows], right)
            if not any(needed):
                loss, term = plan.cost(logits, rows)
            else:
                with torch.enable_grad():
                    loss, term = plan.cost(logits.requires_grad_(), rows)
                (of_logits,) = torch.autograd.grad(loss, logits, grad)
                if of_bias is not None:
                    of_bias += of_logits.sum(dim=0)
                for left, right, of_left, of_right in zip(lefts, rights, of_lefts, of_rights, strict=True):
                    of_product = of_logits.to(right.dtype)
                    if of_left is not None:
                        torch.mm(of_product, right, out=of_left[rows])
                    if of_right is not None:
                        _add_product(of_right, of_product, left[rows])
            losses.append(loss.detach())
            terms.append(term.detach())
        for number, right in enumerate(factors[1::2]):  # the float32 sums are not kept until the backward pass
            total = of_rights[number]
            of_rights[number] = None if total is None else total.to(right.dtype)
        gradients = [of_bias, *(value for pair in zip(of_lefts, of_rights, strict=True) for value in pair)]
    return torch.stack(losses).sum(), torch.stack(terms).sum(), gradients


def _add_product(total: Tensor, of_logits: Tensor, hidden: Tensor) -> None:
    """Add `of_logits.T @ hidden` to `total`, [vocab, width]."""
    if total.dtype == hidden.dtype:
        total.addmm_(of_logits.T, hidden)
        return
    for start in range(0, len(total), _OUTPUTS_AT_ONCE):
        outputs = slice(start, start + _OUTPUTS_AT_ONCE)
        total[outputs] += of_logits[:, outputs].T @ hidden
