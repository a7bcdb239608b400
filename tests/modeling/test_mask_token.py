import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llamafactory_ddm.modeling.mask_token import ResolvedMaskToken, add_mask_token, resolve_mask_token
from support.tiny import tiny_tokenizer


def model_of(rows, tied=True):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=tied)
    )


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_an_id_names_the_token(tokenizer):
    index = tokenizer.get_vocab()["cat"]
    assert resolve_mask_token(tokenizer, index) == ResolvedMaskToken("cat", index, False)
    assert resolve_mask_token(tokenizer, str(index)) == ResolvedMaskToken("cat", index, False)


def test_digits_that_are_a_token_are_that_token(tokenizer):
    assert resolve_mask_token(tokenizer, "7").token == "7"
    assert resolve_mask_token(tokenizer, 7).id == 7


def test_a_token_of_the_vocabulary(tokenizer):
    assert resolve_mask_token(tokenizer, "cat") == ResolvedMaskToken("cat", tokenizer.get_vocab()["cat"], False)


def test_text_that_is_one_token(tokenizer):
    """Byte-level BPE spells a leading blank as a letter of its own; the user writes the blank."""
    assert resolve_mask_token(tokenizer, " dog").token == "Ġdog"


def test_a_new_special_token(tokenizer):
    assert resolve_mask_token(tokenizer, "<|mask|>") == ResolvedMaskToken("<|mask|>", len(tokenizer), True)
    assert resolve_mask_token(tokenizer, "[MASK]").is_new


def test_the_tokenizers_own(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    resolved = resolve_mask_token(tokenizer, None)
    assert (resolved.token, resolved.id, resolved.is_new) == ("<mask>", len(tokenizer) - 1, False)


def test_the_checkpoints_comes_before_the_tokenizers(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    index = tokenizer.get_vocab()["cat"]
    assert resolve_mask_token(tokenizer, None, config_mask=("cat", index)).id == index
    with pytest.raises(ValueError, match="saved with the checkpoint"):
        resolve_mask_token(tokenizer, None, config_mask=("cat", index + 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "has no mask token, and none is given: set mask_token"),
        ("catdog", r"is not one token but 2 \('cat', 'dog'\)"),
        (10**6, "is not an id of the vocabulary"),
        (-1, "is not an id of the vocabulary"),
        ("<|endoftext|>", "is the tokenizer's (pad|eos|bos) token"),
        (0, "is the tokenizer's (pad|eos|bos) token"),
        ("", "is not one token but 0"),
        (True, "mask_token: true is neither a token nor an id"),
    ],
)
def test_what_is_no_mask_token(tokenizer, given, words):
    with pytest.raises(ValueError, match=words) as error:
        resolve_mask_token(tokenizer, given)
    assert "<|mask|>" in str(error.value)  # the cure


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean(tokenizer, tied):
    model = model_of(len(tokenizer), tied)
    means = [
        e.weight.detach().clone().mean(dim=0) for e in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    old = model.get_input_embeddings().weight.detach().clone()
    mask = resolve_mask_token(tokenizer, "<|mask|>")
    add_mask_token(model, tokenizer, mask)
    assert tokenizer.mask_token_id == mask.id == len(tokenizer) - 1
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    for table, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        torch.testing.assert_close(table.weight[mask.id], mean)
    torch.testing.assert_close(model.get_input_embeddings().weight[:-1], old)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_padded_vocabulary_is_not_resized_and_padding_is_not_in_the_mean(tokenizer):
    known = len(tokenizer)
    model = model_of(known + 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[known:] = 100.0
    mean = model.get_input_embeddings().weight[:known].detach().mean(dim=0)
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "<|mask|>"))
    assert model.get_input_embeddings().weight.shape[0] == known + 5
    torch.testing.assert_close(model.get_input_embeddings().weight[known], mean)


def test_an_existing_token_keeps_its_row(tokenizer):
    model = model_of(len(tokenizer))
    old = model.get_input_embeddings().weight.detach().clone()
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "cat"))
    assert torch.equal(model.get_input_embeddings().weight, old)


def test_a_trained_row_of_the_checkpoint_is_kept(tokenizer):
    model = model_of(len(tokenizer) + 1)
    old = model.get_input_embeddings().weight.detach().clone()
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, None, config_mask=("<|mask|>", len(tokenizer))))
    assert torch.equal(model.get_input_embeddings().weight, old)
    assert tokenizer.mask_token == "<|mask|>"


