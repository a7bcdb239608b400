"""`do_predict: true`: generate the requested texts, save each when it is finished, and compute metrics."""

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

from tqdm.auto import tqdm

from ..._version import __version__
from ...checkpoints.weights import weight_files
from ...data.canvas import Canvas
from ...evaluation.text import exact_match, gsm8k_accuracy, rouge
from ...generation.generator import Generated, TextGenerator
from ...generation.trace import Trace, write_html
from ...sampling import SamplingSettings
from ...utils.files import explain_disk_errors
from ...utils.processes import barrier, broadcast_from_first, gather
from ..logs import get_logger
from .prediction_log import IndexSet, OrderedRecords, PredictionLog, write_predictions
from .requests import Repeated, Request, distinct

logger = get_logger(__name__)

FILE = "generated_predictions.jsonl"
PAGE = "generated_predictions.html"
_LOG_FOLDER = "generated_predictions.unfinished"
_NUM_LOGGED_SAMPLES = 3


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

    A text depends only on the seed and its sample index, not on the batch, the number of processes or an interruption.
    Finished texts are kept in the folder generated_predictions.unfinished, from which an interrupted run of the same
    model, settings and requests resumes. The files of the run are written when all texts are finished.

    Args:
        generator: the model.
        requests: the texts to generate.
        settings: the sampling settings.
        training_args: LLaMA-Factory's.
        model_folders: folders of the model's and the adapters' weights; None if the weights are not on disk, and then
            an interrupted run starts again.
        save_trace: whether to write generated_predictions.html.
    Returns:
        Metrics, with the prefix `predict_`.
    Raises:
        ValueError: if the settings do not fit the requests.
        OSError: if a file cannot be written.
    """
    rank, world = training_args.process_index, training_args.world_size
    folder = Path(training_args.output_dir)
    canvases = [request.canvas for request in distinct(requests)]
    _log_surplus_steps(generator, canvases, settings)
    # The first process decides, as saving a model changes its config on that process only.
    fingerprint = broadcast_from_first(_fingerprint(generator, requests, settings, model_folders, save_trace), world)
    log = PredictionLog(folder / _LOG_FOLDER, fingerprint, rank, world)
    edits = generator.edits(settings)
    if edits.active and settings.edit_ratio is None and settings.edit_threshold is None:
        logger.info_rank0(
            f"Editing is on with edit_ratio: {edits.ratio:g}, the default for a model trained with noise_process: "
            "mixed; edit_ratio: 0 turns it off."
        )
    finished = log.open(resume=model_folders is not None)
    if finished:
        logger.info_rank0(f"Resuming: {len(finished)} of {len(requests)} texts are finished already.")
    pending: Iterable[int] = _pending_indices(len(requests), finished, rank, world)
    start_time, tokens = time.perf_counter(), 0
    if settings.early_stop in ("predict", "grow"):
        requests, pending = _predict_canvas_lengths(generator, requests, pending, settings, training_args)
    progress = _Progress(
        max(0, -(-(len(requests) - len(finished) - rank) // world)),
        training_args.per_device_eval_batch_size,
        generator.max_steps(canvases, settings),
        disable=bool(training_args.disable_tqdm or rank),
    )
    with progress.bar:
        for batch, results in _batches(generator, requests, settings, pending, training_args, save_trace, progress):
            for index, result in zip(batch, results, strict=True):
                log.add(_record(index, requests[index], result, edited=edits.active))
                tokens += result.n_tokens
            progress.finish(len(batch), tokens)
    seconds, tokens = _reduce_over_processes(time.perf_counter() - start_time, tokens, world)
    records = log.collect(len(requests))
    metrics = compute_metrics(records)
    if rank == 0:
        _write_results(folder, records, _page_facts(generator, settings), save_trace=save_trace)
    barrier(world)  # every process has read the log
    if rank == 0:
        shutil.rmtree(folder / _LOG_FOLDER)
    barrier(world)
    if tokens:
        metrics["predict_runtime"] = seconds
        metrics["predict_tokens_per_second"] = tokens / seconds
    return metrics


def _log_surplus_steps(generator: TextGenerator, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
    """Log if diffusion_steps exceeds the number of tokens that the steps can decode."""
    n_tokens, what = max(canvas.n_editable for canvas in canvases), "tokens to generate"
    if generator.config.train_block_length is not None:
        n_tokens, what = generator.config.train_block_length, "tokens of a block"
    if settings.diffusion_steps > n_tokens and not settings.may_idle:
        logger.info_rank0(
            f"diffusion_steps: {settings.diffusion_steps} is more than the {n_tokens} {what}; fewer steps suffice."
        )


class _Progress:
    """A progress bar of denoising steps; a batch that takes fewer steps than planned jumps to its end."""

    def __init__(self, num_texts: int, batch_size: int, steps: int, *, disable: bool) -> None:
        num_batches = -(-num_texts // batch_size)
        self.bar = tqdm(total=num_batches * steps, desc="Denoising", unit="step", disable=disable)
        self._num_texts, self._steps = num_texts, steps
        self._num_finished = self._steps_before_batch = 0
        self._start_time = time.perf_counter()

    def step(self, step: int) -> None:
        """Show that the batch has taken a step, counted from 0."""
        self._advance(self._steps_before_batch + min(step + 1, self._steps))

    def finish(self, batch_size: int, tokens: int) -> None:
        """Show that the batch is finished; `tokens` is the number of tokens generated by all batches so far."""
        self._num_finished += batch_size
        self._steps_before_batch += self._steps
        speed = tokens / (time.perf_counter() - self._start_time)
        postfix = f"{self._num_finished} of {self._num_texts} texts, {speed:.0f} tokens/s"
        self.bar.set_postfix_str(postfix, refresh=False)
        self._advance(self._steps_before_batch)

    def _advance(self, steps: int) -> None:
        self.bar.update(max(0, steps - self.bar.n))


def _pending_indices(count: int, finished: IndexSet, rank: int, world: int) -> Iterator[int]:
    """Return this process's share of the sample indices below `count` that are not finished."""
    return itertools.islice((index for index in range(count) if index not in finished), rank, None, world)


