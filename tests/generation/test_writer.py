"""The size of canvases and how they grow, with a model that knows its text by heart."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

from llamafactory_ddm.data.canvas import canvas_of
from llamafactory_ddm.generation.canvas_size import CanvasSizer
from llamafactory_ddm.generation.writer import Writer
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig, VariableLength
from llamafactory_ddm.modeling.length_heads import LengthHeads, LengthPredictors
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, SamplingSettings
from support.numbers import counted

END, PAD, WORD, MASK, FIRST = 0, 1, 2, 3, 10
WIDTH = 4
CONFIG = DiffusionConfig("<|mask|>", MASK, False, "masked", 0.0, "linear", 1.0)
SETTINGS = SamplingSettings(logits=LogitsConfig(temperature=0.0), diffusion_steps=30, early_stop="grow", grow_length=4)


class ByHeart:
    """Predicts n words, EOS and padding after a prompt of one token, FIRST + n. With `boasts` it predicts EOS at the
    last position of a fully masked canvas."""

    hidden = None

    def __init__(self, n_padding, boasts):
        self.n_padding, self.boasts = n_padding, boasts

    def __call__(self, z, position):
        self.hidden = torch.ones(len(position), WIDTH)
        logits = torch.zeros(len(position), 64)
        for index, (row, column) in enumerate(divmod(number, z.shape[1]) for number in position.tolist()):
            first = self.n_padding[row]
            words = int(z[row, first]) - FIRST
            nth = column - first - 1
            token = WORD if nth < words else END if nth == words else PAD
            if self.boasts and column == z.shape[1] - 1 and not bool((z[row] == WORD).any()):
                token = END
            logits[index, token] = 20.0
        return logits

    def close(self):
        pass


def writer(monkeypatch, block=None, boasts=False, lengths=None, config=None):
    ends = VariableLength("eos_pad", ("<|pad|>",), (PAD,), 32, block)
    sizer = CanvasSizer(
        SimpleNamespace(device="cpu"),
        config or dataclasses.replace(CONFIG, variable_length=ends),
        eos_ids=[END, PAD],
        n_ids=64,
        lengths=lengths,
    )

    def denoiser(model, *, shift, is_padding, outputs, keep_hidden, runner):
        length = [0] * 99 if is_padding is None else is_padding.sum(dim=1).tolist()
        return ByHeart(length, boasts)

    monkeypatch.setattr("llamafactory_ddm.generation.canvas_size.ModelDenoiser", denoiser)
    return Writer(sizer)


def canvas(words, positions=30):
    return canvas_of([[FIRST + words], positions])


def grown(made, words, settings=SETTINGS):
    sized = made.sizer.sized([canvas(n) for n in words], settings)
    return sized, made.write([one.canvas for one in sized], settings, sample_indices=range(len(words)))


def test_a_canvas_starts_short_and_grows_until_eos_is_predicted(monkeypatch):
    """The first of 4, 8, 12 … positions that hold n words and EOS; each prediction costs a forward pass."""
    sized, written = grown(writer(monkeypatch), [2, 3, 4, 11, 40])
    assert [one.canvas.n_editable for one in sized] == [4, 4, 8, 12, 30]
    assert [one.nfe for one in sized] == [1, 1, 2, 3, 7]  # the whole canvas needs no look
    assert [one.computed for one in sized] == [5, 5, 5 + 9, 5 + 9 + 13, sum(range(5, 30, 4))]
    for words, one in zip([2, 3, 4, 11, 30], written, strict=True):
        assert one.ids[1 : 1 + words] == [WORD] * words
        assert one.ids[1 + words :][:1] == ([END] if words < 30 else [])


def test_a_text_without_eos_grows_during_generation(monkeypatch):
    """EOS is predicted too early: the canvas grows because none is generated."""
    made = writer(monkeypatch, boasts=True)
    seen = []
    sized = made.sizer.sized([canvas(2), canvas(9)], SETTINGS)
    assert [one.canvas.n_editable for one in sized] == [4, 4]
    written = made.write(
        [one.canvas for one in sized],
        SETTINGS,
        sample_indices=[0, 1],
        watch=lambda step, canvases, ids: seen.append((step, [len(row) for row in ids])),
    )
    assert written[0].ids == [FIRST + 2, WORD, WORD, END, END] and written[0].canvas.n_editable == 4
    assert written[1].ids == [FIRST + 9, *[WORD] * 9, END, END, END] and written[1].canvas.n_editable == 12
    assert all(written[1].canvas.editable[1:])
    # Four steps for the first four positions, four for the next, then up to the end; steps count on.
    steps = sorted(step for step in written[1].committed if step >= 0)
    assert steps == list(range(len(steps)))
    assert written[1].nfe >= 10
    assert written[1].computed == 4 * 5 + 4 * 9 + (written[1].nfe - 8) * 13
    assert [step for step, _ in seen] == sorted({step for step, _ in seen})
    assert seen[0][1] == [5, 5] and seen[-1][1] == [13]


def test_events_of_a_growing_text_lead_to_its_final_ids(monkeypatch):
    """Events of all parts, with steps numbered through; edits add up."""
    made = writer(monkeypatch, boasts=True)
    noisy = dataclasses.replace(SETTINGS, logits=LogitsConfig(temperature=9.0), edit_threshold=0.5, edit_steps=1)
    for one in made.write([canvas(n).cut(4) for n in (2, 9, 5)], noisy, sample_indices=[3, 4, 5], traced=True):
        now = {position: token for position, token in enumerate(one.ids) if not one.canvas.editable[position]}
        last = {}
        for step, position, token in one.events:
            assert one.canvas.editable[position] and now.get(position) != token
            now[position], last[position] = token, step
        assert list(one.events) == sorted(one.events, key=lambda event: event[:2])
        assert one.edits == len(one.events) - len(last) > 0
        assert [last.get(position, -1) for position in range(len(one.ids))] == one.committed
        assert all(now[position] == one.ids[position] for position in now)
    assert made.write([canvas(2).cut(4)], noisy, sample_indices=[3])[0].events is None


def test_growing_does_not_depend_on_the_batch(monkeypatch):
    made = writer(monkeypatch, boasts=True)
    noisy = dataclasses.replace(SETTINGS, logits=LogitsConfig(temperature=7.0), denoising_strategy="random")
    together = made.write([canvas(n).cut(4) for n in (2, 9, 5)], noisy, sample_indices=[6, 7, 8])
    alone = [made.write([canvas(n).cut(4)], noisy, sample_indices=[o])[0] for n, o in ((2, 6), (9, 7), (5, 8))]
    assert together == alone
    assert any(len(one.ids) > 9 for one in alone)


def test_added_positions_draw_other_random_numbers(monkeypatch):
    """Otherwise a text would repeat itself whenever it grows."""
    made = writer(monkeypatch)
    noisy = dataclasses.replace(SETTINGS, logits=LogitsConfig(40.0, suppress=(END, PAD)), denoising_strategy="random")
    ids = made.write([canvas(30).cut(4)], noisy, sample_indices=[0])[0].ids[1:]
    assert len(ids) == 30
    assert ids[:4] != ids[4:8] and ids[4:8] != ids[8:12]


@property_settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    name=st.sampled_from(sorted(STRATEGIES)),
    way=st.sampled_from(["none", "eos", "predict", "grow"]),
    steps=st.integers(8, 30),
    block=st.sampled_from([None, 4, 7]),
    length=st.integers(2, 9),
    logits=st.sampled_from([LogitsConfig(20.0), LogitsConfig(20.0, top_p=0.9), LogitsConfig(20.0, top_k=5)]),
    edit_steps=st.integers(0, 2),
    seed=st.integers(0, 2**64 - 1),
)
def test_no_two_draws_share_a_number(words, name, way, steps, block, length, logits, edit_steps, seed):
    """For all samples, parts of a growing text, steps, positions and streams, in one run or with other seeds."""
    settings = SamplingSettings(
        denoising_strategy=name,
        logits=logits,
        diffusion_steps=steps,
        block_length=None if way == "grow" else block,
        early_stop=way,
        grow_length=length,
        edit_threshold=0.3 if edit_steps else None,
        edit_steps=edit_steps,
    )
    with pytest.MonkeyPatch.context() as patch, counted() as ledger:
        made = writer(patch, boasts=True)
        for own in (seed, seed ^ 1, (seed + 0x9E3779B97F4A7C15) % 2**64):
            one = dataclasses.replace(settings, seed=own)
            sized = [one.canvas for one in made.sizer.sized([canvas(n) for n in words], one)]
            made.write(sized, one, sample_indices=range(5, 5 + len(sized)))
    assert len(ledger.uses) >= 3 * len(words)


def test_numbers_are_not_shared_where_steps_differ():
    """Row 3 of 4 steps and row 2 of 6, where 3 * 4 is 2 * 6."""
    with pytest.MonkeyPatch.context() as patch, counted():
        made = writer(patch)
        settings = dataclasses.replace(SETTINGS, logits=LogitsConfig(20.0, suppress=(END, PAD)), diffusion_steps=10)
        sizes = [canvas(40, 20).cut(8), canvas(40, 20).cut(12)]
        written = made.write(sizes, settings, sample_indices=[3, 2])
    assert [len(one.ids) for one in written] == [21, 21]


def test_canvas_lengths_are_rounded_up_to_blocks(monkeypatch):
    made = writer(monkeypatch, block=8)
    predict = dataclasses.replace(SETTINGS, early_stop="predict")
    assert [len(one.canvas) for one in made.sizer.sized([canvas(2), canvas(7), canvas(30)], predict)] == [8, 16, 31]
    assert [len(one.canvas) for one in made.sizer.sized([canvas(2), canvas(7), canvas(30)], SETTINGS)] == [8, 16, 31]


def test_growing_takes_its_share_of_the_steps(monkeypatch):
    """Six steps for 30 positions are one for four positions and two for eight, not six for each part."""
    made = writer(monkeypatch)
    for length, steps in ((4, 1), (8, 2)):
        few = dataclasses.replace(SETTINGS, diffusion_steps=6, grow_length=length)
        written = made.write([canvas(11).cut(length)], few, sample_indices=[0])[0]
        assert written.canvas.n_editable == -(-12 // length) * length
        assert written.nfe <= steps * written.canvas.n_editable // length < 6
        assert written.ids[1:13] == [*[WORD] * 11, END]


def predicting(name, coverage=0.95, **keys):
    logits = LogitsConfig(temperature=0.0, **keys)
    return dataclasses.replace(
        SETTINGS, early_stop="predict", length_predictor=name, length_coverage=coverage, logits=logits
    )


def predictors():
    """Untrained heads that predict the same for all texts."""
    heads = LengthHeads(WIDTH)
    torch.nn.init.zeros_(heads.regressor[2].weight)
    torch.nn.init.constant_(heads.regressor[2].bias, 2.0)  # exp(2) - 1 is 6.4 positions
    thresholds = {
        "regressor": torch.linspace(0.0, 0.4, 9, dtype=torch.float64),
        "eos_cdf": torch.full((9,), 0.1, dtype=torch.float64),
        "expected": torch.full((9,), 0.5, dtype=torch.float64),
    }
    return LengthPredictors(heads, thresholds, canvas=31)


@pytest.mark.parametrize(
    ("name", "coverage", "positions"),
    [
        ("regressor", 0.1, 7),  # threshold 0
        ("regressor", 0.9, 11),  # threshold 0.4: e^2.4 - 1 is 10.02
        ("regressor", 0.95, 30),  # more than nine texts can say
        ("eos_cdf", 0.9, 4),  # not below the coverage
        ("expected", 0.5, 8),  # 4 positions: (1 + 4) e^0.5 - 1 is 7.2
    ],
)
def test_each_predictor_sets_the_canvas_length(monkeypatch, name, coverage, positions):
    made = writer(monkeypatch, lengths=predictors())
    found = made.sizer.sized([canvas(3)], predicting(name, coverage))[0]
    assert (found.canvas.n_editable, found.nfe, found.computed) == (positions, 1, 31)


def test_calibration_holds_only_for_the_fitted_canvas_and_settings(monkeypatch):
    """On another canvas, or with other probabilities, eos_cdf uses the coverage, and other predictors raise."""
    made, settings = writer(monkeypatch, lengths=predictors()), predicting("eos_cdf", 0.05)
    assert made.sizer.threshold(settings, canvas(3)) == 0.1 == made.sizer.threshold(settings, canvas(3).cut(5))
    assert (
        made.sizer.threshold(settings, canvas(3, 20))
        == made.sizer.threshold(predicting("eos_cdf", 0.05, eos_penalty=1.0), canvas(3))
        == 0.05
    )
    batch = [canvas(3), canvas(3, 20)]
    assert len(made.sizer.sized(batch, settings)) == 2
    for name, other, reason in (
        ("regressor", canvas(3, 20), "cutoff_len: 31.* 21 tokens"),
        ("token_classifier", canvas(3), "no calibration"),
    ):
        with pytest.raises(ValueError, match=f"length_predictor: {name} .*{reason}"):
            made.sizer.sized([other], predicting(name))
    with pytest.raises(ValueError, match=r"length_predictor: expected .*eos_penalty"):
        made.sizer.sized([canvas(3)], predicting("expected", eos_penalty=1.0))
    with pytest.raises(ValueError, match=r"length_predictor: expected .*suppress_tokens"):
        made.sizer.sized([canvas(3)], predicting("expected", suppress=(PAD,)))


def test_an_eos_penalty_lengthens_the_canvas(monkeypatch):
    """A less probable EOS means a longer canvas, with predict and with grow."""
    made = writer(monkeypatch)
    for way in ("predict", "grow"):
        plain, late = (dataclasses.replace(predicting("eos_cdf", eos_penalty=p), early_stop=way) for p in (0.0, 40.0))
        assert made.sizer.sized([canvas(3)], plain)[0].canvas.n_editable == 4
        assert made.sizer.sized([canvas(3)], late)[0].canvas.n_editable == 30


@pytest.mark.parametrize("way", ["predict", "grow"])
def test_canvases_whose_length_cannot_be_predicted(monkeypatch, way):
    settings = dataclasses.replace(SETTINGS, early_stop=way)
    gap = canvas_of([[FIRST + 2], 4, [WORD]])
    with pytest.raises(ValueError, match=rf"early_stop: {way} .*infilling"):
        writer(monkeypatch).sizer.sized([gap], settings)
    with pytest.raises(ValueError, match=rf"early_stop: {way} .*variable_length"):
        writer(monkeypatch, config=CONFIG).sizer.sized([canvas(3)], settings)
    padding = dataclasses.replace(CONFIG, train_on_padding=True)
    assert writer(monkeypatch, config=padding).sizer.sized([canvas(3)], settings)[0].canvas.n_editable == 4


def test_heads_of_another_width_are_refused(monkeypatch):
    made = writer(monkeypatch, lengths=LengthPredictors(LengthHeads(WIDTH + 2), {}, 31))
    with pytest.raises(ValueError, match=r"width 6.* 4.*fit-length"):
        made.sizer.sized([canvas(3)], dataclasses.replace(SETTINGS, early_stop="predict"))
