"""The loss of mixed noise against the rates of its jump process, in high precision and on a toy that is enumerated."""

import functools
import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_ddm.diffusion import losses as objectives
from llamafactory_ddm.diffusion.losses import masked_cross_entropy, mixed_kl
from llamafactory_ddm.diffusion.noise import draw_time, mix_tokens

IDS, MASK, WIDTH = 7, 5, 9  # two logits more than there are tokens
RATIOS = (0.0, 0.05, 0.1, 0.5, 0.9, 1.0)
ALPHAS = (1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999)


def by_rates(logits, x, z, alpha, ratio):
    """(1 - a) / a times the divergence between the two backward jump processes, summed over where z may jump to."""
    a, k = mpmath.mpf(alpha), mpmath.mpf(ratio)
    weights = [mpmath.mpf(0) if j == MASK else mpmath.exp(mpmath.mpf(v)) for j, v in enumerate(logits[:IDS])]
    p = [w / sum(weights) for w in weights]
    pi = [k / IDS + (1 - k if j == MASK else 0) for j in range(IDS)]
    if pi[z] == 0:
        return mpmath.mpf(0)  # nothing jumps to z
    q_x = [a * (j == x) + (1 - a) * pi[j] for j in range(IDS)]
    q_p = [a * p[j] + (1 - a) * pi[j] for j in range(IDS)]
    total = mpmath.mpf(0)
    for j in range(IDS):
        if j != z:
            true, model = q_x[j] / q_x[z], q_p[j] / q_p[z]
            total += model - true + (true * mpmath.log(true / model) if true > 0 else 0)
    return (1 - a) / a * pi[z] * total


def cases(scales):
    """Yield ratio, alpha, logits, x and z: z is x, [MASK] or another token, as the ratio allows."""
    generator = torch.Generator().manual_seed(0)
    for ratio, alpha, scale in itertools.product(RATIOS, ALPHAS, scales):
        logits = torch.randn(WIDTH, generator=generator) * scale
        for x in (0, 3):
            for z in (x, MASK, 6):
                if not (ratio == 0 and z == 6):
                    yield ratio, alpha, logits, x, z


def ours(logits, x, z, alpha, ratio):
    alphas = torch.tensor([alpha], dtype=torch.float64)
    return mixed_kl(
        logits[None], torch.tensor([x]), torch.tensor([z]), alphas, uniform_ratio=ratio, n_ids=IDS, mask_id=MASK
    )[0]


@pytest.fixture(autouse=True)
def precise():
    with mpmath.workdps(60):
        yield


def test_it_equals_the_divergence_of_the_rates_in_high_precision():
    """Logits spread over hundreds of nats make probabilities that float32 and float64 cannot hold."""
    for ratio, alpha, logits, x, z in cases(scales=(1, 5, 30, 300)):
        expected = float(by_rates(logits.double().tolist(), x, z, alpha, ratio))
        assert float(ours(logits, x, z, alpha, ratio)) == pytest.approx(expected, rel=2e-6, abs=1e-12), (
            ratio, alpha, x, z, logits
        )  # fmt: skip


def gradient_by_rates(logits, x, z, alpha, ratio):
    """Central differences of a step of 1e-20, in 60 digits."""
    step = mpmath.mpf(10) ** -20
    values = [mpmath.mpf(v) for v in logits.double().tolist()]
    found = []
    for moved in range(WIDTH):
        up, down = ([v + sign * step * (i == moved) for i, v in enumerate(values)] for sign in (1, -1))
        difference = by_rates(up, x, z, alpha, ratio) - by_rates(down, x, z, alpha, ratio)
        found.append(float(difference / (2 * step)))
    return torch.tensor(found)


