"""The loss of block diffusion: a bound, exact at its ends, and one number however a batch is split."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from llamafactory_ddm.data.collators import ResponseCollator, VariableLengthCollator
from llamafactory_ddm.diffusion.likelihood import evaluation_times
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.evaluation.bound import N_STATISTICS, bound_metrics, row_statistics
from llamafactory_ddm.modeling.bidirectional import full_attention_mask
from llamafactory_ddm.modeling.block_attention import two_stream_inputs
from llamafactory_ddm.objectives.block import BlockObjective
from llamafactory_ddm.objectives.masked import MaskedObjective
from support.blocks import forward, loss_by_blocks, noised_ids, two_streams
from support.tiny import LENGTH, MASK_ID, Rows, stack, tiny_model

EOS, PAD = 0, 7


def objective(block_length=4, shift=True, **rest):
    return BlockObjective(
        mask_id=MASK_ID, shift=shift, schedule=get_schedule("linear"), block_length=block_length, **rest
    )


def rows(count=8, lengths=None):
    return stack(list(Rows(count, lengths)))


def answers():
    """Prompts of 3 to 6 tokens with answers, in one of which [MASK] stands."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for prompt, length in ((3, 16), (5, 9), (6, 12), (4, 5)):
        ids = [*torch.randint(8, MASK_ID, (length - 1,), generator=generator).tolist(), EOS]
        result.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    for key in ("input_ids", "labels"):
        result[0][key][10] = MASK_ID
    return result


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
@pytest.mark.parametrize("target_length", [None, 18])
def test_answers_are_scored_block_by_block_with_their_prompts_in_clear(shift, weighting, target_length):
    ours = objective(shift=shift, weighting=weighting)
    clean = ours.clean(ResponseCollator(pad_id=PAD, shift=shift, target_length=target_length)(answers()))
    batch = ours.noise(clean, sample_index=torch.arange(4), group_size=4)
    model, length = tiny_model().eval(), clean.x_0.shape[1]
    z = noised_ids(ours, clean, torch.arange(4))
    assert torch.equal(z[~clean.maskable], clean.x_0[~clean.maskable]) and MASK_ID not in batch.scored["targets"]
    total = torch.zeros(())
    for row in range(4):
        n = length if clean.is_padding is None else int((~clean.is_padding[row]).sum())
        parts = (clean.x_0[row, :n], z[row, :n], clean.maskable[row, :n])
        rule = {"block_length": 4, "shift": shift, "mask_id": MASK_ID, "weighted": weighting == "elbo"}
        total = total + loss_by_blocks(model, *parts, **rule)
    torch.testing.assert_close(two_streams(model, ours, batch), total, rtol=1e-5, atol=0)


