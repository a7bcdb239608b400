"""`do_predict: true`: generate texts, save them as they finish, and compute metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..._version import __version__
from ...checkpoints.weights import weight_files
from ...evaluation.text import exact_match, gsm8k_accuracy, rouge
from ...generation.generator import Generated, TextGenerator
from ...generation.trace import Trace, write_html
from ...sampling import SamplingSettings
from ...utils.files import explain_disk_errors
from ..logs import get_logger
from .progress import Collected, Numbers, Unfinished, barrier, write_predictions
from .requests import Repeated, Request, distinct

logger = get_logger(__name__)

FILE = "generated_predictions.jsonl"
PAGE = "generated_predictions.html"
_UNFINISHED = "generated_predictions.unfinished"
_SHOWN = 3


def generate_all(
    generator: TextGenerator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    training_args: Any,
    *,
    model_folders: Sequence[str] | None,
    save_trace: bool,
) -> dict[str, float]:
    """Generate all requests, sharded across processes, and write the files of the run.

    A text depends only on the seed and its own number, not on the batch, the number of processes or an interruption.
    Finished texts are kept in a folder next to the file, and an interrupted run of the same model, settings and
    requests resumes. Files appear under their names when they are complete.

    Args:
        generator: the model.
        requests: the texts to generate.
        settings: the sampling settings.
        training_args: LLaMA-Factory's.
        model_folders: folders of the model's and the adapters' weights; None if the weights are not on disk, so that
            the run cannot resume.
        save_trace: whether to write generated_predictions.html.
    Returns:
        Metrics, with the prefix `predict_`.
    Raises:
        ValueError: if the settings do not fit the requests.
        OSError: if a file cannot be written.
    """
    rank, world = training_args.process_index, training_args.world_size
    folder = Path(training_args.output_dir)
    most = max(request.canvas.n_editable for request in distinct(requests))
    by_chance = settings.denoising_strategy in ("random", "remdm")
    if settings.diffusion_steps > most and not by_chance:
        logger.info_rank0(
            f"diffusion_steps: {settings.diffusion_steps} is more than the {most} tokens to generate: fewer will do."
        )
    # The first process decides, as saving a model changes its config on that process only.
    fingerprint = _of_first_rank(_fingerprint(generator, requests, settings, model_folders, save_trace), world)
    unfinished = Unfinished(folder / _UNFINISHED, fingerprint, rank, world)
    edits = generator.edits(settings)
    edited = edits.active
    if edited and settings.edit_ratio is None and settings.edit_threshold is None:
        logger.info_rank0(
            f"This model was trained with random tokens among its noise, so it may rewrite what it wrote, by "
            f"edit_ratio: {edits.ratio:g}; edit_ratio: 0 leaves tokens as they are."
        )
    done = unfinished.open(resume=model_folders is not None)
    if done:
        logger.info_rank0(f"{len(done)} of {len(requests)} texts were generated before the run was interrupted.")
    todo: Iterable[int] = _numbers(len(requests), done, rank, world)
    began, tokens = time.perf_counter(), 0
    if settings.early_stop in ("predict", "grow"):
        requests, todo = _sized(generator, requests, todo, settings, training_args)
    progress = _Progress(
        max(0, -(-(len(requests) - len(done) - rank) // world)),
        training_args.per_device_eval_batch_size,
        settings.diffusion_steps if by_chance else min(settings.diffusion_steps, most),
        disable=bool(training_args.disable_tqdm or rank),
    )
    with progress.bar:
        for batch, results in _batches(generator, requests, settings, todo, training_args, save_trace, progress):
            for number, result in zip(batch, results, strict=True):
                unfinished.add(_record(number, requests[number], result, edited=edited))
                tokens += result.n_tokens
            progress.finish(len(batch), tokens)
    seconds, tokens = _over_ranks(time.perf_counter() - began, tokens, world)
    records = unfinished.collect(len(requests))
    metrics = metrics_of(records)
    if rank == 0:
        _publish(folder, records, _facts(generator, settings), save_trace=save_trace)
    barrier(world)  # all have read
    if rank == 0:
        shutil.rmtree(folder / _UNFINISHED)
    barrier(world)
    if tokens:
        metrics["predict_runtime"] = seconds
        metrics["predict_tokens_per_second"] = tokens / seconds
    return metrics


class _Progress:
    """A progress bar of denoising steps; a batch that needs fewer steps than planned jumps to its end."""

    def __init__(self, texts: int, batch: int, steps: int, *, disable: bool) -> None:
        self.bar = tqdm(total=-(-texts // batch) * steps, desc="Denoising", unit="step", disable=disable)
        self._texts, self._steps = texts, steps
        self._done = self._before = 0
        self._began = time.perf_counter()

    def step(self, number: int) -> None:
        """Show that the batch has taken step `number`, counted from 0."""
        self._advance(self._before + min(number + 1, self._steps))

    def finish(self, n_texts: int, tokens: int) -> None:
        """Show that the batch is finished; `tokens` is the total number of generated tokens."""
        self._done += n_texts
        self._before += self._steps
        speed = tokens / (time.perf_counter() - self._began)
        self.bar.set_postfix_str(f"{self._done} of {self._texts} texts, {speed:.0f} tokens/s", refresh=False)
        self._advance(self._before)

    def _advance(self, to: int) -> None:
        self.bar.update(max(0, to - self.bar.n))


def _numbers(count: int, done: Numbers, rank: int, world: int) -> Iterator[int]:
    """Return this process's share of the numbers below `count` that are not done."""
    return itertools.islice((number for number in range(count) if number not in done), rank, None, world)


