"""Noise that teaches where a text ends, against counts written out by hand and exact expectations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.eos_noise import (
    EosNoise,
    anneal,
    draw_masks,
    is_window_row,
    mask_around_eos,
    mask_counts,
    scored_padding,
)
from llamafactory_ddm.diffusion.loss_weights import token_weight
from llamafactory_ddm.diffusion.noise import draw_time
from llamafactory_ddm.diffusion.schedules import SCHEDULES, get_schedule


def rows_of(*rows):
    """Rows written as text: g fixed, t text, e EOS, p padding, . outside of the canvas."""
    length = max(map(len, rows))
    kinds = [list(row.ljust(length, ".")) for row in rows]
    maskable = torch.tensor([[kind in "tep" for kind in row] for row in kinds])
    is_pad = torch.tensor([[kind == "p" for kind in row] for row in kinds])
    end = torch.tensor([row.index("e") if "e" in row else -1 for row in kinds])
    return maskable, is_pad, end


@given(text=st.integers(0, 6), pads=st.integers(0, 9), t=st.floats(0.0, 1.0, width=32), ratio=st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_mask_counts_follow_the_published_rule(text, pads, t, ratio):
    maskable, is_pad, _ = rows_of("g" + "t" * text + "p" * pads + ".")
    masked = mask_counts(maskable, is_pad, torch.tensor([t]), ratio, seed=3, sample_index=torch.tensor([5]))[0]
    length = text + pads
    expected_pads, expected_text = min(int(t * length * ratio), pads), min(int(t * length * (1 - ratio)), text)
    if expected_pads + expected_text == 0 and length:
        expected_pads, expected_text = (0, 1) if text else (1, 0)
    assert int((masked & is_pad[0]).sum()) == expected_pads
    assert int((masked & ~is_pad[0]).sum()) == expected_text
    assert not bool((masked & ~maskable[0]).any())


def test_each_token_of_a_kind_is_equally_likely():
    maskable, is_pad, _ = rows_of("gtttteppppp")
    n = 20000
    masked = mask_counts(
        maskable.expand(n, -1), is_pad.expand(n, -1), torch.full((n,), 0.5), 0.4, seed=1, sample_index=torch.arange(n)
    )
    share = masked.double().mean(dim=0)
    # Of ten maskable tokens five are masked: two pads of five, three of five others.
    torch.testing.assert_close(share[1:6], torch.full((5,), 3 / 5).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(share[6:], torch.full((5,), 2 / 5).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("text", "pads", "ratio"), [(4, 20, 0.3), (4, 2, 0.3), (4, 20, 0.0), (3, 3, 1.0), (5, 0, 0.5)]
)
def test_the_fraction_of_padding_among_scored_tokens(text, pads, ratio):
    maskable, is_pad, _ = rows_of("g" + "t" * text + "p" * pads)
    n = 20000
    kept = scored_padding(maskable.expand(n, -1), is_pad.expand(n, -1), ratio, seed=1, sample_index=torch.arange(n))
    assert bool((kept | is_pad).logical_or(~maskable).all())  # all text stays
    n_pads = float((kept & is_pad).sum() / n)
    if ratio < 1 and ratio * text / (1 - ratio) <= pads:
        assert n_pads / (n_pads + text) == pytest.approx(ratio, abs=0.01)
    else:
        assert n_pads == pads  # there are not enough of them


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_loss_of_scored_tokens_is_an_evidence_bound(name):
    """For tokens that are independent the bound is exact: the sum of their own negative log-likelihoods."""
    maskable, is_pad, end = rows_of("gttteppppp")
    nll = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 0.1, 0.2, 0.3, 0.4, 0.5]).double()
    n, schedule, ratio = 400_000, get_schedule(name), 0.25
    rows = torch.arange(n)
    t = draw_time(2, rows, antithetic=True, group_size=1000)
    noise = EosNoise(pad_mask_ratio=ratio)
    drawn = draw_masks(
        noise,
        *(maskable.expand(n, -1), is_pad.expand(n, -1), end.expand(n), t, schedule),
        weighting="elbo",
        step=0,
        seed=2,
        sample_index=rows,
    )
    weight = token_weight(t, drawn.maskable, schedule, "elbo", "tokens", row=drawn.weight)
    mean = float((weight * drawn.is_scored * nll).sum() / n)
    keep = ratio * 4 / (0.75 * 5)
    assert mean == pytest.approx(float(nll[:5].sum() + keep * nll[5:].sum()), rel=0.02)


@given(seed=st.integers(0, 1000), window=st.integers(0, 8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_window_reaches_from_before_eos_to_the_end_of_the_canvas(seed, window, data):
    texts = [
        "g" * data.draw(st.integers(0, 3))
        + "t" * data.draw(st.integers(0, 6))
        + "e"
        + "p" * data.draw(st.integers(0, 4))
        for _ in range(3)
    ]
    maskable, is_pad, end = rows_of(*texts)
    masked = mask_around_eos(maskable, end, window, seed=seed, sample_index=torch.arange(3))
    for row in range(3):
        positions = masked[row].nonzero()[:, 0].tolist()
        assert int(end[row]) in positions
        assert bool(masked[row][is_pad[row]].all())
        assert positions == list(range(positions[0], positions[-1] + 1))
        assert int(end[row]) - positions[0] <= window
        assert not bool((masked[row] & ~maskable[row]).any())


def test_the_window_size_is_uniform():
    maskable, _, end = rows_of("g" + "t" * 9 + "epp")
    n = 20000
    masked = mask_around_eos(maskable.expand(n, -1), end.expand(n), 4, seed=1, sample_index=torch.arange(n))
    count = torch.bincount(masked.sum(dim=1) - 3, minlength=10) / n
    torch.testing.assert_close(count[:5], torch.full((5,), 0.2), rtol=0, atol=0.015)
    assert int(count[5:].count_nonzero()) == 0


def test_rows_without_eos_have_no_window():
    maskable, _, end = rows_of("gtt", "gte")
    assert is_window_row(end, 1.0, seed=0, sample_index=torch.arange(2)).tolist() == [False, True]
    assert mask_around_eos(maskable, end, 1, seed=0, sample_index=torch.arange(2))[0].tolist() == [False] * 3
    n = 20000
    drawn = is_window_row(torch.ones(n, dtype=torch.int64), 0.3, seed=0, sample_index=torch.arange(n))
    assert float(drawn.double().mean()) == pytest.approx(0.3, abs=0.015)


def draw(noise, rows, step, *, weighting="elbo", seed=0):
    maskable, is_pad, end = rows_of(*["gttttepppp"] * len(rows))
    t = draw_time(seed, rows)
    return draw_masks(
        noise,
        maskable,
        is_pad,
        end,
        t,
        get_schedule("linear"),
        weighting=weighting,
        step=step,
        seed=seed,
        sample_index=rows,
    )


def test_pad_ratio_and_window_grow_with_the_optimiser_step():
    assert [anneal(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0] and anneal(0, 0) == 1.0
    noise = EosNoise(pad_mask_ratio=0.4, pad_anneal_steps=10, eos_window_max=8, eos_window_anneal_steps=4)
    assert [noise.pad_ratio(step) for step in (0, 5, 10, 99)] == [0.0, 0.2, 0.4, 0.4]
    assert [noise.eos_window(step) for step in (0, 1, 2, 4, 9)] == [0, 2, 4, 8, 8]
    rows = torch.arange(400)
    for method in ("elbo", "counts"):
        noise = EosNoise(pad_mask_ratio=0.4, pad_anneal_steps=10, pad_mask_method=method)
        pads = [int(draw(noise, rows, step).is_scored[:, 6:].sum()) for step in (0, 5, 10)]
        assert pads[0] == 0 < pads[1] < pads[2], method
    with pytest.raises(ValueError, match=r"step and steps .*-1"):
        anneal(-1, 3)


def test_window_rows_are_weighted_as_linear_noise_of_their_level():
    rows = torch.arange(50)
    drawn = draw(EosNoise(eos_window_ratio=1.0, eos_window_max=3), rows, 0)
    torch.testing.assert_close(drawn.weight, 9.0 / drawn.is_masked.sum(dim=1))
    assert bool((draw(EosNoise(eos_window_ratio=1.0), rows, 0, weighting="uniform").weight == 1).all())
    some = draw(EosNoise(eos_window_ratio=0.5, eos_window_max=3), rows, 0)
    ordinary = ~is_window_row(torch.full((50,), 5), 0.5, seed=0, sample_index=rows)
    assert 0 < int(ordinary.sum()) < 50
    torch.testing.assert_close(some.weight[ordinary], 1 / draw_time(0, rows)[ordinary])


def test_padding_that_is_not_scored_is_still_masked():
    """The model's input does not depend on the ratio: in generation padding is masked too."""
    rows = torch.arange(500)
    plain, few = (draw(EosNoise(pad_mask_ratio=ratio), rows, 0) for ratio in (None, 0.1))
    assert torch.equal(few.is_masked, plain.is_masked)
    assert 0 < int(few.is_scored[:, 6:].sum()) < int(plain.is_scored[:, 6:].sum()) / 2
    assert torch.equal(few.is_scored[:, :6], plain.is_scored[:, :6])


