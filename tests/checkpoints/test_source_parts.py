"""Start and end tokens of a published model, from its tokenizer."""

from dataclasses import replace

from llamafactory_ddm.checkpoints.convert import with_start_and_end
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer

CONFIG = DiffusionConfig("<|mask|>", 262, True, "masked", 0.0, "linear", 1.0)


def test_a_document_ends_with_the_tokenizers_own_token():
    tokenizer = tiny_tokenizer()
    config = with_start_and_end(CONFIG, tokenizer)
    assert (config.start_token, config.start_token_id) == ("<|endoftext|>", 0)
    assert (config.end_tokens, config.end_token_ids) == (("<|endoftext|>",), (0,))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert with_start_and_end(CONFIG, tokenizer).start_token == "<s>"
    assert with_start_and_end(replace(CONFIG, shift=False), tokenizer).start_token_id is None


def test_a_turn_ends_as_the_chat_template_has_it():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>", "<|im_end|>"], special_tokens=True)
    assert with_start_and_end(CONFIG, tokenizer).end_tokens == ("<|endoftext|>",)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    config = with_start_and_end(CONFIG, tokenizer)
    assert config.end_tokens == ("<|endoftext|>", "<|im_end|>")
    assert config.end_token_ids == (0, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_end_tokens_of_a_checkpoint_are_kept():
    config = replace(CONFIG, end_tokens=("a",), end_token_ids=(5,))
    assert with_start_and_end(config, tiny_tokenizer()) is config
