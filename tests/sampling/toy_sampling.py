"""A toy denoiser, a strategy with a fixed order, and a short way to call the sampler."""

import torch

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, get_strategy, sample

V, MASK = 12, 11


NAMES = sorted(STRATEGIES)


def toy(z, select):
    """Logits that depend on the whole row, and like [MASK] best, which must never be drawn."""
    value = (z * (torch.arange(z.shape[1]) + 3)).sum(dim=1, keepdim=True) % 7
    table = torch.sin(
        value[..., None] + torch.arange(z.shape[1])[None, :, None] + torch.arange(V)[None, None, :] * 1.7
    )
    table[..., MASK] = 50.0
    return table[select]


def relative(z, select):
    """Logits that depend on the real tokens of a row and on the position among them, not on the padding (id 0)."""
    real = z != 0
    position = real.cumsum(dim=1)
    value = (z * position * real).sum(dim=1, keepdim=True) % 13
    table = torch.sin(value[..., None] + position[..., None] * 2.3 + torch.arange(V) * 1.7)
    return table[select]


def by_selection(denoiser):
    """Make of a function of a boolean selection what the sampler calls, which gets flat positions."""

    def call(z, position):
        select = torch.zeros(z.numel(), dtype=torch.bool).index_fill(0, position, True).view_as(z)
        return denoiser(z, select)

    return call


def run(x, editable, *, denoiser=toy, steps=5, name="random", config=None, seed=0, sample_index=None, **rest):
    own = {key: rest.pop(key) for key in ("confidence_threshold", "entropy_bound", "remask_cap") if key in rest}
    rest.setdefault("strategy", get_strategy(name, **own))
    rest.setdefault("mask_id", MASK)
    rest.setdefault("schedule", get_schedule("linear"))
    return sample(
        by_selection(denoiser),
        x,
        editable=editable,
        steps=steps,
        logits=config or LogitsConfig(),
        seed=seed,
        sample_index=torch.arange(len(x)) if sample_index is None else sample_index,
        **rest,
    )


class LeftToRight:
    """The first masked position of each row."""

    name = "left_to_right"
    measures = frozenset()

    def candidates(self, view):
        return view.is_masked & (view.is_masked.cumsum(dim=1) == 1)

    def commit(self, view, candidate, score):
        return candidate


def ragged(seed, share):
    """Return four rows, padded at the left, with a share of positions to fill, and where in them each row is."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (4,), generator=generator).tolist()
    longest = max(lengths)
    x = torch.zeros(4, longest, dtype=torch.int64)
    editable = torch.zeros_like(x, dtype=torch.bool)
    for row, length in enumerate(lengths):
        x[row, longest - length :] = torch.randint(1, MASK, (length,), generator=generator)
        editable[row, longest - length :] = torch.rand(length, generator=generator) < share
    return x, editable, [slice(longest - length, None) for length in lengths]