def _sized(
    generator: TextGenerator,
    requests: Sequence[Request],
    todo: Iterable[int],
    settings: SamplingSettings,
    training_args: Any,
) -> tuple[Sequence[Request], Iterable[int]]:
    """Return the requests with canvases of predicted length, and `todo` sorted by that length.

    Sorting puts texts of similar length into one batch. The length of equal requests is predicted once.
    """
    if isinstance(requests, Repeated):
        alone, _ = _sized(generator, [requests.request], [0], settings, training_args)
        return Repeated(alone[0], len(requests)), todo
    size, result, todo = training_args.per_device_eval_batch_size, list(requests), list(todo)
    if settings.early_stop == "predict":
        reasons = {generator.sizer.why_uncalibrated(settings, requests[number].canvas) for number in todo} - {None}
        for reason in sorted(map(str, reasons)):
            logger.info_rank0(
                f"length_predictor: {settings.length_predictor} is not calibrated, as {reason}; its threshold is "
                f"length_coverage: {settings.length_coverage}."
            )
    for low in range(0, len(todo), size):
        part = todo[low : low + size]
        sized = generator.sized([requests[number].canvas for number in part], settings)
        for number, one in zip(part, sized, strict=True):
            result[number] = dataclasses.replace(
                requests[number], canvas=one.canvas, nfe=one.nfe, computed=one.computed
            )
    before, after = (sum(len(which[number].canvas) for number in todo) for which in (requests, result))
    logger.info_rank0(
        f"early_stop: {settings.early_stop} begins with {100 * after / max(before, 1):.1f} % of the canvases' tokens."
    )
    todo.sort(key=lambda number: len(result[number].canvas))
    return result, todo


def _thresholds(generator: TextGenerator, requests: Sequence[Request], settings: SamplingSettings) -> list[float]:
    """Return the thresholds of the length predictor on the canvases."""
    if settings.early_stop != "predict":
        return []
    return sorted({generator.sizer.threshold(settings, request.canvas) for request in distinct(requests)})


def _batches(
    generator: TextGenerator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    todo: Iterable[int],
    training_args: Any,
    traced: bool,
    progress: _Progress,
) -> Iterator[tuple[list[int], list[Generated]]]:
    """Yield the numbers of each batch, and its generated texts."""
    numbers = iter(todo)
    while batch := list(itertools.islice(numbers, training_args.per_device_eval_batch_size)):
        yield (
            batch,
            generator.sample_batch(
                [requests[number].canvas for number in batch],
                settings,
                sample_indices=batch,
                traced=traced,
                callback=lambda step, pieces: progress.step(step),
            ),
        )


def _record(number: int, request: Request, result: Generated, *, edited: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"number": number}
    if request.prompt is not None:
        record["prompt"] = request.prompt
    record["predict"] = result.predict
    if request.prompt is not None:
        record["text"] = result.text
    if request.label is not None:
        record["label"] = request.label
    record["tokens"], record["forwards"] = result.n_tokens, result.num_forward_passes + request.nfe
    record["computed"] = result.computed + request.computed
    if edited:
        record["edits"] = result.edits
    if result.trace is not None:
        record["trace"] = dataclasses.asdict(result.trace)
    return record


