"""The texts that a run generates: from noise, or from the examples of a LLaMA-Factory data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llamafactory.data.processor import SupervisedDatasetProcessor

from ...data.canvas import Canvas, check_unmarked
from ...data.collators import response_start
from ...data.control_tokens import reading_as_text
from ...generation.generator import TextGenerator, error_prefix
from ..data.faults import explain_dataset_errors
from ..data.prompts import examples
from ..data.templates import uncut, without_cut


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Attributes:
        canvas: fixed tokens and positions to generate.
        prompt: the user's text; None for noise.
        label: the reference text, if there is one.
        nfe: forward passes that it took to predict the size of the canvas.
        computed: number of tokens in these forward passes.
    """

    canvas: Canvas
    prompt: str | None = None
    label: str | None = None
    nfe: int = 0
    computed: int = 0


class Repeated(Sequence[Request]):
    """A sequence of equal requests that stores one of them."""

    def __init__(self, request: Request, count: int) -> None:
        self.request, self._count = request, count

    def __len__(self) -> int:
        """Return the number of requests."""
        return self._count

    def __getitem__(self, number: Any) -> Any:
        """Return the request.

        Raises:
            IndexError: if `number` is out of range.
        """
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self.request


def distinct(requests: Sequence[Request]) -> Sequence[Request]:
    """Return the requests without repetitions of a `Repeated`."""
    return (requests.request,) if isinstance(requests, Repeated) else requests


def from_noise(generator: TextGenerator, *, count: int, length: int, max_new_tokens: int | None = None) -> Repeated:
    """Return `count` requests for texts of `length` tokens with the start token, or of `max_new_tokens` without it.

    Raises:
        ValueError: if the length does not fit the model.
    """
    said = f"cutoff_len: {length}"
    if max_new_tokens is not None:
        length, said = max_new_tokens + int(generator.start_id is not None), f"max_new_tokens: {max_new_tokens}"
    with error_prefix(said):
        canvas = generator.from_noise(length)
    return Repeated(Request(canvas), count)


def from_texts(
    generator: TextGenerator,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    *,
    infill: bool,
    prefix_length: int | None,
    max_new_tokens: int | None,
) -> list[Request]:
    """Return a request to continue or infill each text of the data set (eval_dataset, else dataset).

    Args:
        generator: builds the canvases.
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's; without `max_new_tokens`, a text is continued up to cutoff_len.
        training_args: LLaMA-Factory's.
        infill: fill in the infilling markers of the texts; else continue the texts.
        prefix_length: number of tokens of a text to use as prompt; None for all.
        max_new_tokens: number of tokens to generate, or None.
    Raises:
        ValueError: if there is no data set, or a text cannot be used.
    """
    requests = []
    for number, (text, label) in enumerate(_texts(model_args, data_args, training_args)):
        with error_prefix(f"dataset: text {number}"):
            if infill:
                canvas = generator.from_marked(text, label=label)
                said = text
            else:
                canvas, said, label = _continued(
                    generator, text, label, data_args.cutoff_len, prefix_length, max_new_tokens
                )
            requests.append(Request(canvas, said, label))
    return _not_empty(requests, data_args)


def _continued(
    generator: TextGenerator,
    text: str,
    label: str | None,
    cutoff_len: int,
    prefix_length: int | None,
    max_new_tokens: int | None,
) -> tuple[Canvas, str, str | None]:
    ids = generator.codec.encode(text)
    generator.note_text(text)
    if prefix_length is not None:
        if len(ids) <= prefix_length:
            raise ValueError(f"it has {len(ids)} tokens, so prefix_length: {prefix_length} leaves nothing to generate")
        ids, rest = ids[:prefix_length], ids[prefix_length:]
        text, label = generator.tokenizer.decode(ids), generator.tokenizer.decode(rest)
    check_unmarked(text)
    has_start = bool(ids) and ids[0] == generator.start_id
    room = cutoff_len - len(ids) - int(generator.start_id is not None and not has_start)
    if max_new_tokens is None and ids and room < 1:
        raise ValueError(
            f"its {len(ids)} tokens leave no room within cutoff_len: {cutoff_len}; raise cutoff_len, set "
            "max_new_tokens, or give less of the text with prefix_length"
        )
    return generator.from_prompt(ids, max(room, 1) if max_new_tokens is None else max_new_tokens), text, label


