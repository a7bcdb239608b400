"""The cost of cached decoding, relative to decoding without a cache and to an autoregressive model with one.

    python benchmarks/decoding.py              the claims: a prompt of 384 tokens, 128 written in blocks of 32, and by
                                               block models in blocks of 8 and 32
    python benchmarks/decoding.py --batch 8
    python benchmarks/decoding.py --batch 8 --decoders block-8
                                               this decoder and `ar` alone
    python benchmarks/decoding.py --quality saves/tiny_gpt2/full/ddm
                                               loss, tokens computed and CPU seconds of texts of a trained model
    python benchmarks/decoding.py --answers saves/tiny_gpt2/full/ddm_sft_block
                                               right answers of a finetuned model, and its time for a token relative to
                                               that of an autoregressive model of its shape

All decoders have the shape of GPT-2 small, random weights (fp32), top-p 0.9, and are timed interleaved in one process.
`ar` computes the prompt once and then one token a pass; the others commit `--per-pass` tokens a pass, two by default,
for which the claims are made. `bare-uncached` and `bare-dual` run similar forward passes and logits with transformers
alone: its `DynamicCache`, causal attention, no sampler. They are a reference for `uncached` and `dual`. Figures are
CPU seconds (process time): the median over rounds of the ratio within a round. The sampler's overhead is what a
decoder takes beyond the forward passes and the output embedding of the tokens asked for, divided by these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import SamplingSettings, load
from llamafactory_ddm.evaluation.quality import Judge
from llamafactory_ddm.evaluation.text import gsm8k_accuracy
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.model_runner import ModelRunner
from llamafactory_ddm.sampling import LogitsConfig, draw_tokens, get_strategy, sample
from llamafactory_ddm.sampling.budget import split_by_position

ROOT = Path(__file__).resolve().parents[1]
LOGITS = LogitsConfig(temperature=0.95, top_p=0.9)
# (decoder, baseline, upper bound on the ratio of their CPU seconds; None: printed only)
TIME_CLAIMS: tuple[tuple[str, str, float | None], ...] = (
    ("prefix", "uncached", 0.40),
    ("dual", "uncached", 0.30),
    ("bare-dual", "bare-uncached", None),
    ("uncached", "bare-uncached", 1.20),
    ("dual", "bare-dual", 1.20),
    ("block-8", "ar", 1.10),
)
OVERHEAD_CLAIM = 0.15
BLOCKS = (8, 32)  # of block models
DIFFUSION = ("uncached", "prefix", "dual", *(f"block-{length}" for length in BLOCKS))
BARE = ("bare-uncached", "bare-dual")
DECODERS = (*DIFFUSION, *BARE)


@dataclass(frozen=True)
class Shape:
    """The model and the run: a GPT-2 of `layers` x `width` that continues `batch` prompts by `written` tokens.

    `device` and `dtype` are those of the model, and `logits` says how tokens are drawn.
    """

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    prompt: int = 384
    written: int = 128
    block: int = 32
    per_pass: int = 2
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    logits: LogitsConfig = LOGITS

    @property
    def prompts(self) -> Tensor:
        """Return [batch, prompt] int64, random ids."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (self.batch, self.prompt), generator=generator).to(self.device)

    @property
    def canvas(self) -> Tensor:
        """Return [batch, prompt + written] int64, the prompts and room for what is written."""
        return torch.cat([self.prompts, self.prompts.new_zeros(self.batch, self.written)], dim=1)


@dataclass
class Decoder:
    """One way to write the texts.

    Attributes:
        run: writes them once, and returns the tokens that went through the model.
        model: its model.
        own: CPU seconds of forward passes and output embeddings in the last run.
    """

    run: Callable[[], int]
    model: GPT2LMHeadModel
    own: float = field(default=0.0)

    def seconds(self) -> tuple[float, int]:
        """Return the CPU seconds of a run and the tokens that went through the model; set `own`."""
        self.own = 0.0
        with self._timed():
            before = time.process_time()
            computed = self.run()
            return time.process_time() - before, computed

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Within the block, add up the time of the model's own work in `own`."""
        forward, projected = self.model.forward, ModelRunner.project

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.process_time()
            output = forward(*args, **kwargs)
            self.own += time.process_time() - before
            return output

        @contextmanager
        def timed_projection(runner: ModelRunner, hidden: Tensor, outputs: int | None) -> Iterator[Tensor]:
            before = time.process_time()
            with projected(runner, hidden, outputs) as logits:
                self.own += time.process_time() - before
                yield logits

        self.model.forward = timed  # type: ignore[method-assign]
        ModelRunner.project = timed_projection  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.model.forward = forward  # type: ignore[method-assign]
            ModelRunner.project = projected  # type: ignore[method-assign]


