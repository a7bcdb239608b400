"""The filters against a full sort in plain Python, and the draws against the distribution they promise."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import tokens as module
from llamafactory_ddm.sampling.logits import LogitsConfig, filtered_log_probs
from llamafactory_ddm.sampling.tokens import draw_tokens


def by_full_sort(logits, config, suppress=()):
    """Sort each row's whole vocabulary (lower id first among equals), keep until the mass is reached, normalise."""
    result = torch.zeros(logits.shape, dtype=torch.float64)
    for row, values in enumerate(logits.double().tolist()):
        values = [-math.inf if i in suppress else v for i, v in enumerate(values)]
        order = sorted(range(len(values)), key=lambda i, v=values: (-v[i], i))
        if config.temperature == 0.0:
            result[row, order[0]] = 1.0
            continue
        weights = [math.exp((values[i] - values[order[0]]) / config.temperature) for i in order[: config.top_k]]
        mass, kept = 0.0, []
        for index, weight in zip(order, weights, strict=False):
            kept.append((index, weight))
            mass += weight / sum(weights)
            if mass >= config.top_p < 1:  # rounding may bring the mass to 1 before the last token
                break
        for index, weight in kept:
            result[row, index] = weight / sum(w for _, w in kept)
    return result


def with_confidence(logits, config, u, **rest):
    draws = draw_tokens(logits, config, u, measures=frozenset({"log_prob"}), **rest)
    return draws.ids, torch.where(draws.bad, torch.nan, draws.log_prob)


def assert_equals_the_full_sort(logits, config, suppress=()):
    got = filtered_log_probs(logits, config, suppress=suppress)
    assert got.dtype == torch.float32 and got.shape == logits.shape
    expected = by_full_sort(logits, config, suppress)
    assert torch.equal(got > -torch.inf, expected > 0), "the same tokens survive"
    torch.testing.assert_close(got.double().exp(), expected, rtol=1e-5, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 60),
    temperature=st.just(0.0) | st.floats(0.2, 3.0),
    top_p=st.just(1.0) | st.floats(0.05, 0.999),  # nearer to 1 the sums' rounding decides
    top_k=st.none() | st.integers(1, 70),
    grain=st.sampled_from([0.0, 0.5, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(seed=0, vocab=4, temperature=0.5, top_p=0.5, top_k=None, grain=4.0, dtype=torch.float32)
@example(seed=0, vocab=40, temperature=1.0, top_p=0.5, top_k=7, grain=4.0, dtype=torch.bfloat16)
@example(seed=0, vocab=40, temperature=1.0, top_p=0.9, top_k=None, grain=4.0, dtype=torch.float32)
@example(seed=0, vocab=9, temperature=0.25, top_p=1.0, top_k=None, grain=0.0, dtype=torch.float32)
def test_filters_equal_a_full_sort(seed, vocab, temperature, top_p, top_k, grain, dtype):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if grain:  # coarse values: many ties, as logits from bfloat16 have
        logits = (logits / grain).round() * grain
    suppress = (seed % vocab,)
    before = logits.to(dtype).clone()
    given_logits = before.clone()
    assert_equals_the_full_sort(given_logits, LogitsConfig(temperature, top_p, top_k), suppress)
    assert torch.equal(given_logits, before), "the caller's logits are left alone"


def test_the_most_probable_token_survives_the_smallest_nucleus():
    log_probs = filtered_log_probs(torch.tensor([[0.0, 0.1, 0.0]]), LogitsConfig(top_p=1e-9))
    assert log_probs.tolist() == [[-math.inf, 0.0, -math.inf]]


def test_negative_zero_and_minus_infinity_sort_as_numbers():
    logits = torch.tensor([[-torch.inf, -1.0, -0.0, 0.0, -2.0]])
    survivors = filtered_log_probs(logits, LogitsConfig(top_k=1)) > -torch.inf
    assert survivors.tolist() == [[False, False, True, False, False]]  # -0.0 and 0.0 are equal: the lower id
    survivors = filtered_log_probs(logits, LogitsConfig(top_k=3)) > -torch.inf
    assert survivors.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("temperature", [1e-310, 1e-42, 1e-6, 1e6, 1e308])
def test_extreme_temperatures_approach_the_argmax_and_the_uniform(temperature):
    logits = torch.tensor([[1.0, 2.0, -3.0, -torch.inf]])
    expected = [[0.0, 1.0, 0.0, 0.0]] if temperature < 1 else [[1 / 3, 1 / 3, 1 / 3, 0.0]]
    got = filtered_log_probs(logits, LogitsConfig(temperature)).exp()
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config", [LogitsConfig(), LogitsConfig(0.7, 0.8), LogitsConfig(1.3, 1.0, 4), LogitsConfig(0.0)]
)
def test_draws_have_the_distribution(config):
    """With u on an even grid each token is drawn n p times, give or take one; a random u only adds noise to that."""
    logits, n = torch.randn(1, 9, generator=torch.Generator().manual_seed(4)), 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, _ = with_confidence(logits.expand(n, 9), config, u, suppress=(3,))
    share = torch.bincount(ids, minlength=9).double() / n
    torch.testing.assert_close(share, by_full_sort(logits, config, (3,))[0], atol=1.5 / n, rtol=0)


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """A token of probability 2**-30 has its own part of [0, 1), which a draw of 24 bits could not hit."""
    logits = torch.tensor([[0.0, -30 * math.log(2.0), 0.0]])
    middle = 1.0 / (2.0 + 2.0**-30)
    u = torch.tensor([middle - 1e-11, middle + 2.0**-32, middle + 2.0**-31 + 1e-9], dtype=torch.float64)
    assert draw_tokens(logits.expand(3, 3), LogitsConfig(), u).ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (0.25, 2), (0.5, 4), (0.75, 4)])
