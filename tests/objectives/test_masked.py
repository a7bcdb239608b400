"""What both objectives take for a target: never [MASK], and the label where it is not the token that stands there."""

import itertools
from dataclasses import replace

import pytest
import torch

from llamafactory_ddm.data.collators import ResponseCollator, VariableLengthCollator
from llamafactory_ddm.diffusion.eos_noise import EosNoise
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.objectives.masked import MaskedObjective
from llamafactory_ddm.objectives.mixed import MixedObjective
from support.tiny import LENGTH, MASK_ID, VOCABULARY

PAD, EOS = 7, 0
ROWS = torch.arange(6)


def objective(kind, **changes):
    mixed = {"uniform_ratio": 0.3, "n_ids": VOCABULARY} if kind == "mixed" else {}
    settings = {"shift": True, "schedule": get_schedule("linear"), **mixed, **changes}
    return {"masked": MaskedObjective, "mixed": MixedObjective}[kind](mask_id=MASK_ID, **settings)


def features(masks):
    """Prompts of 3 tokens with answers; [MASK] stands in prompts and answers, and one answer is nothing else."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in (16, 9, 12, 5, 15, 7):
        ids = torch.randint(8, MASK_ID, (length,), generator=generator).tolist()
        rows.append({"input_ids": [*ids[:-1], EOS], "labels": [-100] * 3 + [*ids[3:-1], EOS]})
    for row, position in masks:
        rows[row]["input_ids"][position] = MASK_ID
        if position > 2:
            rows[row]["labels"][position] = MASK_ID
    return rows


MASKS = [(0, 1), (0, 5), (0, 6), (1, 3), (2, 10), *((3, position) for position in range(3, 5)), (4, 7)]


def formats():
    plain = [{"input_ids": row["input_ids"]} for row in features(MASKS)]
    keep = [[1] * len(row["input_ids"]) for row in plain]
    texts = {
        "input_ids": torch.tensor([row["input_ids"] + [PAD] * (16 - len(row["input_ids"])) for row in plain]),
        "attention_mask": torch.tensor([k + [0] * (16 - len(k)) for k in keep]),
    }
    packed = [
        {
            **row,
            "position_ids": [*range(4), *range(len(row["input_ids"]) - 4)],
            "attention_mask": [1] * len(row["input_ids"]),
        }
        for row in features(MASKS)
    ]
    ends = VariableLengthCollator(eos_id=EOS, pad_ids=(PAD,), canvas=24)
    return {
        "texts": texts,
        "answers": ResponseCollator(pad_id=PAD, shift=True)(features(MASKS)),
        "padded": ResponseCollator(pad_id=PAD, shift=True, target_length=24)(features(MASKS)),
        "packed": ResponseCollator(pad_id=PAD, shift=True)(packed),
        "variable": ends(features(MASKS)),
    }


@pytest.mark.parametrize("kind", ["masked", "mixed"])
@pytest.mark.parametrize("name", ["texts", "answers", "padded", "packed", "variable"])
def test_a_mask_token_in_the_text_is_like_an_unlabelled_token(kind, name):
    """In training, truncated or not, under every norm, and in evaluation."""
    batch = formats()[name]
    maskable = batch.get("maskable", batch.get("attention_mask")).bool()
    without = {**batch, "maskable": maskable & (batch["input_ids"] != MASK_ID)}
    assert int((maskable & ~without["maskable"]).sum()) >= 6
    elbo = EosNoise(0.4, eos_window_ratio=0.5, eos_window_max=4) if kind == "masked" else None
    counts = replace(elbo, pad_mask_method="counts") if elbo else None
    for norm, noise, ratio in itertools.product(("tokens", "masked", "sequence"), (None, elbo, counts), (0.0, 0.6)):
        extra = {"eos_noise": noise} if kind == "masked" else {}
        ours = objective(kind, norm=norm, truncate_ratio=ratio, **extra)
        clean, given = (ours.clean(each).truncated(ratio, seed=0, sample_index=ROWS) for each in (batch, without))
        expected = without["maskable"].clone()
        expected[:, 0] = False
        if not ratio:
            assert torch.equal(clean.maskable, expected)
        one, two = (ours.noise(each, sample_index=ROWS, group_size=6, step=1) for each in (clean, given))
        assert MASK_ID not in one.scored["targets"]
        assert all(torch.equal(one.scored[key], two.scored[key]) for key in one.scored)
        assert torch.equal(one.head_index, two.head_index) and torch.equal(one.z_t, two.z_t)
        if not ratio and noise is None:
            counted = {"tokens": int(expected.sum()), "sequence": int(expected.any(dim=1).sum())}
            assert int(one.denominator) == counted.get(norm, int(one.denominator))
            assert int(one.n_maskable) == int(expected.sum())
            scored = (expected & (one.z_t == MASK_ID)).sum() if kind == "masked" else expected.sum()
            assert len(one.head_index) == int(scored)
    (noised,) = ours.evaluations(
        objective(kind).clean(batch), torch.full((6, 1), 0.99, dtype=torch.float64), seed=0, sample_index=ROWS
    )
    assert torch.equal(noised.n_counted, expected.sum(dim=1))
    assert not bool((noised.is_scored & ~expected).any())


def test_a_row_of_masks_alone_is_not_in_the_likelihood_bound():
    """By enumeration: of a row with n tokens of the text and [MASK] among them, n count, each with 1 / n."""
    ours = objective("masked", shift=False)
    row = {"input_ids": torch.tensor([[9, MASK_ID, 11], [MASK_ID] * 3])}
    clean = ours.clean(row)
    cost = torch.rand(2, 3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(2, dtype=torch.float64)
    for level in (0.25, 0.75):  # one of two tokens hidden, then both; which one is drawn below
        draws = []
        for seed in range(400):
            (noised,) = ours.evaluations(
                clean, torch.full((2, 1), level, dtype=torch.float64), seed=seed, sample_index=torch.arange(2)
            )
            nll, bound = ours.evaluate(cost[noised.is_scored], clean, noised)
            assert noised.n_counted.tolist() == [2, 0] and len(nll) == round(2 * (level + 0.25))
            draws.append(bound)
        total += torch.stack(draws).mean(dim=0) / 2
    nll = cost.double().logsumexp(dim=2) - cost.double().gather(2, row["input_ids"][..., None])[..., 0]
    assert float(total[0]) == pytest.approx(float(nll[0, 0] + nll[0, 2]), rel=0.02)
    assert float(total[1]) == 0.0


# The answers 11 12 and 14 have no end of their own: the first token of the next turn, 20, has it as label.
TURNS = {
    "input_ids": [20, 10, 21, 11, 12, 20, 13, 21, 14, EOS],
    "labels": [-100, -100, -100, 11, 12, EOS, -100, -100, 14, EOS],
}


@pytest.mark.parametrize("kind", ["masked", "mixed"])
@pytest.mark.parametrize("variable", [False, True])
def test_an_eos_label_on_the_next_turns_first_token_is_masked_as_eos_and_shown_as_the_turn(kind, variable):
    if variable:
        collate = VariableLengthCollator(eos_id=EOS, pad_ids=(PAD,), canvas=12)
    else:
        collate = ResponseCollator(pad_id=PAD, shift=True, target_length=12)
    ours, rows = objective(kind), torch.arange(64)
    clean = ours.clean(collate([TURNS] * 64))
    assert clean.maskable[0].tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 4
    batch = ours.noise(clean, sample_index=rows, group_size=64)
    targets = torch.full((64, 12), -100)
    targets.view(-1)[batch.head_index + 1] = batch.scored["targets"]
    there = targets[:, 5]
    assert set(there.tolist()) <= {EOS, -100} and EOS in there
    hidden = batch.z_t[:, 5]
    assert MASK_ID in hidden and 20 in hidden and bool((batch.z_t[:, 0] == 20).all())
    if kind == "masked":
        assert set(hidden.tolist()) == {MASK_ID, 20} and torch.equal(there == EOS, hidden == MASK_ID)
    else:
        noised = torch.full((64, 12), -100)
        noised.view(-1)[batch.head_index + 1] = batch.scored["noised"]
        assert torch.equal(noised[:, 5] == EOS, hidden == 20)  # kept, for the loss
    (noised,) = ours.evaluations(clean, torch.full((64, 1), 0.3, dtype=torch.float64), seed=0, sample_index=rows)
    assert EOS in noised.z[:, 5]
    assert EOS not in clean.displayed(noised.z)[:, 5] and 20 in clean.displayed(noised.z)[:, 5]


def test_rows_whose_labels_equal_their_tokens_have_no_shown_ids():
    clean = objective("masked").clean(formats()["answers"])
    assert clean.shown is None and clean.displayed(clean.x_0) is clean.x_0
    assert clean.x_0.shape[1] == LENGTH
