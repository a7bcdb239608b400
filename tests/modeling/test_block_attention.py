"""Two streams in one row give what a forward pass for each block gives, in every family and whatever is padded."""

import itertools

import pytest
import torch
from test_families import build, known

from llamafactory_ddm.diffusion.blocks import block_of
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError, make_bidirectional
from llamafactory_ddm.modeling.block_attention import (
    probe_block_attention,
    two_stream_inputs,
    two_stream_visibility,
)
from llamafactory_ddm.modeling.sparse_attention import (
    attention_implementation,
    check_takes_sparse,
    mask_rule,
    sparse_mask,
)
from llamafactory_ddm.objectives.block import BlockObjective
from support.blocks import loss_by_blocks, noised_ids, two_streams
from support.tiny import tiny_model

LENGTH, MASK, ROWS = 11, 39, torch.arange(3)
FAMILIES = ["gpt2", "gpt_neox", "granite", "llama", "olmo", "olmo2", "phi", "qwen2", "qwen3", "qwen3_moe", "smollm3"]


def objective(block_length, shift, **rest):
    return BlockObjective(
        mask_id=MASK, shift=shift, schedule=get_schedule("linear"), block_length=block_length, seed=4, **rest
    )


def batches():
    """Rows without padding, padded on either side, and packed; with the documents of each row as slices."""
    ids = torch.randint(3, MASK, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    keep = torch.ones_like(ids)
    right, left = keep.clone(), keep.clone()
    right[1, 6:], right[2, 9:] = 0, 0
    left[1, :5], left[2, :2] = 0, 0
    document = torch.tensor([[1] * 11, [1] * 4 + [2] * 5 + [0] * 2, [1] * 2 + [2] * 2 + [3] * 7])
    position = torch.tensor([[*range(11)], [*range(4), *range(5), 0, 0], [*range(2), *range(2), *range(7)]])
    packed = {"attention_mask": (document > 0).long(), "document": document, "position_ids": position}
    return {
        "plain": ({"input_ids": ids}, [[(0, 11)]] * 3),
        "right": ({"input_ids": ids, "attention_mask": right}, [[(0, 11)], [(0, 6)], [(0, 9)]]),
        "left": ({"input_ids": ids, "attention_mask": left}, [[(0, 11)], [(5, 11)], [(2, 11)]]),
        "packed": ({"input_ids": ids, **packed}, [[(0, 11)], [(0, 4), (4, 9)], [(0, 2), (2, 4), (4, 11)]]),
    }


def compare(model, name, block_length, shift):
    batch, documents = batches()[name]
    ours = objective(block_length, shift)
    clean = ours.clean(batch)
    noised, noisy = ours.noise(clean, sample_index=ROWS, group_size=3), noised_ids(ours, clean, ROWS)
    expected = torch.zeros(())
    for row, parts in enumerate(documents):
        for low, high in parts:
            x_0, z = clean.x_0[row, low:high], noisy[row, low:high]
            maskable = clean.maskable[row, low:high]
            expected = expected + loss_by_blocks(
                model, x_0, z, maskable, block_length=block_length, shift=shift, mask_id=MASK
            )
    torch.testing.assert_close(two_streams(model, ours, noised), expected, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", known(FAMILIES))
def test_two_streams_are_the_blocks_one_by_one(name):
    model = build(name)
    make_bidirectional(model)
    probe_block_attention(model)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        for kind in ("left", "packed"):
            for shift in (False, True):
                compare(model, kind, 4, shift)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "right", "left", "packed"])
@pytest.mark.parametrize("block_length", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shift", [False, True])
def test_two_streams_for_every_length_of_blocks(kind, block_length, shift):
    compare(tiny_model().eval(), kind, block_length, shift)


BLOCKS = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, -1, -1, -1]]).repeat(1, 2)
DOCUMENTS = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0, 0]]).repeat(1, 2)
IS_NOISY = (torch.arange(16) >= 8).expand(2, 16)


def test_the_mask_is_the_rule_written_out():
    seen = two_stream_visibility(BLOCKS, IS_NOISY, DOCUMENTS)[:, 0]
    for row, query, key in itertools.product(range(2), range(16), range(16)):
        of, to = int(BLOCKS[row, query]), int(BLOCKS[row, key])
        if -1 in (of, to):
            expected = query == key
        elif DOCUMENTS[row, query] != DOCUMENTS[row, key]:
            expected = False
        elif query < 8:
            expected = key < 8 and to <= of
        else:
            expected = to < of if key < 8 else to == of
        assert bool(seen[row, query, key]) == expected, (row, query, key)


def test_the_rule_of_flex_attention_is_the_dense_mask():
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(16), torch.arange(16), indexing="ij")
    for packed in (DOCUMENTS, None):
        dense = two_stream_visibility(BLOCKS, IS_NOISY, packed)[:, 0]
        assert torch.equal(mask_rule(BLOCKS, IS_NOISY, packed)(row, torch.tensor(0), query, key), dense)
        shared = mask_rule(BLOCKS[:1], IS_NOISY[:1], None if packed is None else packed[:1])
        assert torch.equal(shared(row, torch.tensor(0), query, key), dense[:1].expand(2, 16, 16))
    assert sparse_mask(BLOCKS, IS_NOISY, DOCUMENTS).shape == (2, 1, 16, 16)