def test_each_token_owns_a_half_open_part_of_the_unit_interval(u, expected):
    """Parts [0, 1/4), [1/4, 1/2) and [1/2, 1) in the order of ids; impossible tokens between them own nothing."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0]]).log()
    assert draw_tokens(logits, LogitsConfig(), torch.tensor([u])).ids.item() == expected


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24, 1.0 - 2**-48])
@pytest.mark.parametrize("config", [LogitsConfig(), LogitsConfig(top_p=0.9), LogitsConfig(top_k=3)])
def test_an_impossible_token_is_never_drawn(u, config):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf, 9.0]])
    ids, _ = with_confidence(logits, config, torch.tensor([u], dtype=torch.float64), suppress=(5,))
    assert ids.item() == (1 if u == 0.0 else 3)


def test_an_impossible_token_is_never_drawn_even_if_the_running_sum_is_not_monotonic(monkeypatch):
    """A parallel sum may round differently from entry to entry; here one is made to do so."""
    falling = torch.zeros(1, 256, dtype=torch.float64)
    falling[0, :4] = torch.tensor([0.4, 0.6, 0.5, 1.0])
    plain = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda self, dim, **rest: falling if self.shape[1] == 256 else plain(self, dim, **rest)
    )
    logits = torch.tensor([[0.0, -torch.inf, 0.5, 0.0]])
    assert draw_tokens(logits, LogitsConfig(), torch.tensor([0.45])).ids.item() in (0, 2, 3)


def test_temperature_zero_takes_the_most_probable():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    ids, confidence = with_confidence(logits, LogitsConfig(0.0), torch.rand(5))
    assert torch.equal(ids, logits.argmax(dim=1))
    torch.testing.assert_close(confidence, logits.log_softmax(dim=1).amax(dim=1))


def test_rows_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, u = torch.randn(7, 11, generator=generator), torch.rand(7, generator=generator)
    together = with_confidence(logits, LogitsConfig(top_p=0.9), u)
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", {"cpu": 22})
    in_parts = with_confidence(logits, LogitsConfig(top_p=0.9), u)
    assert torch.equal(in_parts[0], together[0])
    torch.testing.assert_close(in_parts[1], together[1])


def test_nothing_to_draw():
    ids, confidence = with_confidence(torch.empty(0, 5), LogitsConfig(top_p=0.5), torch.empty(0))
    assert ids.tolist() == [] and ids.dtype == torch.int64 and confidence.tolist() == []


def test_confidence_is_the_models_own_without_the_suppressed_ids():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    ids, confidence = with_confidence(logits, LogitsConfig(0.3, 0.5, 2), torch.rand(3), suppress=(4,))
    own = logits[:, [0, 1, 2, 3, 5]].logsumexp(dim=1)
    torch.testing.assert_close(confidence, logits[torch.arange(3), ids] - own)


@pytest.mark.parametrize("broken", [[math.nan, 0.0, 1.0], [-math.inf] * 3, [0.0, math.inf, 0.0]])
@pytest.mark.parametrize("config", [LogitsConfig(), LogitsConfig(0.0), LogitsConfig(top_p=0.5), LogitsConfig(top_k=2)])
def test_unusable_logits_have_no_confidence(broken, config):
    _, confidence = with_confidence(torch.tensor([[0.0, 1.0, 2.0], broken]), config, torch.tensor([0.3, 0.6]))
    assert confidence.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_out_of_range(values, words):
    with pytest.raises(ValueError, match=words):
        LogitsConfig(**values)


def test_wrong_shapes_and_ids():
    with pytest.raises(ValueError, match="u must be"):
        draw_tokens(torch.zeros(2, 3), LogitsConfig(), torch.zeros(3))
    with pytest.raises(ValueError, match="logits must be"):
        filtered_log_probs(torch.zeros(3), LogitsConfig())
    with pytest.raises(ValueError, match="suppress"):
        filtered_log_probs(torch.zeros(2, 3), LogitsConfig(), suppress=(-1,))
