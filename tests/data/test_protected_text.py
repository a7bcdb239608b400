"""Control tokens that a user spells are characters; those of a template stay tokens."""

import pytest
from transformers import AddedToken, AutoTokenizer

from llamafactory_ddm.data.protected_text import ProtectedText, special_texts
from support.cli import ROOT

MARKS = ["<|im_start|>", "<|im_end|>", "<tool>"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    tokenizer.add_tokens([AddedToken(token, special=token != "<tool>") for token in MARKS])
    return tokenizer


def test_special_tokens_are_found_and_other_added_tokens_are_not(tokenizer):
    assert special_texts(tokenizer) == sorted(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("spelled", [*MARKS, "<|endoftext|>"])
def test_a_users_spelling_is_text_beside_the_same_token_of_the_template(tokenizer, spelled):
    text = ProtectedText(tokenizer, [*MARKS, "<|endoftext|>"])
    control = tokenizer.convert_tokens_to_ids(spelled)
    users = f"a {spelled} b{spelled}"
    ids = text.encode(f"{spelled}x {text.protect(users)}{spelled}")
    assert ids.count(control) == 2 and ids[0] == ids[-1] == control
    assert tokenizer.decode(ids) == f"{spelled}x {users}{spelled}"
    assert control not in text.encode(text.protect(users))


def test_other_text_is_encoded_as_ever(tokenizer):
    text = ProtectedText(tokenizer, MARKS)
    for users in ("Tom saw a cat.", "  two  spaces\n", "ünï", "<|im_star t|>", ""):
        whole = f"<|im_start|>user\n{users}<|im_end|>"
        expected = tokenizer.encode(whole, add_special_tokens=False)
        assert text.encode(f"<|im_start|>user\n{text.protect(users)}<|im_end|>") == expected


def test_text_around_a_spelled_token_is_encoded_as_without_it(tokenizer):
    """The tokens before and after are those of the same text with the token's characters."""
    text = ProtectedText(tokenizer, MARKS)
    ids = text.encode(f"<|im_start|>user\n{text.protect('I say <tool> now')}<|im_end|>\n")
    plain = tokenizer.encode("user\nI say <too", add_special_tokens=False)
    assert ids[1 : 1 + len(plain) - 1] == plain[:-1]


def test_nobody_can_spell_the_marks_themselves(tokenizer):
    text = ProtectedText(tokenizer, MARKS)
    for users in ("\ufdd0<|im_end|>\ufdd0", "\ufdd10\ufdd2", "\ufdd1\ufdd2<|im_end|>", "\ufdd0<tool>\ufdd0 <tool>"):
        ids = text.encode(text.protect(users))
        assert not {tokenizer.convert_tokens_to_ids(mark) for mark in MARKS} & set(ids)
        assert "\ufffd" in tokenizer.decode(ids)


def test_tokens_that_a_text_may_hold_are_kept(tokenizer):
    text = ProtectedText(tokenizer, MARKS)
    ids = text.encode(text.protect("<tool>x<|im_end|>", ["<|im_end|>"]))
    tool, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<tool>", "<|im_end|>"))
    assert tool in ids and end not in ids


def test_a_tokenizer_that_cannot_read_them_as_text_refuses(tokenizer):
    class Slow:
        encode = tokenizer.encode
        get_added_vocab = tokenizer.get_added_vocab

    text = ProtectedText(Slow(), MARKS)
    assert text.encode(text.protect("a cat")) == tokenizer.encode("a cat")
    with pytest.raises(ValueError, match=r"<\|im_end\|>"):
        text.encode(text.protect("a <|im_end|>"))
    text.check("a cat")
    with pytest.raises(ValueError, match=r"<\|im_end\|>"):
        text.check("a <|im_end|>")
