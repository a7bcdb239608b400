import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import logits as module
from llamafactory_ddm.sampling.logits import LogitsConfig, candidates, draw_tokens, log_confidence


def by_full_sort(logits, config):
    """The textbook filter: sort the whole vocabulary of each row, keep until the mass is reached."""
    result = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    for row, values in enumerate(logits.double() / config.temperature):
        order = values.argsort(descending=True).tolist()[: config.top_k or len(values)]
        kept = values[order].softmax(dim=0)
        mass = 0.0
        for index, p in zip(order, kept.tolist(), strict=True):
            result[row, index] = values[index]
            mass += p
            if mass >= config.top_p:
                break
    return result.softmax(dim=1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 60),
    temperature=st.floats(0.2, 3.0),
    top_p=st.floats(0.05, 1.0),
    top_k=st.none() | st.integers(1, 70),
)
def test_filters_equal_a_full_sort(seed, vocab, temperature, top_p, top_k):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    config = LogitsConfig(temperature, top_p, top_k)
    scores, ids = candidates(logits, config)
    got = torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, ids, scores.double().softmax(dim=1))
    torch.testing.assert_close(got, by_full_sort(logits, config), rtol=1e-4, atol=1e-6)


def test_a_wide_nucleus_is_found_in_more_than_one_look(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WIDTH", 2)
    monkeypatch.setattr(module, "_WIDER", 2)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    config = LogitsConfig(1.0, 0.95)
    scores, ids = candidates(logits, config)
    got = torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, ids, scores.double().softmax(dim=1))
    torch.testing.assert_close(got, by_full_sort(logits, config), rtol=1e-4, atol=1e-6)


def test_draws_have_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.25, 0.65])
    n = 20000
    u = (torch.arange(n) + 0.5) / n
    ids = draw_tokens(probabilities.log().expand(n, 4), LogitsConfig(), u)
    torch.testing.assert_close(torch.bincount(ids, minlength=4) / n, probabilities, atol=1e-3, rtol=0)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24])
@pytest.mark.parametrize("config", [LogitsConfig(), LogitsConfig(top_p=0.9), LogitsConfig(top_k=3)])
def test_an_impossible_token_is_never_drawn(u, config):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw_tokens(logits, config, torch.tensor([u])).item() == (1 if u == 0.0 else 3)


def test_temperature_zero_takes_the_most_probable():
    logits = torch.randn(5, 9)
    assert torch.equal(draw_tokens(logits, LogitsConfig(0.0), torch.rand(5)), logits.argmax(dim=1))


def test_rows_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    logits, u = torch.randn(7, 11), torch.rand(7)
    together = draw_tokens(logits, LogitsConfig(), u)
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 22)
    assert torch.equal(draw_tokens(logits, LogitsConfig(), u), together)


def test_nothing_to_draw():
    assert draw_tokens(torch.empty(0, 5), LogitsConfig(), torch.empty(0)).tolist() == []


def test_confidence_is_the_models_own():
    logits = torch.randn(3, 6)
    ids = torch.tensor([5, 0, 2])
    torch.testing.assert_close(log_confidence(logits, ids), logits.log_softmax(dim=1)[torch.arange(3), ids])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_values_out_of_range(values, words):
    with pytest.raises(ValueError, match=words):
        LogitsConfig(**values)