@pytest.mark.parametrize("sure_of", ["nothing", "z", "x"])
def test_its_gradient_equals_that_of_the_divergence_in_high_precision(sure_of):
    """Also where the model is sure, be it right or wrong, and large numbers cancel."""
    for ratio, alpha, logits, x, z in cases(scales=(1, 5)):
        if alpha in (1e-5, 0.1, 0.999):
            continue  # half of the cases are enough
        logits[{"z": z, "x": x, "nothing": 7}[sure_of]] += 15
        leaf = logits.clone().requires_grad_()
        ours(leaf, x, z, alpha, ratio).backward()
        expected = gradient_by_rates(logits, x, z, alpha, ratio)
        error = float((leaf.grad - expected).abs().max())
        assert error <= 1e-4 * float(expected.abs().max()) + 1e-7, (error, ratio, alpha, x, z, logits)


@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_without_random_tokens_it_is_the_cross_entropy_at_the_mask_and_nothing_elsewhere(scale):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, WIDTH, generator=generator) * scale
    logits[:, [MASK, 7, 8]] = -torch.inf  # what the model gives to [MASK] does not count here
    x_0 = torch.tensor([0, 1, 2, 3, 6] * 10)
    alpha = torch.rand(50, generator=generator).double()
    settings = {"uniform_ratio": 0.0, "n_ids": IDS, "mask_id": MASK}
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kl, nll = mixed_kl(one, x_0, torch.full((50,), MASK), alpha, **settings), masked_cross_entropy(two, x_0)
    exact = torch.nn.functional.cross_entropy(logits.double(), x_0, reduction="none")
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(kl, nll, rtol=1e-6, atol=1e-6)  # the latter is a difference of float32 numbers
    weight = torch.rand(50, generator=generator)
    (kl * weight).sum().backward()
    (nll * weight).sum().backward()
    three = logits.double().requires_grad_()
    (torch.nn.functional.cross_entropy(three, x_0, reduction="none") * weight).sum().backward()
    torch.testing.assert_close(one.grad.double(), three.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)
    assert bool((mixed_kl(logits, x_0, x_0, alpha, **settings) == 0).all())


@given(
    seed=st.integers(0, 2**32),
    ratio=st.sampled_from((0.0, 1e-6, 0.05, 0.1, 0.5, 0.9, 1.0)),
    alpha=st.sampled_from((0.0, 1e-7, 1e-5, 1e-3, 0.5, 0.999, 1 - 1e-6)),
    scale=st.sampled_from((0.0, 1.0, 10.0, 1e3, 1e6)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
@settings(max_examples=200, deadline=None)
def test_it_is_never_negative_and_always_finite_as_is_its_gradient(seed, ratio, alpha, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(12, WIDTH, generator=generator) * scale).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    x_0 = torch.randint(0, MASK, (12,), generator=generator)
    z_t = torch.where(torch.arange(12) % 3 == 0, x_0, torch.randint(0, IDS, (12,), generator=generator))
    alphas = torch.full((12,), alpha, dtype=torch.float64)
    kl = mixed_kl(logits, x_0, z_t, alphas, uniform_ratio=ratio, n_ids=IDS, mask_id=MASK)
    assert bool((kl >= 0).all())
    assert bool(kl.isfinite().all())
    kl.sum().backward()
    assert logits.grad.dtype == dtype
    if dtype != torch.float16:  # what is beyond its range becomes inf there, as any gradient of that type
        assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[:, [MASK, 7, 8]] == 0).all())


def test_half_precision_logits_are_worked_on_in_float32():
    generator = torch.Generator().manual_seed(3)
    logits, x_0 = (torch.randn(40, WIDTH, generator=generator) * 8).bfloat16(), torch.arange(40) % MASK
    z_t, alpha = torch.arange(40) % IDS, torch.rand(40, generator=generator).double()
    settings = {"uniform_ratio": 0.1, "n_ids": IDS, "mask_id": MASK}
    torch.testing.assert_close(
        mixed_kl(logits, x_0, z_t, alpha, **settings), mixed_kl(logits.float(), x_0, z_t, alpha, **settings)
    )


