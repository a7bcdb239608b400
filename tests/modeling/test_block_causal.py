"""Block attention in generation: its mask, and the cache against forward passes over whole prefixes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_families import DENSE, EXPERTS, build, known

from llamafactory_ddm.diffusion.blocks import block_of, positions_of
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError, make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.model_info import window_of
from llamafactory_ddm.modeling.pass_widths import grouped
from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample
from llamafactory_ddm.sampling.budget import split_by_position
from support.tiny import LENGTH, VOCABULARY, Rows, tiny_model

B = 4
SMALLEST = torch.finfo(torch.float32).min
PADDED = torch.arange(LENGTH)[None] < torch.tensor([[0], [5], [2]])


def visible(is_padding, block_length):
    """Loop over every pair of columns: [batch, length, length], True where a query may see a key."""
    batch, length = is_padding.shape
    result = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        start = int(is_padding[row].sum())
        for query in range(start, length):
            for key in range(start, length):
                result[row, query, key] = (key - start) // block_length <= (query - start) // block_length
    return result


def by_whole_prefixes(model, z, is_padding, wanted, *, shift, block_length=B):
    """Logits of the tokens at `wanted` by one row at a time, without padding, up to the end of the token's block."""
    rows = []
    for index in wanted.tolist():
        row, column = divmod(index, z.shape[1])
        start = int(is_padding[row].sum())
        source = column - start - int(shift)
        end = min((source // block_length + 1) * block_length, z.shape[1] - start)
        ids = z[row, start : start + end][None]
        seen = visible(torch.zeros(1, end, dtype=torch.bool), block_length)
        mask = torch.zeros(1, 1, end, end).masked_fill(~seen[:, None], SMALLEST)
        if getattr(model.config.get_text_config(), "layer_types", None):
            mask = {"full_attention": mask}
        with torch.no_grad():
            rows.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, source])
    return torch.stack(rows)


def decoded_block_by_block(z, is_padding, *, shift, seed=0):
    """Yield the ids and requested tokens of a sampler's steps: masks give way to tokens, block by block."""
    generator = torch.Generator().manual_seed(seed)
    position = positions_of(z, is_padding=is_padding)
    block = block_of(position, B, is_padding=is_padding)
    unit = 2 * block + (position % B > 0) if shift else block
    unit = unit.masked_fill(position < 3, -1)  # a prompt of three tokens
    canvas = torch.where(unit >= 0, VOCABULARY - 1, z)
    masked = unit >= 0
    while masked.any():
        current = torch.where(masked, unit, 10**6).amin(dim=1, keepdim=True)
        wanted = masked & (unit == current)
        wanted &= wanted.any(dim=1, keepdim=True) & (torch.rand(len(z), 1, generator=generator) < 0.8)
        if not wanted.any():
            continue
        yield canvas.clone(), wanted.flatten().nonzero()[:, 0]
        commit = wanted & (torch.rand(wanted.shape, generator=generator) < 0.5)
        canvas = torch.where(commit, z, canvas)
        masked &= ~commit


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_logits_are_those_of_whole_prefixes(shift, cached):
    """Rows with padding in front, at different blocks, some of them left out of a step."""
    model, z = tiny_model().eval(), Rows(3).ids
    denoiser = BlockDenoiser(model, block_length=B, shift=shift, is_padding=PADDED, cached=cached)
    for canvas, wanted in decoded_block_by_block(z, PADDED, shift=shift):
        found = torch.cat([part.clone() for part in denoiser(canvas, wanted)])
        torch.testing.assert_close(found, by_whole_prefixes(model, canvas, PADDED, wanted, shift=shift))


def sampled(model, z, is_padding, **options):
    """Texts of the sampler after a prompt of three tokens, at temperature 0.9."""
    position = positions_of(z, is_padding=is_padding)
    editable = (position >= 3) & ~is_padding
    denoiser = BlockDenoiser(model, block_length=B, shift=True, is_padding=is_padding, **options)
    output = sample(
        denoiser,
        z,
        editable=editable,
        mask_id=VOCABULARY - 1,
        steps=2,
        strategy=get_strategy("low_confidence"),
        logits=LogitsConfig(0.9, 0.9),
        block=split_by_position(editable, position, B, shift=True),
    )
    denoiser.close()
    return output.sequences


