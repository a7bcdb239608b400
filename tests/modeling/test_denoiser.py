import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.row_selecting_head import RowSelectingHead
from llamafactory_ddm.objectives.shift import head_index, predictable
from support.tiny import LENGTH, VOCABULARY, Rows, tiny_model


def copies(parts):
    """Each chunk is valid only until the next is requested."""
    return [part.clone() for part in parts]


def test_with_shift_position_zero_is_not_predictable():
    maskable = torch.ones(2, 3, dtype=torch.bool)
    assert predictable(maskable, True).tolist() == [[False, True, True]] * 2
    assert predictable(maskable, False) is maskable
    with pytest.raises(ValueError, match="never predicted"):
        head_index(maskable, True)


@pytest.mark.parametrize("shift", [True, False])
def test_the_denoiser_gives_the_dense_logits_of_the_chosen_tokens(shift):
    model, z = tiny_model().eval(), Rows(3).ids
    select = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.4
    select[:, 0] = not shift
    dense = model(input_ids=z, use_cache=False).logits
    if shift:
        dense = torch.cat([dense[:, :1] * 0, dense[:, :-1]], dim=1)
    position = select.flatten().nonzero()[:, 0]
    for rows_at_once in (1, 5, 1000):
        denoiser = ModelDenoiser(model, shift=shift, rows_at_once=rows_at_once)
        parts = copies(denoiser(z, position))
        parts = copies(denoiser(z, position))  # the memory of the first call is used again
        assert all(len(part) <= rows_at_once for part in parts)
        torch.testing.assert_close(torch.cat(parts), dense[select])
        denoiser.close()
    assert model(input_ids=z, use_cache=False).logits.shape == (3, LENGTH, model.config.vocab_size)


def test_two_calls_at_a_time_do_not_share_their_memory():
    """As guidance reads them: parts of two calls alternate."""
    model, one, two = tiny_model().eval(), Rows(2).ids, Rows(2, seed=1).ids
    position = torch.arange(1, 2 * LENGTH)
    denoiser = ModelDenoiser(model, shift=False, rows_at_once=6)
    pairs = [(a.clone(), b.clone()) for a, b in zip(denoiser(one, position), denoiser(two, position), strict=True)]
    for column, z in enumerate((one, two)):
        dense = model(input_ids=z, use_cache=False).logits.flatten(0, 1)[1:]
        torch.testing.assert_close(torch.cat([pair[column] for pair in pairs]), dense)


def test_a_model_that_changes_its_logits_projects_them_itself():
    """Later chunks are projected outside the model's forward, so the first one has to be compared with it."""
    model, z = tiny_model().eval(), Rows(2).ids
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 0.5))
    dense = model(input_ids=z, use_cache=False).logits
    position = torch.arange(2 * LENGTH)
    parts = list(ModelDenoiser(model, shift=False, rows_at_once=4)(z, position))
    torch.testing.assert_close(torch.cat(parts), dense.flatten(0, 1))


def test_soft_capped_logits_in_parts():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        sliding_window=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.data *= 50
    make_bidirectional(model)
    z = Rows(2).ids
    position = torch.arange(2 * LENGTH)
    whole = list(ModelDenoiser(model, shift=False)(z, position))
    parts = copies(ModelDenoiser(model, shift=False, rows_at_once=7)(z, position))
    assert len(whole) == 1 and len(parts) == 5 and whole[0].abs().max() <= 0.5
    torch.testing.assert_close(torch.cat(parts), whole[0])


@pytest.mark.parametrize("shift", [True, False])
def test_padding_before_a_text_changes_nothing(shift):
    model, text = tiny_model().eval(), Rows(1).ids[:, :9]
    alone = torch.cat(list(ModelDenoiser(model, shift=shift)(text, torch.arange(1, 9))))
    padded = torch.cat([torch.full((1, 5), 3), text], dim=1)
    is_padding = torch.arange(14)[None] < 5
    other = torch.cat([Rows(1, seed=1).ids[:, :14], padded])
    both = torch.cat([torch.zeros_like(is_padding), is_padding])
    denoiser = ModelDenoiser(model, shift=shift, is_padding=both)
    torch.testing.assert_close(torch.cat(list(denoiser(other, 14 + 5 + torch.arange(1, 9)))), alone)


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