class Largest(TorchDispatchMode):
    """Records the largest float32 tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_rows_are_taken_a_few_at_a_time_and_the_result_is_the_same(monkeypatch, rows_at_once):
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(60, WIDTH, generator=generator) * 3).bfloat16()
    kept = logits.clone()
    x_0, z_t = torch.arange(60) % MASK, torch.arange(60) % IDS
    alpha, weight = torch.rand(60, generator=generator).double(), torch.rand(60, generator=generator)

    def run():
        leaf = logits.clone().requires_grad_()
        kl = mixed_kl(leaf, x_0, z_t, alpha, uniform_ratio=0.1, n_ids=IDS, mask_id=MASK)
        (kl * weight).sum().backward()
        return kl.detach(), leaf.grad

    expected = run()
    monkeypatch.setattr(objectives, "_ELEMENTS_AT_ONCE", {"cpu": rows_at_once * WIDTH})
    with Largest() as largest:
        found = run()
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(logits, kept)
    if rows_at_once < 60:  # but for the nine numbers of a row, nothing is larger than a part
        assert largest.elements <= max(rows_at_once * WIDTH, 9 * 60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_0": torch.zeros(2, dtype=torch.int64)}, "logits must be"),
        ({"uniform_ratio": 1.5}, "uniform_ratio"),
        ({"n_ids": 10}, r"n_ids .*1\.\.9.*10"),
    ],
)
def test_what_does_not_fit_is_an_error(change, words):
    given = {
        "x_0": torch.zeros(3, dtype=torch.int64),
        "z_t": torch.zeros(3, dtype=torch.int64),
        "alpha": torch.full((3,), 0.5),
        "uniform_ratio": 0.1,
        "n_ids": IDS,
        "mask_id": MASK,
    }
    with pytest.raises(ValueError, match=words):
        mixed_kl(torch.zeros(3, WIDTH), **{**given, **change})


# ---- a language of two tokens, each one of three, and every state of the process ----

TOKENS, LENGTH, TOY_MASK = 3, 2, 3
STATES = list(itertools.product(range(TOKENS + 1), repeat=LENGTH))
TEXTS = list(itertools.product(range(TOKENS), repeat=LENGTH))


def kernel(ratio):
    pi = torch.full((TOKENS + 1,), ratio / (TOKENS + 1), dtype=torch.float64)
    pi[TOY_MASK] += 1 - ratio
    return pi


def chance(z, x, alpha, pi):
    """q(z | x) of a whole sequence."""
    return math.prod(alpha * (i == j) + (1 - alpha) * float(pi[i]) for i, j in zip(z, x, strict=True))


def table(seed):
    """Logits for each state, [length, tokens + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return {z: torch.randn(LENGTH, TOKENS + 1, generator=generator, dtype=torch.float64) for z in STATES}


def costs(model, x, alpha, ratio):
    """The summed loss of each noised sequence, [states], without the weight."""
    n = len(STATES)
    kl = mixed_kl(
        torch.cat([model(z, alpha) for z in STATES]),
        torch.tensor(x).repeat(n),
        torch.tensor(STATES).flatten(),
        torch.full((n * LENGTH,), alpha, dtype=torch.float64),
        uniform_ratio=ratio,
        n_ids=TOKENS + 1,
        mask_id=TOY_MASK,
    )
    return kl.double().view(n, LENGTH).sum(dim=1)


def bound(model, x, ratio, nodes=48):
    """The bound of a text, its expectation taken over every noised sequence, integrated over logit(alpha)."""
    points, weights = (torch.from_numpy(v) for v in __import__("numpy").polynomial.legendre.leggauss(nodes))
    total, pi = 0.0, kernel(ratio)
    for y, weight in zip((16 * points).tolist(), (16 * weights).tolist(), strict=True):
        alpha = 1 / (1 + math.exp(-y))
        chances = torch.tensor([chance(z, x, alpha, pi) for z in STATES], dtype=torch.float64)
        expected = float(chances @ costs(model, x, alpha, ratio))
        total += weight * alpha * expected  # d alpha = alpha (1 - alpha) dy, and the weight is 1 / (1 - alpha)
    return total


# Every jump: the state it leaves, the one it reaches, the position, and the tokens before and after.
JUMPS = [
    (STATES.index(z), STATES.index((*z[:i], j, *z[i + 1 :])), i, z[i], j)
    for z in STATES
    for i, j in itertools.product(range(LENGTH), range(TOKENS + 1))
    if j != z[i]
]


def generated(logits, ratio, steps=1200):
    """The exact distribution of the jump process that a table of logits defines, from pure noise to text."""
    pi = kernel(ratio)
    mass = torch.tensor([math.prod(float(pi[i]) for i in z) for z in STATES], dtype=torch.float64)
    p = torch.stack([logits[z] for z in STATES])
    p[..., TOY_MASK] = -torch.inf
    p = p.softmax(-1)
    here, there, position, before, after = torch.tensor(JUMPS).T
    size = 32 / steps
    for step in range(steps):
        alpha = 1 / (1 + math.exp(16 - (step + 0.5) * size))
        q = alpha * p + (1 - alpha) * pi
        rates = torch.zeros(len(STATES), len(STATES), dtype=torch.float64)
        rates[here, there] = (1 - alpha) * pi[before] * q[here, position, after] / q[here, position, before]
        rates -= rates.sum(dim=1).diag()
        mass = mass @ torch.matrix_exp(rates * size)
    return {z: float(mass[STATES.index(z)]) for z in TEXTS}


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_it_bounds_the_exact_likelihood_of_the_process_that_the_model_defines(ratio):
    logits = table(0)
    found = generated(logits, ratio)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-4)
    for x in ((0, 0), (2, 1)):
        limit = -math.log(found[x])
        assert limit <= bound(lambda z, alpha: logits[z], x, ratio) <= limit + 5.0


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
def test_a_model_that_knows_the_language_reaches_its_entropy(ratio):
    """With the exact conditionals, the bound of the reverse process has no gap."""
    generator = torch.Generator().manual_seed(5)
    language = torch.rand(TOKENS, TOKENS, generator=generator, dtype=torch.float64) ** 2
    language /= language.sum()
    pi = kernel(ratio)

    @functools.cache
    def knowing(z, alpha):
        rows = []
        for position in range(LENGTH):
            other = z[1 - position]
            seen = torch.tensor([alpha * (other == w) + (1 - alpha) * float(pi[other]) for w in range(TOKENS)])
            joint = language if position == 0 else language.T
            rows.append(torch.cat([(joint * seen).sum(dim=1).log(), torch.tensor([-math.inf])]))
        return torch.stack(rows)

    expected = sum(float(language[x]) * bound(knowing, x, ratio) for x in TEXTS)
    assert expected == pytest.approx(float(-(language * language.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_the_monte_carlo_loss_converges_to_the_bound(ratio):
    logits, x, n = table(1), (2, 0), 30000
    t = draw_time(1, torch.arange(n), time_epsilon=1e-3, antithetic=True, group_size=64)
    x_0 = torch.tensor(x).expand(n, LENGTH)
    z_t = mix_tokens(
        x_0,
        torch.ones_like(x_0, dtype=torch.bool),
        t,
        uniform_ratio=ratio,
        n_ids=TOKENS + 1,
        mask_id=TOY_MASK,
        seed=1,
        sample_index=torch.arange(n),
    )
    rows = torch.cat([logits[tuple(z)] for z in z_t.tolist()])
    alpha = (1 - t.double())[:, None].expand(n, LENGTH).flatten()
    kl = mixed_kl(rows, x_0.flatten(), z_t.flatten(), alpha, uniform_ratio=ratio, n_ids=TOKENS + 1, mask_id=TOY_MASK)
    per_row = kl.view(n, LENGTH).sum(dim=1) / t
    exact = bound(lambda z, alpha: logits[z], x, ratio)
    assert abs(float(per_row.mean()) - exact) < 4.5 * float(per_row.std()) / n**0.5 + 2e-3 * exact
