import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamafactory_ddm.modeling.special_tokens import (
    ResolvedMaskToken,
    add_mask_token,
    check_roles,
    resolve_mask_token,
    resolve_token,
    resolve_tokens,
)
from support.tiny import tiny_tokenizer


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
    """Byte-level BPE spells a leading space as another character; the user writes the space."""
    assert resolve_mask_token(tokenizer, " dog").token == "Ġdog"


def test_a_new_special_token(tokenizer):
    assert resolve_mask_token(tokenizer, "<|mask|>") == ResolvedMaskToken("<|mask|>", len(tokenizer), True)
    assert resolve_mask_token(tokenizer, "[MASK]").is_new


def test_the_mask_token_of_the_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    resolved = resolve_mask_token(tokenizer, None)
    assert (resolved.token, resolved.id, resolved.is_new) == ("<mask>", len(tokenizer) - 1, False)


def test_the_mask_token_of_the_checkpoint_precedes_the_tokenizers(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    index = tokenizer.get_vocab()["cat"]
    assert resolve_mask_token(tokenizer, None, config_mask=("cat", index)).id == index
    with pytest.raises(ValueError, match="'cat'"):
        resolve_mask_token(tokenizer, None, config_mask=("cat", index + 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "mask_token"),
        ("catdog", r"2 \('cat', 'dog'\)"),
        (10**6, "mask_token: 1000000 "),
        (-1, "mask_token: -1 "),
        ("<|endoftext|>", r"\b(pad|eos|bos)\b"),
        (0, r"\b(pad|eos|bos)\b"),
        ("", "mask_token: '' .*0"),
        (True, "mask_token: true"),
    ],
)
def test_invalid_mask_tokens(tokenizer, given, words):
    with pytest.raises(ValueError, match=words) as error:
        resolve_mask_token(tokenizer, given)
    assert "<|mask|>" in str(error.value)  # the cure


def test_add_mask_token(tokenizer):
    mask = resolve_mask_token(tokenizer, "<|mask|>")
    assert tokenizer.mask_token is None  # asking adds nothing
    add_mask_token(tokenizer, mask)
    assert tokenizer.mask_token_id == mask.id == len(tokenizer) - 1
    known = len(tokenizer)
    add_mask_token(tokenizer, resolve_mask_token(tokenizer, "cat"))  # stays an ordinary token
    assert tokenizer.mask_token == "<|mask|>" and len(tokenizer) == known


def test_a_tokenizer_that_gives_the_checkpoints_token_another_id(tokenizer):
    mask = resolve_mask_token(tokenizer, None, config_mask=("<|mask|>", len(tokenizer) + 1))
    with pytest.raises(ValueError, match=r"'<\|mask\|>' .*262.*263"):
        add_mask_token(tokenizer, mask)


def test_a_mask_token_that_a_template_makes_eos_is_refused(tokenizer):
    mask = resolve_mask_token(tokenizer, "cat")
    tokenizer.eos_token = "cat"
    with pytest.raises(ValueError, match=r"mask_token: 'cat' .*\beos\b"):
        check_roles(tokenizer, mask, "cat")


def word_tokenizer(vocabulary, **special):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def test_text_that_the_tokenizer_does_not_know_is_not_the_unknown_token():
    with pytest.raises(ValueError, match=r"mask_token: 'zebra' .*'<unk>'"):
        resolve_mask_token(word_tokenizer({"<unk>": 0, "cat": 1}), "zebra")


def test_an_escape_that_yaml_did_not_read(tokenizer):
    """In single quotes YAML does not read \\n as an escape."""
    assert resolve_token(tokenizer, "sep_token", "\n")[0] == "Ċ"
    for find in (resolve_mask_token, lambda known, text: resolve_token(known, "mask_token", text)):
        with pytest.raises(ValueError, match=r'mask_token: "\\n"'):
            find(tokenizer, r"\n")
    with pytest.raises(ValueError) as error:
        resolve_token(tokenizer, "sep_token", "nonsuch")
    assert "escape" not in str(error.value)


def test_lists_of_tokens():
    """A list of a request may be long, and hold anything."""
    tokenizer = word_tokenizer({"<unk>": 0, "cat": 1, "dog": 7})
    read = []
    tokenizer.get_vocab = lambda get=tokenizer.get_vocab: read.append(1) or get()
    assert resolve_tokens(tokenizer, "suppress_tokens", ["cat", 7, "7", *[1] * 1000]) == (1, 7)
    assert len(read) == 1
    for wrong in (["cat", ["dog"]], [{"cat": 1}], [None], [1.0], [True], [3]):
        with pytest.raises(ValueError, match=r"^suppress_tokens"):
            resolve_tokens(tokenizer, "suppress_tokens", wrong)


def test_a_vocabulary_with_gaps():
    tokenizer = word_tokenizer({"<unk>": 0, "cat": 1, "dog": 7})
    assert resolve_mask_token(tokenizer, 7) == ResolvedMaskToken("dog", 7, False)
    with pytest.raises(ValueError, match="mask_token: 2 "):
        resolve_mask_token(tokenizer, 2)
    mask = resolve_mask_token(tokenizer, "<|mask|>")
    assert tokenizer.mask_token is None  # asking adds nothing
    add_mask_token(tokenizer, mask)
    assert tokenizer.mask_token_id == mask.id


def test_the_unknown_token_is_no_mask_unless_a_checkpoint_was_trained_so(tokenizer):
    tokenizer.unk_token = "cat"
    with pytest.raises(ValueError, match=r"mask_token: 'cat' .*\bunk\b"):
        resolve_mask_token(tokenizer, "cat")
    index = tokenizer.convert_tokens_to_ids("cat")
    assert resolve_mask_token(tokenizer, None, config_mask=("cat", index)).is_trained


def test_neither_the_checkpoint_nor_the_tokenizer_may_name_the_padding_token(tokenizer):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' .*\bpad\b"):
        resolve_mask_token(tokenizer, None, config_mask=("<|endoftext|>", 0))
    tokenizer.mask_token = tokenizer.pad_token
    with pytest.raises(ValueError, match=r"mask_token.*\bpad\b"):
        resolve_mask_token(tokenizer, None)


def test_a_yaml_that_repeats_the_checkpoints_token(tokenizer):
    mask = resolve_mask_token(tokenizer, "<|mask|>", config_mask=("<|mask|>", len(tokenizer)))
    assert mask.is_new and mask.is_trained
    assert not resolve_mask_token(tokenizer, "cat", config_mask=("<|mask|>", len(tokenizer) - 1)).is_trained
