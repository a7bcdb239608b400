"""`sample_steps`: texts that the model generates while it trains, in the log, in samples.jsonl and in TensorBoard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from ...data.collators import is_target, response_start
from ...generation.generator import TextGenerator, error_prefix
from ...sampling import SamplingSettings
from ...utils.files import explain_disk_errors, replacing
from ...utils.processes import gather
from ..logs import describe, get_logger
from ..predict.requests import Request
from .trainer import DiffusionTrainer

logger = get_logger(__name__)
FILE = "samples.jsonl"
_COUNT = 4
_MAX_ROWS = 1000  # that are searched for prompts


def build_sample_requests(
    generator: TextGenerator,
    rows: Sequence[Any],
    *,
    prompts: Sequence[str] | None,
    count: int | None,
    n_tokens: int | None,
    cutoff_len: int,
) -> list[Request]:
    """Return what `sample_steps` generates: from the prompts, else from those of the rows, else from noise.

    Args:
        generator: the model with its template, into which prompts are put.
        rows: data sets of prepared prompts with responses, of which the first with a prompt is used; none for noise.
        prompts: texts of the user, or None.
        count: number of texts, without `prompts`; None for 4.
        n_tokens: tokens to generate; None for what the prompt leaves of `cutoff_len`.
        cutoff_len: largest number of tokens of a training row.
    Raises:
        ValueError: if a prompt leaves no room, or no row has a prompt.
    """
    count = count or _COUNT
    if prompts is not None:
        requests = []
        for number, prompt in enumerate(prompts):
            with error_prefix(f"sample_prompts: text {number}"):
                room = n_tokens or _checked_room(generator, prompt, cutoff_len)
                requests.append(Request(generator.from_templated(prompt, room), prompt))
        return requests
    if not rows:
        with error_prefix(f"sample_length: {n_tokens}" if n_tokens else f"cutoff_len: {cutoff_len}"):
            length = n_tokens + (generator.start_id is not None) if n_tokens else cutoff_len
            return [Request(generator.from_noise(length))] * count
    found: list[tuple[list[int], list[int]]] = []
    for part in rows:
        found = found or list(itertools.islice(_prompts_and_answers(part), count))
    requests = []
    for number, (ids, answer) in enumerate(found):
        with error_prefix(f"sample_steps: prompt {number} of the data"):
            canvas = generator.from_prompt(ids, n_tokens or max(1, cutoff_len - len(ids)), start=False)
        label = generator.tokenizer.decode(generator.before_eos(answer), skip_special_tokens=True)
        requests.append(Request(canvas, generator.tokenizer.decode(ids), label))
    if not requests:
        raise ValueError(
            f"sample_steps: the first {_MAX_ROWS} rows have no prompt before a response, as with train_on_prompt: "
            "true; set sample_prompts"
        )
    return requests


def _checked_room(generator: TextGenerator, prompt: str, cutoff_len: int) -> int:
    """Return the number of tokens that a prompt leaves of `cutoff_len`.

    Raises:
        ValueError: if that is none.
    """
    encode, template = generator.codec.encode, generator.config.template
    if template is None:
        n_fixed = len(encode(prompt)) + (generator.start_id is not None)
    else:
        n_fixed = len(template.ids(prompt, encode=encode, token_id=generator.tokenizer.convert_tokens_to_ids))
    if n_fixed >= cutoff_len:
        raise ValueError(
            f"its {n_fixed} tokens leave no room within cutoff_len: {cutoff_len}; shorten it, or set sample_length"
        )
    return cutoff_len - n_fixed


def _prompts_and_answers(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of prompt and last answer of each row that has both; of a packed row those of its first text."""
    for row in itertools.islice(rows, _MAX_ROWS):
        ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        positions = torch.as_tensor(row.get("position_ids", range(len(ids))))
        n = next((n for n in range(1, len(ids)) if int(positions[n]) == 0), len(ids))
        targets = is_target(ids[:n], labels[:n], torch.arange(n) == 0)
        if not bool(targets.any()):
            continue
        end = targets.nonzero().max() + 1  # a template may write after the answer
        begin = int(response_start(targets, end))
        if begin:
            yield ids[:begin].tolist(), labels[begin : int(end)].tolist()


