"""Print how a text comes out of noise, step by step: the trace in README.

python docs/make_trace.py saves/tiny_gpt2/full/ddm --seed 42
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample

BLANK = "░"


def main() -> None:
    """Read the command line, sample and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--show", type=int, default=6, help="how many of the steps to print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="low_confidence")
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    config = DiffusionConfig.load(arguments.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).float().eval()
    make_bidirectional(model)
    x = torch.full((1, arguments.length), config.mask_token_id)
    x[:, 0] = tokenizer.bos_token_id
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = not config.shift
    mask = full_attention_mask(
        model, batch=1, length=arguments.length, is_padding=None, visible=None, dtype=model.dtype, device=x.device
    )
    shown = {round(i * (arguments.steps - 1) / (arguments.show - 1)) for i in range(arguments.show)}

    def show(step: int, z: Tensor, fresh: Tensor) -> None:
        if step in shown:
            pieces = [BLANK if i == config.mask_token_id else tokenizer.decode([i]) for i in z[0, 1:].tolist()]
            text = "".join(piece if piece != BLANK else f" {BLANK}" for piece in pieces)
            print(f"step {step + 1:>3}  {text.strip()}")

    sample(
        ModelDenoiser(model, shift=config.shift, attention_mask=mask),
        x,
        editable=editable,
        mask_id=config.mask_token_id,
        steps=arguments.steps,
        strategy=get_strategy(arguments.strategy),
        logits=LogitsConfig(temperature=arguments.temperature, top_p=0.95),
        seed=arguments.seed,
        rows=torch.tensor([0]),
        schedule=get_schedule(config.noise_schedule),
        callback=show,
    )


if __name__ == "__main__":
    main()
