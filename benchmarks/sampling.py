"""The cost of sampling, relative to the trunk of the model alone, timed interleaved in the same process.

    python benchmarks/sampling.py             the claims: CPU seconds of each strategy, batch 1 and 4
    python benchmarks/sampling.py --memory    peak memory of a step, each in a fresh process
    python benchmarks/sampling.py --table     cost against length, steps, batch and vocabulary
    python benchmarks/sampling.py --quality saves/tiny_gpt2/full/ddm
                                              the table of docs/performance.md
    python benchmarks/sampling.py --revising saves/tiny_gpt2/full/ddm --samples 128
                                              the table of docs/sampling_edits.md

The baseline, the trunk, is one forward pass of GPT-2 without its output embedding for each denoising step. Figures are
CPU seconds (process time): the median over rounds of the ratio within a round. fp32, random weights, top-p 0.9; with
random weights every distribution is nearly flat, the hardest case for a nucleus.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import SamplingSettings, TextGenerator, load
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import LogitsConfig, get_strategy, sample

TIME_CLAIMS = {"random": 1.20, "low_confidence": 1.50, "margin": 1.50, "entropy": 1.50, "confidence_threshold": 1.50}
MEMORY_CLAIM = 1.2
_PARALLEL = {"denoising_strategy": "confidence_threshold", "confidence_threshold": 0.5}
REVISING: list[dict[str, Any]] = [
    *({"denoising_strategy": "low_confidence", "diffusion_steps": steps} for steps in (64, 48, 32, 16)),
    *(
        {
            "denoising_strategy": "low_confidence",
            "diffusion_steps": steps,
            "edit_threshold": threshold,
            "edit_steps": 4,
        }
        for steps in (32, 16)
        for threshold in (0.9, 0.5)
    ),
    {"denoising_strategy": "low_confidence", "diffusion_steps": 32, "edit_ratio": 0.1, "edit_steps": 4},
    *({**_PARALLEL, **edits} for edits in ({}, {"edit_threshold": 0.5}, {"edit_threshold": 0.5, "edit_steps": 8})),
    *({"denoising_strategy": "random", "diffusion_steps": steps} for steps in (64, 128)),
    *({"denoising_strategy": "remdm", "diffusion_steps": s, "remask_cap": c} for s, c in ((64, 0.02), (128, 0.1))),
]


@dataclass(frozen=True)
class Shape:
    """The model and the run: a GPT-2 of `layers` x `width`, `batch` rows of `length` tokens in `steps` steps."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    length: int = 256
    steps: int = 32
    batch: int = 1


