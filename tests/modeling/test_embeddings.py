"""Rows for tokens that a model does not know: the mean of those that it knows, tied and untied."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.modeling.embeddings import (
    has_tied_embeddings,
    init_new_embeddings,
    num_embeddings,
    resize_embeddings,
)

KNOWN = 20


def model_of(rows, tied=True):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=tied)
    )


def tables(model):
    return [e.weight.detach().clone() for e in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [[KNOWN], [KNOWN, KNOWN + 1, KNOWN + 2], [KNOWN + 2]])
def test_new_embeddings_are_the_mean(tied, ids):
    model = model_of(KNOWN, tied)
    before = tables(model)
    init_new_embeddings(model, ids, known=KNOWN)
    assert num_embeddings(model) == model.config.vocab_size == max(ids) + 1
    for old, new in zip(before, tables(model), strict=True):
        torch.testing.assert_close(new[:KNOWN], old, rtol=0, atol=0)
        torch.testing.assert_close(new[KNOWN:], old.mean(dim=0).expand(max(ids) + 1 - KNOWN, -1))
    assert has_tied_embeddings(model) == tied


def test_a_padded_vocabulary_is_not_resized_and_padding_is_not_in_the_mean():
    model = model_of(KNOWN + 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[KNOWN:] = 100.0
    mean = model.get_input_embeddings().weight[:KNOWN].detach().mean(dim=0)
    init_new_embeddings(model, [KNOWN], known=KNOWN)
    assert num_embeddings(model) == KNOWN + 5
    torch.testing.assert_close(model.get_input_embeddings().weight[KNOWN], mean)
    assert bool((model.get_input_embeddings().weight[KNOWN + 1 :] == 100.0).all())


def test_nothing_new_changes_nothing():
    model = model_of(KNOWN)
    before = tables(model)
    init_new_embeddings(model, [], known=KNOWN)
    assert all(torch.equal(old, new) for old, new in zip(before, tables(model), strict=True))


def test_ids_beyond_the_embeddings_are_no_part_of_the_mean():
    """Tokenizers may have more tokens than the model has embeddings."""
    model = model_of(KNOWN - 3)
    mean = model.get_input_embeddings().weight.detach().mean(dim=0)
    init_new_embeddings(model, [KNOWN - 1], known=KNOWN)
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], mean)


def test_the_bias_of_the_output_embedding_gets_the_mean_too():
    model = model_of(KNOWN + 3, tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(float(KNOWN + 3)))
    init_new_embeddings(model, [KNOWN], known=KNOWN)
    assert model.lm_head.bias[KNOWN].item() == pytest.approx((KNOWN - 1) / 2)


def test_the_mean_of_half_precision_rows_is_taken_in_float32():
    """A sum of equal bfloat16 numbers stops growing; their mean in float32 is the number itself."""
    model = model_of(300).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0078125)
    init_new_embeddings(model, [300], known=300)
    assert set(model.get_input_embeddings().weight[300].tolist()) == {1.0078125}


@pytest.mark.parametrize("sign", ["is_quantized", "quantization_method", "bitsandbytes"])
def test_a_quantised_model_cannot_grow(sign):
    model = model_of(KNOWN + 1)
    if sign == "bitsandbytes":
        model.extra = type("Linear4bit", (torch.nn.Identity,), {"__module__": "bitsandbytes.nn.modules"})()
    else:
        setattr(model, sign, True if sign == "is_quantized" else "gptq")
    before = tables(model)
    for index in (KNOWN, KNOWN + 1):  # a row that is there and means nothing, and one that is not there
        with pytest.raises(ValueError, match=r"1 tokens .*quantization_bit"):
            init_new_embeddings(model, [index], known=KNOWN)
    init_new_embeddings(model, [], known=KNOWN)
    assert all(torch.equal(old, new) for old, new in zip(before, tables(model), strict=True))


def test_embeddings_grow_and_shrink():
    model = model_of(KNOWN)
    before = tables(model)[0]
    resize_embeddings(model, KNOWN + 4)
    resize_embeddings(model, KNOWN)
    assert torch.equal(tables(model)[0], before)
