"""Which random number is which: a stand-in for Philox whose every number names the counter that it came from."""

import contextlib

import pytest

from llamafactory_ddm.diffusion import rng as philox
from llamafactory_ddm.sampling import loop, state


class Ledger:
    """Notes what each number was drawn for; a number that was drawn for two things is an error."""

    def __init__(self):
        self.counters = {}
        self.uses = {}

    def philox(self, counter, key):
        """Return a new number for each key, counter and word, its 24 bits reversed so that it looks random."""
        counter = philox.torch.broadcast_tensors(*counter)
        flat = zip(*(part.flatten().tolist() for part in counter), strict=True)
        numbers = [self.counters.setdefault((key, *one), len(self.counters)) for one in flat]
        assert 4 * len(self.counters) < 2**24
        words = ([int(f"{4 * number + word:024b}"[::-1], 2) << 8 for number in numbers] for word in range(4))
        return tuple(philox.torch.tensor(word).view(counter[0].shape) for word in words)

    def note(self, number, use):
        """Note what a number is for."""
        assert self.uses.setdefault(number, use) == use, f"{self.uses[number]} and {use} share a number"


@contextlib.contextmanager
def counted():
    """Give a ledger that all keyed draws go through, and that notes what the sampler draws."""
    ledger, views, plans = Ledger(), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "philox4x32", ledger.philox)
        view_step, uniform, token_draws = loop.view_step, state.Plan.uniform, state.Plan.token_draws

        def watched(*arguments):
            views[:] = [view_step(*arguments)]
            return views[0]

        def note(plan, stream, row_step, numbers):
            """Note the numbers of each row and position, of rows that are at work and positions of their block."""
            if not any(plan is other for other in plans):
                plans.append(plan)
            part = next(number for number, other in enumerate(plans) if plan is other)
            view = views[0]
            at_work = view.scope & ((view.steps > 0) & (view.edit_step == 0))[:, None]
            for (row, place), drawn in numbers:
                if at_work[row, place]:
                    sample, step = int(plan.sample_index[row]), (part, int(row_step[row]))
                    for nth, number in enumerate(drawn):
                        ledger.note(number, (plan.seed, sample, step, place, nth, stream))

        def noted(plan, stream, row_step):
            u = uniform(plan, stream, row_step)
            places = ((row, place) for row in range(u.shape[0]) for place in range(u.shape[1]))
            note(plan, stream, row_step, ((at, [float(u[at])]) for at in places))
            return u

        def noted_draws(plan, row_step, flat_index, *, tries):
            u = token_draws(plan, row_step, flat_index, tries=tries)
            first = (u * 2.0**24).floor() * 2.0**-24
            numbers = philox.torch.stack([first, (u - first) * 2.0**24], dim=2).flatten(1).tolist()
            places = (divmod(index, plan.editable_index.shape[1]) for index in flat_index.tolist())
            note(plan, state.Stream.SAMPLE_TOKEN, row_step, zip(places, numbers, strict=True))
            return u

        patch.setattr(loop, "view_step", watched)
        patch.setattr(state.Plan, "uniform", noted)
        patch.setattr(state.Plan, "token_draws", noted_draws)
        yield ledger
