"""Digits as tokens of their own, against text cut up by hand."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamafactory_ddm.modeling.special_tokens import split_digits, splits_digits

END = "<|endoftext|>"


def with_numbers():
    """A byte-level tokenizer that has tokens for 12, for 123 and for a space with 1."""
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "Ġ1", "ab"]
    merges = [("1", "2"), ("12", "3"), ("Ġ", "1"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


JOINED, SPLIT = with_numbers(), split_digits(with_numbers())


def test_splits_digits():
    assert not splits_digits(JOINED)
    assert splits_digits(SPLIT)


@given(st.text(alphabet="0123 ab\n'é٣", max_size=20))
def test_ids_are_those_of_the_pieces_between_digits(text):
    pieces = [piece for piece in re.split(r"(\d)", text) if piece]
    expected = [index for piece in pieces for index in JOINED.encode(piece, add_special_tokens=False)]
    assert SPLIT.encode(text, add_special_tokens=False) == expected
    assert SPLIT.decode(expected) == text


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_digits_are_split_after_saving_and_loading(tmp_path, name):
    with_numbers().save_pretrained(tmp_path / "one")
    settings = tmp_path / "one" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": name}))
    one = AutoTokenizer.from_pretrained(tmp_path / "one")
    one.add_special_tokens({"mask_token": "<|mask|>"})
    split_digits(one).save_pretrained(tmp_path / "two")
    two = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert splits_digits(two)
    assert (two.mask_token, two.pad_token, two.eos_token) == ("<|mask|>", END, END)
    assert len(two) == len(one)
    text = "ab <|mask|> 12"
    assert two.encode(text) == split_digits(one).encode(text)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="use_fast_tokenizer: true"):
        split_digits(object())