def _publish(folder: Path, records: Collected, facts: dict[str, str], *, save_trace: bool) -> None:
    if not save_trace:
        (folder / PAGE).unlink(missing_ok=True)  # of an earlier run
    else:
        with explain_disk_errors(folder):
            write_html(
                folder / PAGE,
                [
                    Trace(
                        f"sample {number}",
                        tuple(raw["start"]),
                        tuple((step, place, piece) for step, place, piece in raw["events"]),
                        raw["steps"],
                    )
                    for number, raw in ((record["number"], record["trace"]) for record in records)
                ],
                heading="Generated texts",
                facts=facts,
            )
        logger.info_rank0(f"How they came about can be watched in {folder / PAGE}")
    hidden = ("number", "trace")
    write_predictions(
        folder / FILE, ({key: value for key, value in record.items() if key not in hidden} for record in records)
    )
    for number, record in enumerate(itertools.islice(records, _SHOWN)):
        prompt = f"{record['prompt']} >>> " if "prompt" in record else ""
        logger.info_rank0(f"sample {number}:\n{prompt}{record['predict']}")
    logger.info_rank0(f"{len(records)} generated texts are saved at {folder / FILE}")


def _facts(generator: TextGenerator, settings: SamplingSettings) -> dict[str, str]:
    """Return the settings that the page shows."""
    facts = {
        "strategy": settings.denoising_strategy,
        "steps": str(settings.diffusion_steps),
        "temperature": f"{settings.logits.temperature:g}",
        "top-p": f"{settings.logits.top_p:g}",
        "seed": str(settings.seed),
    }
    if settings.block_length is not None:
        facts["block length"] = str(settings.block_length)
    edits = generator.edits(settings)
    if edits.active:
        rule = f"ratio {edits.ratio:g}" if edits.threshold is None else f"from probability {edits.threshold:g}"
        facts["edits"] = rule + (f", {edits.steps} further steps" if edits.steps else "")
    if settings.denoising_strategy == "remdm":
        facts["remask cap"] = f"{settings.remask_cap:g}"
    return facts


def _fingerprint(
    generator: TextGenerator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    model_folders: Sequence[str] | None,
    save_trace: bool,
) -> str:
    """Return a hash of everything that decides the generated texts."""
    files = []
    for folder in model_folders or ():
        for path in weight_files(Path(folder)) if Path(folder).is_dir() else ():
            stat = path.stat()
            files.append([path.name, stat.st_size, stat.st_mtime_ns])
    facts = [
        __version__,
        list(model_folders or ()),
        str(generator.model.dtype),
        files,
        dataclasses.asdict(generator.config),
        generator.model.config.to_dict(),
        getattr(generator.model.config, "_attn_implementation", None),
        getattr(generator.model.config, "_commit_hash", None),
        len(generator.tokenizer),
        dataclasses.asdict(settings),
        _thresholds(generator, requests, settings),
        save_trace,
        len(requests),
        [[one.canvas.ids, one.canvas.editable, one.prompt, one.label] for one in distinct(requests)],
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _over_ranks(seconds: float, tokens: int, world: int) -> tuple[float, int]:
    """Return the longest time and the sum of tokens over all processes."""
    parts: list[Any] = [(seconds, tokens)] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, (seconds, tokens))
    return max(part[0] for part in parts), sum(part[1] for part in parts)


def _of_first_rank(value: str, world: int) -> str:
    """Return the value of the first process."""
    shared: list[Any] = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(shared, src=0)
    return str(shared[0])


def metrics_of(records: Collected) -> dict[str, float]:
    """Return metrics of the records of generated_predictions.jsonl, with the prefix `predict_`.

    Records are read once, and only texts with a label are kept in memory.
    """
    total = dict.fromkeys(("tokens", "forwards", "computed", "edits"), 0)
    predictions: list[str] = []
    labels: list[str] = []
    edited = False
    for record in records:
        for key in total:
            total[key] += record.get(key, 0)
        edited = edited or "edits" in record
        if "label" in record:
            predictions.append(record["predict"])
            labels.append(record["label"])
    metrics: dict[str, float] = {
        "predict_samples": len(records),
        "predict_tokens_per_forward": total["tokens"] / total["forwards"],
        "predict_computed_tokens": total["computed"] / len(records),
    }
    if edited:
        metrics["predict_edits_per_sample"] = total["edits"] / len(records)
    if not labels:
        return metrics
    if len(labels) < len(records):
        metrics["predict_labelled_samples"] = len(labels)
    metrics["predict_exact_match"] = exact_match(predictions, labels)
    accuracy = gsm8k_accuracy(predictions, labels)
    if accuracy is not None:
        metrics["predict_gsm8k_accuracy"] = accuracy
    scores = rouge(predictions, labels)
    if scores is None:
        logger.warning_rank0(
            'ROUGE is left out, as rouge-score is not installed: pip install "llamafactory-ddm[eval]"'
        )
    for name, value in (scores or {}).items():
        metrics[f"predict_{name}"] = value
    return metrics
