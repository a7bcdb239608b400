"""The heads that predict lengths: what they learn, and the file that keeps them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamafactory_ddm.modeling.length_heads import (
    FILE_NAME,
    Examples,
    LengthHeads,
    LengthPredictors,
    fit_heads,
    mean_hidden,
)

WIDTH = 32


def examples(seed=0, rows=3000):
    """Lengths of 1 to 30 that can be read off the mean state, and positions whose state says if the text has ended."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(rows, WIDTH, generator=generator)
    length = (mean[:, 0] * 29).round().long() + 1
    mean = mean * 3.0 - 20.0  # whatever the scale
    hidden = torch.randn(rows * 4, WIDTH, generator=generator)
    return Examples(mean, length, hidden, hidden[:, 1] > 0.3)


def test_heads_learn_what_can_be_learnt():
    heads = fit_heads(examples(), epochs=20, learning_rate=1e-2, seed=0)
    new = examples(seed=1)
    error = (heads.expected_length(new.mean) - new.length).abs().mean()
    right = ((heads.p_ended(new.hidden) > 0.5) == new.ended).float().mean()
    assert error < 1.5 and right > 0.97
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_fitting_depends_on_its_seed_and_leaves_random_states_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (fit_heads(examples(), epochs=2, learning_rate=1e-2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    weights = [heads.regressor[0].weight for heads in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="dataset holds 0 texts"):
        fit_heads(Examples(*(value[:0] for value in vars(examples()).values())), epochs=1, learning_rate=1.0, seed=0)


def test_a_length_is_never_below_zero_or_beyond_all_bounds():
    heads = LengthHeads(WIDTH)
    for bias, expected in ((-5.0, 0.0), (1e9, pytest.approx(4.85e8, rel=1e-2))):
        torch.nn.init.constant_(heads.regressor[2].bias, bias)
        torch.nn.init.zeros_(heads.regressor[2].weight)
        assert heads.expected_length(torch.ones(1, WIDTH)).item() == expected


def test_the_mean_is_that_of_each_row():
    editable = torch.tensor([[False, True, True], [True, False, False]])
    hidden = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]], dtype=torch.bfloat16)
    assert mean_hidden(hidden, editable).tolist() == [[2.0, 4.0], [5.0, 5.0]]


def test_the_file_gives_back_what_was_saved(tmp_path):
    predictors = LengthPredictors(LengthHeads(WIDTH), {"eos_cdf": torch.tensor([0.5, 0.25], dtype=torch.float64)}, 64)
    assert LengthPredictors.find(tmp_path) is None
    path = predictors.save(tmp_path)
    again = LengthPredictors.find(tmp_path)
    assert path.name == FILE_NAME and [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    assert again.min_thresholds["eos_cdf"].tolist() == [0.25, 0.5] and again.canvas == 64
    for name, value in predictors.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[name], value)


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """The file calls eos_cdf belief."""
    path = LengthPredictors(LengthHeads(WIDTH), {}, 64).save(tmp_path)
    tensors = load_file(path) | {"least_margins.belief": torch.tensor([0.25, 0.5], dtype=torch.float64)}
    save_file(tensors, path, {"format_version": "1", "width": str(WIDTH), "canvas": "64"})
    assert LengthPredictors.find(tmp_path).min_thresholds["eos_cdf"].tolist() == [0.25, 0.5]


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def newer(path):
    save_file(load_file(path), path, {"format_version": "9", "width": str(WIDTH)})


def other_width(path):
    save_file(load_file(path), path, {"format_version": "1", "width": str(2 * WIDTH), "canvas": "64"})


def foreign(path):
    save_file({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, ""),
        (newer, "upgrade llamafactory-ddm"),
        (other_width, "size mismatch"),
        (foreign, "format_version"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, spoil, words):
    spoil(LengthPredictors(LengthHeads(WIDTH), {}, 64).save(tmp_path))
    with pytest.raises(ValueError, match=rf"{FILE_NAME} cannot be read \(.*{words}.*fit-length"):
        LengthPredictors.find(tmp_path)