@torch.no_grad()
def test_flex_attention_gives_the_dense_logits(monkeypatch):
    """Uncompiled, on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as upstream

    monkeypatch.setattr(upstream, "compile_friendly_flex_attention", lambda *a, training, **k: flex_attention(*a, **k))
    for name in ("llama", "qwen3"):
        model = build(name)
        make_bidirectional(model)
        check_takes_sparse(model)
        ours = objective(4, True)
        for kind in ("packed", "plain"):
            clean = ours.clean(batches()[kind][0])
            noised = ours.noise(clean, sample_index=ROWS, group_size=3)
            dense = two_streams(model, ours, noised)
            with attention_implementation(model, "flex_attention"):
                torch.testing.assert_close(two_streams(model, ours, noised), dense, rtol=1e-5, atol=0)
        assert model.config._attn_implementation == "sdpa"


def test_models_without_flex_attention_are_refused():
    with pytest.raises(ValueError, match=r"sparse_attention: true .*gpt2"):
        check_takes_sparse(tiny_model())
    model = build("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"sparse_attention: true .*attention_dropout: 0.1"):
        check_takes_sparse(model)


def test_blocks_are_counted_from_the_start_of_a_document():
    position = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 0]])
    is_padding = torch.tensor([[True, True, *[False] * 5], [*[False] * 6, True]])
    assert block_of(position, 3, is_padding=is_padding).tolist() == [[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 2, 2, -1]]
    assert block_of(torch.arange(5)[None], 2).tolist() == [[0, 0, 1, 1, 2]]
    with pytest.raises(ValueError, match="block_length"):
        block_of(position, 0)


@torch.no_grad()
def test_two_streams_may_have_more_columns_than_the_model_has_positions():
    model, ours = tiny_model().eval(), objective(4, True)
    clean = ours.clean({"input_ids": torch.arange(30).repeat(2, 1)})
    batch = ours.noise(clean, sample_index=torch.arange(2), group_size=2)
    assert batch.z_t.shape == (2, 60) and model.config.n_positions == 32
    losses = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        losses.append(two_streams(model, ours, batch))
    torch.testing.assert_close(*losses)


def test_rows_without_padding_share_their_columns():
    ours = objective(4, False)
    batch = ours.noise(ours.clean(batches()["plain"][0]), sample_index=ROWS, group_size=3)
    assert batch.z_t.shape == (3, 8 + 12)  # the last block is completed
    assert batch.placement["block"].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert batch.placement["position_ids"].tolist() == [*range(8), *range(12)]
    assert batch.placement["is_noisy"].tolist() == [False] * 8 + [True] * 12
    inputs = two_stream_inputs(tiny_model(), batch.z_t, dtype=torch.float32, **batch.placement)
    assert inputs["attention_mask"].shape == (1, 1, 20, 20) and inputs["position_ids"].shape == (3, 20)


def test_columns_that_no_scored_token_depends_on_are_left_out():
    """A prompt of 9 tokens, an answer of 4, and 3 more; the second row has less."""
    ids = torch.arange(16).repeat(2, 1)
    maskable = torch.zeros(2, 16, dtype=torch.bool)
    maskable[0, 9:13] = True
    maskable[1, 1:3] = True
    ours = objective(4, True)
    clean = ours.clean({"input_ids": ids, "maskable": maskable})
    batch = ours.noise(clean, sample_index=ROWS[:2], group_size=2)
    # Row 0: blocks 0 to 2 in clear, for the first token of block 3; block 2 noised. Row 1: block 0 noised.
    assert batch.z_t.shape == (2, 16)
    assert batch.placement["block"].tolist() == [[0] * 4 + [1] * 4 + [2] * 8, [0] * 4 + [-1] * 12]
    assert batch.placement["is_noisy"][0].tolist() == [False] * 12 + [True] * 4


@pytest.mark.parametrize("name", known(["mistral", "gemma2", "gpt_oss"]))
def test_sliding_windows_are_refused(name):
    model = build(name)
    model.config.sliding_window = 4
    make_bidirectional(model)
    with pytest.raises(NotBidirectionalError, match=r"sliding-window .*attention: block"):
        probe_block_attention(model)


def test_flash_attention_is_refused(monkeypatch):
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotBidirectionalError, match=r"attention: block .*flash_attn: sdpa"):
        probe_block_attention(model)


class Wrapped(torch.nn.Module):
    """The model under another mask."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, attention_mask, **rest):
        return self.model(attention_mask=self.change(attention_mask), **rest)


def causal(mask):
    return torch.full_like(mask, torch.finfo(mask.dtype).min).triu(1).minimum(mask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (causal, "does not see the last noised token"),
        (torch.zeros_like, "sees its own clean token"),
        (lambda mask: mask[..., :3], "does not accept the mask"),
    ],
)
def test_a_model_that_sees_other_tokens_is_refused(change, words):
    model = tiny_model()
    with pytest.raises(NotBidirectionalError, match=words):
        probe_block_attention(Wrapped(model, change), inner=model)
