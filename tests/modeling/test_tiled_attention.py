"""Attention over tiles has the values and gradients of dense attention, and computes only the tiles it needs."""

import math

import pytest
import torch
from test_families import build, known
from torch import nn

from llamafactory_ddm.modeling import tiled_attention as module
from llamafactory_ddm.modeling.bidirectional import additive_mask, make_bidirectional
from llamafactory_ddm.modeling.block_attention import two_stream_visibility
from llamafactory_ddm.modeling.model_info import implementation
from llamafactory_ddm.modeling.sparse_attention import attention_implementation
from llamafactory_ddm.modeling.tiled_attention import TILED, takes_tiles, tiled_attention, tiles_of

TILE = 4
FAMILIES = ["gpt2", "llama", "qwen2", "gpt_neox", "phi", "gemma2", "qwen3_moe", "stablelm"]
CPU = torch.device("cpu")
BLOCK = torch.tensor([*range(7), *range(8)]).repeat_interleave(2)  # 30 columns: seven tiles of 4, and one of 2
IS_NOISY = torch.arange(30) >= 14


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_TILE", TILE)


def streams(dtype=torch.float64, rows=1):
    """The mask of two streams; the second row, if there is one, lacks its first block."""
    block = BLOCK.repeat(rows, 1)
    block[1:, :2] = -1
    return additive_mask(two_stream_visibility(block, IS_NOISY.repeat(rows, 1)), dtype)


def softmax_attention(query, key, value, mask, scale):
    """Attention written out; several heads share the keys of one."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    return ((query @ key.transpose(2, 3) * scale + mask).softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_values_and_gradients_are_those_of_softmax(rows, key_heads):
    torch.manual_seed(0)
    layer, mask = nn.Module(), streams(rows=rows)
    layer.num_key_value_groups = 4 // key_heads
    parts = [torch.randn(rows, heads, 30, 8, dtype=torch.float64) for heads in (4, key_heads, key_heads)]
    for part in parts:
        part.requires_grad_()
    expected = softmax_attention(*parts, mask, 0.3)
    actual, weights = tiled_attention(layer, *parts, mask, scaling=0.3, dropout=0.0)
    assert weights is None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    pairs = (torch.autograd.grad(value, parts, gradient) for value in (actual, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_tiles_are_those_in_which_some_query_sees_some_key(rows):
    mask = streams(rows=rows)
    tiles = tiles_of(mask)
    assert [numbers for numbers, _ in tiles] == [
        [
            key
            for key in range(8)
            if any(
                float(mask[row, 0, i, j]) == 0
                for row in range(rows)
                for i in range(TILE * query, min(TILE * query + TILE, 30))
                for j in range(TILE * key, min(TILE * key + TILE, 30))
            )
        ]
        for query in range(8)
    ]
    for query, (numbers, part) in enumerate(tiles):
        columns = [j for key in numbers for j in range(TILE * key, min(TILE * key + TILE, 30))]
        assert torch.equal(part, mask[:, :, TILE * query : TILE * query + TILE, columns])
    assert tiles_of(mask) is tiles  # kept for the other layers


def test_short_blocks_leave_most_pairs_out(monkeypatch):
    monkeypatch.setattr(module, "_TILE", 128)
    columns = torch.arange(1024)
    block = additive_mask(two_stream_visibility(columns[None] % 512 // 4, columns[None] >= 512), torch.float32)
    computed = sum(part.shape[2] * part.shape[3] for _, part in tiles_of(block))
    assert computed == 24 / 64 * 1024**2  # clean on clean 10, noisy on clean 10, noisy on noisy 4
    packed = additive_mask((columns[:, None] // 100 == columns // 100)[None, None], torch.float32)
    assert sum(part.shape[2] * part.shape[3] for _, part in tiles_of(packed)) == 22 / 64 * 1024**2


def test_a_mask_that_leaves_little_out_is_computed_as_a_whole(monkeypatch):
    calls, dense = [], module.ALL_ATTENTION_FUNCTIONS["sdpa"]
    whole = torch.zeros(1, 1, 30, 30)
    parts = [torch.randn(1, 2, 30, 8) for _ in range(3)]

    def counted(layer, query, *rest, **keys):
        calls.append(query.shape[2])
        return dense(layer, query, *rest, **keys)

    monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    for mask in (None, whole, additive_mask(torch.ones(30, 30).tril().bool()[None, None], torch.float32)[..., :20, :]):
        query = parts[0][:, :, : 30 if mask is None else mask.shape[2]]
        tiled_attention(nn.Module(), query, *parts[1:], mask, scaling=1 / math.sqrt(8), dropout=0.0)
    assert calls == [30, 30, 4, 4, 4, 4, 4]
    assert tiles_of(whole) is None


@torch.no_grad()
@pytest.mark.parametrize("name", known(FAMILIES))
def test_models_compute_the_same(name):
    model = build(name)
    make_bidirectional(model)
    if not takes_tiles(model, CPU):
        assert name == "stablelm"
        return
    ids, mask = torch.arange(3, 33)[None].repeat(2, 1), streams(torch.float32, rows=2)
    mask = dict.fromkeys(model.config.layer_types, mask) if getattr(model.config, "layer_types", None) else mask
    position_ids = torch.arange(15).repeat(2)[None].expand(2, 30)
    dense = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    with attention_implementation(model, TILED):
        tiled = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    assert implementation(model) == "sdpa"
    torch.testing.assert_close(tiled, dense, rtol=1e-4, atol=1e-4)
    of_layers = mask["full_attention"] if isinstance(mask, dict) else mask
    assert of_layers.tiles is not None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mask_of_padding_is_that_of_sdpa(name):
    """As a callback passes it that uses the model between two steps."""
    model, ids = build(name), torch.arange(3, 15).view(2, 6)
    keep = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for switch in (lambda: None, lambda: make_bidirectional(model)):
        switch()
        expected = model(input_ids=ids, attention_mask=keep, use_cache=False).logits
        with attention_implementation(model, TILED):
            actual = model(input_ids=ids, attention_mask=keep, use_cache=False).logits
        torch.testing.assert_close(actual[keep > 0], expected[keep > 0])
        unmasked = model(input_ids=ids, attention_mask=torch.ones_like(keep), use_cache=False).logits
        assert not torch.allclose(actual[0, 2:], unmasked[0, 2:])


def test_attention_dropout_keeps_means():
    """Of constant values, the mean over heads and queries with dropout is the value."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 200, 30, 4) for _ in range(2)]
    out, _ = tiled_attention(
        nn.Module(), *parts, torch.ones(1, 200, 30, 4), streams(torch.float32), scaling=1.0, dropout=0.5
    )
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert out.std().item() > 0.1


def test_which_models_take_tiles():
    model = build("llama")
    assert takes_tiles(model, CPU)
    assert not takes_tiles(model, torch.device("cuda"))
    model.set_attn_implementation("eager")
    assert not takes_tiles(model, CPU)
    assert not takes_tiles(build("falcon"), CPU)  # its attention cannot be replaced