@pytest.mark.parametrize("method", ["elbo", "counts"])
def test_window_rows_keep_the_fraction_of_padding(method):
    """All padding is masked, but only a fraction of it is scored: 0.4 of 9 tokens if 5 are text."""
    n = 4000
    rows = torch.arange(n)
    keys = {"pad_mask_ratio": 0.3, "pad_anneal_steps": 10, "pad_mask_method": method}
    noise = EosNoise(**keys, eos_window_ratio=1.0, eos_window_max=4)
    for step, ratio in ((0, 0.0), (10, 0.3)):
        drawn = draw(noise, rows, step)
        assert bool(drawn.is_masked[:, 5:].all())  # "g tttt e pppp": the end and the pads
        assert bool((drawn.is_scored <= drawn.is_masked).all()) and bool((drawn.is_scored <= drawn.maskable).all())
        assert bool((drawn.is_scored[:, 1:6] == drawn.is_masked[:, 1:6]).all())
        kept = ratio * 5 / (1 - ratio) / 4  # of the pads, so that a share `ratio` of those and 5 tokens is pads
        assert float(drawn.maskable[:, 6:].double().mean()) == pytest.approx(kept, abs=0.02)
        count = (drawn.maskable.sum(dim=1), drawn.is_scored.sum(dim=1))
        torch.testing.assert_close(drawn.weight, count[0] / count[1])
    plain = draw(EosNoise(eos_window_ratio=1.0, eos_window_max=4), rows, 0)
    assert torch.equal(plain.is_scored, plain.is_masked) and bool(plain.maskable[:, 1:].all())


@pytest.mark.parametrize("method", ["elbo", "counts"])
def test_one_batch_equals_its_micro_batches_and_ranks(method):
    noise = EosNoise(pad_mask_ratio=0.3, pad_mask_method=method, eos_window_ratio=0.5, eos_window_max=3)
    rows = torch.arange(12)
    whole = draw(noise, rows, 3)
    for low in range(0, 12, 4):
        part = draw(noise, rows[low : low + 4], 3)
        for name in ("maskable", "is_masked", "is_scored", "weight"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[low : low + 4]), name


@pytest.mark.parametrize(
    "function", [scored_padding, lambda m, p, ratio, **k: mask_counts(m, p, torch.ones(1), ratio, **k)]
)
def test_a_ratio_out_of_range(function):
    maskable, is_pad, _ = rows_of("tep")
    with pytest.raises(ValueError, match=r"ratio .*1\.5"):
        function(maskable, is_pad, 1.5, seed=0, sample_index=torch.arange(1))
