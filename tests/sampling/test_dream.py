"""Dream's sampler as it was published, on plain lists, against ours with its schedule and the scores that it takes."""

import math

import pytest
import torch

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import LogitsConfig, SamplingSettings, get_strategy, prediction, sample
from llamafactory_ddm.sampling.budget import dream_budget, dream_fractions
from support.tiny import MASK_ID, VOCABULARY, tiny_model

PROMPT, LENGTH, SHARP = [5, 7, 11], 14, 60.0
CONFIGS = [
    LogitsConfig(0.0, score_distribution="filtered"),
    LogitsConfig(0.0, top_p=0.8, score_distribution="filtered"),
    LogitsConfig(0.0, top_k=3, score_distribution="filtered"),
    LogitsConfig(0.7, top_p=0.9, score_distribution="filtered"),
    LogitsConfig(1.5, top_k=4, score_distribution="filtered"),
]


def filtered(logits, config):
    """Temperature, nucleus and top-k at one position, one after another, on sorted probabilities."""
    logits = [-math.inf if token == MASK_ID else value for token, value in enumerate(logits)]
    if config.temperature:
        logits = [value / config.temperature for value in logits]
    order = sorted(range(VOCABULARY), key=lambda token: -logits[token])
    weights = [math.exp(value - max(logits)) for value in logits]
    kept, mass = [], 0.0
    for token in order:
        if mass <= config.top_p * sum(weights):
            kept.append(token)
        mass += weights[token]
    kept = kept[: config.top_k]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(VOCABULARY)]


def score(name, p, token):
    first, second = sorted(p, reverse=True)[:2]
    entropy = sum(value * math.log(value) for value in p if value)
    return {"low_confidence": p[token], "margin": first - second, "entropy": entropy}[name]


def published(table_of, drawn, z, steps, name, config):
    """Return the sequences after each step.

    Args:
        table_of: logits at i for token i.
        drawn: [steps] dicts, the token drawn at each position; None takes the most probable one.
        z: the prompt and [MASK] behind it.
        steps: of the loop.
        name: which score.
        config: temperature and filters.
    """
    z, frames = list(z), []
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masked = [position for position, token in enumerate(z) if token == MASK_ID]
        p = [filtered(row, config) for row in table_of(z)]
        count = len(masked)
        if step < steps - 1:
            count = int(torch.tensor(float(len(masked))) * (1 - times[step + 1] / times[step]))
        x_0 = {position: max(range(VOCABULARY), key=p[position].__getitem__) for position in masked}
        if drawn is not None:
            x_0 |= drawn[step]
            assert all(p[position][x_0[position]] > 0 for position in masked)
        best = sorted(masked, key=lambda position: -score(name, p[position], x_0[position]))
        for position in best[:count]:
            z[position] = x_0[position]
        frames.append(list(z))
    return frames


@pytest.mark.parametrize("name", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("shift", "steps"), [(True, 4), (True, 17), (False, 11)])
def test_texts_are_those_of_the_published_loop(monkeypatch, shift, name, config, steps):
    model = tiny_model(seed=3).eval()
    z = torch.tensor([PROMPT + [MASK_ID] * (LENGTH - len(PROMPT))])
    calls, drawn, frames = [], [{} for _ in range(steps)], []

    def denoiser(z, position):
        calls.append(position.tolist())
        return SHARP * torch.cat(list(made(z, position)))

    def noted(*arguments, **options):
        result = draw(*arguments, **options)
        drawn[len(frames)] = dict(zip(calls[-1], result.ids.tolist(), strict=True))
        return result

    def after(step, z, fresh):
        frames.append(z[0].tolist())

    draw = prediction.draw_tokens
    monkeypatch.setattr(prediction, "draw_tokens", noted)
    made = ModelDenoiser(model, shift=shift, is_padding=None, outputs=VOCABULARY)
    options = {"editable": z == MASK_ID, "mask_id": MASK_ID, "steps": steps, "strategy": get_strategy(name)}
    sample(denoiser, z, logits=config, commit_schedule="dream", callback=after, **options)
    made.close()

    @torch.no_grad()
    def table_of(z):
        logits = SHARP * model(input_ids=torch.tensor([z])).logits[0]
        return (torch.cat([logits[:1], logits[:-1]]) if shift else logits).tolist()

    expected = published(table_of, drawn if config.temperature else None, z[0].tolist(), steps, name, config)
    assert frames + [frames[-1]] * (steps - len(frames)) == expected


def test_the_schedule_by_hand():
    """Ten tokens in ten steps: int(10 * 0.0999) is none, and so on, until the last step takes what is left."""
    assert dream_budget(10, 10, get_schedule("linear")) == [0, 1, 1, 1, 1, 1, 1, 1, 1, 2]
    assert dream_budget(9, 2, get_schedule("linear")) == [4, 5]
    assert dream_budget(5, 1, get_schedule("linear")) == [5]
    assert dream_fractions(4, get_schedule("linear")).tolist() == pytest.approx(
        [0.24975, 0.3329, 0.499, 1.0], abs=1e-4
    )
    assert dream_fractions(3, get_schedule("cosine"))[-1] == 1.0
    with pytest.raises(ValueError, match="steps must be at least 1"):
        dream_fractions(0, get_schedule("linear"))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_budgets_sum_to_what_is_masked(name):
    for n in (1, 2, 7, 256):
        for steps in (1, 2, 5, 256, 300):
            budget = dream_budget(n, steps, get_schedule(name))
            assert sum(budget) == n and min(budget) >= 0 and len(budget) == steps


def test_random_order_uses_the_reveal_probabilities():
    z = torch.full((2000, 2), MASK_ID)
    options = {"editable": z == MASK_ID, "mask_id": MASK_ID, "steps": 4, "strategy": get_strategy("random")}
    for schedule, shares in (
        ("dream", dream_fractions(4, get_schedule("linear"))),
        ("even", [1 / 4, 1 / 3, 1 / 2, 1]),
    ):
        output = sample(lambda z, position: torch.zeros(len(position), 40), z, commit_schedule=schedule, **options)
        left = 1.0
        for step, share in enumerate(shares):
            assert abs(float((output.committed == step).float().mean()) - left * share) < 4 * (0.25 / 4000) ** 0.5
            left *= 1 - share


def test_keys_without_effect_are_refused():
    for strategy in ("topk", "confidence_threshold", "entropy_bound", "remdm"):
        with pytest.raises(ValueError, match=f"commit_schedule: dream .*{strategy}"):
            SamplingSettings(denoising_strategy=strategy, commit_schedule="dream")
    with pytest.raises(ValueError, match=r"commit_schedule .*'llada'"):
        SamplingSettings(commit_schedule="llada")
    with pytest.raises(ValueError, match=r"score_distribution .*'own'"):
        LogitsConfig(score_distribution="own")
    for strategy in ("random", "remdm"):
        with pytest.raises(ValueError, match=f"score_distribution: filtered .*{strategy}"):
            SamplingSettings(denoising_strategy=strategy, logits=LogitsConfig(score_distribution="filtered"))
