"""What a run is to generate: one `Request` per text, from noise or from the examples of a LLaMA-Factory data set."""

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
from ..data.prompts import load_examples
from ..data.templates import without_cutoff, without_truncation


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Attributes:
        canvas: fixed tokens and positions to generate.
        prompt: the user's text; None when generating from noise.
        label: the reference text, if there is one.
        nfe: forward passes that predicting the length of the canvas took.
        computed: number of tokens in those forward passes.
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

    def __getitem__(self, index: Any) -> Any:
        """Return the request.

        Raises:
            IndexError: if `index` is out of range.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self.request


def distinct(requests: Sequence[Request]) -> Sequence[Request]:
    """Return the requests, those of a `Repeated` once."""
    return (requests.request,) if isinstance(requests, Repeated) else requests


def build_noise_requests(
    generator: TextGenerator, *, count: int, length: int, max_new_tokens: int | None = None
) -> Repeated:
    """Return `count` requests for texts of `length` tokens, start token included, or of `max_new_tokens` after it.

    Raises:
        ValueError: if the length does not fit the model.
    """
    key = f"cutoff_len: {length}"
    if max_new_tokens is not None:
        length, key = max_new_tokens + int(generator.start_id is not None), f"max_new_tokens: {max_new_tokens}"
    with error_prefix(key):
        canvas = generator.from_noise(length)
    return Repeated(Request(canvas), count)


def build_text_requests(
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
        infill: fill the infilling markers of the texts; else continue the texts.
        prefix_length: number of tokens of a text to use as prompt; None for all.
        max_new_tokens: number of tokens to generate, or None.
    Raises:
        ValueError: if there is no data set, or a text cannot be used.
    """
    requests = []
    for index, (text, label) in enumerate(_load_texts(model_args, data_args, training_args)):
        with error_prefix(f"dataset: text {index}"):
            if infill:
                request = Request(generator.from_marked(text, label=label), text, label)
            else:
                request = _build_continuation(
                    generator, text, label, data_args.cutoff_len, prefix_length, max_new_tokens
                )
            requests.append(request)
    return _check_not_empty(requests, data_args)


def _build_continuation(
    generator: TextGenerator,
    text: str,
    label: str | None,
    cutoff_len: int,
    prefix_length: int | None,
    max_new_tokens: int | None,
) -> Request:
    ids = generator.codec.encode(text)
    generator.note_text(text)
    if prefix_length is not None:
        if len(ids) <= prefix_length:
            raise ValueError(
                f"it has {len(ids)} tokens, so prefix_length: {prefix_length} leaves nothing to generate; lower "
                "prefix_length, or remove the text"
            )
        ids, rest = ids[:prefix_length], ids[prefix_length:]
        text, label = generator.tokenizer.decode(ids), generator.tokenizer.decode(rest)
    check_unmarked(text)
    has_start = bool(ids) and ids[0] == generator.start_id
    room = cutoff_len - len(ids) - int(generator.start_id is not None and not has_start)
    if max_new_tokens is None and ids and room < 1:
        raise ValueError(
            f"its {len(ids)} tokens leave no room within cutoff_len: {cutoff_len}; raise cutoff_len, set "
            "max_new_tokens, or use fewer tokens of the text with prefix_length"
        )
    canvas = generator.from_prompt(ids, max(room, 1) if max_new_tokens is None else max_new_tokens)
    return Request(canvas, text, label)