@torch.no_grad()
def test_blocks_of_one_token_with_shift_are_autoregressive():
    ours, model = objective(1), tiny_model().eval()
    clean = ours.clean(rows(3, [16, 9, 12]))
    batch = ours.noise(clean, sample_index=torch.arange(3), group_size=3)
    total = torch.zeros(())
    for row, n in enumerate([16, 9, 12]):
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        mask = full_attention_mask(
            model, batch=1, length=n, is_padding=None, visible=causal, dtype=torch.float32, device="cpu"
        )
        logits = model(input_ids=clean.x_0[row : row + 1, :n], attention_mask=mask, use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], clean.x_0[row, 1:n], reduction="sum")
    torch.testing.assert_close(two_streams(model, ours, batch), total, rtol=1e-5, atol=0)
    assert int(batch.denominator) == int(batch.n_maskable) == 15 + 8 + 11 and int(batch.n_masked) == 0


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_one_block_is_masked_diffusion_of_the_row(shift):
    """With shift too, as the row's first token is given in both; a shorter row is followed by masks."""
    ours, model = objective(LENGTH, shift), tiny_model().eval()
    full = MaskedObjective(mask_id=MASK_ID, shift=shift, schedule=get_schedule("linear"))
    clean = ours.clean(rows(4, [16, 10, 16, 5]))
    assert torch.equal(clean.maskable, full.clean(rows(4, [16, 10, 16, 5])).maskable)
    batch = ours.noise(clean, sample_index=torch.arange(4), group_size=4)
    z = noised_ids(ours, clean, torch.arange(4))
    is_masked = (z == MASK_ID) & clean.maskable
    mask = full_attention_mask(
        model, batch=4, length=LENGTH, is_padding=None, visible=None, dtype=torch.float32, device="cpu"
    )
    canvas = z if clean.is_padding is None else z.masked_fill(clean.is_padding, MASK_ID)
    logits = model(input_ids=canvas, attention_mask=mask, use_cache=False).logits
    logits = logits.roll(1, dims=1) if shift else logits
    cost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), clean.x_0, reduction="none") * is_masked
    weight = clean.maskable.sum(dim=1) / is_masked.sum(dim=1)
    torch.testing.assert_close(two_streams(model, ours, batch), (weight * cost.sum(dim=1)).sum(), rtol=1e-5, atol=0)
    samples, index = 4, torch.arange(4)
    levels = evaluation_times(index, samples)
    pairs = zip(
        ours.evaluations(clean, levels, seed=0, sample_index=index),
        full.evaluations(clean, levels, seed=0, sample_index=index),
        strict=True,
    )
    for one, other in pairs:
        assert torch.equal(one.z, other.z) and torch.equal(one.is_scored, other.is_scored)


def bound_logits(model):
    def logits(z, index, placement):
        inputs = two_stream_inputs(model, z, dtype=torch.float32, **placement)
        return model(input_ids=z, use_cache=False, **inputs).logits.flatten(0, 1)[index]

    return logits


def in_whole_blocks(text, block_length):
    """Return the text with masks up to the end of its last block, which are never scored."""
    return torch.cat([text, text.new_full((-len(text) % block_length,), MASK_ID)])


def nll_of_text(model, text, block_length, shift):
    """Return the exact -log p of a text under the blocks' reverse process that unmasks one token at a time.

    Each block is generated in an order drawn uniformly; p is the mean over orders. With shift the first token of a
    block comes first, and that of the text is given.
    """
    total = 0.0
    for low in range(0, len(text), block_length):
        high = min(low + block_length, len(text))
        columns = list(range(low + shift, high))
        if shift and low:
            logits = forward(model, text[:low], block_length)[-1]
            total -= float(logits.log_softmax(dim=-1)[text[low]])
        probabilities = []
        for order in itertools.permutations(columns):
            z, log_p = in_whole_blocks(text[:high], block_length), 0.0
            z[columns] = MASK_ID
            for i in order:
                logits = forward(model, z, block_length)
                log_p += float(logits[i - shift].log_softmax(dim=-1)[text[i]])
                z[i] = text[i]
            probabilities.append(math.exp(log_p))
        if columns:
            total -= math.log(sum(probabilities) / len(probabilities))
    return total


