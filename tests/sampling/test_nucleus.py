"""The nucleus against a full sort, draws by rejection against the distribution they promise, and the measures."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.sampling import nucleus, start
from llamafactory_ddm.sampling.logits import LogitsConfig, filtered_log_probs, guided_logits, penalise_repetition
from llamafactory_ddm.sampling.nucleus import Weights, draw_by_rejection, in_nucleus, nucleus_mask, sample_weights
from llamafactory_ddm.sampling.tokens import draw_tokens

ALL = frozenset({"log_prob", "margin", "entropy", "argmax", "top_log_prob"})


def members(values, weights, top_p):
    """Walk down a row sorted by value, lower id first, until the mass is reached; everything in exact sums."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    total, mass, kept = math.fsum(weights), [], []
    for index in order:
        kept.append(index)
        mass.append(weights[index])
        if math.fsum(mass) >= top_p * total:
            break
    return kept


def closest(values, weights, top_p):
    """How near the mass of the first n tokens, for some n, comes to the bound, as a share of all."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    sums = itertools.accumulate(weights[index] for index in order)
    return min(abs(mass / math.fsum(weights) - top_p) for mass in sums)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 400),
    top_p=st.floats(0.01, 0.999),
    grain=st.sampled_from([0.0, 0.25, 2.0, 100.0]),
)
def test_the_nucleus_equals_a_full_sort_ties_included(seed, vocab, top_p, grain):
    values = torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    if grain:  # coarse values: ties, up to all being equal
        values = (values / grain).round() * grain
    values[0, seed % vocab] = -torch.inf if vocab > 1 else 0.0
    values -= values.amax(dim=1, keepdim=True)
    weights = values.exp()
    got = nucleus_mask(values, weights, top_p)
    for row in range(2):
        expected = members(values[row].tolist(), weights[row].tolist(), top_p)
        assert got[row].nonzero()[:, 0].tolist() == sorted(expected)
        if closest(values[row].tolist(), weights[row].tolist(), top_p) < 1e-6:
            continue  # float32 sums cannot tell the two sides of the bound apart
        one_by_one = in_nucleus(
            values[row].expand(vocab, -1), weights[row].expand(vocab, -1), torch.arange(vocab), top_p
        )
        assert one_by_one.nonzero()[:, 0].tolist() == sorted(expected)
        # The first tries draw nearly every token; where one lies outside, a draw from the nucleus itself replaces it.
        u = torch.stack([torch.linspace(0, 0.999, vocab, dtype=torch.float64), torch.zeros(vocab)], dim=1)
        table = Weights(weights[row].expand(vocab, -1))
        first = sample_weights(table, u[:, 0]).tolist()
        for wide in (1, vocab + 1):  # each row alone, and all rows at once
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nucleus, "_WIDE", wide)
                drawn = draw_by_rejection(values[row].expand(vocab, -1), table, u, top_p).tolist()
            assert drawn == [token if token in expected else min(expected) for token in first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_real_vocabulary_are_drawn_as_by_the_nucleus_itself(dtype):
    """Rounding to bfloat16 makes most logits equal to others."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(12, 50257, generator=generator) * torch.linspace(0.01, 4, 12)[:, None]).to(dtype).float()
    values -= values.amax(dim=1, keepdim=True)
    u = torch.rand(12, 8, generator=generator, dtype=torch.float64)
    for top_p in (0.05, 0.5, 0.9):
        weights = Weights(values.exp())
        is_inside = nucleus_mask(values, weights.values, top_p)
        tries = torch.stack([sample_weights(weights, u[:, column]) for column in range(7)], dim=1)
        last = sample_weights(Weights(weights.values * is_inside), u[:, 7])
        expected = [
            next((token for token in row if is_inside[number, token]), int(last[number]))
            for number, row in enumerate(tries.tolist())
        ]
        assert draw_by_rejection(values, weights, u, top_p).tolist() == expected


def test_equal_tokens_fill_the_nucleus_from_the_lowest_id():
    values = torch.zeros(1, 10)
    assert nucleus_mask(values, values.exp(), 0.3).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert nucleus_mask(values, values.exp(), 0.31).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000])
def test_each_token_owns_its_part_of_the_unit_interval_across_chunks(vocab):
    weights = torch.rand(1, vocab, generator=torch.Generator().manual_seed(vocab)).double()
    weights[0, ::7] = 0.0
    if vocab == 1:
        weights[:] = 1.0
    ends = weights.cumsum(dim=1)[0] / weights.sum()
    inside = torch.cat([torch.zeros(1, dtype=torch.float64), ends[:-1]]) * 0.5 + ends * 0.5
    possible = weights[0] > 0
    drawn = sample_weights(Weights(weights.expand(vocab, vocab)), inside)
    assert torch.equal(drawn[possible], torch.arange(vocab)[possible])


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-48])
def test_the_ends_of_the_interval_hit_possible_tokens(u):
    weights = torch.zeros(1, 600)
    weights[0, [300, 410]] = torch.tensor([1.0, 2.0])
    drawn = sample_weights(Weights(weights), torch.tensor([u], dtype=torch.float64))
    assert drawn.item() == (300 if u == 0.0 else 410)


