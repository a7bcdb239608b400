"""Which decided tokens are rewritten: by hand, against the rule on plain lists, and the laws that must hold."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sampling import MASK, NAMES, LeftToRight, V, by_selection, ragged, relative, run, toy

from llamafactory_ddm.diffusion.noise import Stream
from llamafactory_ddm.diffusion.rng import keyed_uniform
from llamafactory_ddm.sampling import (
    Edits,
    LogitsConfig,
    SamplingSettings,
    denoising_step,
    get_strategy,
    start,
)
from llamafactory_ddm.sampling.budget import split_into_blocks
from llamafactory_ddm.sampling.edits import edits_of

GREEDY = LogitsConfig(0.0)
END, PAD = 0, 1
ONE_BY_ONE = [name for name in NAMES if name != "remdm"]  # they never mask a token again


def settled(**wanted):
    """A denoiser that predicts token 2 with 0.9; at a position with nothing masked up to it, it predicts `wanted`.

    `wanted` maps p0, p1, … to (token, probability).
    """

    def denoiser(z, select):
        p = torch.full((len(z), z.shape[1], V), 0.1 / (V - 2))
        p[..., 2] = 0.9
        for name, (token, probability) in wanted.items():
            position = int(name[1:])
            for row in range(len(z)):
                if not bool((z[row, : position + 1] == MASK).any()):
                    p[row, position] = (1 - probability) / (V - 2)
                    p[row, position, token] = probability
        p[..., MASK] = 0.0
        return p.log()[select]

    return denoiser


def frames_of(x, editable, **options):
    """Return the output, and the sequences before the first step and after each."""
    frames = [x.masked_fill(editable, MASK)]
    output = run(x, editable, callback=lambda step, z, fresh: frames.append(z.clone()), **options)
    return output, frames


def rows_of(frames, row=0):
    return ["".join("_" if token == MASK else f"{token:x}" for token in frame[row].tolist()) for frame in frames]


def test_the_budget_by_hand():
    """Ratio one half allows an edit for each committed token, the most confident first."""
    x = torch.zeros(1, 4, dtype=torch.int64)
    denoiser = settled(p0=(5, 0.6), p1=(6, 0.8), p2=(2, 0.9))
    output, frames = frames_of(
        x, x == 0, denoiser=denoiser, steps=4, strategy=LeftToRight(), config=GREEDY, edits=Edits(ratio=0.5)
    )
    # Two may be rewritten in the second step, three in the third, of which one is spent, and so on.
    assert rows_of(frames) == ["____", "2___", "52__", "562_", "5622"]
    assert output.committed.tolist() == [[1, 2, 2, 3]] and output.edits.tolist() == [2]
    none = run(x, x == 0, denoiser=denoiser, steps=4, strategy=LeftToRight(), config=GREEDY)
    assert none.sequences.tolist() == [[2, 2, 2, 2]] and none.edits.tolist() == [0]


def test_the_most_confident_edits_come_first_and_unused_budget_remains():
    """A third: one edit for two tokens. Nothing differs before the fourth is there, then three do: with the fifth two
    may, and with the sixth the last.
    """

    def denoiser(z, select):
        p = torch.full((1, 6, V), 0.1 / (V - 2))
        p[..., 2] = 0.9
        if int((z != MASK).sum()) >= 4:
            for position, probability in ((0, 0.5), (1, 0.8), (2, 0.7)):
                p[0, position] = (1 - probability) / (V - 2)
                p[0, position, 7] = probability
        p[..., MASK] = 0.0
        return p.log()[select]

    x = torch.zeros(1, 6, dtype=torch.int64)
    ratio = 1 / 3
    _, frames = frames_of(
        x, x == 0, denoiser=denoiser, steps=6, strategy=LeftToRight(), config=GREEDY, edits=Edits(ratio=ratio)
    )
    assert rows_of(frames)[4:] == ["2222__", "27722_", "777222"]
    at_once = {"denoiser": denoiser, "steps": 1, "name": "low_confidence", "config": GREEDY}
    for further, expected in ((0, "222222"), (1, "777222")):
        _, frames = frames_of(x, x == 0, edits=Edits(ratio, steps=further), **at_once)
        assert rows_of(frames)[-1] == expected  # in a block's first step nothing can be rewritten


def test_tokens_committed_in_the_step_count():
    """A third, one token a step: a model that writes 1 and then prefers 2 takes its 1 back in the second step."""

    def denoiser(z, select):
        wanted = 1 if bool((z == MASK).all()) else 2
        return torch.nn.functional.one_hot(torch.full_like(z, wanted), V).float().mul(9.0)[select]

    x = torch.zeros(1, 4, dtype=torch.int64)
    options = {"denoiser": denoiser, "steps": 4, "strategy": LeftToRight(), "config": GREEDY}
    _, frames = frames_of(x, x == 0, edits=Edits(ratio=1 / 3), **options)
    assert rows_of(frames) == ["____", "1___", "22__", "222_", "2222"]


def published(table_of, z, blocks, steps, k):
    """XDLM's loop on plain lists: a transfer budget a block, and edits by what is committed, this step included."""
    z, frames = list(z), []
    for block in range(max(blocks) + 1):
        inside = [position for position, b in enumerate(blocks) if b == block]
        committed = rewritten = 0
        for step in range(steps):
            table = [softmax(row) for row in table_of(z)]
            best = {position: max(range(V), key=lambda token, p=table[position]: p[token]) for position in inside}
            surest = sorted(inside, key=lambda position: -table[position][best[position]])
            masked = [position for position in surest if z[position] == MASK]
            decided = [position for position in surest if z[position] != MASK and z[position] != best[position]]
            fresh = masked[: len(inside) // steps + (step < len(inside) % steps)]
            committed += len(fresh)
            allowed_now = math.floor(committed * k / (1 - k)) - rewritten if step else 0
            again = [
                position for position in decided if table[position][best[position]] >= table[position][z[position]]
            ][:allowed_now]
            rewritten += len(again)
            for position in fresh + again:
                z[position] = best[position]
            frames.append(list(z))
    return frames


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    size=st.integers(4, 6),
    k=st.sampled_from(
        [Fraction(1, 10), Fraction(1, 3), Fraction(3, 10), Fraction(1, 2), Fraction(2, 3), Fraction(9, 10)]
    ),
    given_tokens=st.integers(0, 2),
)
def test_the_published_rule(seed, sizes, size, k, given_tokens):
    """Blocks of one size, as many steps in each as the smallest has tokens, and a prompt in front."""
    n_blocks, steps = len(sizes), min(sizes)
    x = torch.randint(0, MASK, (1, given_tokens + n_blocks * size), generator=torch.Generator().manual_seed(seed))
    editable = torch.arange(x.shape[1])[None] >= given_tokens
    blocks = split_into_blocks(editable, size)[0].tolist()
    everywhere = torch.ones_like(editable)
    _, frames = frames_of(
        x,
        editable,
        steps=n_blocks * steps,
        name="low_confidence",
        block_length=size,
        config=GREEDY,
        edits=Edits(ratio=float(k)),
    )
    expected = published(
        lambda z: toy(torch.tensor([z]), everywhere).view(len(z), V).tolist(), frames[0][0].tolist(), blocks, steps, k
    )
    assert [frame[0].tolist() for frame in frames[1:]] == expected


