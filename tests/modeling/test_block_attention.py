"""Two streams in one row give what a forward pass for each block gives, in every family and whatever is padded."""

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
from support.blocks import loss_by_blocks, two_streams
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
    noised = ours.noise(clean, sample_index=ROWS, group_size=3)
    expected = torch.zeros(())
    for row, parts in enumerate(documents):
        for low, high in parts:
            x_0, z = clean.x_0[row, low:high], noised.z_t[row, LENGTH + low : LENGTH + high]
            maskable = clean.maskable[row, low:high]
            expected = expected + loss_by_blocks(
                model, x_0, z, maskable, block_length=block_length, shift=shift, mask_id=MASK
            )
    torch.testing.assert_close(two_streams(model, ours, clean, noised), expected, rtol=1e-5, atol=0)


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


def test_the_mask_is_the_rule_written_out():
    block = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 3]])
    document = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2]])
    seen = two_stream_visibility(block, document)[0, 0]
    columns = [(stream, i) for stream in "cn" for i in range(8)]
    for query, (of, i) in enumerate(columns):
        for key, (stream, j) in enumerate(columns):
            if 0 in (i, j):
                expected = query == key
            elif document[0, i] != document[0, j]:
                expected = False
            elif of == "c":
                expected = stream == "c" and block[0, j] <= block[0, i]
            else:
                expected = block[0, j] < block[0, i] if stream == "c" else block[0, j] == block[0, i]
            assert bool(seen[query, key]) == bool(expected), (of, i, stream, j)


def test_the_rule_of_flex_attention_is_the_dense_mask():
    block = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, -1, -1, -1]])
    document = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0, 0]])
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(16), torch.arange(16), indexing="ij")
    for packed in (document, None):
        dense = two_stream_visibility(block, packed)[:, 0]
        assert torch.equal(mask_rule(block, packed)(row, torch.tensor(0), query, key), dense)
    mask = sparse_mask(block, document)
    assert mask.shape == (2, 1, 16, 16)


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
            dense = two_streams(model, ours, clean, noised)
            with attention_implementation(model, "flex_attention"):
                torch.testing.assert_close(two_streams(model, ours, clean, noised), dense, rtol=1e-5, atol=0)
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
    model, ids = tiny_model().eval(), torch.arange(30).repeat(2, 2)
    inputs = two_stream_inputs(model, ids, 4, dtype=torch.float32)
    logits = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits.append(model(input_ids=ids, use_cache=False, **inputs).logits)
    torch.testing.assert_close(*logits)


def test_rows_without_padding_share_one_mask_and_positions_come_twice():
    model = tiny_model()
    inputs = two_stream_inputs(model, torch.zeros(5, 8, dtype=torch.int64), 2, dtype=torch.float32)
    assert inputs["attention_mask"].shape == (1, 1, 8, 8)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3] * 2] * 5


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
