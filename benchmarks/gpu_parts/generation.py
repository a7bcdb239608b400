"""Generation on a GPU: the same texts and tokens as on the CPU, its speed beside autoregressive decoding, serving."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import STRATEGIES, LogitsConfig, draw_tokens, get_strategy, sample
from llamafactory_ddm.sampling.budget import split_by_position
from llamafactory_ddm.sampling.edits import Edits

from .machine import Machine
from .models import Shape, make_model
from .report import Report

GREEDY = LogitsConfig(temperature=0.0)
CACHES = ("none", "prefix", "dual", "block")  # block is a block model, with its cache
BLOCK = 8
ROUNDS = 5


def _texts(model: Any, shape: Shape, cache: str, strategy: str, edits: Edits | None) -> Tensor:
    """Return [4, length] int64 on the CPU, texts that continue prompts of 8 tokens, greedily."""
    length = 40 if shape.width > 64 else 24
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, shape.mask_id, (4, length), generator=generator).to(model.device)
    position = torch.arange(length, device=model.device).expand(x.shape)
    editable = position >= 8
    block = None
    if cache == "none":
        denoiser: Any = ModelDenoiser(model, shift=True)
    elif cache == "block":
        denoiser = BlockDenoiser(model, block_length=BLOCK, shift=True)
        block = split_by_position(editable, position, BLOCK, shift=True)
    else:
        denoiser = CachedDenoiser(model, kind=cache, shift=True)  # type: ignore[arg-type]
    try:
        output = sample(
            denoiser,
            x,
            editable=editable,
            mask_id=shape.mask_id,
            steps=BLOCK // 2 if cache == "block" else (length - 8) // 2,
            strategy=get_strategy(strategy),
            block_length=None if cache == "block" else BLOCK,
            block=block,
            logits=GREEDY,
            edits=edits,
        )
    finally:
        denoiser.close()
    return output.sequences.cpu()


def _greedy_cases() -> Iterator[tuple[str, str, Edits | None]]:
    for cache in CACHES:
        for strategy in sorted(STRATEGIES):
            yield cache, strategy, None
        yield cache, "low_confidence", Edits(threshold=0.05, steps=2)
        yield cache, "low_confidence", Edits(ratio=0.2)


def greedy(machine: Machine, report: Report) -> None:
    """Compare greedy texts with the CPU's; in float64 too where they differ, to tell rounding from an error."""
    # Weights of this size give peaked distributions, so that few choices depend on rounding.
    shape = Shape(2, 32, 2, 64, 64, scale=0.4) if machine.is_toy else Shape(4, 256, 4, 1024, 64, scale=0.2)
    models: dict[tuple[str, torch.dtype], Any] = {}

    def texts(device: str, dtype: torch.dtype, case: tuple[str, str, Edits | None]) -> Tensor:
        if (device, dtype) not in models:
            models[device, dtype] = make_model(shape).to(device, dtype).eval()
            make_bidirectional(models[device, dtype])
        cache, strategy, edits = case
        return _texts(models[device, dtype], shape, cache, strategy, edits)

    for case in _greedy_cases():
        cache, strategy, edits = case
        how = "" if edits is None else f", edits by {'ratio' if edits.ratio else 'threshold'}"
        what = f"cache {cache}, {strategy}{how}: texts equal to the CPU's, float32"
        try:
            share, note = _equal(texts(machine.device, torch.float32, case), texts("cpu", torch.float32, case)), ""
            if share < 1.0:
                doubles = _equal(texts(machine.device, torch.float64, case), texts("cpu", torch.float64, case))
                note = f"in float64 {doubles:.3g} of the texts are equal"
            report.add(what, share, at_least=1.0, note=note)
        except Exception as error:  # noqa: BLE001 - the other strategies are measured
            report.fail(what, error)


def _equal(one: Tensor, other: Tensor) -> float:
    """Return the share of equal rows."""
    return float((one == other).all(dim=1).double().mean())


def draws(machine: Machine, report: Report) -> None:
    """Compare tokens drawn on the device with those that the CPU draws from the same logits and numbers.

    The exponential function of a device may differ in the last bit, so a number that falls within rounding of a
    boundary between two tokens may give either.
    """
    rows, vocabularies = (16, (64, 5000)) if machine.is_toy else (512, (1000, 50304, 126464))
    configs = {
        "greedy": GREEDY,
        "plain": LogitsConfig(),
        "top-p 0.9": LogitsConfig(top_p=0.9),
        "temperature 0.7, top-p 0.9": LogitsConfig(0.7, 0.9),
        "top-k 50, top-p 0.9": LogitsConfig(top_p=0.9, top_k=50),
    }
    for vocabulary in vocabularies:
        generator = torch.Generator().manual_seed(vocabulary)
        logits = torch.randn(rows, vocabulary, generator=generator) * 4
        u = torch.rand(rows, 8, dtype=torch.float64, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)
            on_device, numbers = given.to(machine.device), u.to(machine.device)
            for name, config in configs.items():
                what = f"{vocabulary} tokens, {str(dtype).removeprefix('torch.')}, {name}: tokens equal to the CPU's"
                try:
                    expected = draw_tokens(given, config, u).ids
                    got = draw_tokens(on_device, config, numbers).ids.cpu()
                    report.add(what, float((got == expected).double().mean()), at_least=0.995)
                except Exception as error:  # noqa: BLE001 - the other settings are measured
                    report.fail(what, error)