def bound_of_text(model, text, block_length, shift):
    """Return the bound by enumeration of all masks of every block."""
    total = 0.0
    for low in range(0, len(text), block_length):
        high = min(low + block_length, len(text))
        columns = list(range(low + shift, high))
        if shift and low:
            total -= float(forward(model, text[:low], block_length)[-1].log_softmax(dim=-1)[text[low]])
        for c in range(1, len(columns) + 1):
            for masked in itertools.combinations(columns, c):
                z = in_whole_blocks(text[:high], block_length)
                z[list(masked)] = MASK_ID
                log_p = forward(model, z, block_length).log_softmax(dim=-1)
                cost = -sum(float(log_p[i - shift, text[i]]) for i in masked)
                total += cost / c / math.comb(len(columns), c)
    return total


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_the_bound_lies_above_the_exact_likelihood_and_every_estimate_has_it_as_mean(shift):
    model = tiny_model(3).eval()
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.dim() > 1 else 1)
    text, b = Rows(1, seed=6).ids[0, :7], 3
    bound, exact = bound_of_text(model, text, b, shift), nll_of_text(model, text, b, shift)
    assert exact <= bound + 1e-4 and bound > 0
    draws = 1500
    ours = objective(b, shift)
    clean = ours.clean({"input_ids": text.repeat(draws, 1)})
    n_counted = 7 - shift
    for noise in ("counts", "times"):
        kind = replace(ours, block_noise=noise, time_epsilon=0.0)
        batch = kind.noise(clean, sample_index=torch.arange(draws), group_size=draws)
        assert int(batch.denominator) == draws * n_counted
        means = per_row(model, kind, clean, batch)
        assert abs(float(means.mean()) - bound) < 4 * float(means.std()) / math.sqrt(draws), noise
    statistics = row_statistics(ours, clean, bound_logits(model), samples=4, sample_index=torch.arange(draws))
    assert float(statistics[:, 0].mean()) == pytest.approx(bound, rel=5e-3)
    metrics = bound_metrics(statistics.sum(dim=0).tolist(), prefix="eval", term="nll")
    assert metrics["eval_loss"] == pytest.approx(bound / n_counted, rel=5e-3)
    assert ("eval_nll_first" in metrics) == shift
    if shift:
        first = [
            -float(forward(model, text[:low], b)[-1].log_softmax(dim=-1)[text[low]]) for low in range(b, len(text), b)
        ]
        assert metrics["eval_nll_first"] == pytest.approx(sum(first) / len(first), rel=1e-4)


def per_row(model, ours, clean, batch):
    """Return the weighted cost of each row."""
    inputs = two_stream_inputs(model, batch.z_t, dtype=torch.float32, **batch.placement)
    logits = model(input_ids=batch.z_t, use_cache=False, **inputs).logits.flatten(0, 1)[batch.head_index]
    nll = torch.nn.functional.cross_entropy(logits, batch.scored["targets"], reduction="none")
    row = batch.head_index // batch.z_t.shape[1]
    return torch.zeros(len(clean.x_0)).index_add_(0, row, nll * batch.scored["weight"].view(torch.float32))


@torch.no_grad()
def test_evaluation_depends_on_the_sample_and_scores_first_tokens_once():
    ours, model = objective(), tiny_model().eval()
    clean = ours.clean(rows(6, [16, 9, 12, 16, 3, 1]))
    index = torch.arange(6)
    whole = row_statistics(ours, clean, bound_logits(model), samples=4, sample_index=index)
    assert whole.shape == (6, N_STATISTICS)
    for low in (0, 3):
        part = ours.clean({key: value[low : low + 3] for key, value in rows(6, [16, 9, 12, 16, 3, 1]).items()})
        found = row_statistics(ours, part, bound_logits(model), samples=4, sample_index=index[low : low + 3])
        torch.testing.assert_close(found, whole[low : low + 3], rtol=1e-5, atol=1e-6)
    assert whole[:, 1].tolist() == [15, 8, 11, 15, 2, 0]
    assert whole[:, -1].tolist() == [3, 2, 2, 3, 0, 0]


