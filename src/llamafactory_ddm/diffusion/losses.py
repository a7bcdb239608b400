"""Losses of masked and mixed diffusion: the cost of one token at one noise level, in nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of the logits that are processed at once. On a CPU the chunk is small enough to stay in the cache.
_ELEMENTS_AT_ONCE = {"cpu": 2**19}
_ELEMENTS_ELSEWHERE = 2**24
_TINY = 1e-30


def masked_cross_entropy(logits: Tensor, x_0: Tensor) -> Tensor:
    """Return -log p(x_0), p = softmax(logits), at each masked position.

    Args:
        logits: [n_masked, vocab], unnormalised, any float dtype; upcast to float32 inside.
        x_0: [n_masked] int64, the clean ids.
    Returns:
        [n_masked] float32, in nats.
    Raises:
        ValueError: if the two disagree in length.
    Source: Shi et al. 2024, MD4 (arXiv 2406.04329), eq. 4.
    """
    if logits.dim() != 2 or x_0.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [n, vocab] and x_0 [n], got {tuple(logits.shape)} and {tuple(x_0.shape)}")
    nll: Tensor = _CrossEntropy.apply(logits, x_0)  # type: ignore[no-untyped-call]
    return nll


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that allocates one tensor of the size of the logits, their gradient.

    `torch.nn.functional.cross_entropy` also saves the log-probabilities: twice the peak memory. Where logits have half
    precision, float32 probabilities would be larger than they are, so the backward pass computes them again. Else the
    forward pass keeps the probabilities, and the backward pass turns them into the gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x_0: Tensor) -> Tensor:
        """Return [n] float32."""
        ctx.keeps = ctx.needs_input_grad[0] and logits.dtype in (torch.float32, torch.float64)
        if ctx.keeps:
            log_p = logits.log_softmax(dim=1)
            nll = -log_p.gather(1, x_0[:, None])[:, 0].float()
            ctx.save_for_backward(x_0)
            ctx.p = log_p.exp_()
            return nll
        log_total = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for part in _row_parts(logits):
            log_total[part] = logits[part].float().logsumexp(dim=1)
        ctx.save_for_backward(logits, x_0, log_total)
        return log_total - logits.gather(1, x_0[:, None])[:, 0].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return (softmax(logits) - one_hot(x_0)) * grad, in the dtype of the logits."""
        if ctx.keeps:
            if ctx.p is None:
                raise RuntimeError("the gradient of masked_cross_entropy can be taken once only")
            (x_0,), p, ctx.p = ctx.saved_tensors, ctx.p, None
            minus_one = torch.full_like(x_0[:, None], -1.0, dtype=p.dtype)
            return p.scatter_add_(1, x_0[:, None], minus_one).mul_(grad[:, None]), None
        logits, x_0, log_total = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part in _row_parts(logits):
            p = logits[part].float().sub(log_total[part, None]).exp_()
            p.scatter_add_(1, x_0[part, None], -torch.ones_like(x_0[part, None], dtype=p.dtype))
            result[part] = p.mul_(grad[part, None])
        return result, None


