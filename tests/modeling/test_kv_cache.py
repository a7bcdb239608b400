"""The cache by column: what a pass writes and sees, and models that compute a canvas in parts."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.kv_cache import ColumnCache
from support.tiny import LENGTH, VOCABULARY, Rows, tiny_model

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def llama(kind=LlamaForCausalLM, config=LlamaConfig, attention="sdpa"):
    torch.manual_seed(3)
    model = kind(config(**SMALL, attn_implementation=attention)).eval()
    make_bidirectional(model)
    return model


MODELS = {
    "gpt2": lambda: tiny_model().eval(),
    "llama": llama,
    "llama-eager": lambda: llama(attention="eager"),
    "qwen3": lambda: llama(Qwen3ForCausalLM, Qwen3Config),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


def forward(model, z, cache=None, *, positions=None, columns=None, rows=None, end=None, mask=None):
    """The logits of a pass over `columns` of `z`, of all its columns if None."""
    rest = {}
    if columns is not None:
        chosen = z if rows is None else z[rows]
        z = chosen.gather(1, columns)
    if cache is not None:
        rest = {"past_key_values": cache, "use_cache": True}
    if positions is None:
        positions = torch.arange(LENGTH).expand(len(z), LENGTH) if columns is None else columns
    with torch.inference_mode():
        if cache is None:
            return model(input_ids=z, attention_mask=mask, position_ids=positions, use_cache=False).logits
        with cache.writing(columns, rows=rows, end=end):
            return model(input_ids=z, attention_mask=mask, position_ids=positions, **rest).logits


def plain_mask(model, z, is_padding=None):
    shape = {"batch": len(z), "length": z.shape[1], "dtype": model.dtype, "device": z.device}
    return full_attention_mask(model, is_padding=is_padding, visible=None, **shape)


def test_a_layer_holds_the_columns_as_they_were_written():
    torch.manual_seed(0)
    cache, expected = ColumnCache(3, 6), torch.zeros(2, 3, 2, 6, 5)
    with torch.inference_mode():
        for rows, columns, end in (
            (None, None, 6),
            (None, [[1, 4], [0, 5], [2, 2]], 6),
            ([2, 0], [[3, 1, 1], [0, 1, 2]], 4),
            ([1], None, 6),
            (None, None, 3),
            (None, [[1, 2], [1, 2], [1, 2]], 6),  # one range for all rows; then ranges that differ
            (None, [[1, 2], [1, 2], [2, 3]], 6),
            ([2, 0], [[3, 4, 5], [3, 4, 5]], 6),
            ([1], [[0]], 4),
            (None, [[], [], []], 6),
        ):
            n_rows = 3 if rows is None else len(rows)
            fresh = torch.randn(2, n_rows, 2, end if columns is None else len(columns[0]), 5)
            names = [list(range(end))] * n_rows if columns is None else columns
            for k, row in enumerate(range(3) if rows is None else rows):
                for i, column in enumerate(names[k]):
                    if column in names[k][:i]:  # a repeated column comes with the same keys
                        fresh[:, k, :, i] = fresh[:, k, :, names[k].index(column)]
                    expected[:, row, :, column] = fresh[:, k, :, i]
            index = None if rows is None else torch.tensor(rows)
            with cache.writing(None if columns is None else torch.tensor(columns).long(), rows=index, end=end):
                seen = cache.update(*fresh, 0)
                assert cache.get_mask_sizes(1, 0) == (end, 0)
            for part, whole in zip(seen, expected, strict=True):
                torch.testing.assert_close(part, (whole if rows is None else whole[index])[:, :, :end], rtol=0, atol=0)
    layer = cache.layers[0]
    for stored, whole in zip((layer.keys, layer.values), expected, strict=True):
        torch.testing.assert_close(stored, whole, rtol=0, atol=0)
    assert cache.get_seq_length() == 0 and len(cache.layers) == 1


def test_a_pass_over_all_columns_is_the_same_bit_for_bit(model):
    z = Rows(3).ids
    cache, mask = ColumnCache(3, LENGTH), plain_mask(model, z)
    assert torch.equal(forward(model, z, cache, mask=mask), forward(model, z, mask=mask))
    some = torch.tensor([2, 0])
    with torch.inference_mode(), cache.writing(rows=some):
        logits = model(
            input_ids=z[some],
            attention_mask=mask,
            position_ids=torch.arange(LENGTH)[None],
            past_key_values=cache,
            use_cache=True,
        ).logits
    assert torch.equal(logits, forward(model, z[some], mask=mask))


def test_a_part_of_an_unchanged_canvas_gets_the_logits_of_the_whole(model):
    z = Rows(3).ids
    cache = ColumnCache(3, LENGTH)
    whole = forward(model, z, cache, mask=plain_mask(model, z))
    columns = torch.tensor([[3, 4, 9], [15, 0, 0], [7, 2, 11]])
    mask = torch.zeros(1, 1, 3, LENGTH)
    part = forward(model, z, cache, columns=columns, mask=mask)
    torch.testing.assert_close(part, whole.take_along_dim(columns[:, :, None], 1))
    rows = torch.tensor([2, 1])
    part = forward(model, z, cache, columns=columns[rows], rows=rows, mask=mask)
    torch.testing.assert_close(part, whole[rows].take_along_dim(columns[rows][:, :, None], 1))


def test_left_padding_is_masked_and_shifts_the_positions(model):
    z = Rows(2).ids
    is_padding = torch.arange(LENGTH)[None] < torch.tensor([[0], [5]])
    positions = ((~is_padding).cumsum(dim=1) - 1).clamp(min=0)
    cache = ColumnCache(2, LENGTH)
    whole = forward(model, z, cache, positions=positions, mask=plain_mask(model, z, is_padding))
    columns = torch.tensor([[0, 8, 9], [6, 14, 7]])
    mask = additive(~is_padding[:, None, :].expand(2, 3, LENGTH))
    part = forward(model, z, cache, columns=columns, positions=positions.gather(1, columns), mask=mask)
    torch.testing.assert_close(part, whole.take_along_dim(columns[:, :, None], 1))
    alone = forward(model, z[1:, 5:], positions=torch.arange(LENGTH - 5)[None], mask=plain_mask(model, z[1:, 5:]))
    torch.testing.assert_close(part[1], alone[0, columns[1] - 5])


@pytest.mark.parametrize("make", [lambda: llama(attention="eager"), llama, lambda: tiny_model().eval()])
def test_blocks_of_a_causal_order_need_no_later_column(make):
    """Each pass computes one block and sees the columns up to its end: as one pass under the same mask."""
    model, z = make(), Rows(2).ids
    block = torch.arange(LENGTH) // 4
    whole = forward(model, z, mask=additive((block[:, None] >= block[None, :])[None]))
    cache = ColumnCache(2, LENGTH)
    for low in range(0, LENGTH, 4):
        columns = torch.arange(low, low + 4).expand(2, 4)
        part = forward(model, z, cache, columns=columns, end=low + 4, mask=torch.zeros(1, 1, 4, low + 4))
        torch.testing.assert_close(part, whole[:, low : low + 4])


def test_states_of_other_columns_stay_those_of_the_pass_that_wrote_them():
    """By a layer of attention in plain torch: the changed column is recomputed, the keys of the others are old."""
    model = llama(attention="eager")
    model.model.layers = model.model.layers[:1]  # with one layer only the changed column's key and value differ
    z = Rows(1).ids
    cache = ColumnCache(1, LENGTH)
    forward(model, z, cache, mask=plain_mask(model, z))
    keys = cache.layers[0].keys.clone()
    changed = z.clone()
    changed[0, 5] = (z[0, 5] + 1) % VOCABULARY
    columns = torch.tensor([[5, 6]])
    part = forward(model, changed, cache, columns=columns, mask=torch.zeros(1, 1, 2, LENGTH))
    torch.testing.assert_close(part, forward(model, changed, mask=plain_mask(model, z))[:, 5:7])
    moved = ((cache.layers[0].keys - keys).abs() > 1e-5).any(dim=3).any(dim=1)
    assert moved[0].nonzero().flatten().tolist() == [5]


def test_an_error_ends_the_pass():
    cache = ColumnCache(1, 4)
    with pytest.raises(KeyError), cache.writing(torch.tensor([[1]]), end=2):
        raise KeyError
    assert cache.get_mask_sizes(1) == (4, 0)