def make_model(shape: Shape) -> GPT2LMHeadModel:
    """Return a causal GPT-2 with random weights, the same each time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocabulary + 1,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=max(1, shape.width // 64),
        n_positions=shape.prompt + shape.written,
    )
    with torch.device(shape.device):
        return GPT2LMHeadModel(config).eval().to(shape.dtype)


def autoregressive(shape: Shape) -> Decoder:
    """Return the autoregressive model of the same shape, which writes one token a pass."""
    model = make_model(shape)
    fuse_gelu(model)  # as in the others

    @torch.inference_mode()
    def run() -> int:
        generator, cache, ids = torch.Generator().manual_seed(0), None, shape.prompts
        for _ in range(shape.written):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            u = torch.rand(shape.batch, 8, dtype=torch.float64, generator=generator).to(shape.device)
            ids, cache = draw_tokens(output.logits[:, -1], shape.logits, u).ids[:, None], output.past_key_values
        return shape.batch * (shape.prompt + shape.written - 1)

    return Decoder(run, model)


def full_attention(shape: Shape, kind: str) -> Decoder:
    """Return a diffusion model with full attention; `kind` is `uncached`, `prefix` or `dual`."""
    model = make_model(shape)
    make_bidirectional(model)
    fuse_gelu(model)
    x = shape.canvas
    editable = torch.zeros_like(x, dtype=torch.bool)
    editable[:, shape.prompt :] = True

    def run() -> int:
        plain = kind == "uncached"
        denoiser = ModelDenoiser(model, shift=True) if plain else CachedDenoiser(model, kind=kind, shift=True)  # type: ignore[arg-type]
        output = sample(
            denoiser,
            x,
            editable=editable,
            mask_id=shape.vocabulary,
            steps=shape.written // shape.per_pass,
            strategy=get_strategy("low_confidence"),
            block_length=shape.block,
            logits=shape.logits,
        )
        denoiser.close()
        return output.computed

    return Decoder(run, model)


def block_model(shape: Shape, length: int) -> Decoder:
    """Return a shifted model with block attention, in blocks of `length`; a pass for the first token of each block."""
    model = make_model(shape)
    make_bidirectional(model)
    fuse_gelu(model)
    x = shape.canvas
    position = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    editable = position >= shape.prompt

    def run() -> int:
        denoiser = BlockDenoiser(model, block_length=length, shift=True)
        output = sample(
            denoiser,
            x,
            editable=editable,
            mask_id=shape.vocabulary,
            steps=max(length // shape.per_pass - 1, 1),
            strategy=get_strategy("low_confidence"),
            block=split_by_position(editable, position, length, shift=True),
            logits=shape.logits,
        )
        denoiser.close()
        return output.computed

    return Decoder(run, model)


def bare(shape: Shape, kind: str) -> Decoder:
    """Return passes like those of `uncached` or `dual` (`kind`) by transformers alone, without a sampler.

    Each computes logits for the last n columns, where n is the number of masks left in the block. With `dual`, the
    first pass of a block computes all columns, and later ones the last `block`; `dual` itself sometimes computes one
    more, because of the shift. Otherwise than there, attention is causal, the cache copies keys and values in each
    pass, and few logits are not padded to a faster number of rows.

    `per_pass` must divide `block`, and `block` must divide `written`.
    """
    model = make_model(shape)
    fuse_gelu(model)  # as in the others

    @torch.inference_mode()
    def run() -> int:
        ids, cache, computed = shape.canvas, None, 0
        for n_written in range(0, shape.written, shape.per_pass):
            n_masked = shape.block - n_written % shape.block
            if kind == "uncached":
                fresh = ids
            elif n_masked == shape.block or cache is None:
                fresh, cache = ids, DynamicCache()
            else:
                fresh = ids[:, : shape.block]
                cache.crop(ids.shape[1] - shape.block)
            model(input_ids=fresh, past_key_values=cache, use_cache=cache is not None, logits_to_keep=n_masked)
            computed += fresh.numel()
        return computed

    return Decoder(run, model)


def decoders(shape: Shape, names: Sequence[str]) -> dict[str, Decoder]:
    """Return `ar` and the decoders `names`."""
    ways = {"ar": autoregressive(shape)}
    for name in names:
        if name in BARE:
            ways[name] = bare(shape, name.removeprefix("bare-"))
        elif name.startswith("block-"):
            ways[name] = block_model(shape, int(name.removeprefix("block-")))
        else:
            ways[name] = full_attention(shape, name)
    return ways


def claim(text: str, value: float, limit: float | None = None) -> bool:
    """Print one line; return whether the claim holds, if there is one."""
    if limit is None:
        print(f"{text:<58} {value:8.2f}", flush=True)
        return True
    print(f"{text:<58} {value:8.2f}  claimed <= {limit:.2f}  {'held' if value <= limit else 'BROKEN'}", flush=True)
    return value <= limit


def measure(shape: Shape, rounds: int, names: Sequence[str] = DECODERS) -> bool:
    """Time `ar` and the decoders `names`, and print their ratios; return whether every claim holds."""
    ways = decoders(shape, names)
    warm = Shape(**{**shape.__dict__, "written": shape.block})
    for decoder in decoders(warm, names).values():
        decoder.run()
    seconds: list[dict[str, float]] = []
    own: list[dict[str, float]] = []
    overheads: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, int] = {}
    for _ in range(rounds):
        seconds.append({})
        own.append({})
        for name, decoder in ways.items():
            seconds[-1][name], computed[name] = decoder.seconds()
            own[-1][name] = decoder.own
            overheads[name].append(seconds[-1][name] / decoder.own - 1)

    def ratio(name: str, base: str) -> float:
        return statistics.median(each[name] / each[base] for each in seconds)

    label = f"batch {shape.batch}:"
    for name in ways:
        columns = computed[name] / (shape.batch * shape.written)
        claim(f"{label} tokens computed for each written, {name}", columns)
    held = True
    for name, base, limit in TIME_CLAIMS:
        if not {name, base} <= set(ways):
            continue
        bound = limit if shape.per_pass == Shape.per_pass else None
        held &= claim(f"{label} CPU seconds, {name} / {base}", ratio(name, base), bound)
    for name in names:
        claim(f"{label} CPU seconds, {name} / ar", ratio(name, "ar"))
    diffusion = [name for name in names if name not in BARE]
    for name in diffusion:
        claim(f"{label} the model alone, {name} / ar", statistics.median(each[name] / each["ar"] for each in own))
    for name in diffusion:
        held &= claim(f"{label} sampler beyond the model, {name}", statistics.median(overheads[name]), OVERHEAD_CLAIM)
    return held


PACES: dict[str, dict[str, Any]] = {
    "64 steps": {"diffusion_steps": 64},
    "32 steps": {"diffusion_steps": 32},
    "confidence_threshold 0.9": {"diffusion_steps": 64, "denoising_strategy": "confidence_threshold"},
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": {"kv_cache": "prefix"},
    "dual": {"kv_cache": "dual"},
    "dual, refresh 8": {"kv_cache": "dual", "cache_refresh": 8},
}


# Of a block model: steps of a block, and the caches that it takes.
BLOCK_PACES: dict[str, dict[str, Any]] = {
    "a token a step": {"diffusion_steps": 64},
    "2 steps a block": {"diffusion_steps": 2},
    "1 step a block": {"diffusion_steps": 1},
    "confidence_threshold 0.9": {"denoising_strategy": "confidence_threshold"},
    "confidence_threshold 0.7": {"denoising_strategy": "confidence_threshold", "confidence_threshold": 0.7},
}
BLOCK_CACHES = {name: CACHES[name] or {"kv_cache": name} for name in ("none", "prefix")}


def quality(checkpoint: str, samples: int, seed: int) -> None:
    """Print the loss of the built-in autoregressive model on texts of 64 tokens, and their cost.

    A model with full attention writes blocks of 16, a block model its own.
    """
    model = load(checkpoint)
    judge = Judge(
        AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_gpt2", dtype=torch.float32),
        AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2"),
    )
    canvases = [model.from_noise(65)] * samples
    print("| pace | cache | loss | tokens computed for each written | tokens per forward pass | CPU seconds |")
    print("|---|---|---|---|---|---|")
    is_full = model.config.train_block_length is None
    for pace, pace_keys in (PACES if is_full else BLOCK_PACES).items():
        for cache, cache_keys in (CACHES if is_full else BLOCK_CACHES).items():
            settings = SamplingSettings(
                logits=LogitsConfig(0.8, 0.95),
                block_length=16 if is_full else None,
                seed=seed,
                **pace_keys,
                **cache_keys,
            )
            before = time.process_time()
            made = model.sample_batch(canvases, settings, sample_indices=range(samples))
            taken = time.process_time() - before
            judged = judge.score([text.predict for text in made])
            loss = sum(text.nll for text in judged) / sum(text.n_scored for text in judged)
            written = sum(text.n_tokens for text in made)
            columns = sum(text.computed for text in made) / written
            rate = written / sum(text.num_forward_passes for text in made)
            print(f"| {pace} | {cache} | {loss:.3f} | {columns:.1f} | {rate:.2f} | {taken:.1f} |", flush=True)


def answers(checkpoint: str, questions: int, rounds: int) -> None:
    """Print how many built-in problems a finetuned model solves, and its CPU time for a token of its answers.

    It unmasks by confidence_threshold, greedily. The baseline has the same weights with causal attention and
    transformers' KV cache: it computes prompts of the mean length, then one token a pass, as many as the answers have,
    and a pass for EOS. The two take turns; the ratios are the median and the range over rounds.
    """
    lines = (ROOT / "data" / "tiny_problems_eval.jsonl").read_text(encoding="utf-8").splitlines()[:questions]
    problems = [json.loads(line) for line in lines]
    prompts = [one["instruction"] for one in problems]
    model, baseline = load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    fuse_gelu(baseline)  # as in the model
    n_ids = sum(len(model.tokenizer(prompt).input_ids) for prompt in prompts) // len(prompts)

    def solve(batch: int) -> tuple[float, list[Any]]:
        before = time.process_time()
        keys: dict[str, Any] = {"temperature": 0, "denoising_strategy": "confidence_threshold"}
        written = list(model.stream(prompts, max_new_tokens=32, batch_size=batch, **keys))
        return (time.process_time() - before) / max(sum(one.n_tokens for one in written), 1), written

    @torch.inference_mode()
    def write(batch: int, n_tokens: int) -> float:
        before = time.process_time()
        for low in range(0, len(prompts), batch):
            rows = min(batch, len(prompts) - low)
            ids, cache = torch.randint(0, len(model.tokenizer), (rows, n_ids)), None
            for _ in range(n_tokens + 1):
                output = baseline(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
        return (time.process_time() - before) / (n_tokens * len(prompts))

    print("| batch | right answers, % | tokens per forward pass | ms a token | relative to the autoregressive model |")
    print("|---|---|---|---|---|")
    for batch in (1, 8):
        _, written = solve(batch)
        n_tokens = sum(one.n_tokens for one in written)
        mean = max(round(n_tokens / len(prompts)), 1)
        write(batch, mean)
        pairs = [(solve(batch)[0], write(batch, mean)) for _ in range(rounds)]
        ratios = [own / other for own, other in pairs]
        right = gsm8k_accuracy([one.predict for one in written], [one["output"] for one in problems])
        rate = n_tokens / sum(one.num_forward_passes for one in written)
        assert right is not None
        cells = (f"{right:.1f}", f"{rate:.2f}", f"{1000 * statistics.median(own for own, _ in pairs):.2f}")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {batch} | {' | '.join(cells)} | {spread} |", flush=True)


def main() -> int:
    """Run the benchmark that the command line names; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality", metavar="CHECKPOINT")
    parser.add_argument("--answers", metavar="CHECKPOINT")
    parser.add_argument("--questions", type=int, default=64, help="problems for --answers")
    parser.add_argument("--samples", type=int, default=64, help="texts for --quality")
    parser.add_argument("--seed", type=int, default=42, help="of the texts for --quality")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS, help="those beside `ar`")
    sizes = {name: value for name, value in Shape().__dict__.items() if isinstance(value, int)}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quality:
        quality(arguments.quality, arguments.samples, arguments.seed)
        return 0
    if arguments.answers:
        answers(arguments.answers, arguments.questions, arguments.rounds)
        return 0
    shape = Shape(**{name: getattr(arguments, name) for name in sizes})
    if set(BARE) & set(arguments.decoders) and (shape.block % shape.per_pass or shape.written % shape.block):
        parser.error(
            "--decoders: bare-… needs --per-pass to divide --block, and --block to divide --written; name only others"
        )
    return 0 if measure(shape, arguments.rounds, arguments.decoders) else 1


if __name__ == "__main__":
    sys.exit(main())