def decoding(machine: Machine, report: Report) -> None:
    """Compare the speed of the samplers of diffusion with autoregressive decoding, as benchmarks/decoding.py does."""
    import decoding as benchmark

    shape = benchmark.Shape(device=machine.device, dtype=torch.bfloat16, logits=GREEDY)
    if machine.is_toy:
        small = {"layers": 1, "width": 64, "vocabulary": 300, "prompt": 12, "written": 8, "block": 4}
        shape = replace(shape, **small)
    for batch, logits, said in ((1, GREEDY, "greedy"), (8, GREEDY, "greedy"), (1, benchmark.LOGITS, "top-p 0.9")):
        used = replace(shape, batch=batch, logits=logits)
        label = f"{used.layers} layers of {used.width}, batch {batch}, {said}"
        runs = {name: decoder.run for name, decoder in benchmark.decoders(used).items()}
        seconds = _interleaved(machine, runs, 1 if machine.is_toy else ROUNDS)
        for name, values in seconds.items():
            rate = batch * used.written / statistics.median(values)
            report.add(f"{label}, {name}: tokens/s", rate, note=f"{used.prompt} given, {used.written} written")
        for name in seconds:
            if name != "ar":
                _report_ratio(report, f"{label}: speed, {name} / autoregressive", seconds["ar"], seconds[name])


def _interleaved(machine: Machine, runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = machine.seconds(run)
            if number:
                seconds[name].append(taken)
    return seconds


def _report_ratio(report: Report, what: str, base: list[float], values: list[float]) -> None:
    ratios = [one / other for one, other in zip(base, values, strict=True)]
    note = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    report.add(what, statistics.median(ratios), note=note)


def serving(machine: Machine, report: Report) -> None:
    """Compare 16 requests at once with one after another, and with LLaMA-Factory's engine (benchmarks/serving.py)."""
    import serving as benchmark
    from llamafactory_ddm.serving import Limits, Server

    count = 4 if machine.is_toy else 16
    names = ("tiny-full", "tiny-block") if machine.is_toy else ("small-full", "small-block")
    for name in names:
        shape = benchmark.SHAPES[name]
        shape = replace(shape, written=8) if machine.is_toy else replace(shape, written=64)
        generator = benchmark.make_generator(
            shape, machine.device, torch.bfloat16 if machine.is_cuda else torch.float32
        )
        requests = benchmark.requests_of(generator, shape, count)
        server = Server(generator, Limits(max_rows=max(count, Limits().max_rows)))
        ways: dict[str, Callable[[], Any]] = {
            "one after another": lambda g=generator, s=server, r=requests: benchmark.serve(g, s, r, at_once=False),
            f"{count} at once": lambda g=generator, s=server, r=requests: benchmark.serve(g, s, r, at_once=True),
        }
        label = f"{name}, {count} requests"
        _report_ways(machine, report, label, ways)
        server.close()
        try:
            with tempfile.TemporaryDirectory() as folder:
                ar = benchmark.autoregressive(shape, folder, "bfloat16" if machine.is_cuda else "float32")
                prompts = benchmark.prompts_of(shape, count)
                _report_ways(machine, report, f"{label}, autoregressive", {"side by side": lambda: ar(prompts, count)})  # noqa: B023
        except Exception as error:  # noqa: BLE001 - the other shape is measured
            report.fail(f"{label}, autoregressive", error)


def _report_ways(machine: Machine, report: Report, label: str, ways: dict[str, Callable[[], Any]]) -> None:
    taken: dict[str, list[Any]] = {way: [] for way in ways}
    for number in range((1 if machine.is_toy else 3) + 1):
        for way, run in ways.items():
            one = run()
            if number:
                taken[way].append(one)
    rates = {way: [one.tokens / one.seconds for one in many] for way, many in taken.items()}
    for way, values in rates.items():
        report.add(f"{label}, {way}: tokens/s", statistics.median(values))
    if len(ways) == 2:
        single, joint = rates.values()
        gains = [one / other for one, other in zip(joint, single, strict=True)]
        report.add(f"{label}: gain in tokens/s of all at once", statistics.median(gains))
