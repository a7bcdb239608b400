"""Decoding time against length: diffusion at several numbers of steps, and an autoregressive model with a KV cache.

    python benchmarks/decoding_time.py [--size small] [--lengths 64 256 1024] [--out decoding_time.png]

Both models have the same shape and random weights: the time does not depend on them, as EOS is never generated and
sampling never stops early. `tiny` is the shape of the built-in model, `small` that of GPT-2 small. In each round all
ways are timed in turn, from a start token to a text of the given length; a first call at the shortest length is not
timed. A ratio is diffusion / autoregressive within a round, and its range is over the rounds. More steps than tokens
take no more passes with `low_confidence`, so they are left out. Seconds are CPU time; on a GPU wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import SamplingSettings, TextGenerator
from llamafactory_ddm.generation.autoregressive import AutoregressiveModel
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "tiny": {"vocab_size": 741, "n_embd": 192, "n_layer": 4, "n_head": 6},
    "small": {"vocab_size": 50258, "n_embd": 768, "n_layer": 12, "n_head": 12},
}


def models(size: str, positions: int, device: torch.device) -> tuple[TextGenerator, AutoregressiveModel]:
    """Return a diffusion model and an autoregressive model of one shape, with the built-in tokenizer."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(GPT2LMHeadModel(GPT2Config(n_positions=positions, **SIZES[size])).eval().to(device))
    diffusion, autoregressive = pair
    make_bidirectional(diffusion)
    for model in pair:
        fuse_gelu(model)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    mask_id = len(tokenizer)
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    config = DiffusionConfig("<|mask|>", mask_id, True, "masked", 0.0, "linear", 1.0)
    autoregressive.config.pad_token_id = None
    writer, sampler = TextGenerator(diffusion, tokenizer, config), AutoregressiveModel(autoregressive, tokenizer)
    return writer, sampler


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter if device.type == "cuda" else time.process_time
    begin = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - begin


def ways_of(
    writer: TextGenerator, sampler: AutoregressiveModel, length: int, arguments: argparse.Namespace
) -> dict[int | None, Callable[[], Any]]:
    """Return what is timed at one length, by the number of steps; None is the autoregressive model."""
    indices = list(range(arguments.batch))
    eos = tuple(writer.eos_ids)
    ways: dict[int | None, Callable[[], Any]] = {}
    shared = {"denoising_strategy": arguments.strategy, "early_stop": "none", "temperature": 1.0, "top_p": 1.0}
    greedy = sampler.settings({"logits_temp": 1.0, "topp_temp": 1.0, "suppress_tokens": eos}).logits
    ways[None] = lambda: sampler.sample(length, greedy, seed=0, sample_indices=indices)
    canvas = writer.from_noise(length + 1)
    for steps in arguments.steps:
        if steps <= length:
            settings = writer.settings(SamplingSettings(), diffusion_steps=steps, suppress_tokens=eos, **shared)
            ways[steps] = lambda settings=settings: writer.sample_batch(  # type: ignore[misc]
                [canvas] * len(indices), settings, sample_indices=indices
            )
    return ways


def plot(times: dict[int, dict[int | None, list[float]]], path: Path, title: str) -> None:
    """Draw the median time of each way against the length, with the range over rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    all_steps = sorted({steps for ways in times.values() for steps in ways if steps is not None})
    for number, steps in enumerate([None, *all_steps]):
        x = [length for length, ways in times.items() if steps in ways]
        rounds = [times[length][steps] for length in x]
        middle = [statistics.median(values) for values in rounds]
        low = [value - min(values) for value, values in zip(middle, rounds, strict=True)]
        high = [max(values) - value for value, values in zip(middle, rounds, strict=True)]
        label = "autoregressive, KV cache" if steps is None else f"diffusion, {steps} steps"
        style = {"color": "black", "linestyle": "--"} if steps is None else {"color": f"C{number - 1}"}
        axes.errorbar(x, middle, yerr=[low, high], label=label, marker="o", capsize=3, **style)
    axes.set(xlabel="tokens", ylabel="seconds a text", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(times))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Time, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--strategy", default="low_confidence")
    parser.add_argument("--batch", type=int, default=1, help="texts that are decoded together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("decoding_time.png"))
    arguments = parser.parse_args()
    if min(*arguments.lengths, *arguments.steps, arguments.batch, arguments.rounds) < 1:
        parser.error("--lengths, --steps, --batch and --rounds must be at least 1")
    if len({*arguments.lengths}) < len(arguments.lengths) or len({*arguments.steps}) < len(arguments.steps):
        parser.error("--lengths and --steps must not repeat a number")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer, sampler = models(arguments.size, max(arguments.lengths) + 1, device)
    ways = {length: ways_of(writer, sampler, length, arguments) for length in sorted(arguments.lengths)}
    times: dict[int, dict[int | None, list[float]]] = {length: {way: [] for way in ways[length]} for length in ways}
    for work in ways[min(ways)].values():
        work()  # the first call is slower
    for _ in range(arguments.rounds):
        for length, of_length in ways.items():
            for way, work in of_length.items():
                times[length][way].append(seconds(work, device) / arguments.batch)
    print("| tokens | steps | seconds a text | diffusion / autoregressive |\n|---|---|---|---|")
    for length, of_length in times.items():
        for way, taken in of_length.items():
            ratios = [value / base for value, base in zip(taken, of_length[None], strict=True)]
            cell = "1" if way is None else f"{min(ratios):.2f} to {max(ratios):.2f}"
            name = "autoregressive" if way is None else str(way)
            print(f"| {length} | {name} | {statistics.median(taken):.3g} | {cell} |")
    plot(times, arguments.out, f"{arguments.size}, {arguments.strategy}, batch of {arguments.batch}, {device.type}")
    print(f"saved: {arguments.out}")


if __name__ == "__main__":
    main()
