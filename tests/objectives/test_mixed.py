"""The objective of mixed noise: what is scored, and that training and evaluation estimate the same bound."""

import pytest
import torch

from llamafactory_ddm.diffusion.likelihood import evaluation_times
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.objectives.base import CleanBatch
from llamafactory_ddm.objectives.mixed import MixedObjective
from support.schedules import time_of
from support.tiny import MASK_ID, VOCABULARY, Rows, stack, tiny_model


def objective(**changes):
    settings = {"shift": False, "uniform_ratio": 0.3, "schedule": get_schedule("linear"), **changes}
    return MixedObjective(mask_id=MASK_ID, n_ids=VOCABULARY, **settings)


def clean_batch(copies=1, shift=False, masks=()):
    """Rows of the clean text, which itself holds [MASK] at `masks`."""
    data = Rows(4, lengths=[16, 9, 5, 12], seed=3)
    rows = stack([data[row] for _ in range(copies) for row in range(4)])
    for position in masks:
        rows["input_ids"][position] = MASK_ID
    return CleanBatch.of(rows, shift=shift, mask_id=MASK_ID)


def test_exactly_the_noised_tokens_are_scored():
    clean = clean_batch(shift=True, masks=[(0, 3)])  # where the model cannot predict it
    batch = objective(shift=True).noise(clean, sample_index=torch.arange(4), group_size=4)
    scored = torch.arange(16) < torch.tensor([16, 9, 5, 12])[:, None]
    scored[:, 0] = scored[0, 3] = False
    assert torch.equal(batch.head_index, scored.flatten().nonzero()[:, 0] - 1)
    assert torch.equal(batch.scored["targets"], clean.x_0[scored])
    assert torch.equal(batch.scored["noised"], batch.z_t[scored])
    assert torch.equal(batch.z_t[~scored], clean.x_0[~scored])
    assert int(batch.denominator) == int(batch.n_maskable) == int(scored.sum())
    assert int(batch.n_masked) == int((scored & (batch.z_t == MASK_ID)).sum())


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_and_weight_are_those_of_the_row(name):
    schedule, clean = get_schedule(name), clean_batch()
    batch = objective(schedule=schedule, time_epsilon=0.1).noise(clean, sample_index=torch.arange(4), group_size=4)
    alpha, weight = batch.scored["alpha"].view(torch.float64), batch.scored["weight"].view(torch.float32)
    assert len(alpha.unique()) == len(weight.unique()) == 4
    expected = -schedule.dalpha(time_of(schedule, alpha)) / (1 - alpha)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=0)


def test_training_and_evaluation_estimate_the_same_bound():
    """Also the mean of the unweighted terms; [MASK] in the clean text counts in neither."""
    copies, model = 1500, tiny_model().eval()
    clean = clean_batch(copies, masks=[(slice(None), 2)])
    rows, ours = torch.arange(4 * copies), objective(antithetic=True)
    keep = (~clean.is_padding).long()
    scored = ~clean.is_padding & (clean.x_0 != MASK_ID)

    @torch.no_grad()
    def logits(z):
        return model(input_ids=z, attention_mask=keep, use_cache=False).logits[scored]

    batch = ours.noise(clean, sample_index=rows, group_size=4 * copies)
    loss, terms = ours.loss(logits(batch.z_t), batch.scored, batch.denominator)
    (noised,) = ours.evaluations(clean, evaluation_times(rows, 1), seed=0, sample_index=rows)
    kl, bound = ours.evaluate(logits(noised.z), clean, noised)
    assert float(loss) == pytest.approx(float(bound.sum() / noised.n_counted.sum()), rel=0.04)
    weight = noised.weight[scored.nonzero()[:, 0]]
    assert float(terms / scored.sum()) == pytest.approx(float((kl * weight).sum() / weight.sum()), rel=0.02)
    assert torch.equal(noised.n_counted, scored.sum(dim=1))
