"""Masking again: the chances, the marginals that they keep, and what the loop makes of a third move."""

import itertools
import math

import pytest
import torch
from toy_sampling import MASK, NAMES, LeftToRight, V, run, toy

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling import LogitsConfig, Remasking, SamplingSettings, get_strategy
from llamafactory_ddm.sampling.budget import remask_probability, reveal_probability, split_into_blocks

CAPS = [0.0, 0.02, 0.3, 1.0]


def chances(step, steps, schedule, cap):
    """Return sigma and the reveal probability of a step."""
    sigma, more = remask_probability(torch.tensor([step]), torch.tensor([steps]), schedule, cap)
    return float(sigma[0]), reveal_probability(step, steps, schedule) + float(more[0])


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_remasking_probabilities_follow_the_posterior_and_keep_the_marginals(steps, name, cap):
    schedule, share = get_schedule(name), 0.0
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        now, then = (1 - t, 1 - s) if name == "linear" else (1 - math.cos(math.pi / 2 * (1 - u)) for u in (t, s))
        sigma, reveal = chances(step, steps, schedule, cap)
        expected = min(cap, (1 - then) / now) if now else cap
        assert sigma == pytest.approx(expected if step < steps - 1 else 0.0, abs=1e-12)
        assert reveal == pytest.approx((then - (1 - sigma) * now) / (1 - now), abs=1e-12)
        assert 0.0 <= sigma <= 1.0 and 0.0 <= reveal <= 1.0 + 1e-12
        share = share * (1 - sigma) + (1 - share) * reveal
        assert share == pytest.approx(then, abs=1e-12)
    assert share == 1.0 or share == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_decoded_fraction_follows_the_schedule(name):
    """20,000 positions in eight steps, cap 0.3: the decoded fraction after each step, within five deviations."""
    shares, moved = [], []

    def watch(step, z, fresh):
        shares.append(float((z != MASK).double().mean()))
        moved.append(int(fresh.sum()))

    x = torch.zeros(4, 5000, dtype=torch.int64)
    run(
        x,
        x == 0,
        denoiser=lambda z, select: torch.zeros(int(select.sum()), V),
        steps=8,
        name="remdm",
        remask_cap=0.3,
        schedule=get_schedule(name),
        callback=watch,
    )
    alpha = get_schedule(name).alpha(1.0 - torch.arange(1, 9, dtype=torch.float64) / 8).tolist()
    for share, expected in zip(shares, alpha, strict=True):
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / x.numel()) + 1e-9
    assert sum(moved) > 1.3 * x.numel()  # many were written more than once


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_cap_of_0_is_random_order(schedule, block_length, temperature):
    x = torch.randint(0, MASK, (5, 9), generator=torch.Generator().manual_seed(4))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = editable[3, 5] = False
    options = {"steps": 11, "block_length": block_length, "config": LogitsConfig(temperature), "seed": 6}
    options["schedule"] = get_schedule(schedule)
    for ends in ((), (3,)):
        one = run(x, editable, name="random", eos_ids=ends, **options)
        two = run(x, editable, name="remdm", remask_cap=0.0, eos_ids=ends, **options)
        assert torch.equal(one.sequences, two.sequences) and torch.equal(one.committed, two.committed)
        assert torch.equal(one.sample_nfe, two.sample_nfe)
        assert (one.steps, one.nfe, one.computed) == (two.steps, two.nfe, two.computed)