class TrainingSamples(TrainerCallback):
    """Generates texts every `steps` optimiser steps, before the step's checkpoint is saved.

    Sample i has the same random numbers at every step, so texts of different steps differ by the weights alone.
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        generator: TextGenerator,
        requests: Sequence[Request],
        settings: SamplingSettings,
        steps: int,
    ) -> None:
        """Generate `requests` with the model in training.

        Args:
            trainer: the trainer that calls this.
            generator: its model.
            requests: what to generate.
            settings: how.
            steps: optimiser steps between two times.
        """
        self.trainer, self.generator = trainer, generator
        self.requests, self.settings, self.steps = requests, settings, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove texts of steps that the run takes (again) from samples.jsonl; warn if no step has texts."""
        if self.steps > state.max_steps:
            logger.warning_rank0(
                f"sample_steps: {self.steps} is more than the {state.max_steps} steps of this run, so no texts are "
                "generated; lower it"
            )
        path = Path(args.output_dir) / FILE
        if args.process_index == 0 and path.is_file():
            _write(path, _lines_up_to(path, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate texts if it is time."""
        if state.global_step % self.steps == 0:
            with self.trainer.beside_training():
                self.take()

    def take(self) -> None:
        """Generate the texts, shared out to all processes, and write them; called on every process.

        If they cannot be generated or written, the log says why and training goes on.
        """
        trainer = self.trainer
        args, step = trainer.args, trainer.state.global_step
        gathered = gather(self._generate(args), args.world_size)
        errors = [error for _, error in gathered if error is not None]
        if errors:
            logger.warning_rank0(f"No samples at step {step}: {errors[0]}")
            return
        if args.process_index != 0:
            return
        ratio = trainer.attention_ratio(step - 1)
        results = sorted((result for results, _ in gathered for result in results), key=lambda result: result["index"])
        common = {"attention_ratio": ratio, "settings": asdict(self.settings)}
        lines = [json.dumps({"step": step, **result, **common}, ensure_ascii=False) for result in results]
        path = Path(args.output_dir) / FILE
        try:
            _write(path, [*_lines_up_to(path, step - 1), *lines])
        except (OSError, ValueError) as error:
            logger.warning_rank0(f"The samples at step {step} are not in {FILE}: {describe(error)}")
        texts = "\n".join(f"  {result['index']}: {_in_one_line(result, ' >>> ')}" for result in results)
        logger.info_rank0(f"Samples at step {step}:\n{texts}")
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                numbered = (f"{result['index']}. {_in_one_line(result, ' **>>>** ')}" for result in results)
                markdown = "\n".join(numbered)
                callback.tb_writer.add_text("samples", markdown, step)

    def _generate(self, args: Any) -> tuple[list[dict[str, Any]], str | None]:
        """Return this process's texts; or none and what is wrong with the model."""
        indices = list(range(args.process_index, len(self.requests), args.world_size))
        results = []
        for low in range(0, len(indices), args.per_device_eval_batch_size):
            batch = indices[low : low + args.per_device_eval_batch_size]
            try:
                sized = self.generator.sized([self.requests[index].canvas for index in batch], self.settings)
                texts = self.generator.sample_batch(
                    [each.canvas for each in sized], self.settings, sample_indices=batch
                )
            except Exception as error:  # noqa: BLE001 - any, such as too little memory: no text is worth a run
                return [], describe(error)
            for index, text in zip(batch, texts, strict=True):
                request = self.requests[index]
                given = {"prompt": request.prompt, "text": text.predict, "label": request.label}
                results.append({"index": index, **{key: value for key, value in given.items() if value is not None}})
        return results, None


def _write(path: Path, lines: Sequence[str]) -> None:
    with explain_disk_errors(path.parent), replacing(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Return the lines of samples.jsonl, if there is one, of steps up to `step`.

    Raises:
        ValueError: if another program wrote the file.
    """
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8") as file:  # not splitlines: a text may hold other line separators
            lines = [line.rstrip("\n") for line in file]
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"sample_steps: {path} is not a file of generated samples, and would be overwritten; move it, or choose "
            "another output_dir"
        ) from error


def _in_one_line(result: Mapping[str, Any], separator: str) -> str:
    """Return prompt and text in one line."""
    return separator.join(" ".join(result[key].split()) for key in ("prompt", "text") if key in result)
