"""What serving gains and costs: one batch for many requests, its overhead, and the time to the first token.

    python benchmarks/serving.py                       the claims, and upstream's engine beside them
    python benchmarks/serving.py --shapes tiny-block --rounds 5

For each shape, `--requests` requests of random prompts go to the server all at once, and one after another; both are
timed interleaved in one process, and a ratio is the median over rounds of the ratio within a round. Models have random
weights (fp32), and EOS is never drawn. `tiny` has the size of the built-in model and `small` that of GPT-2 small; a
block model decodes blocks of 4 positions, or of 2 (`pairs`), and a full one the whole canvas. All commit two tokens a
pass, `pairs` one.

`ceiling` is how much faster the model alone computes the rows of 16 requests in one pass than in 16; a gain beyond it
is work of the sampler that a batch saves. The overhead is what the server takes beyond the forward passes and the
output embeddings, divided by these. `ar` is the autoregressive model of the same shape in LLaMA-Factory's own engine,
with MAX_CONCURRENT=1 and 16. Tokens a second and times to the first text are wall time; the other figures are CPU
seconds (process time), which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llamafactory_ddm import SamplingSettings, TextGenerator
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.model_runner import ModelRunner
from llamafactory_ddm.sampling import LogitsConfig
from llamafactory_ddm.serving import Answer, Failure, Limits, Progress, Request, Server

EOS, MASK, LETTERS = "<|endoftext|>", "<|mask|>", "abcdefghij"
TEMPERATURE, TOP_P = 0.95, 0.9
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Shape:
    """A GPT-2 that answers prompts of `prompt` tokens with `written` tokens, in blocks of `block` or all at once.

    Attributes:
        gain: lower bound on the gain in tokens/s of all requests at once, or None.
        overhead: upper bound on the server's overhead with all requests at once, or None.
    """

    layers: int
    width: int
    vocabulary: int
    block: int | None = None
    prompt: int = 16
    written: int = 32
    gain: float | None = None
    overhead: float | None = None

    @property
    def steps(self) -> int:
        """Number of steps of a block, or of the whole canvas, that commit two tokens each."""
        return max((self.block or self.written) // 2 - (self.block is not None), 1)


TINY = Shape(layers=4, width=192, vocabulary=740)
SMALL = Shape(layers=12, width=768, vocabulary=50257)
SHAPES = {
    "tiny-full": TINY,
    "tiny-block": replace(TINY, block=4, gain=3.0),
    "small-full": replace(SMALL, overhead=0.10),
    "small-block": replace(SMALL, block=4, overhead=0.15),
    "small-pairs": replace(SMALL, block=2, gain=4.0, overhead=0.15),
}
FIRST_TEXT_BLOCKS, N_FIRST_TEXTS = (4, 8, 16, 32), 8


def make_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer of `vocabulary` tokens, EOS, `LETTERS` and words, with a mask token after them."""
    pieces = [EOS, *LETTERS, *(f"Ġw{number}" for number in range(vocabulary - 1 - len(LETTERS)))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    made.add_tokens([MASK], special_tokens=True)
    return made


def make_model(shape: Shape) -> GPT2LMHeadModel:
    """Return a causal GPT-2 with random weights, the same each time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocabulary + 1,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=max(1, shape.width // 64),
        n_positions=shape.prompt + shape.written + 16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def make_generator(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextGenerator:
    """Return a diffusion model of a shape."""
    model = make_model(shape).to(device, dtype)
    make_bidirectional(model)
    fuse_gelu(model)
    config = DiffusionConfig(MASK, shape.vocabulary, True, "masked", 0.0, "linear", 1.0)
    if shape.block is not None:
        config = replace(config, attention="block", train_block_length=shape.block)
    return TextGenerator(model, make_tokenizer(shape.vocabulary), config)


def prompts_of(shape: Shape, count: int) -> list[str]:
    """Return `count` random prompts of `shape.prompt` tokens, a letter each."""
    draw = random.Random(0)
    return ["".join(draw.choices(LETTERS, k=shape.prompt)) for _ in range(count)]


def requests_of(generator: TextGenerator, shape: Shape, count: int, **keys: Any) -> list[Request]:
    """Return a request for each prompt; `keys` are sampling settings."""
    logits = LogitsConfig(TEMPERATURE, TOP_P, suppress=tuple(generator.eos_ids))
    settings = SamplingSettings(diffusion_steps=shape.steps, logits=logits)
    return [
        Request(generator.from_prompt(prompt, shape.written), replace(settings, seed=seed, **keys))
        for seed, prompt in enumerate(prompts_of(shape, count))
    ]


@dataclass
class Taken:
    """What a run took.

    Attributes:
        seconds: wall time.
        cpu: CPU seconds.
        own: those of forward passes and output embeddings.
        tokens: number of tokens written.
        passes: number of forward passes.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    own: float = 0.0
    tokens: int = 0
    passes: int = 0


@contextmanager
def timed_model(generator: TextGenerator, taken: Taken) -> Iterator[None]:
    """Within the block, add up the CPU time of the model's own work in `taken`."""
    forward, project = generator.model.forward, ModelRunner.project

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        before = time.process_time()
        output = forward(*args, **kwargs)
        taken.own += time.process_time() - before
        taken.passes += 1
        return output

    @contextmanager
    def timed_projection(runner: ModelRunner, *args: Any) -> Iterator[Any]:
        before = time.process_time()
        with project(runner, *args) as logits:
            taken.own += time.process_time() - before
            yield logits

    generator.model.forward = timed_forward
    ModelRunner.project = timed_projection  # type: ignore[method-assign]
    try:
        yield
    finally:
        generator.model.forward = forward
        ModelRunner.project = project  # type: ignore[method-assign]


@contextmanager
def timed(taken: Taken) -> Iterator[None]:
    """Within the block, take the time of all that this process does."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    taken.seconds, taken.cpu = time.perf_counter() - wall, time.process_time() - cpu


def serve(generator: TextGenerator, server: Server, requests: Sequence[Request], *, at_once: bool) -> Taken:
    """Answer requests all at once, or one after another.

    Raises:
        Exception: what a request failed with.
    """
    taken = Taken()
    with timed(taken), timed_model(generator, taken):
        for part in [requests] if at_once else [[request] for request in requests]:
            taken.tokens += sum(answer.completion_tokens for answer in answers(server, part))
    return taken


def answers(server: Server, requests: Sequence[Request]) -> list[Answer]:
    """Submit requests and wait for all answers.

    Raises:
        Exception: what a request failed with.
    """
    done: list[Answer | Failure] = []
    is_over = threading.Event()

    def on_event(event: Any) -> None:
        if not isinstance(event, Progress):
            done.append(event)
            if len(done) == len(requests):
                is_over.set()

    for request in requests:
        server.submit(request, on_event)
    is_over.wait()
    for event in done:
        if isinstance(event, Failure):
            raise event.error
    return [event for event in done if isinstance(event, Answer)]


def seconds_to_first_text(server: Server, request: Request) -> tuple[float, float]:
    """Return the seconds from a request to its first piece of text, and to its answer.

    Raises:
        Exception: what the request failed with.
    """
    times: list[float] = []
    is_over = threading.Event()
    before = time.perf_counter()

    def on_event(event: Any) -> None:
        if isinstance(event, Failure) or not isinstance(event, Progress) or (event.text and not times):
            times.append(time.perf_counter() - before)
        if not isinstance(event, Progress):
            is_over.set()

    server.submit(request, on_event)
    is_over.wait()
    return times[0], times[-1]


@torch.inference_mode()
def forward_seconds(shape: Shape, batch: int, repeats: int) -> float:
    """Return the median CPU seconds of a forward pass of `batch` rows: of the canvas, or of a block after a prompt."""
    model = make_model(shape).transformer
    columns = shape.block or shape.prompt + shape.written
    ids, taken, cache = torch.zeros(batch, columns, dtype=torch.int64), [], DynamicCache()
    if shape.block is not None:
        model(torch.zeros(batch, shape.prompt, dtype=torch.int64), past_key_values=cache, use_cache=True)
    for _ in range(repeats + 1):
        before = time.process_time()
        model(ids, past_key_values=cache if shape.block else None, use_cache=shape.block is not None)
        taken.append(time.process_time() - before)
        cache.crop(shape.prompt)
    return statistics.median(taken[1:])


def autoregressive(shape: Shape, folder: str, dtype: str = "float32") -> Callable[[Sequence[str], int], Taken]:
    """Return a function that answers prompts by LLaMA-Factory's engine, so many of them side by side."""
    from llamafactory.chat import ChatModel

    model = make_model(shape)
    model.save_pretrained(folder)
    make_tokenizer(shape.vocabulary).save_pretrained(folder)
    chat = ChatModel(
        {
            "model_name_or_path": folder,
            "template": "empty",
            "infer_dtype": dtype,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
        }
    )

    async def all_of(prompts: Sequence[str], concurrent: int) -> int:
        chat.engine.semaphore = asyncio.Semaphore(concurrent)  # what MAX_CONCURRENT sets
        made = [chat.achat([{"role": "user", "content": p}], max_new_tokens=shape.written) for p in prompts]
        return sum(each[0].response_length for each in await asyncio.gather(*made))

    def run(prompts: Sequence[str], concurrent: int) -> Taken:
        taken = Taken()
        with timed(taken):
            taken.tokens = asyncio.run_coroutine_threadsafe(all_of(prompts, concurrent), chat._loop).result()
        return taken

    return run


def claim(text: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> bool:
    """Print one line; return whether the claim holds, if there is one."""
    line, held = f"{text:<62} {value:8.3g}", True
    for sign, limit, holds in ((">=", at_least, value >= (at_least or 0)), ("<=", at_most, value <= (at_most or 0))):
        if limit is not None:
            line, held = f"{line}  claimed {sign} {limit:.2f}  {'held' if holds else 'BROKEN'}", holds
    print(line, flush=True)
    return held


def measure(name: str, shape: Shape, arguments: argparse.Namespace) -> bool:
    """Time one shape in all ways and print the figures; return whether every claim holds."""
    count = arguments.requests
    alone = {batch: forward_seconds(shape, batch, 2 * arguments.rounds) for batch in (*BATCHES, count)}
    for batch in BATCHES:
        claim(f"{name}: CPU milliseconds of a forward pass, {batch} rows", 1000 * alone[batch])
    generator, prompts = make_generator(shape), prompts_of(shape, count)
    requests = requests_of(generator, shape, count)
    runs: dict[str, list[Taken]] = {}
    server = Server(generator, Limits(max_rows=max(count, Limits().max_rows)))
    with tempfile.TemporaryDirectory() as folder:
        ar = autoregressive(shape, folder)
        ways: dict[str, Callable[[], Taken]] = {
            "one after another": lambda: serve(generator, server, requests, at_once=False),
            f"{count} at once": lambda: serve(generator, server, requests, at_once=True),
            "ar, one after another": lambda: ar(prompts, 1),
            f"ar, {count} at once": lambda: ar(prompts, count),
        }
        answers(server, requests[:2])  # the first calls are slower
        ar(prompts[:1], 1)
        for _ in range(arguments.rounds):
            for way, run in ways.items():
                runs.setdefault(way, []).append(run())
    server.close()
    return report(name, shape, runs, count * alone[1] / alone[count])


def report(name: str, shape: Shape, runs: dict[str, list[Taken]], ceiling: float) -> bool:
    """Print what the rounds of all ways took, and their ratios; return whether every claim holds."""
    single, joint, ar_single, ar_joint = runs

    def gain(way: str, base: str) -> float:
        pairs = zip(runs[way], runs[base], strict=True)
        return statistics.median((b.cpu / b.tokens) / (a.cpu / a.tokens) for a, b in pairs)

    for way, rounds in runs.items():
        claim(f"{name}: tokens a second, {way}", statistics.median(each.tokens / each.seconds for each in rounds))
    for way, rounds in runs.items():
        claim(f"{name}: CPU seconds of all answers, {way}", statistics.median(each.cpu for each in rounds))
    for way in (single, joint):
        claim(f"{name}: forward passes, {way}", runs[way][0].passes)
    claim(f"{name}: ceiling of the gain", ceiling)
    held = claim(f"{name}: gain, {joint} over {single}", gain(joint, single), at_least=shape.gain)
    claim(f"{name}: gain, {single} over {ar_single}", gain(single, ar_single))
    claim(f"{name}: gain, {joint} over {ar_joint}", gain(joint, ar_joint))
    for way, limit in ((single, None), (joint, shape.overhead)):
        overhead = statistics.median(each.cpu / each.own - 1 for each in runs[way])
        held &= claim(f"{name}: server beyond the model, {way}", overhead, at_most=limit)
    return held


def measure_first_text(name: str, shape: Shape) -> None:
    """Print the time to the first text by block length, of block models or of a full one that decodes in blocks.

    A model with random weights is certain of no position, so the order within a block is random, and means are taken.
    """
    for length in FIRST_TEXT_BLOCKS:
        if length > shape.written:
            continue
        used = replace(shape, block=length if shape.block else None)
        generator = make_generator(used)
        keys = {"denoising_strategy": "random", "block_length": None if shape.block else length}
        first, *requests = requests_of(generator, used, 1 + N_FIRST_TEXTS, **keys)
        server = Server(generator)
        answers(server, [first])  # the first call is slower
        times = [seconds_to_first_text(server, request) for request in requests]
        server.close()
        until_text, until_end = (statistics.mean(each) for each in zip(*times, strict=True))
        claim(f"{name}: milliseconds to the first text, blocks of {length}", 1000 * until_text)
        claim(f"{name}: share of the whole answer, blocks of {length}", until_text / until_end)


def main() -> int:
    """Run the benchmark; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--written", type=int, help="tokens of an answer, in place of the shape's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    held = True
    for name in arguments.shapes:
        shape = SHAPES[name] if arguments.written is None else replace(SHAPES[name], written=arguments.written)
        held &= measure(name, shape, arguments)
        if shape.block in (None, FIRST_TEXT_BLOCKS[0]):
            measure_first_text(name, shape)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