def test_a_quantised_model_cannot_grow(tokenizer):
    model = model_of(len(tokenizer))
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised model cannot grow; name a token that exists"):
        add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "<|mask|>"))
    assert tokenizer.mask_token is None  # nothing half done
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "cat"))


def word_tokenizer(vocabulary, **special):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def test_text_that_the_tokenizer_does_not_know_is_not_the_unknown_token():
    with pytest.raises(ValueError, match="'zebra' is unknown to the tokenizer, which reads it as '<unk>'"):
        resolve_mask_token(word_tokenizer({"<unk>": 0, "cat": 1}), "zebra")


def test_a_vocabulary_with_gaps():
    tokenizer = word_tokenizer({"<unk>": 0, "cat": 1, "dog": 7})
    assert resolve_mask_token(tokenizer, 7) == ResolvedMaskToken("dog", 7, False)
    with pytest.raises(ValueError, match="mask_token: 2 is not an id of the vocabulary"):
        resolve_mask_token(tokenizer, 2)
    mask = resolve_mask_token(tokenizer, "<|mask|>")
    assert tokenizer.mask_token is None  # asking adds nothing
    model = model_of(8)
    add_mask_token(model, tokenizer, mask)
    assert tokenizer.mask_token_id == mask.id


def test_neither_the_checkpoint_nor_the_tokenizer_may_name_the_padding_token(tokenizer):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is the tokenizer's pad token"):
        resolve_mask_token(tokenizer, None, config_mask=("<|endoftext|>", 0))
    tokenizer.mask_token = tokenizer.pad_token
    with pytest.raises(ValueError, match="is the tokenizer's pad token"):
        resolve_mask_token(tokenizer, None)


def test_a_yaml_that_repeats_the_checkpoints_token_leaves_the_trained_row(tokenizer):
    model = model_of(len(tokenizer) + 1)
    old = model.get_input_embeddings().weight.detach().clone()
    mask = resolve_mask_token(tokenizer, "<|mask|>", config_mask=("<|mask|>", len(tokenizer)))
    add_mask_token(model, tokenizer, mask)
    assert mask.is_new and mask.is_trained
    assert torch.equal(model.get_input_embeddings().weight, old)
    assert not resolve_mask_token(tokenizer, "cat", config_mask=("<|mask|>", len(tokenizer) - 1)).is_trained


def test_the_bias_of_the_output_embedding_gets_the_mean_too(tokenizer):
    model = model_of(len(tokenizer) + 3, tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(float(len(tokenizer) + 3)))
    known = len(tokenizer)
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "<|mask|>"))
    assert model.lm_head.bias[known].item() == pytest.approx((known - 1) / 2)


def test_the_mean_of_half_precision_rows_is_taken_in_float32(tokenizer):
    """A sum of equal bfloat16 numbers stops growing; their mean in float32 is the number itself."""
    model = model_of(len(tokenizer)).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0078125)
    mask = resolve_mask_token(tokenizer, "<|mask|>")
    add_mask_token(model, tokenizer, mask)
    assert set(model.get_input_embeddings().weight[mask.id].tolist()) == {1.0078125}


def test_a_quantised_model_takes_a_trained_row_it_already_has(tokenizer):
    model = model_of(len(tokenizer) + 1)
    model.is_quantized = True
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, None, config_mask=("<|mask|>", len(tokenizer))))
    assert tokenizer.mask_token == "<|mask|>"


@pytest.mark.parametrize("sign", ["quantization_method", "bitsandbytes"])
def test_other_signs_of_a_quantised_model(tokenizer, sign):
    model = model_of(len(tokenizer))
    if sign == "quantization_method":
        model.quantization_method = "gptq"
    else:
        model.extra = type("Linear4bit", (torch.nn.Identity,), {"__module__": "bitsandbytes.nn.modules"})()
    with pytest.raises(ValueError, match="quantised model cannot grow"):
        add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, "<|mask|>"))
    assert tokenizer.mask_token is None


def test_a_token_beyond_the_rows_of_a_quantised_model_is_refused(tokenizer):
    model = model_of(len(tokenizer) - 3)
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised model cannot grow"):
        add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, len(tokenizer) - 1))


def test_a_token_beyond_the_rows_gets_the_mean(tokenizer):
    model = model_of(len(tokenizer) - 3)
    mean = model.get_input_embeddings().weight.detach().mean(dim=0)
    add_mask_token(model, tokenizer, resolve_mask_token(tokenizer, len(tokenizer) - 1))
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], mean)
