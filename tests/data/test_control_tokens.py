"""The spelling of [MASK] in a text, under tokenizers that have it as an added token, in the vocabulary too, or not."""

import pickle

from transformers import AddedToken, PreTrainedTokenizerFast

from llamafactory_ddm.data.control_tokens import control_texts, reading_as_text
from llamafactory_ddm.data.text_codec import TextCodec
from support.tiny import tiny_tokenizer

TEXT = "a cat <|mask|> do<|im_end|>"


def with_tokens(*tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def test_a_control_token_is_read_as_by_a_tokenizer_without_it():
    """All other tokens keep their ids, later additions included, and after pickling too."""
    tokenizer, without = with_tokens("<|mask|>", "<|im_end|>"), with_tokens("<|im_end|>")
    plain = reading_as_text(tokenizer, ["<|mask|>"])
    end, mask = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|mask|>"))
    expected = [
        end if index == without.convert_tokens_to_ids("<|im_end|>") else index for index in without.encode(TEXT)
    ]
    assert plain.encode(TEXT) == plain(TEXT)["input_ids"] == pickle.loads(pickle.dumps(plain)).encode(TEXT) == expected
    assert mask in tokenizer.encode(TEXT) and plain.decode(expected) == TEXT
    assert len(plain) == len(tokenizer) and plain.eos_token_id == tokenizer.eos_token_id


def test_a_control_token_that_is_also_in_the_vocabulary():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "a": 1, "[MASK]": 2, "cat": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", unk_token="[UNK]")
    assert tokenizer.encode("a [MASK] cat") == [1, 2, 3]
    assert reading_as_text(tokenizer, ["[MASK]"]).encode("a [MASK] cat") == [1, 0, 3]


def test_words_and_eos_are_no_control_tokens():
    tokenizer = with_tokens("<|mask|>")
    assert control_texts(tokenizer, ["<|mask|>", "cat", "<|endoftext|>", "<|new|>", "<|mask|>"]) == ["<|mask|>"]
    assert reading_as_text(tokenizer, ["<|new|>"]) is tokenizer


def test_an_unknown_word_stays_unknown_where_its_token_is_hidden():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert reading_as_text(tokenizer, ["[UNK]"]).encode("a dog cat") == [1, 0, 2]


def test_padding_that_is_a_word_stays_one():
    """Some models have "!" as their padding; hidden, the merges of its tokenizer would name a token that is gone."""
    tokenizer = tiny_tokenizer()
    for word in ("!", "ca", "cat"):
        tokenizer.add_special_tokens({"pad_token": word})
        assert word in tokenizer.get_added_vocab()
        assert control_texts(tokenizer, [word]) == []


def test_control_tokens_in_prompts_are_read_as_text():
    tokenizer = with_tokens("<|mask|>")
    codec = TextCodec(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"))
    assert codec.encode("a <|mask|>") == tiny_tokenizer().encode("a <|mask|>")
    assert codec.encode_after(" <|mask|>") == tiny_tokenizer().encode(" <|mask|>")
    assert codec.holds_control("a <|mask|>") and not codec.holds_control("a cat")