def make_model(shape: Shape) -> GPT2LMHeadModel:
    """Return a bidirectional GPT-2 with random weights, the same each time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocabulary + 1,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=max(1, shape.width // 64),
        n_positions=max(1024, shape.length),
    )
    model = GPT2LMHeadModel(config).eval()
    make_bidirectional(model)
    fuse_gelu(model)
    return model


def sampler(model: GPT2LMHeadModel, shape: Shape, strategy: str) -> Callable[[], None]:
    """Return a function that samples once."""
    x = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
    editable = torch.ones_like(x, dtype=torch.bool)
    editable[:, 0] = False

    def run() -> None:
        denoiser = ModelDenoiser(model, shift=True)
        sample(
            denoiser,
            x,
            editable=editable,
            mask_id=shape.vocabulary,
            steps=shape.steps,
            strategy=get_strategy(strategy),
            logits=LogitsConfig(temperature=0.95, top_p=0.9),
        )
        denoiser.close()

    return run


def trunk(model: GPT2LMHeadModel, shape: Shape) -> Callable[[], None]:
    """Return a function that runs the body as often as there are steps."""
    z = torch.full((shape.batch, shape.length), shape.vocabulary)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(shape.steps):
                model.transformer(z, use_cache=False)

    return run


def cpu_seconds(run: Callable[[], None]) -> float:
    """Return the process time of one call."""
    before = time.process_time()
    run()
    return time.process_time() - before


def measure(shape: Shape, strategies: list[str], rounds: int) -> dict[str, float]:
    """Return strategy -> median ratio of its time to the trunk's."""
    model = make_model(shape)
    runs = {"trunk": trunk(model, shape), **{name: sampler(model, shape, name) for name in strategies}}
    short = replace(shape, steps=2)
    trunk(model, short)()
    sampler(model, short, strategies[0])()
    ratios: dict[str, list[float]] = {name: [] for name in strategies}
    for _ in range(rounds):
        seconds = {name: cpu_seconds(run) for name, run in runs.items()}
        for name in strategies:
            ratios[name].append(seconds[name] / seconds["trunk"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def peak_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024  # type: ignore[index]


def report_memory(shape: Shape, kind: str) -> None:
    """Run `kind` alone in this process and print its peak."""
    model = make_model(shape)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of making the model
    short = replace(shape, steps=2)
    (trunk(model, short) if kind == "trunk" else sampler(model, short, kind))()
    print(peak_mib())


def claim(text: str, value: float, limit: float) -> bool:
    """Print one line; return whether the claim holds."""
    print(f"{text:<58} {value:8.2f}  claimed <= {limit:.2f}  {'held' if value <= limit else 'BROKEN'}", flush=True)
    return value <= limit


def memory(shape: Shape) -> bool:
    """Compare the memory that a fully masked step adds to the trunk with the size of its float32 logits."""
    # Return freed memory to the system at once; otherwise the peak would include what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for kind in ("trunk", "low_confidence"):
        words = [sys.executable, __file__, "--peak", kind, "--batch", str(shape.batch), "--layers", str(shape.layers)]
        words += ["--width", str(shape.width), "--vocabulary", str(shape.vocabulary), "--length", str(shape.length)]
        words += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        peaks[kind] = float(done.stdout.strip().splitlines()[-1])
    logits = shape.batch * (shape.length - 1) * shape.vocabulary * 4 / 2**20
    added = peaks["low_confidence"] - peaks["trunk"]
    return claim(f"batch {shape.batch}: memory beyond the trunk / masked logits", added / logits, MEMORY_CLAIM)


def table(shape: Shape, rounds: int) -> None:
    """Print the table of docs/performance.md."""
    print("| what varies | value | random | low_confidence |\n|---|---|---|---|")
    variants: list[tuple[str, list[int]]] = [
        ("length", [64, 128, 256, 512]),
        ("steps", [8, 16, 32]),
        ("batch", [1, 4]),
        ("vocabulary", [8000, 32000, 50257, 128000]),
    ]
    for name, values in variants:
        for value in values:
            got = measure(replace(shape, **{name: value}), ["random", "low_confidence"], rounds)
            print(f"| {name} | {value} | {got['random']:.2f} | {got['low_confidence']:.2f} |", flush=True)


def judged(texts: list[str], model: TextGenerator, judge: GPT2LMHeadModel) -> float:
    """Return the loss of the autoregressive model on the texts, EOS included, in nats per token."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[model.start_id, *model.codec.encode(text), model.tokenizer.eos_token_id]])
        with torch.inference_mode():
            log_p = judge(ids).logits[0, :-1].log_softmax(dim=-1)
        total -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def quality(checkpoint: str, samples: int) -> None:
    """Print the table of strategies that decode several tokens per forward pass, and of fixed steps."""
    model = load(checkpoint)
    judge = AutoModelForCausalLM.from_pretrained("data/tiny_gpt2", dtype=torch.float32).eval()
    canvases = [model.from_noise(65)] * samples

    def tried(**keys: Any) -> tuple[float, float]:
        settings = SamplingSettings(logits=LogitsConfig(0.8, 0.95), block_length=16, seed=42, **keys)
        made = model.sample_batch(canvases, settings, sample_indices=range(samples))
        rate = sum(text.n_tokens for text in made) / sum(text.num_forward_passes for text in made)
        return rate, judged([text.predict for text in made], model, judge)

    print("| strategy | tokens per forward pass | loss | fixed steps need for that loss | speed-up |")
    print("|---|---|---|---|---|")
    fixed = []
    for steps in (64, 56, 48, 40, 32, 24, 16, 8):
        rate, loss = tried(denoising_strategy="low_confidence", diffusion_steps=steps)
        fixed.append((loss, 64 / rate))
        print(f"| low_confidence, {steps} steps | {rate:.2f} | {loss:.3f} | | |", flush=True)
    for name, values in (("confidence_threshold", (0.95, 0.9, 0.7, 0.5)), ("entropy_bound", (0.01, 0.1, 0.3, 1.0))):
        for value in values:
            rate, loss = tried(denoising_strategy=name, diffusion_steps=64, **{name: value})
            needed = forwards_for(loss, fixed)
            said = "more than all" if needed is None else f"{needed:.0f} forward passes"
            gain = "" if needed is None else f"{needed * rate / 64:.2f}"
            print(f"| {name}: {value:g} | {rate:.2f} | {loss:.3f} | {said} | {gain} |", flush=True)


def revising(checkpoint: str, samples: int) -> None:
    """Print the table of editing and remasking."""
    model = load(checkpoint)
    judge = AutoModelForCausalLM.from_pretrained("data/tiny_gpt2", dtype=torch.float32).eval()
    print("| keys | forward passes a text | edits a text | loss |\n|---|---|---|---|")
    plain = {"logits": LogitsConfig(0.8, 0.95), "block_length": 16, "early_stop": "none", "seed": 42}
    for keys in REVISING:
        settings = SamplingSettings(**{**plain, **keys})
        made = model.sample_batch([model.from_noise(65)] * samples, settings, sample_indices=range(samples))
        forwards = sum(text.num_forward_passes for text in made) / samples
        edits = sum(text.edits for text in made) / samples
        said = ", ".join(f"`{key}: {value}`" for key, value in keys.items())
        loss = judged([text.predict for text in made], model, judge)
        print(f"| {said} | {forwards:.1f} | {edits:.1f} | {loss:.3f} |", flush=True)


def forwards_for(loss: float, fixed: list[tuple[float, float]]) -> float | None:
    """Return the number of forward passes with which fixed steps reach `loss`, by linear interpolation.

    None if the loss is below that of the most forward passes; the fewest if it is above all.
    """
    if loss < fixed[0][0]:
        return None
    for (low, more), (high, fewer) in itertools.pairwise(fixed):
        if low <= loss <= high:
            return more + (fewer - more) * (loss - low) / (high - low)
    return fixed[-1][1]


def main() -> int:
    """Run the benchmark that the command line names; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quality", metavar="CHECKPOINT")
    parser.add_argument("--revising", metavar="CHECKPOINT")
    parser.add_argument("--samples", type=int, default=64, help="texts for --quality and --revising")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--strategies", default=",".join(TIME_CLAIMS))
    parser.add_argument("--batches", default="1,4")
    for name, value in Shape().__dict__.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(**{name: getattr(arguments, name) for name in Shape().__dict__})
    if arguments.peak:
        report_memory(shape, arguments.peak)
        return 0
    if arguments.table:
        table(shape, arguments.rounds)
        return 0
    if arguments.quality:
        quality(arguments.quality, arguments.samples)
        return 0
    if arguments.revising:
        revising(arguments.revising, arguments.samples)
        return 0
    held = True
    for batch in (int(word) for word in arguments.batches.split(",")):
        if arguments.memory:
            held &= memory(replace(shape, batch=batch))
            continue
        got = measure(replace(shape, batch=batch), arguments.strategies.split(","), arguments.rounds)
        for name, ratio in got.items():
            limit = TIME_CLAIMS.get(name, float("inf"))
            held &= claim(f"batch {batch}: CPU seconds, {name} / trunk alone", ratio, limit)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
