"""Print a text after some of its denoising steps: the trace in README.

python docs/make_trace.py saves/tiny_gpt2/full/ddm --seed 42
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable

from llamafactory_ddm import LogitsConfig, SamplingSettings, load

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
    parser.add_argument("--block-length", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    model = load(arguments.checkpoint)
    canvas = model.from_noise(arguments.length)
    last = min(arguments.steps, canvas.n_editable) - 1
    shown = {round(i * last / (arguments.show - 1)) for i in range(arguments.show)}

    def show(step: int, pieces: Callable[[], list[list[str | None]]]) -> None:
        if step in shown:
            text = "".join(piece if piece is not None else f" {BLANK}" for piece in pieces()[0])
            print(textwrap.fill(f"step {step + 1:>3}  {text.strip()}", 120, subsequent_indent=" " * 10))

    settings = SamplingSettings(
        denoising_strategy=arguments.strategy,
        diffusion_steps=arguments.steps,
        block_length=arguments.block_length,
        logits=LogitsConfig(temperature=arguments.temperature, top_p=0.95),
        seed=arguments.seed,
    )
    model.sample_batch([canvas], settings, sample_indices=[0], callback=show)


if __name__ == "__main__":
    main()