def test_the_threshold_by_hand():
    x = torch.zeros(1, 4, dtype=torch.int64)
    denoiser = settled(p0=(5, 0.6), p1=(6, 0.8), p2=(7, 0.7))
    for threshold, expected in ((0.5, "5672"), (0.65, "2672"), (0.75, "2622"), (0.95, "2222")):
        options = {"denoiser": denoiser, "steps": 4, "strategy": LeftToRight(), "config": GREEDY}
        output, frames = frames_of(x, x == 0, edits=Edits(threshold=threshold), **options)
        assert rows_of(frames)[-1] == expected
        assert output.edits.tolist() == [sum(letter != "2" for letter in expected)]


def test_edits_use_the_distribution_after_penalties_before_temperature():
    """Temperature and filters do not change edits; suppressed tokens and [MASK] never replace a token."""
    x = torch.zeros(1, 3, dtype=torch.int64)

    def denoiser(z, select):
        logits = torch.zeros(1, 3, V)
        logits[..., MASK], logits[..., 9], logits[..., 4] = 50.0, 30.0, 20.0
        return logits[select]

    for config, token in ((LogitsConfig(1e6), 9), (LogitsConfig(1e6, suppress=(9,)), 4)):
        output = run(
            x, x == 0, denoiser=denoiser, steps=3, strategy=LeftToRight(), config=config, edits=Edits(0.9, steps=2)
        )
        assert output.sequences.tolist() == [[token] * 3]
        assert output.edits.sum() > 0