def mixed_kl(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha: Tensor, *, uniform_ratio: float, n_ids: int, mask_id: int
) -> Tensor:
    """Return the cost of each token under mixed noise, scaled so that its weight is that of masked noise.

    The cost times -alpha' / (1 - alpha) is the integrand of the evidence bound, an integral over t. Without uniform
    noise the cost is the cross-entropy at [MASK] and 0 elsewhere.

    Forward process: a token is kept with probability a = alpha(t), else it is drawn from pi, which gives k / n to each
    of the n ids and a further 1 - k to [MASK]. So the marginal of a clean distribution y is

        q_y(j) = a y_j + (1 - a) pi_j.

    In continuous time a token jumps from j to z at the rate (-a'/a) pi_z. The reverse process jumps from z to j at the
    rate r_y(j) = (-a'/a) pi_z q_y(j) / q_y(z). The bound compares the reverse process of the clean token x with that
    of the model's distribution p, which gives no mass to [MASK]. The divergence of two jump processes with the rates r
    and r' is the sum over j of r' - r + r log(r / r'). With rho = q_x(z) / q_p(z) it is

        (-a'/a) (pi_z / q_x(z)) { rho - 1 - log rho + KL(q_x | q_p) },   both parts at least 0.

    With psi(u) = u - log(1 + u), b = (1 - a) k / n and s = a / b,

        KL(q_x | q_p) = (a + b) psi(-a (1 - p_x) / (a + b)) + b sum over j other than x and [MASK] of psi(s p_j),

        rho - 1 - log rho = 0                                        at z = [MASK],
                            psi(a (1 - p_x) / (b + a p_x))           at z = x,
                            psi(-u / (1 + u)) with u = s p_z         at any other z.

    This form is free of catastrophic cancellation: 1 - p_x is summed from the other tokens. Numbers per row are
    float64, sums over the vocabulary float32, computed for a few rows at a time. The backward pass recomputes them, so
    the only further tensor of the size of the logits is their gradient.

    Args:
        logits: [n, vocab], unnormalised, any float dtype; the columns of [MASK] and from `n_ids` on are ignored.
        x_0: [n] int64, the clean ids, below `n_ids` and not [MASK].
        z_t: [n] int64, the noised ids.
        alpha: [n] float, the probability that a token is kept, in [0, 1).
        uniform_ratio: k, the fraction of noised tokens that become random tokens, in [0, 1].
        n_ids: n; noise draws ids from 0 to n - 1.
        mask_id: the id of [MASK]; if below `n_ids`, it is also one of the n ids.
    Returns:
        [n] float32, in nats; at least 0.
    Raises:
        ValueError: if the shapes disagree or a number is out of range.
    Source: XDLM (arXiv 2602.01362) for the process and its bound; the form above is derived here.
    """
    if logits.dim() != 2 or any(value.shape != logits.shape[:1] for value in (x_0, z_t, alpha)):
        raise ValueError(
            f"logits must be [n, vocab] and x_0, z_t and alpha [n], got {tuple(logits.shape)}, {tuple(x_0.shape)}, "
            f"{tuple(z_t.shape)} and {tuple(alpha.shape)}"
        )
    if not 0.0 <= uniform_ratio <= 1.0:
        raise ValueError(f"uniform_ratio must lie in [0, 1], got {uniform_ratio}")
    if not 0 < n_ids <= logits.shape[1]:
        raise ValueError(f"n_ids must lie in 1..{logits.shape[1]}, the width of the logits, got {n_ids}")
    kl: Tensor = _MixedKl.apply(logits, x_0, z_t, alpha.double(), uniform_ratio, n_ids, mask_id)  # type: ignore[no-untyped-call]
    return kl


