"""The forward process of masks and random tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.noise import mask_tokens, mix_tokens
from llamafactory_ddm.diffusion.schedules import get_schedule

IDS, MASK = 5, 3


def mixed(x_0, level, ratio, *, maskable=None, seed=3, sample_index=None):
    return mix_tokens(
        x_0,
        torch.ones_like(x_0, dtype=torch.bool) if maskable is None else maskable,
        level,
        uniform_ratio=ratio,
        n_ids=IDS,
        mask_id=MASK,
        seed=seed,
        sample_index=torch.arange(len(x_0)) if sample_index is None else sample_index,
    )


@pytest.mark.parametrize("level", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_every_token_comes_as_often_as_the_kernel_says(level, ratio):
    x_0 = torch.full((400, 500), 1)
    share = (
        torch.bincount(mixed(x_0, torch.full((400,), level), ratio).flatten(), minlength=IDS).double() / x_0.numel()
    )
    expected = torch.full((IDS,), level * ratio / IDS, dtype=torch.float64)
    expected[1] += 1 - level
    expected[MASK] += level * (1 - ratio)
    error = 4.5 * (expected * (1 - expected) / x_0.numel()).sqrt() + 1e-9
    assert bool(((share - expected).abs() <= error).all())


def test_random_tokens_are_evenly_spread_over_many_ids():
    """One draw of 24 bits would give some of 100,000 ids 1 % more than others; here all halves and thirds agree."""
    n_ids, x_0 = 100_003, torch.zeros(1000, 4000, dtype=torch.int64)
    drawn = mix_tokens(
        x_0,
        torch.ones_like(x_0, dtype=torch.bool),
        torch.ones(1000),
        uniform_ratio=1.0,
        n_ids=n_ids,
        mask_id=0,
        seed=1,
        sample_index=torch.arange(1000),
    )
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) == n_ids - 1
    total = drawn.numel()
    for modulus in (2, 3, 7):
        share = torch.bincount((drawn % modulus).flatten(), minlength=modulus).double() / total
        ids = torch.bincount(torch.arange(n_ids) % modulus, minlength=modulus).double() / n_ids
        assert float((share - ids).abs().max()) < 4.5 * (0.25 / total) ** 0.5


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_without_random_tokens_the_masks_are_those_of_masked_noise(name):
    x_0, rows, schedule = torch.arange(60).reshape(6, 10) % MASK, torch.arange(6) + 7, get_schedule(name)
    t, maskable = torch.linspace(0.1, 0.9, 6), torch.rand(6, 10) < 0.7
    z_t = mixed(x_0, 1.0 - schedule.alpha(t), 0.0, maskable=maskable, sample_index=rows)
    assert torch.equal(z_t, mask_tokens(x_0, maskable, t, schedule, seed=3, sample_index=rows, mask_id=MASK).z_t)


@given(seed=st.integers(0, 2**32), ratio=st.floats(0, 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_noise_stays_in_maskable_and_depends_on_the_row_alone(seed, ratio, data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(0, IDS, (batch, length), generator=generator)
    maskable = torch.rand(batch, length, generator=generator) < 0.7
    rows, level = torch.arange(batch) + seed, torch.rand(batch, generator=generator)
    z_t = mixed(x_0, level, ratio, maskable=maskable, seed=seed, sample_index=rows)
    assert torch.equal(z_t[~maskable], x_0[~maskable])
    one = [
        mixed(x_0[i, None], level[i, None], ratio, maskable=maskable[i, None], seed=seed, sample_index=rows[i, None])
        for i in range(batch)
    ]
    assert torch.equal(z_t, torch.cat(one))


@pytest.mark.parametrize(("ratio", "n_ids"), [(-0.1, 3), (1.1, 3), (0.5, 0)])
def test_values_out_of_range(ratio, n_ids):
    x = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"uniform_ratio|n_ids"):
        mix_tokens(
            x,
            x == 0,
            torch.ones(1),
            uniform_ratio=ratio,
            n_ids=n_ids,
            mask_id=0,
            seed=0,
            sample_index=torch.zeros(1).long(),
        )