def allowed(committed, spent, ratio):
    """The rule in exact arithmetic, the ratio being the decimal that is written."""
    r = Fraction(str(ratio))
    return math.floor(committed * r / (1 - r)) - spent


def softmax(logits):
    values = [-math.inf if token == MASK else float(value) for token, value in enumerate(logits)]
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def is_complete(tokens, editable, ends):
    """No fixed token after an editable position, and an EOS with nothing masked before it."""
    mine = [position for position, flag in enumerate(editable) if flag]
    if not mine or not all(editable[mine[0] :]):
        return False
    decided = [tokens[position] for position in mine]
    found = [n for n, token in enumerate(decided) if token in ends]
    return bool(found) and MASK not in decided[: found[0]]


def last_of_text(tokens, editable, ends):
    """Return the position of the first decoded EOS, if no fixed token follows it; later positions are no text."""
    mine = [position for position, flag in enumerate(editable) if flag]
    if not mine or not all(editable[mine[0] :]):
        return len(tokens)
    return next((position for position in mine if tokens[position] in ends), len(tokens))


def follow_row(frames, tables, editable, blocks, edits, ends=()):
    """Check one row's frames against the rule on plain lists; return the number of edits."""
    block, spent, further, changed, total = None, 0, 0, False, 0
    for before, after, table in zip(frames[:-1], frames[1:], tables, strict=True):
        open_blocks = [b for b, token in zip(blocks, before, strict=True) if b >= 0 and token == MASK]
        if is_complete(before, editable, ends):
            assert before == after
            continue
        if block is None or block not in open_blocks:
            if block is not None and changed and further < edits.steps:
                further += 1
            elif open_blocks:
                block, spent, further = min(open_blocks), 0, 0
            else:
                assert before == after
                continue
        inside = [position for position, b in enumerate(blocks) if b == block]
        decided = [position for position in inside if before[position] != MASK]
        rewritten = []
        for position in [position for position in decided if position <= last_of_text(before, editable, ends)]:
            p = softmax(table[position])
            best = max(range(V), key=lambda token: (p[token], -token))
            if best != before[position] and p[best] >= p[before[position]]:
                rewritten.append((-p[best], position, best))
        if edits.threshold is not None:
            rewritten = [one for one in rewritten if -one[0] >= edits.threshold]
        else:
            n = sum(after[position] != MASK for position in inside)
            rewritten = sorted(rewritten)[: max(0, allowed(n, spent, edits.ratio))]
        expected = list(before)
        for _, position, token in rewritten:
            expected[position] = token
        fresh = [position for position in inside if before[position] == MASK and after[position] != MASK]
        for position in fresh:
            expected[position] = after[position]
        assert after == expected
        spent += len(rewritten)
        total += len(rewritten)
        changed = bool(rewritten or fresh)
    return total


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(2, 9),
    steps=st.integers(1, 12),
    name=st.sampled_from(ONE_BY_ONE),
    block_length=st.none() | st.integers(2, 5),
    rule=st.sampled_from([(0.1, None), (0.3, None), (0.5, None), (0.7, None), (0.0, 0.05), (0.0, 0.15), (0.0, 0.9)]),
    edit_steps=st.integers(0, 3),
    ends=st.sampled_from([(), (END,), (END, PAD)]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_rule_on_plain_lists(seed, length, steps, name, block_length, rule, edit_steps, ends, temperature):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, V, (3, length), generator=generator)
    editable = torch.rand(3, length, generator=generator) < 0.8
    editable[0, 1:] = True
    steps = max(steps, -(-length // (block_length or length)))
    edits = Edits(*rule, edit_steps)
    output, frames = frames_of(
        x,
        editable,
        steps=steps,
        name=name,
        block_length=block_length,
        config=LogitsConfig(temperature),
        seed=seed,
        edits=edits,
        eos_ids=ends,
    )
    everywhere = torch.ones_like(editable)
    tables = [toy(z, everywhere).view(3, length, V).tolist() for z in frames[:-1]]
    blocks = split_into_blocks(editable, block_length).tolist()
    for row in range(3):
        rows = [frame[row].tolist() for frame in frames]
        mine = [table[row] for table in tables]
        n_edits = follow_row(rows, mine, editable[row].tolist(), blocks[row], edits, ends)
        assert n_edits == int(output.edits[row])
        # What holds at the end: no [MASK], the given tokens, and for each position the last step that wrote it.
        for i in range(length):
            writes = [n for n in range(len(rows) - 1) if rows[n][i] != rows[n + 1][i]]
            assert output.committed[row, i] == max(writes, default=-1)
    assert torch.equal(output.sequences[~editable], x[~editable])
    assert not (output.sequences[editable] == MASK).any()
    n_blocks = torch.tensor([max(row) + 1 for row in blocks])
    assert output.steps <= int((steps + n_blocks * edit_steps).max())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_without_budget_it_is_the_masked_sampler(name, block_length, temperature):
    """They use the same draws and forward passes, with early stop too."""
    x = torch.randint(0, MASK, (4, 8), generator=torch.Generator().manual_seed(2))
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = editable[2, 4] = False
    for more in ({}, {"eos_ids": (3,)}):
        options = {"steps": 9, "name": name, "block_length": block_length, "config": LogitsConfig(temperature), **more}
        plain = run(x, editable, **options)
        for edits in (Edits(), Edits(ratio=0.1)):  # a tenth of eight tokens is none
            other = run(x, editable, edits=edits, **options)
            assert torch.equal(other.sequences, plain.sequences) and torch.equal(other.committed, plain.committed)
            assert torch.equal(other.sample_nfe, plain.sample_nfe) and other.edits.tolist() == [0] * 4
            assert (other.steps, other.nfe, other.computed) == (plain.steps, plain.nfe, plain.computed)
        further = run(x, editable, edits=Edits(ratio=0.1, steps=2), **options)  # they draw nothing
        assert torch.equal(further.sequences, plain.sequences) and further.edits.tolist() == [0] * 4


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(NAMES),
    block_length=st.none() | st.integers(1, 5),
    edits=st.sampled_from([Edits(0.5), Edits(0.3, steps=2), Edits(threshold=0.12), Edits(threshold=0.2, steps=3)]),
    eos_ids=st.sampled_from([(), (2,)]),
)
def test_rows_of_different_lengths_equal_each_row_alone(seed, name, block_length, edits, eos_ids):
    x, editable, parts = ragged(seed, 0.8)
    own = {"remask_cap": 0.3} if name == "remdm" else {}
    options = {"denoiser": relative, "name": name, "steps": 12, "block_length": block_length, "edits": edits, **own}
    options |= {"config": LogitsConfig(0.9, 0.8), "eos_ids": eos_ids}
    together = run(x, editable, **options)
    for row, part in enumerate(parts):
        alone = run(x[row : row + 1, part], editable[row : row + 1, part], sample_index=torch.tensor([row]), **options)
        assert torch.equal(alone.sequences[0], together.sequences[row, part])
        assert torch.equal(alone.committed[0], together.committed[row, part])
        assert (alone.sample_nfe[0], alone.edits[0]) == (together.sample_nfe[row], together.edits[row])
    assert not (together.sequences[editable] == MASK).any()
    assert torch.equal(together.sequences[~editable], x[~editable])


def restless(z, select):
    """Always one token further than the one that stands there: a text that never comes to rest."""
    wanted = torch.where(z == MASK, 2, (z + 1) % MASK)
    return torch.nn.functional.one_hot(wanted, V).float().mul(20.0)[select]


def test_edit_steps_end():
    """Three of them after each block's last mask, or fewer once nothing changes."""
    x = torch.zeros(1, 4, dtype=torch.int64)
    options = {"denoiser": restless, "steps": 2, "name": "low_confidence", "config": GREEDY, "block_length": 2}
    output, frames = frames_of(x, x == 0, edits=Edits(threshold=0.5, steps=3), **options)
    assert rows_of(frames) == ["____", "22__", "33__", "44__", "55__", "5522", "5533", "5544", "5555"]
    assert (output.steps, output.edits.tolist()) == (8, [12])
    calm, frames = frames_of(
        x,
        x == 0,
        **{**options, "denoiser": settled(p0=(5, 0.8), p1=(6, 0.8)), "edits": Edits(threshold=0.5, steps=3)},
    )
    assert rows_of(frames) == ["____", "22__", "56__", "56__", "5622", "5622"]
    assert calm.sample_nfe.tolist() == [5]
    spent, frames = frames_of(x, x == 0, **{**options, "edits": Edits(ratio=1 / 3, steps=3)})
    assert rows_of(frames)[1:5] == ["22__", "32__", "32__", "3222"]  # one edit for two tokens, and no forward for none
    assert spent.sample_nfe.tolist() == [4]


def test_random_numbers_of_rows_do_not_collide_in_edit_steps():
    x = torch.zeros(3, 2, dtype=torch.int64)
    options = {"editable": x == 0, "mask_id": MASK, "steps": 4, "seed": 5}
    _, plain = start(x, **options)
    row_step = torch.tensor([0, 1, 3])
    expected = keyed_uniform(5, Stream.SAMPLE_ORDER, torch.arange(3), 2, steps=row_step)
    assert torch.equal(plain.uniform(Stream.SAMPLE_ORDER, row_step), expected)
    seen = [plain.uniform(Stream.SAMPLE_ORDER, torch.full((3,), step)) for step in range(4)]
    assert len({value for u in seen for value in u.flatten().tolist()}) == 4 * 6
    x = torch.zeros(3, 8, dtype=torch.int64)
    state, plan = start(x, editable=x == 0, mask_id=MASK, steps=4, seed=5, block_length=2, edit_steps=3)
    edits, strategy = Edits(threshold=0.05, steps=3), get_strategy("low_confidence")
    while not state.finished:
        taken = state.row_step
        state = denoising_step(
            by_selection(toy), state, plan, strategy=strategy, logits=LogitsConfig(1.0), edits=edits
        )
        assert bool((state.row_step - taken <= 1).all())
    assert state.step > 4 and state.row_step.tolist() == [4, 4, 4]


def test_editing_an_eos_away_reopens_the_text():
    """In the second step EOS is committed at position 1, in the third it is edited, and the text fills the canvas.

    An edit to EOS completes the text at once.
    """

    def changing(z, select, first=END, then=5):
        logits = torch.nn.functional.one_hot(torch.full_like(z, 2), V).float()
        for position, token in ((1, first), (1, then)) if int((z != MASK).sum()) > 1 else ((1, first),):
            logits[:, position] = 0.0
            logits[:, position, token] = 1.0
        return 20.0 * logits[select]

    class From(LeftToRight):
        """Place 1 first, then from the left, so that an end can be written before what stands in front of it."""

        def candidates(self, view):
            order = torch.tensor([1, 0, 2, 3])
            masked = view.is_masked[:, order]
            return (masked & (masked.cumsum(dim=1) == 1))[:, order.argsort()]

    x = torch.zeros(1, 4, dtype=torch.int64)
    options = {"steps": 4, "strategy": From(), "config": GREEDY, "eos_ids": (END,)}
    whole = run(x, x == 0, denoiser=changing, **options)
    assert whole.sequences.tolist() == [[2, END, END, END]] and whole.committed.tolist() == [[1, 0, -1, -1]]

    def opened(z, select):
        wanted = END if int((z == MASK).sum()) == 4 else 5
        logits = torch.nn.functional.one_hot(torch.full_like(z, 2), V).float()
        logits[:, 1] = torch.nn.functional.one_hot(torch.tensor(wanted), V).float()
        return 20.0 * logits[select]

    # The end goes in the same step in which what stands before it is committed: the text must not be closed by it.
    output, frames = frames_of(x, x == 0, denoiser=opened, edits=Edits(threshold=0.5), **options)
    assert rows_of(frames) == ["____", "_0__", "25__", "252_", "2522"]
    assert output.committed.tolist() == [[1, 1, 2, 3]]

    def closing(z, select):
        wanted = 5 if int((z == MASK).sum()) == 4 else END
        logits = torch.nn.functional.one_hot(torch.full_like(z, 2), V).float()
        logits[:, 1] = torch.nn.functional.one_hot(torch.tensor(wanted), V).float()
        return 20.0 * logits[select]

    output, frames = frames_of(x, x == 0, denoiser=closing, edits=Edits(threshold=0.5, steps=5), **options)
    assert rows_of(frames) == ["____", "_5__", "20__"]  # complete, and left alone
    assert output.sequences.tolist() == [[2, END, END, END]] and output.committed.tolist() == [[1, 1, -1, -1]]
    _, frames = frames_of(x, x == 0, denoiser=closing, edits=Edits(threshold=0.5), eos_last=True, **options)
    assert rows_of(frames) == ["____", "_5__", "25__", "252_", "2522"]  # no end while something is masked
    more = {"edits": Edits(threshold=0.5, steps=1), "eos_last": True}
    assert run(x, x == 0, denoiser=closing, **more, **options).sequences.tolist() == [[2, END, 2, 2]]


def test_denoising_step_needs_a_plan_with_its_edit_steps():
    x = torch.zeros(1, 3, dtype=torch.int64)
    state, plan = start(x, editable=x == 0, mask_id=MASK, steps=3)
    with pytest.raises(ValueError, match="edit_steps=2"):
        denoising_step(toy, state, plan, strategy=LeftToRight(), logits=GREEDY, edits=Edits(0.5, steps=2))
    with pytest.raises(ValueError, match="edit_steps"):
        start(x, editable=x == 0, mask_id=MASK, steps=3, edit_steps=-1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ((1.0, None, 0), "edit_ratio .*1.0"),
        ((-0.1, None, 0), "edit_ratio"),
        ((math.nan, None, 0), "edit_ratio"),
        ((0.0, 0.0, 0), "edit_threshold .*0.0"),
        ((0.0, 1.1, 0), "edit_threshold"),
        ((0.2, None, -1), "edit_steps"),
        ((0.2, 0.9, 0), "edit_ratio: 0.2 and edit_threshold: 0.9"),
        (
            (0.0, None, 2),
            "edit_steps: 2",
        ),
    ],
)
def test_invalid_values(keys, words):
    with pytest.raises(ValueError, match=words):
        Edits(*keys)
    ratio, threshold, steps = keys
    with pytest.raises(ValueError, match=words):
        SamplingSettings(edit_ratio=ratio, edit_threshold=threshold, edit_steps=steps)


