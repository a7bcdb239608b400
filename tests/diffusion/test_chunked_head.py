"""The loss of a head in chunks against autograd of the formula with all logits."""

import pytest
import torch
from torch.nn import functional

from llamafactory_ddm.diffusion.chunked_head import chunk_rows, head_loss
from llamafactory_ddm.diffusion.losses import masked_cross_entropy, mixed_kl

N, VOCAB, WIDTH, MASK = 7, 23, 5, 22


def draw(n=N, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(4)
    hidden, weight, bias = (
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in ((n, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    x_0 = torch.randint(0, MASK, (n,), generator=generator)
    return hidden, weight, bias, x_0, torch.rand(n, generator=generator) * 10


def cross_entropy_cost(x_0, row_weight, seen=None):
    def cost(logits, rows):
        if seen is not None:
            seen.append(len(logits))
        nll = masked_cross_entropy(logits, x_0[rows])
        return (nll * row_weight[rows]).sum(), nll.detach().sum()

    return cost


@pytest.mark.parametrize("rows", [*range(1, N + 2), None])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_loss_and_its_gradients_are_those_of_the_formula(rows, has_bias):
    hidden, weight, bias, x_0, row_weight = draw()
    leaves = (hidden, weight, bias) if has_bias else (hidden, weight)
    logits = hidden @ weight.T + (bias if has_bias else 0.0)
    nll = logits.exp().sum(dim=1).log() - logits[torch.arange(N), x_0]
    expected = torch.autograd.grad(3.0 * (nll * row_weight).sum(), leaves)
    seen = []
    cost = cross_entropy_cost(x_0, row_weight, seen)
    loss, terms = head_loss(hidden, weight, bias if has_bias else None, cost, rows=rows)
    assert loss.item() == pytest.approx((nll * row_weight).sum().item(), rel=1e-6)
    assert terms.item() == pytest.approx(nll.sum().item(), rel=1e-6) and not terms.requires_grad
    for ours, theirs in zip(torch.autograd.grad(3.0 * loss, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert sum(seen) == N and max(seen) <= (rows or N)


@pytest.mark.parametrize("rows", [1, 3, N])
def test_the_divergence_of_mixed_noise(rows):
    hidden, weight, bias, x_0, row_weight = draw()
    z_t, alpha = x_0.clone(), torch.linspace(0.05, 0.95, N, dtype=torch.float64)
    z_t[::2], z_t[1] = MASK, (x_0[1] + 1) % MASK

    def cost(logits, rows):
        kl = mixed_kl(logits, x_0[rows], z_t[rows], alpha[rows], uniform_ratio=0.3, n_ids=VOCAB, mask_id=MASK)
        return (kl * row_weight[rows]).sum(), kl.detach().sum()

    expected, expected_terms = cost(hidden @ weight.T + bias, slice(None))
    gradients = torch.autograd.grad(expected, (hidden, weight, bias))
    loss, terms = head_loss(hidden, weight, bias, cost, rows=rows)
    torch.testing.assert_close((loss, terms), (expected, expected_terms), rtol=1e-6, atol=0.0)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight, bias)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def draw_low_rank(n=N, dtype=torch.float64, rank=2):
    generator = torch.Generator().manual_seed(5)
    inner, outer = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (n, VOCAB))
    return inner.to(dtype).requires_grad_(), outer.to(dtype).requires_grad_()


@pytest.mark.parametrize("rows", [1, 3, N, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_product_of_low_rank(rows, frozen):
    hidden, weight, bias, x_0, row_weight = draw()
    weight.requires_grad_(not frozen)
    inner, outer = draw_low_rank()
    leaves = [leaf for leaf in (hidden, weight, bias, inner, outer) if leaf.requires_grad]
    logits = hidden @ weight.T + bias + inner @ outer.T
    nll = logits.exp().sum(dim=1).log() - logits[torch.arange(N), x_0]
    expected = torch.autograd.grad(3.0 * (nll * row_weight).sum(), leaves)
    cost = cross_entropy_cost(x_0, row_weight)
    loss, terms = head_loss(hidden, weight, bias, cost, low_rank=(inner, outer), rows=rows)
    assert loss.item() == pytest.approx((nll * row_weight).sum().item(), rel=1e-6)
    assert terms.item() == pytest.approx(nll.sum().item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(3.0 * loss, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_without_rows_every_gradient_is_zero():
    hidden, weight, bias, x_0, row_weight = draw(0)
    loss, terms = head_loss(hidden, weight, bias, cross_entropy_cost(x_0, row_weight))
    loss.backward()
    assert (loss.item(), terms.item()) == (0.0, 0.0)
    assert hidden.grad.shape == (0, WIDTH) and not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tensor_has_no_gradient(frozen):
    leaves = draw()
    leaves[frozen].requires_grad_(False)
    head_loss(*leaves[:3], cross_entropy_cost(*leaves[3:]), rows=2)[0].backward()
    assert [leaf.grad is None for leaf in leaves[:3]] == [number == frozen for number in range(3)]


def test_no_gradient_is_computed_under_no_grad_nor_given_twice():
    hidden, weight, bias, x_0, row_weight = draw()
    cost = cross_entropy_cost(x_0, row_weight)
    loss, _ = head_loss(hidden, weight, bias, cost, rows=2)
    with torch.no_grad():
        value, _ = head_loss(hidden, weight, bias, cost, rows=2)
    assert value.item() == pytest.approx(loss.item(), rel=1e-6) and not value.requires_grad
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def gradient_errors(dtype, weight_dtype, scale, n=64, rows=9):
    """Return the errors of the weight's gradient, with all logits and in chunks, against float64."""
    hidden, weight, bias, x_0, row_weight = draw(n, torch.float32)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    loss, _ = cross_entropy_cost(x_0, row_weight)(functional.linear(*exact), slice(None))
    truth = scale * torch.autograd.grad(loss, exact[1])[0]
    hidden, weight, bias = (value.detach().to(weight_dtype).requires_grad_() for value in (hidden, weight, bias))
    errors = []
    for in_chunks in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=weight_dtype != dtype):
            cost = cross_entropy_cost(x_0, row_weight)
            if in_chunks:
                loss, _ = head_loss(hidden, weight, bias, cost, rows=rows)
            else:
                loss, _ = cost(functional.linear(hidden, weight, bias), slice(None))
        (gradient,) = torch.autograd.grad(scale * loss, weight)
        assert gradient.dtype == weight_dtype
        errors.append((gradient.double() - truth).norm().item() / truth.norm().item())
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_as_exact_as_with_all_logits(dtype, autocast):
    dense, chunked = gradient_errors(dtype, torch.float32 if autocast else dtype, scale=8.0)
    assert chunked < 1.5 * dense < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_of_half_precision_are_as_exact_as_one(dtype):
    """A sum in half precision would lose the parts that are smaller than its last digit."""
    dense, chunked = gradient_errors(dtype, dtype, scale=8.0, n=2000, rows=1)
    assert chunked < 1.5 * dense < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_with_a_product_of_low_rank(dtype, autocast):
    """Adapters in float32 on a frozen layer in half precision, as PEFT keeps them, and all in half precision."""
    hidden, weight, bias, x_0, row_weight = draw(64, dtype)
    low_rank = draw_low_rank(64, torch.float32 if autocast else dtype)
    leaves = (hidden, *low_rank)
    cost = cross_entropy_cost(x_0, row_weight)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight, bias, *low_rank)]
    logits = exact[0] @ exact[1].T + exact[2] + exact[3] @ exact[4].T
    truth = torch.autograd.grad(8.0 * cost(logits, slice(None))[0], (exact[0], *exact[3:]))
    errors = []
    for rows in (None, 9):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            if rows is None:
                logits = functional.linear(hidden, weight, bias) + functional.linear(*low_rank)
                loss, _ = cost(logits, slice(None))
            else:
                loss, _ = head_loss(hidden, weight, bias, cost, low_rank=low_rank, rows=rows)
        gradients = torch.autograd.grad(8.0 * loss, leaves)
        assert [value.dtype for value in gradients] == [leaf.dtype for leaf in leaves]
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(gradients, truth, strict=True)])
    for dense, chunked in zip(*errors, strict=True):
        assert chunked < 1.5 * dense < 0.05


def test_in_float16_the_factor_of_the_loss_keeps_small_gradients():
    hidden, weight, bias, x_0, _ = draw(16, torch.float16)
    tiny = torch.full((16,), 2.0**-26)  # as 1 / denominator; its gradient is 0 in float16
    loss, _ = head_loss(hidden, weight, bias, cross_entropy_cost(x_0, tiny), rows=5)
    dense, _ = cross_entropy_cost(x_0, tiny)(functional.linear(hidden, weight, bias), slice(None))
    ours, theirs = (torch.autograd.grad(value * 2.0**26, hidden)[0] for value in (loss, dense))
    assert theirs.abs().sum() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_rows_of_a_chunk_follow_from_the_vocabulary():
    assert chunk_rows(50258, "cpu") % 16 == 0 and 64 <= chunk_rows(50258, "cpu") <= 512
    assert chunk_rows(10**9, "cpu") == 16 and chunk_rows(50258, "cuda") > chunk_rows(50258, "cpu")
