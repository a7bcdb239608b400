"""The generator against the published known answers, and the laws of the keyed draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ddm.diffusion.rng import keyed_uniform, philox4x32

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@given(seed=st.integers(0, 2**64 - 1), row=st.integers(0, 2**40), length=st.integers(1, 33))
@settings(max_examples=50, deadline=None)
def test_a_draw_depends_on_its_own_key_alone(seed, row, length):
    alone = keyed_uniform(seed, 2, torch.tensor([row]), length)
    among = keyed_uniform(seed, 2, torch.tensor([row + 5, row, 3]), length + 7)
    assert torch.equal(alone[0], among[1, :length])
    assert bool(((alone >= 0) & (alone < 1)).all())


@pytest.mark.parametrize("length", [1, 2, 16])
def test_numbers_from_a_column_on_are_those_of_the_whole_row(length):
    rows, first = torch.tensor([7, 7, 2, 2, 0]), torch.tensor([0, 5, 2, 19, 48])
    whole = keyed_uniform(3, 2, rows, 64, steps=rows)
    found = keyed_uniform(3, 2, rows, length, steps=rows, first=first)
    assert torch.equal(found, whole.gather(1, first[:, None] + torch.arange(length)))


def test_seeds_streams_rows_and_columns_differ():
    rows = torch.arange(64)
    base = keyed_uniform(1, 2, rows, 64)
    assert base.unique().numel() > 4000
    for other in (keyed_uniform(2, 2, rows, 64), keyed_uniform(1, 3, rows, 64), keyed_uniform(1, 2, rows + 64, 64)):
        assert float((base == other).float().mean()) < 0.01


def test_uniform_moments_and_independence():
    u = keyed_uniform(7, 1, torch.arange(1000), 1000).double()
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 1e6) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 1e-3
    histogram = torch.histc(u, bins=100, min=0, max=1)
    assert float(((histogram - 1e4) ** 2 / 1e4).sum()) < 160  # chi-square, 99 degrees of freedom, p = 1e-4
    assert abs(float(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1])) < 4e-3
    assert abs(float(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1])) < 4e-3


@pytest.mark.parametrize(
    ("seed", "stream", "length"), [(-1, 1, 1), (2**64, 1, 1), (0, -1, 1), (0, 2**32, 1), (0, 1, 0)]
)
def test_out_of_range_keys_are_refused(seed, stream, length):
    with pytest.raises(ValueError, match="must"):
        keyed_uniform(seed, stream, torch.arange(2), length)
