"""What a published model's texts start from and end with, from its tokenizer."""

from dataclasses import replace

from llamafactory_ddm.checkpoints.convert import with_start_and_end
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer

DESCRIBED = DiffusionConfig("<|mask|>", 262, True, "masked", 0.0, "linear", 1.0)


def test_a_document_ends_with_the_tokenizers_own_token():
    tokenizer = tiny_tokenizer()
    found = with_start_and_end(DESCRIBED, tokenizer)
    assert (found.start_token, found.start_token_id) == ("<|endoftext|>", 0)
    assert (found.end_tokens, found.end_token_ids) == (("<|endoftext|>",), (0,))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert with_start_and_end(DESCRIBED, tokenizer).start_token == "<s>"
    assert with_start_and_end(replace(DESCRIBED, shift=False), tokenizer).start_token_id is None


def test_a_turn_ends_as_the_chat_template_has_it():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>", "<|im_end|>"], special_tokens=True)
    assert with_start_and_end(DESCRIBED, tokenizer).end_tokens == ("<|endoftext|>",)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    found = with_start_and_end(DESCRIBED, tokenizer)
    assert found.end_tokens == ("<|endoftext|>", "<|im_end|>")
    assert found.end_token_ids == (0, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_what_a_checkpoint_says_itself_stays():
    said = replace(DESCRIBED, end_tokens=("a",), end_token_ids=(5,))
    assert with_start_and_end(said, tiny_tokenizer()) is said