def test_defaults_of_the_keys():
    assert edits_of(None, None, 0, default=0.0) == Edits() == SamplingSettings().edits()
    assert SamplingSettings().edits(0.1) == Edits(0.1)
    assert SamplingSettings(edit_ratio=0.0).edits(0.1) == Edits(0.0)
    assert SamplingSettings(edit_ratio=0.8).edits(0.1) == Edits(0.8)
    assert SamplingSettings(edit_threshold=0.9).edits(0.1) == Edits(0.0, 0.9)
    assert [SamplingSettings().edits(k).ratio for k in (0.5, 0.6, 0.99)] == [0.5, 0.5, 0.5]
    further = SamplingSettings(edit_steps=2)
    assert further.edits(0.1) == Edits(0.1, None, 2)
    with pytest.raises(ValueError, match="edit_steps: 2"):
        further.edits(0.0)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95])
def test_the_allowance_is_that_of_exact_arithmetic(ratio):
    """7 masks at a ratio of 0.3 allow 3 edits, where floating point gives 2.9999…"""
    from types import SimpleNamespace

    decided = torch.ones(400, 400).tril().bool()
    view = SimpleNamespace(is_decoded=decided, block_edits=torch.zeros(400, dtype=torch.int64))
    for more in (0, 3):
        got = Edits(ratio).allowance(view, torch.full((400,), more)).tolist()
        assert got == [allowed(n + more, 0, ratio) for n in range(1, 401)]
