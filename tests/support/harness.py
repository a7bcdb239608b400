"""A small diffusion model with random weights, and made-up rows, for tasks of lm-evaluation-harness."""

import importlib.util

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig

from .cli import ROOT
from .tiny import tiny_tokenizer


def random_model(folder, positions=48):
    """Save a model of bytes with random weights, and return its folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    torch.manual_seed(0)
    size = {"n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DiffusionConfig(
        mask_token="<|mask|>",
        mask_token_id=len(tokenizer) - 1,
        shift=True,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=1.0,
    ).save(folder)
    return folder


def made_up_rows(folder):
    """Write the rows of data/make_task_rows.py, and return their folder."""
    spec = importlib.util.spec_from_file_location("make_task_rows", ROOT / "data" / "make_task_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(folder)
    return folder
