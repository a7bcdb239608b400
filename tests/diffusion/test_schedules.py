"""Each schedule against autograd and the closed forms of its source."""

import math

import pytest
import torch

from llamafactory_ddm.diffusion.schedules import SCHEDULES, NoiseSchedule, get_schedule

TIMES = torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_derivative_and_weight_follow_from_alpha(name):
    schedule = get_schedule(name)
    assert isinstance(schedule, NoiseSchedule)
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.dalpha(TIMES), slope)
    torch.testing.assert_close(schedule.loss_weight(TIMES), -slope / (1 - schedule.alpha(TIMES)))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_alpha_falls_from_one_to_zero(name):
    schedule = get_schedule(name)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert (schedule.alpha(TIMES).diff() < 0).all()


def test_published_values():
    t = torch.tensor(0.25, dtype=torch.float64)
    assert float(get_schedule("linear").loss_weight(t)) == 4.0
    assert math.isclose(float(get_schedule("cosine").loss_weight(t)), math.pi / 2 * math.tan(3 * math.pi / 8))


def test_unknown_name():
    with pytest.raises(ValueError, match="linear"):
        get_schedule("linaer")
