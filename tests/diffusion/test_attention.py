"""The annealed mask."""

import pytest
import torch

from llamafactory_ddm.diffusion.attention import additive_mask, annealed_visibility, annealing_ratio

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "steps", "ratio"), [(0, 4, 0.25), (2, 4, 0.75), (3, 4, 1.0), (9, 4, 1.0), (0, 0, 1.0), (0, 1, 1.0)]
)
def test_annealing_ratio(step, steps, ratio):
    assert annealing_ratio(step, steps) == ratio


def test_ratio_refuses_negatives():
    with pytest.raises(ValueError, match="anneal_steps"):
        annealing_ratio(-1, 4)
    with pytest.raises(ValueError, match="anneal_steps"):
        annealing_ratio(0, -4)


def test_ratio_0_is_causal_and_1_is_full():
    assert torch.equal(
        annealed_visibility(5, 0.0, seed=0, draw=0, device=CPU)[0, 0], torch.ones(5, 5, dtype=torch.bool).tril()
    )
    assert bool(annealed_visibility(5, 1.0, seed=0, draw=0, device=CPU).all())


def test_past_is_always_visible_and_the_future_at_the_ratio():
    visible = annealed_visibility(400, 0.3, seed=1, draw=2, device=CPU)[0, 0]
    below = torch.ones(400, 400, dtype=torch.bool).tril()
    assert bool(visible[below].all())
    assert abs(float(visible[~below].float().mean()) - 0.3) < 4.5 * (0.21 / 79800) ** 0.5


def test_each_draw_differs_and_repeats():
    first, again, second = (annealed_visibility(16, 0.5, seed=1, draw=d, device=CPU) for d in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask(dtype):
    mask = additive_mask(torch.tensor([[True, False]]), dtype)
    assert mask.dtype == dtype and mask.tolist() == [[0.0, torch.finfo(dtype).min]]


def test_ratio_outside_the_unit_interval():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        annealed_visibility(4, 1.5, seed=0, draw=0, device=CPU)