@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 0.7), (0.05, 2.0), (0.999, 1.3)])
@pytest.mark.parametrize("vocab", [9, 400])
def test_draws_by_rejection_have_the_distribution(top_p, temperature, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(1, vocab, generator=generator) * 2 * 2).round() / 2  # with ties
    config, n = LogitsConfig(temperature, top_p), 40000
    u = torch.rand(n, 8, generator=generator, dtype=torch.float64)
    ids = draw_tokens(logits.expand(n, vocab), config, u, suppress=(3,)).ids
    expected = filtered_log_probs(logits, config, suppress=(3,))[0].double().exp()
    assert (expected[ids] > 0).all(), "a draw lies outside the nucleus"
    share = torch.bincount(ids, minlength=vocab).double() / n
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("tries", [1, 2, 8])
def test_the_last_number_always_finds_a_token_of_the_nucleus(tries):
    """All other uniform numbers select the least probable token, which is never in the nucleus."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).expand(50, 4)
    u = torch.full((50, tries), 1.0 - 2**-48, dtype=torch.float64)
    u[:, -1] = (torch.arange(50) + 0.5) / 50
    ids = draw_tokens(logits, LogitsConfig(top_p=0.8), u).ids
    expected = filtered_log_probs(logits[:1], LogitsConfig(top_p=0.8)).exp()[0]
    torch.testing.assert_close(torch.bincount(ids, minlength=4) / 50, expected, atol=0.021, rtol=0)


def test_a_draw_depends_on_its_own_row_only():
    generator = torch.Generator().manual_seed(1)
    logits, u = torch.randn(40, 300, generator=generator), torch.rand(40, 8, generator=generator)
    config = LogitsConfig(1.1, 0.4)
    together = draw_tokens(logits, config, u).ids
    for row in range(40):
        assert draw_tokens(logits[row : row + 1], config, u[row : row + 1]).ids[0] == together[row]


@pytest.mark.parametrize(
    "config", [LogitsConfig(), LogitsConfig(0.0), LogitsConfig(0.5, 0.3), LogitsConfig(2.0, 1.0, 3)]
)
@pytest.mark.parametrize("wide", [1, 31])
def test_measures_are_of_the_models_own_distribution(config, wide, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 30, generator=generator)
    logits[0, 5] = -torch.inf
    monkeypatch.setattr(nucleus, "_WIDE", wide)
    draws = draw_tokens(logits, config, torch.rand(6, 8, generator=generator), suppress=(4, 29, 77), measures=ALL)
    allowed = [i for i in range(30) if i not in (4, 29)]
    p = logits.double()[:, allowed].softmax(dim=1)
    best = p.sort(dim=1, descending=True).values
    own = logits.double()[:, allowed].logsumexp(dim=1)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        draws.log_prob.double(), logits.double().gather(1, draws.ids[:, None])[:, 0] - own, **close
    )
    torch.testing.assert_close(draws.margin.double(), best[:, 0] - best[:, 1], **close)
    torch.testing.assert_close(draws.entropy.double(), -torch.special.xlogy(p, p).sum(dim=1), **close)
    assert draws.argmax.tolist() == [allowed[i] for i in p.argmax(dim=1).tolist()]
    torch.testing.assert_close(draws.top_log_prob.double(), best[:, 0].log(), **close)
    assert not draws.bad.any()


def test_uniform_numbers_have_48_bits():
    x = torch.zeros(2, 500, dtype=torch.int64)
    _, plan = start(x, editable=x == 0, mask_id=1, steps=3, seed=5)
    u = plan.token_draws(torch.zeros(2, dtype=torch.int64), torch.arange(1000), tries=2)
    assert u.shape == (1000, 2) and u.dtype == torch.float64
    grains = u * 2.0**48
    assert torch.equal(grains, grains.round()) and not torch.equal(u * 2.0**24, (u * 2.0**24).round())
    assert float(u.min()) >= 0.0 and float(u.max()) < 1.0
    low = (grains % 2**24) / 2**24  # the lower half is as uniform as the whole
    assert abs(float(low.mean()) - 0.5) < 0.04 and abs(float(u.mean()) - 0.5) < 0.04
    assert abs(float(torch.corrcoef(torch.stack([u.flatten(), low.flatten()]))[0, 1])) < 0.12


def test_a_single_token_has_the_whole_margin_and_no_entropy():
    draws = draw_tokens(torch.tensor([[2.0, 7.0]]), LogitsConfig(), torch.zeros(1), suppress=(0,), measures=ALL)
    assert (draws.ids.item(), draws.margin.item(), draws.entropy.item(), draws.log_prob.item()) == (1, 1.0, 0.0, 0.0)


def test_guidance_by_its_formula():
    one, other = torch.tensor([[1.0, -2.0, -torch.inf]]), torch.tensor([[0.5, 1.0, 3.0]])
    torch.testing.assert_close(guided_logits(one, other, 3.0), torch.tensor([[2.0, -8.0, -torch.inf]]))
    torch.testing.assert_close(guided_logits(one, other, 1.0), one)
    assert guided_logits(one, other, 0.0).tolist() == [[0.5, 1.0, -math.inf]]


def test_the_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1, 1, 5], [0, 11, 2], [7, 7, 7]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone())
    before = logits.clone()
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.7), expected)
    assert torch.equal(logits, before)
    nobody = torch.full((3, 2), 2**62)
    torch.testing.assert_close(penalise_repetition(logits, nobody, 1.7), logits)


def test_ids_to_suppress_may_be_of_numpy():
    assert LogitsConfig(suppress=(np.int64(3),)).suppress == (3,)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"suppress": (-1,)}, "suppress"),
    ],
)
def test_values_out_of_range(values, words):
    with pytest.raises(ValueError, match=words):
        LogitsConfig(**values)