def build_example_requests(
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

    The examples are encoded by the processor that LLaMA-Factory trains with, so prompts are those of training. Nothing
    is truncated, because a shorter prompt or label would silently change the metrics. An example without an answer
    gives a request without a label.

    Raises:
        ValueError: if there is no data set, an example has no prompt, or its prompt leaves no room for a response.
    """
    untruncated_args = without_cutoff(data_args)
    untruncated_args.packing = untruncated_args.neat_packing = untruncated_args.train_on_prompt = False
    processor_arguments = {
        **tokenizer_module,
        "tokenizer": reading_as_text(tokenizer_module["tokenizer"], generator.codec.controls),
    }
    processor = SupervisedDatasetProcessor(
        template=without_truncation(template), **processor_arguments, data_args=untruncated_args
    )
    names, requests = _check_dataset_names(data_args), []
    for index, example in enumerate(_load_examples(model_args, data_args, training_args)):
        with error_prefix(f"dataset: example {index}"):
            _check_turns(example)
        with explain_dataset_errors(data_args, names):
            ids, answer = _encode_prompt_and_answer(processor, example)
        with error_prefix(f"dataset: example {index}"):
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
                else generator.tokenizer.decode(generator.before_eos(answer), skip_special_tokens=True)
            )
            prompt = generator.tokenizer.decode(ids)
            generator.note_text(prompt)
            requests.append(Request(canvas, prompt, label))
    return _check_not_empty(requests, data_args)


def _check_turns(example: Any) -> None:
    if len(example["_prompt"]) % 2 != 1:
        raise ValueError(
            f"it has {len(example['_prompt'])} turns before the response, where turns must start with the user's and "
            "alternate; correct the example, or remove it"
        )
    if len(example["_response"]) != 1:
        raise ValueError(
            f"it has {len(example['_response'])} responses, expected 1; correct the example, or remove it"
        )


def _encode_prompt_and_answer(
    processor: SupervisedDatasetProcessor, example: Any
) -> tuple[list[int], list[int] | None]:
    """Return the ids of an example's prompt, and those of its answer, or None if it has none."""
    response = dict(example["_response"][0])
    is_answered = bool(response["content"])
    # A template may encode an empty answer to no tokens, so that it could not be told where the prompt ends.
    response["content"] = response["content"] or "."
    ids, labels = processor._encode_data_example(
        prompt=example["_prompt"],
        response=[response],
        system=example["_system"],
        tools=example["_tools"],
        images=example["_images"] or [],
        videos=example["_videos"] or [],
        audios=example["_audios"] or [],
    )
    # A label that differs from its token is EOS of the previous answer, on the first token of the prompt.
    begin = int(response_start(torch.tensor(labels) == torch.tensor(ids), torch.tensor(len(ids))))
    return ids[:begin], labels[begin:] if is_answered else None


def _load_texts(model_args: Any, data_args: Any, training_args: Any) -> Iterator[tuple[str, str | None]]:
    """Yield text and label (the response column, if there is one) of each example."""
    for example in _load_examples(model_args, data_args, training_args):
        with explain_dataset_errors(data_args, _check_dataset_names(data_args)):
            text = "".join(message["content"] for message in example["_prompt"])
            label = "".join(message["content"] for message in example["_response"])
        yield text, label or None


def _load_examples(model_args: Any, data_args: Any, training_args: Any) -> Any:
    names = _check_dataset_names(data_args)
    with explain_dataset_errors(data_args, names), training_args.main_process_first(desc="load dataset"):
        return load_examples(names, model_args, data_args, training_args)


def _check_dataset_names(data_args: Any) -> list[str]:
    """Return the names of the data sets to generate from: eval_dataset, else dataset.

    Raises:
        ValueError: if there is none, or with streaming.
    """
    names = data_args.eval_dataset or data_args.dataset
    if data_args.streaming:
        raise ValueError(
            "streaming: true is not supported when generating from a data set; remove it, and set max_samples"
        )
    if not names:
        raise ValueError(
            "eval_dataset: is missing, so there is nothing to generate from; set it (or dataset) to a data set of "
            "prompts, or with stage: ddm set generate_from: noise"
        )
    return list(names)


def _check_not_empty(requests: list[Request], data_args: Any) -> list[Request]:
    if not requests:
        raise ValueError(f"dataset: {', '.join(_check_dataset_names(data_args))} has no examples; check its file")
    return requests