@pytest.mark.parametrize("norm", ["tokens", "masked", "sequence"])
def test_eight_rows_give_the_gradient_of_four_and_four(norm):
    ours = objective(norm=norm)
    batch = rows(8, [16, 9, 12, 16, 3, 16, 7, 10])

    def gradient(parts):
        model = tiny_model().eval()
        noised = []
        for low, high in parts:
            clean = ours.clean({key: value[low:high] for key, value in batch.items()})
            noised.append(ours.noise(clean, sample_index=torch.arange(low, high), group_size=8))
        total = sum(each.denominator for each in noised)
        for each in noised:
            (two_streams(model, ours, each) / total).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradient([(0, 8)])
    assert float(whole.norm()) > 0
    torch.testing.assert_close(gradient([(0, 4), (4, 8)]), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", ["tokens", "masked", "sequence"])
def test_norms_divide_by_what_they_say(norm):
    ours = objective(norm=norm)
    clean = ours.clean(rows(3, [16, 9, 1]))
    batch = ours.noise(clean, sample_index=torch.arange(3), group_size=3)
    assert int(batch.denominator) == {"tokens": 15 + 8, "masked": len(batch.head_index), "sequence": 2}[norm]
    tokens = objective(norm="tokens").noise(clean, sample_index=torch.arange(3), group_size=3)
    ratio = batch.scored["weight"].view(torch.float32) / tokens.scored["weight"].view(torch.float32)
    row = batch.head_index // batch.z_t.shape[1]
    expected = torch.tensor([1 / 15, 1 / 8, 1.0])[row] if norm == "sequence" else torch.ones(len(row))
    torch.testing.assert_close(ratio, expected)


def test_variable_length_and_truncated_rows_end_within_a_block():
    ours = objective(truncate_ratio=1.0)
    collate = VariableLengthCollator(eos_id=EOS, pad_ids=(PAD,), canvas=24, block=4, extra=1)
    clean = ours.clean(collate(answers()))
    assert int(clean.maskable.sum()) > 0
    cut = ours.clean(rows(8)).truncated(1.0, seed=0, sample_index=torch.arange(8))
    for each in (clean, cut):
        count = len(each.x_0)
        batch = ours.noise(each, sample_index=torch.arange(count), group_size=count)
        assert int(batch.n_maskable) == int(each.maskable.sum())
        assert torch.equal(batch.scored["targets"], each.x_0[targets(batch, each)])


def targets(batch, clean):
    """Return [batch, length] bool, the tokens that the batch scores, from its head_index (with shift)."""
    n_columns, position = batch.z_t.shape[1], batch.placement["position_ids"].expand(batch.z_t.shape)
    row, column = batch.head_index // n_columns, batch.head_index % n_columns
    scored = torch.zeros_like(clean.x_0, dtype=torch.bool)
    scored[row, position[row, column] + 1] = True
    return scored


@pytest.mark.parametrize("shift", [False, True])
def test_the_next_turn_is_hidden_from_the_end_of_an_answer_as_in_generation(shift):
    """Blocks of 8: the prompt of 3, its answer up to 5, the next prompt up to 9, its answer up to 13, a prompt."""
    ids = torch.arange(10, 26)[None]
    maskable = torch.zeros(1, 16, dtype=torch.bool)
    maskable[0, [3, 4, 5, 10, 11, 12, 13]] = True
    ours = objective(8, shift)
    clean = ours.clean({"input_ids": ids, "maskable": maskable})
    hidden = [6, 7, 14, 15]
    batch = ours.noise(clean, sample_index=torch.zeros(1, dtype=torch.int64), group_size=1)
    levels = evaluation_times(torch.zeros(1, dtype=torch.int64), 2)
    noised = [
        each.z for each in ours.evaluations(clean, levels, seed=0, sample_index=torch.zeros(1, dtype=torch.int64))
    ]
    for z in (batch.z_t[:, 8:], *noised):
        shown = [0, 1, 2, 8, 9]
        assert bool((z[0, hidden] == MASK_ID).all()) and torch.equal(z[0, shown], ids[0, shown])
    assert torch.equal(batch.z_t[:, :8], ids[:, :8])  # of the clean stream the second block is not needed
    assert set(batch.scored["targets"].tolist()) <= set(ids[maskable].tolist())
    assert int(batch.n_maskable) == 7


def test_an_eos_label_on_the_next_turns_first_token_is_predicted_from_clean_text_and_shown_as_the_turn():
    turns = {
        "input_ids": [20, 10, 21, 11, 20, 13, 21, 14, EOS],
        "labels": [-100, -100, -100, 11, EOS, -100, -100, 14, EOS],
    }
    ours = objective(4)
    clean = ours.clean(ResponseCollator(pad_id=PAD, shift=True)([turns] * 2))
    batch = ours.noise(clean, sample_index=torch.arange(2), group_size=2)
    assert bool((batch.z_t[:, 4] == 20).all()) and bool((batch.z_t[:, 8 + 4] == 20).all())
    at = (batch.head_index == 3).nonzero()[0, 0]  # the clean stream's last token of the first block
    assert int(batch.scored["targets"][at]) == EOS