def _predict_canvas_lengths(
    generator: TextGenerator,
    requests: Sequence[Request],
    pending: Iterable[int],
    settings: SamplingSettings,
    training_args: Any,
) -> tuple[Sequence[Request], Iterable[int]]:
    """Return the requests with canvases of predicted length, and `pending` sorted by that length.

    Sorting puts texts of similar length into one batch. The length of equal requests is predicted once.
    """
    if isinstance(requests, Repeated):
        (resized_request,), _ = _predict_canvas_lengths(generator, [requests.request], [0], settings, training_args)
        return Repeated(resized_request, len(requests)), pending
    batch_size, resized, pending = training_args.per_device_eval_batch_size, list(requests), list(pending)
    if settings.early_stop == "predict":
        reasons = {generator.sizer.why_uncalibrated(settings, requests[index].canvas) for index in pending} - {None}
        for reason in sorted(map(str, reasons)):
            logger.info_rank0(
                f"length_predictor: {settings.length_predictor} is not calibrated: {reason}; its threshold is "
                f"length_coverage: {settings.length_coverage}."
            )
    for start in range(0, len(pending), batch_size):
        batch = pending[start : start + batch_size]
        sized_canvases = generator.sized([requests[index].canvas for index in batch], settings)
        for index, sized in zip(batch, sized_canvases, strict=True):
            resized[index] = dataclasses.replace(
                requests[index], canvas=sized.canvas, nfe=sized.nfe, computed=sized.computed
            )
    full_tokens = sum(len(requests[index].canvas) for index in pending)
    resized_tokens = sum(len(resized[index].canvas) for index in pending)
    logger.info_rank0(
        f"early_stop: {settings.early_stop} starts with {100 * resized_tokens / max(full_tokens, 1):.1f} % of the "
        "tokens of the full canvases."
    )
    pending.sort(key=lambda index: len(resized[index].canvas))
    return resized, pending


def _thresholds(generator: TextGenerator, requests: Sequence[Request], settings: SamplingSettings) -> list[float]:
    """Return the thresholds of the length predictor on the canvases; none unless early_stop is `predict`."""
    if settings.early_stop != "predict":
        return []
    return sorted({generator.sizer.threshold(settings, request.canvas) for request in distinct(requests)})


