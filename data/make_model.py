"""Make the folders of the built-in autoregressive model, before and after training.

python data/make_model.py start saves/tiny_gpt2/start            makes a GPT-2 with random weights
python data/make_model.py keep saves/tiny_gpt2/full/pt           copies a trained one to data/tiny_gpt2, in bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

TINY = Path(__file__).parent / "tiny_gpt2"


def start(folder: Path) -> None:
    """Write random weights with a fixed seed, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=192,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep(folder: Path) -> None:
    """Copy a trained model to data/tiny_gpt2, rounded to bfloat16 to keep the repository small."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(TINY)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "keep"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"start": start, "keep": keep}[arguments.action](arguments.folder)


if __name__ == "__main__":
    main()