def test_an_exact_denoiser_of_independent_tokens_gives_their_distribution():
    """Two positions of three tokens; each of the nine texts has the product of its tokens' probabilities."""
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)

    def exact(z, select):
        return p.log().float().expand(len(z), -1, -1)[select]

    n = 20_000
    x = torch.zeros(n, 2, dtype=torch.int64)
    output = run(x, x == 0, denoiser=exact, steps=5, name="remdm", remask_cap=0.4, mask_id=3)
    for a, b in itertools.product(range(3), repeat=2):
        expected = float(p[0, a] * p[1, b])
        share = float(((output.sequences[:, 0] == a) & (output.sequences[:, 1] == b)).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def enumerated(joint, steps, cap):
    """The distribution of the sampler's texts, every path of it enumerated, with the joint's exact conditionals."""
    schedule, states = get_schedule("linear"), {(None, None): 1.0}
    for step in range(steps):
        sigma, reveal = chances(step, steps, schedule, cap)
        after = {}
        for state, weight in states.items():
            moves = []
            for position, token in enumerate(state):
                if token is not None:
                    moves.append([(token, 1 - sigma), (None, sigma)])
                    continue
                other = state[1 - position]
                marginal = [
                    sum(q for text, q in joint.items() if text[position] == v and other in (None, text[1 - position]))
                    for v in range(3)
                ]
                moves.append([(None, 1 - reveal), *((v, reveal * q / sum(marginal)) for v, q in enumerate(marginal))])
            for (a, one), (b, two) in itertools.product(*moves):
                after[a, b] = after.get((a, b), 0.0) + weight * one * two
        states = after
    return states


@pytest.mark.parametrize("cap", [0.02, 0.5])
def test_paths_of_dependent_tokens_are_those_of_the_enumeration(cap):
    """With two tokens that always agree, few steps err; the sampler errs as often as the enumerated chain."""
    joint = {(v, v): q for v, q in enumerate((0.5, 0.3, 0.2))}
    joint |= {(a, b): 1e-4 for a in range(3) for b in range(3) if a != b}

    def exact(z, select):
        table = torch.empty(len(z), 2, 3, dtype=torch.float64)
        for position in range(2):
            for other in range(4):
                values = [
                    sum(q for text, q in joint.items() if text[position] == v and other in (3, text[1 - position]))
                    for v in range(3)
                ]
                table[z[:, 1 - position] == other, position] = torch.tensor(values, dtype=torch.float64).log()
        return table.float()[select]

    n, steps = 20_000, 4
    x = torch.zeros(n, 2, dtype=torch.int64)
    output = run(x, x == 0, denoiser=exact, steps=steps, name="remdm", remask_cap=cap, mask_id=3, seed=3)
    for (a, b), expected in enumerated(joint, steps, cap).items():
        if None in (a, b):
            assert expected < 1e-12
            continue
        share = float(((output.sequences[:, 0] == a) & (output.sequences[:, 1] == b)).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n) + 1e-12


def test_blocks_take_their_steps_and_are_finished_before_the_next():
    """Only positions of the current block are remasked; prompts and finished blocks stay; no [MASK] is left."""
    x = torch.randint(0, MASK, (4, 11), generator=torch.Generator().manual_seed(8))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, :2] = editable[1, 6] = False
    block = split_into_blocks(editable, 3)
    frames, again = [x.masked_fill(editable, MASK)], 0
    output = run(
        x,
        editable,
        denoiser=toy,
        steps=18,
        name="remdm",
        remask_cap=0.5,
        block_length=3,
        callback=lambda step, z, fresh: frames.append(z.clone()),
    )
    for step, (before, after) in enumerate(itertools.pairwise(frames)):
        current = torch.full((4,), step // 6)  # three blocks of six steps
        touched = before != after
        assert torch.equal(touched & (block != current[:, None]), torch.zeros_like(touched))
        again += int((touched & (after == MASK)).sum())
        assert not bool((touched & (after != MASK) & (before != MASK)).any())  # never rewritten at once
    assert again > 10
    assert output.steps == 18 and torch.equal(output.sequences[~editable], x[~editable])
    assert not (output.sequences[editable] == MASK).any() and output.edits.tolist() == [0] * 4
    for row in range(4):
        for position in range(11):
            last = max((n for n in range(18) if frames[n][row, position] != frames[n + 1][row, position]), default=-1)
            assert output.committed[row, position] == last


def test_a_complete_text_is_unchanged_and_its_rest_filled_with_eos():
    """EOS everywhere: a text is complete once its first position is decoded; masked positions after it become EOS."""
    x = torch.zeros(30, 6, dtype=torch.int64)
    frames = []
    output = run(
        x,
        x == 0,
        denoiser=lambda z, select: torch.nn.functional.one_hot(torch.full((int(select.sum()),), 4), V) * 30.0,
        steps=6,
        name="remdm",
        remask_cap=0.6,
        eos_ids=(4,),
        callback=lambda step, z, fresh: frames.append(z.clone()),
    )
    assert bool((output.sequences == 4).all())
    for row in range(30):
        first = next(n for n, z in enumerate(frames) if z[row, 0] == 4)
        assert all(torch.equal(z[row], frames[first][row]) for z in frames[first:])
    assert bool((output.committed < 0).any())


def test_any_strategy_may_remask():
    """This one remasks once what it committed two steps ago, and needs a further step for it."""

    class Regretful(LeftToRight):
        def remask(self, view):
            return (
                torch.ones_like(view.is_masked) & (view.step == 2)[:, None]
            )  # what is no decided position is left out

        def stays(self, view):
            return torch.zeros_like(view.step, dtype=torch.bool)

    assert isinstance(Regretful(), Remasking) and not isinstance(LeftToRight(), Remasking)
    assert [name for name in NAMES if isinstance(get_strategy(name), Remasking)] == ["remdm"]
    x, editable = torch.tensor([[7, 0, 0, 0, 0]]), torch.tensor([[False, True, True, True, True]])
    shown = []
    output = run(
        x, editable, strategy=Regretful(), steps=6, callback=lambda step, z, fresh: shown.append((z == MASK)[0].int())
    )
    assert [row.tolist() for row in shown] == [
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 1, 1, 0, 1],  # the third is committed, the two before it are masked
        [0, 0, 1, 0, 1],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ]
    assert output.committed.tolist() == [[-1, 3, 4, 2, 5]] and output.sequences[0, 0] == 7


def test_invalid_values():
    for cap in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="remask_cap"):
            get_strategy("remdm", remask_cap=cap)
    assert SamplingSettings(denoising_strategy="remdm", remask_cap=0.5).strategy() == get_strategy(
        "remdm", remask_cap=0.5
    )
    with pytest.raises(ValueError, match=r"eos_last: true .*remdm"):
        SamplingSettings(denoising_strategy="remdm", eos_last=True)
