"""Generation on a GPU: the same texts and tokens as on the CPU, its speed beside autoregressive decoding, serving."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llamafactory_ddm.modeling.activations import fuse_gelu
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
            fuse_gelu(models[device, dtype])
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
    large = shape if machine.is_toy else replace(shape, layers=16, width=2048)  # 0.9B weights
    for used, said in (
        (shape, "greedy"),
        (large, "greedy"),
        (replace(large, batch=8), "greedy"),
        (replace(shape, logits=benchmark.LOGITS), "top-p 0.9"),
    ):
        for decoder in benchmark.decoders(replace(used, written=used.block), benchmark.DIFFUSION).values():
            decoder.run()  # the first calls are slower
        decoders = benchmark.decoders(used, benchmark.DIFFUSION)
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(1 if machine.is_toy else 3):
            for name, decoder in decoders.items():
                seconds[name].append(machine.seconds(decoder.run))
        label = f"GPT-2, {used.layers} layers of {used.width}, batch {used.batch}, {said}"
        for name, values in seconds.items():
            rate = used.batch * used.written / statistics.median(values)
            report.add(f"{label}, {name}: tokens/s", rate, note=f"{used.prompt} given, {used.written} written")
        for name in seconds:
            if name != "ar":
                _report_ratio(report, f"{label}: speed, {name} / autoregressive", seconds["ar"], seconds[name])
        del decoders, decoder
        machine.release()


def _report_ratio(report: Report, what: str, base: list[float], values: list[float]) -> None:
    ratios = [one / other for one, other in zip(base, values, strict=True)]
    note = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    report.add(what, statistics.median(ratios), note=note)


def serving(machine: Machine, report: Report) -> None:
    """Compare 16 requests at once with one after another, and with LLaMA-Factory's engine (benchmarks/serving.py)."""
    import serving as benchmark
    from llamafactory_ddm.serving import Limits, Server

    count, dtype = (4, "float32") if machine.is_toy else (16, "bfloat16")
    for name in ("tiny-full", "tiny-block") if machine.is_toy else ("small-full", "small-block"):
        shape = benchmark.SHAPES[name]
        if machine.is_toy:
            shape = replace(shape, written=8)
        label = f"{name}, {count} requests"
        generator = benchmark.make_generator(shape, machine.device, getattr(torch, dtype))
        requests, prompts = benchmark.requests_of(generator, shape, count), benchmark.prompts_of(shape, count)
        with closing(Server(generator, Limits(max_rows=max(count, Limits().max_rows)))) as server:
            benchmark.answers(server, requests[:2])  # the first calls are slower
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(1 if machine.is_toy else 3):
                for at_once, values in rates.items():
                    taken = benchmark.serve(generator, server, requests, at_once=at_once)
                    values.append(taken.tokens / taken.seconds)
        single, joint = rates.values()
        report.add(f"{label}, one after another: tokens/s", statistics.median(single))
        report.add(f"{label}, at once: tokens/s", statistics.median(joint))
        _report_ratio(report, f"{label}: gain of all at once", joint, single)
        try:
            with tempfile.TemporaryDirectory() as folder:
                ar = benchmark.autoregressive(shape, folder, dtype)
                ar(prompts[:1], 1)
                taken = ar(prompts, count)
            report.add(f"{label}, LLaMA-Factory's engine, autoregressive: tokens/s", taken.tokens / taken.seconds)
        except Exception as error:  # noqa: BLE001 - the other shape is measured
            report.fail(f"{label}, LLaMA-Factory's engine", error)
