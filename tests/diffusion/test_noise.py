"""The laws of the forward process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.noise import draw_time, k_smallest_mask, mask_tokens
from llamafactory_ddm.diffusion.schedules import SCHEDULES, get_schedule

MASK = 9


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(SCHEDULES)), data=st.data())
@settings(max_examples=60, deadline=None)
def test_noise_stays_inside_maskable_and_changes_nothing_else(seed, name, data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(0, MASK + 1, (batch, length), generator=generator)
    maskable = torch.rand(batch, length, generator=generator) < 0.7
    rows = torch.arange(batch) + seed
    t = draw_time(seed, rows)
    noised = mask_tokens(x_0, maskable, t, get_schedule(name), seed=seed, sample_index=rows, mask_id=MASK)
    assert not bool((noised.is_masked & ~maskable).any())
    assert torch.equal(noised.z_t[~noised.is_masked], x_0[~noised.is_masked])
    assert bool((noised.z_t[noised.is_masked] == MASK).all())


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("time", [0.001, 0.3, 0.8, 1.0])
def test_keep_rate_is_alpha(name, time):
    schedule = get_schedule(name)
    x_0, t = torch.zeros(400, 500, dtype=torch.int64), torch.full((400,), time)
    noised = mask_tokens(
        x_0, torch.ones_like(x_0, dtype=torch.bool), t, schedule, seed=3, sample_index=torch.arange(400), mask_id=MASK
    )
    alpha = float(schedule.alpha(torch.tensor(time, dtype=torch.float64)))
    tolerance = 4.5 * (alpha * (1 - alpha) / 2e5) ** 0.5 + 1e-9
    assert abs(1 - float(noised.is_masked.double().mean()) - alpha) <= tolerance


def test_one_batch_equals_its_micro_batches_and_ranks():
    x_0, rows = torch.arange(8 * 6).reshape(8, 6), torch.arange(8) + 80
    maskable, schedule = torch.ones(8, 6, dtype=torch.bool), get_schedule("linear")

    def noise(part):
        t = draw_time(11, rows[part], antithetic=True, group_size=8)
        return mask_tokens(x_0[part], maskable[part], t, schedule, seed=11, sample_index=rows[part], mask_id=MASK)

    whole, halves = noise(slice(None)), [noise(slice(0, 4)), noise(slice(4, 8))]
    assert torch.equal(whole.z_t, torch.cat([h.z_t for h in halves]))
    assert torch.equal(whole.t, torch.cat([h.t for h in halves]))


def test_antithetic_time_is_stratified_and_each_row_stays_uniform():
    groups = 4000
    u = draw_time(5, torch.arange(8 * groups), time_epsilon=0.0, antithetic=True, group_size=8).reshape(groups, 8)
    strata = (u * 8).floor().long().clamp(max=7).sort(dim=1).values
    assert float((strata == torch.arange(8)).all(dim=1).float().mean()) > 0.999  # float rounding at a stratum's edge
    assert bool((abs(u.mean(dim=0) - 0.5) < 4.5 * (1 / 12 / groups) ** 0.5).all())
    assert (
        float(u.mean(dim=1).std()) < 0.05 < float(draw_time(5, torch.arange(8 * groups)).reshape(-1, 8).mean(1).std())
    )


def test_time_range():
    t = draw_time(0, torch.arange(100000), time_epsilon=0.2)
    assert float(t.min()) >= 0.2 and float(t.max()) < 1.0 and abs(float(t.mean()) - 0.6) < 0.005
    with pytest.raises(ValueError, match="time_epsilon"):
        draw_time(0, torch.arange(2), time_epsilon=1.0)
    with pytest.raises(ValueError, match="group_size"):
        draw_time(0, torch.arange(2), group_size=0)


def test_shapes_must_agree():
    x_0 = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="shapes"):
        mask_tokens(
            x_0,
            x_0.bool()[:, :2],
            torch.ones(2),
            get_schedule("linear"),
            seed=0,
            sample_index=torch.arange(2),
            mask_id=MASK,
        )


@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_k_smallest_mask(seed, data):
    length = data.draw(st.integers(1, 8))
    score = torch.rand(1, length, generator=torch.Generator().manual_seed(seed))
    among = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    count = data.draw(st.integers(0, 9))
    marked = [position for position in range(length) if among[0, position]]
    expected = sorted(sorted(marked, key=lambda position: float(score[0, position]))[:count])
    assert k_smallest_mask(score, among, torch.tensor([count]))[0].nonzero()[:, 0].tolist() == expected