class _MixedKl(torch.autograd.Function):
    """`mixed_kl` and its gradient; the docstring of `mixed_kl` defines the symbols."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        x_0: Tensor,
        z_t: Tensor,
        alpha: Tensor,
        uniform_ratio: float,
        n_ids: int,
        mask_id: int,
    ) -> Tensor:
        """Return [n] float32."""
        ctx.n_ids, ctx.mask_id = n_ids, mask_id
        a, b = alpha.clamp(min=_TINY), (1.0 - alpha) * uniform_ratio / n_ids
        s = (a / b).clamp(max=1.0 / _TINY)  # within the range of float32; a larger s gives the same result
        l_x, l_z = _at(logits, x_0), _at(logits, z_t)
        # Over the tokens other than x: highest logit, sum of exp(logit - highest), 1 - p_x, sum of psi(s p_j).
        peak, partition, p_rest, spread = (torch.empty_like(a) for _ in range(4))
        for part in _row_parts(logits):
            e, highest = _exp_others(logits[part], x_0[part], n_ids, mask_id)
            peak[part], partition[part] = highest.double(), e.sum(dim=1).double().clamp(min=_TINY)
            p_rest[part] = torch.sigmoid(partition[part].log() + peak[part] - l_x[part])
            scale = s[part] * p_rest[part] / partition[part]
            spread[part] = _psi(e.mul_(scale.to(e.dtype)[:, None])).sum(dim=1).double()
        log_rest = partition.log() + peak
        total = torch.logaddexp(log_rest, l_x)
        p_x, u_z = torch.sigmoid(l_x - log_rest), s * (l_z - total).exp()
        is_x, is_mask = z_t == x_0, z_t == mask_id
        # p_x may underflow while b is 0, so log(b + a p_x) is computed from logarithms.
        w, log_kept = a * p_rest / (a + b), a.log() + l_x - total
        log_below = torch.logaddexp(b.log(), log_kept)
        log_left = log_below - (a + b).log()
        kl = (a + b) * torch.where(w < 0.5, _psi(-w.clamp(max=0.5)), -w - log_left) + a / s * spread
        # Without uniform noise every jump leads to [MASK], so a token that is kept costs 0.
        share = torch.where(is_x, b / (a + b), 1.0) * (is_mask | (b > 0.0))
        below, v = log_below.exp().where(b > 0.0, 1.0), u_z / (1.0 + u_z)
        of_other = torch.where(v < 0.5, _psi(-v.clamp(max=0.5)), u_z.log1p() - v)
        at_z = torch.where(is_x, _psi(a * p_rest / below), of_other).masked_fill(is_mask, 0.0)
        # Factors of the rows for the backward pass: `of_x` is p_x h_x, `of_z` is p_z times what z adds to h_z.
        p_kept = (log_kept - log_below).exp()
        of_z = torch.where(is_x, -p_kept * p_rest / below, v.square() / a).masked_fill(is_mask, 0.0)
        rows = torch.stack(
            [peak, p_rest / partition, s, p_x, p_rest, (l_z - total).exp(), -p_rest * p_kept, of_z, share]
        )
        ctx.save_for_backward(logits, x_0, z_t, rows)
        return (share * (at_z + kl) / a).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient in the dtype of the logits, 0 for [MASK] and for ids from `n_ids` on.

        The gradient of the braces divided by a is p_j (h_j - sum over i of p_i h_i), where

            h_j = s p_j / (1 + s p_j)               for j other than x,
            h_x = -a (1 - p_x) / (b + a p_x).

        z = x adds -a (1 - p_x) / (b + a p_x)^2 to h_x; any other token z adds u / (b (1 + u)^2) to h_z.
        """
        logits, x_0, z_t, rows = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for part in _row_parts(logits):
            peak, scale, s, p_x, p_rest, p_z, of_x, of_z, share = rows[:, part]
            is_x, elsewhere = z_t[part] == x_0[part], z_t[part] != ctx.mask_id
            p, _ = _exp_others(logits[part], x_0[part], ctx.n_ids, ctx.mask_id, peak)
            p.mul_(scale.to(p.dtype)[:, None])
            ph = p * s.to(p.dtype)[:, None]
            ph.div_(ph + 1.0).mul_(p)
            mean = ph.sum(dim=1).double()
            ph.addcmul_(p, -(mean + of_x + of_z).to(p.dtype)[:, None])
            # Where p is near 1, large numbers cancel. So the entry of x is computed in float64, and that of another z
            # is minus the sum of the rest, as all entries sum to 0.
            at_x = (of_x + of_z.where(is_x, 0.0)) * p_rest - p_x * (mean + of_z.where(~is_x, 0.0))
            at_z = p_z * (s * p_z / (1.0 + s * p_z) - mean - of_x) + of_z * (1.0 - p_z)
            z = z_t[part].where(elsewhere, x_0[part])[:, None]
            ph.scatter_(1, z, 0.0).scatter_(1, x_0[part, None], at_x.to(p.dtype)[:, None])
            at_z = torch.where(p_z > 0.5, -ph.sum(dim=1).double(), at_z)
            ph.scatter_(1, z, torch.where(is_x | ~elsewhere, at_x, at_z).to(p.dtype)[:, None])
            result[part, : ctx.n_ids] = ph.mul_((share * grad[part]).to(p.dtype)[:, None])
        return result, None, None, None, None, None, None


def _exp_others(
    logits: Tensor, x_0: Tensor, n_ids: int, mask_id: int, peak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return exp(logit - highest) with 0 for x and [MASK], and `highest`, the highest logit of the other tokens.

    Args:
        logits: [n, vocab].
        x_0: [n] int64.
        n_ids: ids from 0 that count.
        mask_id: the id of [MASK].
        peak: [n], `highest` of an earlier call, which is then not computed again.
    Returns:
        A new tensor [n, n_ids], float64 if the logits are, else float32; and [n] of the same dtype.
    """
    values = logits[:, :n_ids].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if mask_id < n_ids:
        values[:, mask_id] = -torch.inf
    values.scatter_(1, x_0[:, None], -torch.inf)
    if peak is None:
        highest = values.amax(dim=1).clamp(min=torch.finfo(values.dtype).min)
    else:
        highest = peak.to(values.dtype)
    return values.sub_(highest[:, None]).exp_(), highest


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    """Return [n] float64, the logit of `ids` in each row."""
    return logits.gather(1, ids[:, None])[:, 0].double()


def _psi(u: Tensor) -> Tensor:
    """Return psi(u) = u - log(1 + u) for u > -1; near 0 by its Taylor series, as the difference would cancel."""
    edge, terms = (0.01, 8) if u.dtype == torch.float64 else (0.03, 4)
    near = u.clamp(min=-edge, max=edge)
    series = torch.full_like(near, (-1.0) ** (terms + 1) / (terms + 1))
    for power in range(terms, 1, -1):
        series.mul_(near).add_((-1.0) ** power / power)
    return torch.where(near == u, series.mul_(near).mul_(near), u - u.log1p())


def _row_parts(logits: Tensor) -> list[slice]:
    """Split the rows into slices so that a float32 copy of one slice is small."""
    at_once = _ELEMENTS_AT_ONCE.get(logits.device.type, _ELEMENTS_ELSEWHERE)
    rows = max(1, at_once // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