def can_be_a_block_model(name):
    try:
        model = build(name)
        make_bidirectional(model)
    except NotBidirectionalError:
        return None
    return None if window_of(model) is not None else model


FEW = ("gpt2", "gpt_neox", "llama", "olmo2", "phi3", "qwen3", "smollm3")  # the others under eager in the slow tests
FAMILIES = [
    pytest.param(name, attention, marks=() if attention == "sdpa" or name in FEW else pytest.mark.slow)
    for attention in ("sdpa", "eager")
    for name in known([*DENSE, *EXPERTS])
]


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_the_cache_changes_no_logit_in_any_family(name, attention):
    model = can_be_a_block_model(name)
    if model is None:
        pytest.skip("sliding windows")
    model.set_attn_implementation(attention)
    z = Rows(3).ids
    plain, cached = (
        BlockDenoiser(model, block_length=B, shift=True, is_padding=PADDED, cached=cached) for cached in (False, True)
    )
    steps = list(decoded_block_by_block(z, PADDED, shift=True))
    for number, (canvas, wanted) in enumerate(steps):
        expected = torch.cat([part.clone() for part in plain(canvas, wanted)])
        found = torch.cat([part.clone() for part in cached(canvas, wanted)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
        if number in (0, len(steps) - 1):
            direct = by_whole_prefixes(model, canvas, PADDED, wanted, shift=True)
            torch.testing.assert_close(found, direct, rtol=0, atol=1e-4 * float(expected.std()))
    assert (cached.take_computed() < plain.take_computed()).all()
    assert torch.equal(*(sampled(model, z, PADDED, cached=cached) for cached in (False, True)))


@pytest.mark.parametrize(("shift", "of_a_block"), [(True, B + 3 * B), (False, (3 + 1) * B)])
def test_columns_computed_for_a_block(shift, of_a_block):
    """Three steps a block; with shift a step for its first token, in which the finished block is computed again."""
    n_blocks, start = 3, int(shift)
    z = Rows(1).ids[:, : n_blocks * B]
    position = torch.arange(n_blocks * B)[None]
    denoiser = BlockDenoiser(tiny_model().eval(), block_length=B, shift=shift)
    output = sample(
        denoiser,
        z,
        editable=position >= start,
        mask_id=VOCABULARY - 1,
        steps=3,
        strategy=get_strategy("low_confidence"),
        block=split_by_position(position >= start, position, B, shift=shift),
    )
    # The last block is not computed again; with shift the first token of all is given.
    assert output.sample_computed.tolist() == [n_blocks * of_a_block - B]
    assert output.nfe == n_blocks * (3 + shift) - shift


@given(widths=st.lists(st.integers(1, 40), min_size=1, max_size=9), cost=st.integers(0, 60))
def test_rows_are_divided_into_passes_where_that_is_cheaper(widths, cost):
    def price(groups):
        return sum(len(group) * max(widths[row] for row in group) + cost for group in groups)

    groups = grouped(widths, cost)
    assert sorted(row for group in groups for row in group) == list(range(len(widths)))
    assert price(groups) <= price([range(len(widths))])
    # No worse than passes of equal widths, up to the costs of as many passes.
    assert price(groups) <= sum(widths) + cost * len(set(widths)) + cost * len(widths)


def test_models_that_take_no_mask_of_blocks_are_refused():
    model = build("mistral")
    model.config.sliding_window = 4
    make_bidirectional(model)
    with pytest.raises(NotBidirectionalError, match="sliding"):
        BlockDenoiser(model, block_length=B, shift=True)
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotBidirectionalError, match="flash_attn"):
        BlockDenoiser(model, block_length=B, shift=True)
