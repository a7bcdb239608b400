"""What `llamafactory-ddm generate` prints, on a terminal and elsewhere."""

import io

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import LogitsConfig, SamplingSettings
from llamafactory_ddm.cli import generate as generate_command
from llamafactory_ddm.generation import load as loading
from llamafactory_ddm.generation import terminal
from llamafactory_ddm.generation.generator import TextGenerator
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.screen import Screen
from support.tiny import tiny_tokenizer

ARGV = ("model", "--max-new-tokens", "5", "--steps", "5", "--seed", "3")
SETTINGS = SamplingSettings(diffusion_steps=5, logits=LogitsConfig(temperature=0.95, top_p=0.9), seed=3)


@pytest.fixture(scope="module")
def generator():
    """A model that generates letters and EOS."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 1, n_positions=48, n_embd=32, n_layer=2, n_head=2))
    letters = {i for token, i in tokenizer.get_vocab().items() if token.isascii() and token.isalpha()}
    model.lm_head = torch.nn.Linear(32, len(tokenizer) + 1)
    for token_id in range(len(tokenizer) + 1):
        is_eos, is_letter = token_id == tokenizer.eos_token_id, token_id in letters
        model.lm_head.bias.data[token_id] = 7.0 if is_eos else 4.0 if is_letter else -30.0
    make_bidirectional(model)
    config = DiffusionConfig("<|mask|>", len(tokenizer), True, "masked", 0.0, "linear", 1.0)
    return TextGenerator(model, tokenizer, config)


@pytest.fixture
def command(generator, monkeypatch):
    """Return a function that runs the command with a model in memory and returns its stdout and stderr."""
    monkeypatch.setattr(loading, "load", lambda path, **keys: generator)
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TERM", "xterm")

    def run(*options, file):
        err = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", file)
            patch.setattr("sys.stderr", err)
            assert generate_command.main([*ARGV, *options]) == 0
        return file, err.getvalue()

    return run


@pytest.mark.parametrize("source", [{}, {"prompt": "cat"}, {"infill": "a<|infill:2|>b"}])
def test_an_animated_text_is_not_printed_again(command, generator, source):
    """Each text is shown once, without the positions after EOS."""
    keys = {"max_new_tokens": 5, "num_samples": 3, "batch_size": 1, "settings": SETTINGS}
    texts = [result.text for result in generator.stream(**source, **keys)]
    options = [f"--{key}={value}" for key, value in source.items()]
    screen, _ = command("--show", "--num-samples", "3", *options, file=Screen())
    assert screen.lines() == [text for text in texts if text]
    assert source or any(len(text) < 5 for text in texts)


def test_without_a_terminal_only_the_texts_are_printed_to_stdout(command):
    file, error = command("--show", "--num-samples", "3", file=io.StringIO())
    assert "\x1b" not in file.getvalue() and file.getvalue().count("- ") == 3
    assert error.startswith("llamafactory-ddm generate: ") and "model" in error and error.count("\n") == 1