def _batches(
    generator: TextGenerator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    pending: Iterable[int],
    training_args: Any,
    traced: bool,
    progress: _Progress,
) -> Iterator[tuple[list[int], list[Generated]]]:
    """Yield the sample indices of each batch, and its generated texts."""
    indices = iter(pending)
    while batch := list(itertools.islice(indices, training_args.per_device_eval_batch_size)):
        yield (
            batch,
            generator.sample_batch(
                [requests[index].canvas for index in batch],
                settings,
                sample_indices=batch,
                traced=traced,
                callback=lambda step, pieces: progress.step(step),
            ),
        )


def _record(index: int, request: Request, result: Generated, *, edited: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"number": index}
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


def _write_results(folder: Path, records: OrderedRecords, facts: dict[str, str], *, save_trace: bool) -> None:
    """Write generated_predictions.jsonl, with `save_trace` the page too, and log the first texts."""
    if not save_trace:
        (folder / PAGE).unlink(missing_ok=True)  # the page of an earlier run
    else:
        with explain_disk_errors(folder):
            write_html(
                folder / PAGE,
                [
                    Trace(
                        f"sample {index}",
                        tuple(trace["start"]),
                        tuple((step, position, piece) for step, position, piece in trace["events"]),
                        trace["steps"],
                    )
                    for index, trace in ((record["number"], record["trace"]) for record in records)
                ],
                heading="Generated texts",
                facts=facts,
            )
        logger.info_rank0(f"The page that replays the denoising of each text is saved at {folder / PAGE}")
    hidden = ("number", "trace")
    write_predictions(
        folder / FILE, ({key: value for key, value in record.items() if key not in hidden} for record in records)
    )
    for index, record in enumerate(itertools.islice(records, _NUM_LOGGED_SAMPLES)):
        prompt = f"{record['prompt']} >>> " if "prompt" in record else ""
        logger.info_rank0(f"sample {index}:\n{prompt}{record['predict']}")
    logger.info_rank0(f"{len(records)} generated texts are saved at {folder / FILE}")


def _page_facts(generator: TextGenerator, settings: SamplingSettings) -> dict[str, str]:
    """Return the settings that the page shows, by their labels."""
    facts = {
        "strategy": settings.denoising_strategy,
        "steps": str(settings.diffusion_steps),
        "temperature": f"{settings.logits.temperature:g}",
        "top-p": f"{settings.logits.top_p:g}",
        "seed": str(settings.seed),
    }
    if settings.block_length is not None:
        facts["block length"] = str(settings.block_length)
    if settings.kv_cache is not None:
        refresh = "" if settings.cache_refresh is None else f", refresh {settings.cache_refresh}"
        facts["KV cache"] = settings.kv_cache + refresh
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
    weight_file_stats = []
    for folder in model_folders or ():
        for path in weight_files(Path(folder)) if Path(folder).is_dir() else ():
            stat = path.stat()
            weight_file_stats.append([path.name, stat.st_size, stat.st_mtime_ns])
    inputs = [
        __version__,
        list(model_folders or ()),
        str(generator.model.dtype),
        weight_file_stats,
        dataclasses.asdict(generator.config),
        generator.model.config.to_dict(),
        getattr(generator.model.config, "_attn_implementation", None),
        getattr(generator.model.config, "_commit_hash", None),
        len(generator.tokenizer),
        dataclasses.asdict(settings),
        _thresholds(generator, requests, settings),
        save_trace,
        len(requests),
        [[r.canvas.ids, r.canvas.editable, r.prompt, r.label] for r in distinct(requests)],
    ]
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()


def _reduce_over_processes(seconds: float, tokens: int, world: int) -> tuple[float, int]:
    """Return the longest time and the sum of the tokens over all processes."""
    measurements = gather((seconds, tokens), world)
    return max(seconds for seconds, _ in measurements), sum(tokens for _, tokens in measurements)


def compute_metrics(records: OrderedRecords) -> dict[str, float]:
    """Return the metrics of the records of generated_predictions.jsonl, with the prefix `predict_`.

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
        logger.warning_rank0('No ROUGE: rouge-score is not installed; pip install "llamafactory-ddm[eval]"')
    for name, value in (scores or {}).items():
        metrics[f"predict_{name}"] = value
    return metrics
