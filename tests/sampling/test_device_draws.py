"""The draws of an accelerator, forced on the CPU: the same tokens as the CPU's own, and what they would cost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import nucleus, tokens
from llamafactory_ddm.sampling.logits import LogitsConfig, filtered_log_probs
from llamafactory_ddm.sampling.tokens import draw_tokens
from support.device_costs import Cost

MEASURES = frozenset({"log_prob", "margin", "entropy", "argmax", "top_log_prob"})


@pytest.fixture
def accelerator(monkeypatch):
    """Return a function that switches the draws to an accelerator's path, with a number of candidates."""

    def switch(n_candidates=16):
        for module in (nucleus, tokens):
            monkeypatch.setattr(module, "is_sequential", lambda device: False)
        monkeypatch.setattr(tokens, "_N_CANDIDATES", n_candidates)

    return switch


def case(seed, vocab, scale, grain, dtype, holes, coarse):
    """Return logits [12, vocab], with ties and impossible tokens, and uniform numbers, some of them on boundaries."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, vocab, generator=generator) * scale
    if grain:
        logits = (logits / grain).round() * grain
    if holes and vocab > 2:
        logits[:, ::3] = -torch.inf
    u = torch.rand(12, 8, generator=generator, dtype=torch.float64)
    return logits.to(dtype), (u * 16).floor() / 16 if coarse else u


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 2, 5, 255, 256, 257, 512, 700]),
    scale=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    grain=st.sampled_from([0.0, 0.0, 0.25, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    holes=st.booleans(),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.0, 1e30]),
    top_p=st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.95, 0.999, 1.0]),
    top_k=st.sampled_from([None, None, 3, 10_000]),
    n_candidates=st.sampled_from([2, 16, 64]),
)
def test_an_accelerator_draws_the_same_tokens(
    seed, vocab, scale, grain, dtype, holes, coarse, temperature, top_p, top_k, n_candidates
):
    logits, u = case(seed, vocab, scale, grain, dtype, holes, coarse)
    config, suppress = LogitsConfig(temperature, top_p, top_k), (vocab // 2,) if vocab > 2 else ()
    expected = draw_tokens(logits, config, u, suppress=suppress, measures=MEASURES)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (nucleus, tokens):
            monkeypatch.setattr(module, "is_sequential", lambda device: False)
        monkeypatch.setattr(tokens, "_N_CANDIDATES", n_candidates)
        got = draw_tokens(logits, config, u, suppress=suppress, measures=MEASURES)
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("n_candidates", [4, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_its_draws_are_those_of_the_published_definition(accelerator, n_candidates, top_p, temperature):
    """Walk down each row sorted by probability until the mass is reached, and draw from what was passed."""
    accelerator(n_candidates)
    logits, u = case(3, 40, 2.0, 0.5, torch.float32, True, False)
    config = LogitsConfig(temperature, top_p)
    ids = draw_tokens(logits, config, u).ids
    for row, values in enumerate((logits.double() / temperature).softmax(dim=1).tolist()):
        order = sorted(range(40), key=lambda i: (-logits[row, i].item(), i))
        kept = [index for n, index in enumerate(order) if math.fsum(values[i] for i in order[:n]) < top_p]
        expected = None
        for number in u[row, :-1].tolist():
            drawn = next(i for i in range(40) if math.fsum(values[: i + 1]) > number)
            if drawn in kept:
                expected = drawn
                break
        if expected is None:
            mass = math.fsum(values[i] for i in kept) * u[row, -1].item()
            expected = next(i for i in sorted(kept) if math.fsum(values[j] for j in kept if j <= i) > mass)
        assert ids[row] == expected


def test_its_draws_have_the_distribution(accelerator):
    logits = (torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 4).round() / 2
    u = torch.rand(40000, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    config = LogitsConfig(0.8, 0.6)
    expected = filtered_log_probs(logits, config)[0].double().exp()
    accelerator()
    assert torch.equal(filtered_log_probs(logits, config)[0].double().exp(), expected)
    share = torch.bincount(draw_tokens(logits.expand(40000, -1), config, u).ids, minlength=300).double() / 40000
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 40000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_unusable_rows_are_found_and_other_rows_are_not_affected(accelerator, bad):
    logits, u = case(5, 300, 2.0, 0.0, torch.float32, False, False)
    expected = draw_tokens(logits, LogitsConfig(top_p=0.9), u).ids
    logits[2] = bad if bad == -torch.inf else logits[2].index_fill(0, torch.tensor([7]), bad)
    accelerator()
    draws = draw_tokens(logits, LogitsConfig(top_p=0.9), u)
    assert draws.bad.nonzero()[:, 0].tolist() == [2]
    draws.ids[2] = expected[2]
    assert torch.equal(draws.ids, expected)


@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float32), (0.7, torch.float32), (0.7, torch.bfloat16)])
def test_a_nucleus_costs_at_most_40_operations_and_12_times_the_logits(temperature, dtype):
    n, vocab = 132, 126464
    logits = torch.empty(n, vocab, device="meta", dtype=dtype)
    u = torch.empty(n, 8, device="meta", dtype=torch.float64)
    with Cost() as cost:
        tokens._draw(logits, LogitsConfig(temperature, 0.9), u, (126336,), frozenset(), True)
    conversion = dtype is not torch.float32
    assert sum(cost.operations.values()) <= 40 + conversion, cost.operations
    assert cost.n_bytes <= 12 * 4 * n * vocab