def from_examples(
    generator: TextGenerator,
    template: Any,
    tokenizer_module: dict[str, Any],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    *,
    max_new_tokens: int | None,
) -> list[Request]:
    """Return a request for the last response of each example of an instruction data set, under its template.

    LLaMA-Factory's training-side processor encodes the examples, so prompts are those of training. Nothing is cut off,
    as a truncated prompt or label would silently change the metrics. An example without an answer is a prompt without
    a label.

    Raises:
        ValueError: if there is no data set, an example is no prompt, or it leaves no room for a response.
    """
    whole = uncut(data_args)
    whole.packing = whole.neat_packing = whole.train_on_prompt = False
    reading = {
        **tokenizer_module,
        "tokenizer": reading_as_text(tokenizer_module["tokenizer"], generator.codec.controls),
    }
    processor = SupervisedDatasetProcessor(template=without_cut(template), **reading, data_args=whole)
    names, requests = _names(data_args), []
    for number, row in enumerate(_examples(model_args, data_args, training_args)):
        with error_prefix(f"dataset: example {number}"):
            _check_turns(row)
        with explain_dataset_errors(data_args, names):
            ids, answer = _split(processor, row)
        with error_prefix(f"dataset: example {number}"):
            room = data_args.cutoff_len - len(ids)
            if max_new_tokens is None and room < 1:
                raise ValueError(
                    f"its prompt of {len(ids)} tokens leaves no room within cutoff_len: {data_args.cutoff_len}; raise "
                    "cutoff_len or set max_new_tokens"
                )
            n_tokens = room if max_new_tokens is None else max_new_tokens
            canvas = generator.from_prompt(ids, n_tokens, start=False)
            label = (
                None
                if answer is None
                else generator.tokenizer.decode(generator.before_end(answer), skip_special_tokens=True)
            )
            prompt = generator.tokenizer.decode(ids)
            generator.note_text(prompt)
            requests.append(Request(canvas, prompt, label))
    return _not_empty(requests, data_args)


def _check_turns(row: Any) -> None:
    if len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1:
        raise ValueError(
            "its turns are not those of a prompt, which begin with the user's and alternate; mend it, or take it out"
        )


def _split(processor: SupervisedDatasetProcessor, row: Any) -> tuple[list[int], list[int] | None]:
    """Return the ids of an example's prompt, and those of its answer, or None if it has none."""
    response = dict(row["_response"][0])
    is_answered = bool(response["content"])
    # A template may encode an empty answer to no tokens, and then its position would be unknown.
    response["content"] = response["content"] or "."
    ids, labels = processor._encode_data_example(
        prompt=row["_prompt"],
        response=[response],
        system=row["_system"],
        tools=row["_tools"],
        images=row["_images"] or [],
        videos=row["_videos"] or [],
        audios=row["_audios"] or [],
    )
    # A label that differs from the token is EOS of the previous answer, at the first token of the prompt.
    begin = int(response_start(torch.tensor(labels) == torch.tensor(ids), torch.tensor(len(ids))))
    return ids[:begin], labels[begin:] if is_answered else None


def _texts(model_args: Any, data_args: Any, training_args: Any) -> Iterator[tuple[str, str | None]]:
    """Yield text and label (the response column, if there is one) of each example."""
    for row in _examples(model_args, data_args, training_args):
        with explain_dataset_errors(data_args, _names(data_args)):
            text = "".join(message["content"] for message in row["_prompt"])
            label = "".join(message["content"] for message in row["_response"])
        yield text, label or None


def _examples(model_args: Any, data_args: Any, training_args: Any) -> Any:
    names = _names(data_args)
    with explain_dataset_errors(data_args, names), training_args.main_process_first(desc="load dataset"):
        return examples(names, model_args, data_args, training_args)


def _names(data_args: Any) -> list[str]:
    names = data_args.eval_dataset or data_args.dataset
    if data_args.streaming:
        raise ValueError("streaming: true does not go with generating from a data set; remove it, and set max_samples")
    if not names:
        raise ValueError(
            "there is nothing to generate from: set eval_dataset (or dataset) to a data set of prompts, or "
            "generate_from: noise"
        )
    return list(names)


def _not_empty(requests: list[Request], data_args: Any) -> list[Request]:
    if not requests:
        raise ValueError(f"dataset: {', '.join(_names(data_args))} holds no text; check the file")
    return requests
