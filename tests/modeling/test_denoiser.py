import pytest
import torch
from torch import nn

from llamafactory_ddm.modeling.denoiser import ModelDenoiser, RowSelectingHead, head_rows, predictable
from support.tiny import LENGTH, Rows, tiny_model


def test_with_shift_position_zero_is_not_predictable():
    maskable = torch.ones(2, 3, dtype=torch.bool)
    assert predictable(maskable, True).tolist() == [[False, True, True]] * 2
    assert predictable(maskable, False) is maskable
    with pytest.raises(ValueError, match="never predicted"):
        head_rows(maskable, True)


@pytest.mark.parametrize("shift", [True, False])
def test_the_denoiser_gives_the_dense_logits_of_the_chosen_tokens(shift):
    model, z = tiny_model().eval(), Rows(3).ids
    select = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.4
    select[:, 0] = not shift
    dense = model(input_ids=z, use_cache=False).logits
    if shift:
        dense = torch.cat([dense[:, :1] * 0, dense[:, :-1]], dim=1)
    denoiser = ModelDenoiser(model, shift=shift)
    torch.testing.assert_close(denoiser(z, select), dense[select])
    denoiser.close()
    assert model(input_ids=z, use_cache=False).logits.shape == (3, LENGTH, model.config.vocab_size)


def test_rows_apply_within_the_block_only_even_after_an_error():
    model, z = tiny_model().eval(), Rows(2).ids
    head = RowSelectingHead(model)
    with pytest.raises(KeyError), head.only(torch.tensor([1, 5])):
        assert model(input_ids=z, use_cache=False).logits.reshape(-1, model.config.vocab_size).shape[0] == 2
        raise KeyError
    assert model(input_ids=z, use_cache=False).logits.shape[:2] == z.shape
    head.remove()


def test_a_model_without_an_output_embedding():
    with pytest.raises(ValueError, match="no output embedding"):
        RowSelectingHead(nn.Linear(2, 2))
