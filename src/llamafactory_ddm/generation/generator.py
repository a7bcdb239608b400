"""Text generation with a diffusion model, for YAML runs, the shell command and notebooks.

from llamafactory_ddm import load
model = load("saves/tiny_gpt2/full/ddm")
print(model.generate("Tom saw a small")[0])
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from importlib import import_module
from operator import itemgetter
from typing import Any

import torch

from ..data.canvas import Canvas, canvas_of, check_unmarked, infilling_canvas
from ..data.collators import start_token_id
from ..data.text_codec import TextCodec
from ..modeling.bidirectional import probe_bidirectional
from ..modeling.block_denoiser import check_block_attention
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.length_heads import LengthPredictors
from ..modeling.model_info import max_positions
from ..modeling.model_runner import Runner
from ..modeling.special_tokens import resolve_tokens
from ..sampling import Edits, SamplingSettings
from ..sampling.budget import split_into_blocks, steps_of_blocks
from ..sampling.keywords import with_keywords
from ..sampling.loop import StepFunction
from ..sampling.state import MAX_SAMPLES
from . import block_models
from .canvas_size import CanvasSizer, SizedCanvas
from .trace import Trace, replay
from .writer import FilledCanvas, Writer

logger = logging.getLogger(__name__)
# Called after each step with the step and a function that returns the pieces of each text; None is [MASK].
StepCallback = Callable[[int, Callable[[], list[list[str | None]]]], None]


@dataclass(frozen=True)
class Generated:
    """One text.

    Attributes:
        predict: what was generated, up to the first EOS or padding token, without special tokens; gaps that are apart
            are joined by a line break.
        text: the whole text, the prompt included.
        n_tokens: number of generated tokens in `predict`; those after an EOS do not count.
        num_forward_passes: forward passes that they took.
        computed: tokens that went through the model for them, padding up to the longest of the batch included.
        edits: number of edits of tokens.
        trace: the text step by step, if requested.
    """

    predict: str
    text: str
    n_tokens: int
    num_forward_passes: int
    computed: int = field(compare=False)
    edits: int = 0
    trace: Trace | None = None


class TextGenerator:
    """A bidirectional model with its tokenizer and its `DiffusionConfig`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: DiffusionConfig,
        *,
        probe: bool = True,
        lengths: LengthPredictors | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: with bidirectional attention.
            tokenizer: its tokenizer.
            config: of its diffusion process.
            probe: test with a forward pass that the attention is bidirectional.
            lengths: fitted length predictors, or None.
        Raises:
            NotBidirectionalError: if the model attends causally, or as a block model takes no mask of blocks.
            ValueError: if the model was trained with shift and the tokenizer has no token to start with.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.start_id = None
        if config.shift:
            self.start_id = start_token_id(tokenizer) if config.start_token_id is None else config.start_token_id
        padding = () if config.variable_length is None else config.variable_length.pad_token_ids
        eos: tuple[int, ...] = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        if config.end_token_ids is not None:
            eos = tuple(config.end_token_ids)
        self.eos_ids = tuple(sorted({*eos, *padding}))  # a text ends before the first of them
        self.codec = TextCodec(tokenizer, config.mask_token_id, self.eos_ids, [i for i in padding if i not in eos])
        self._n_with_control = 0
        self._token_ids = frozenset(tokenizer.get_vocab().values())  # a tokenizer takes 30 ms to list 50,000
        n_ids = max(self._token_ids) + 1  # the model may have more embeddings
        self.sizer = CanvasSizer(model, config, eos_ids=self.eos_ids, n_ids=n_ids, lengths=lengths)
        self.writer = Writer(self.sizer)
        if config.train_block_length is not None:
            check_block_attention(model)
        if probe:
            probe_bidirectional(model)

    def from_noise(self, length: int) -> Canvas:
        """Return the canvas of a text of `length` tokens in all, the start token included.

        Raises:
            ValueError: if there is nothing to generate, or `length` exceeds the model's positions.
        """
        return self._checked(canvas_of([length - (self.start_id is not None)], start_id=self.start_id))

    def from_prompt(self, prompt: str | Sequence[int], n_tokens: int, *, start: bool = True) -> Canvas:
        """Return the canvas of a prompt and `n_tokens` tokens that continue it.

        Args:
            prompt: text, or ids.
            n_tokens: number of tokens to generate.
            start: whether to prepend the start token if the model needs one.
        Raises:
            ValueError: if the prompt is empty, holds the mask token or an infilling marker, or leaves no positions to
                generate.
        """
        if isinstance(prompt, str):
            check_unmarked(prompt)
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token, or generate from noise")
        if isinstance(prompt, str):
            self.note_text(prompt)
        return self._checked(canvas_of([ids, n_tokens], start_id=self.start_id if start else None))

    def from_templated(self, prompt: str, n_tokens: int) -> Canvas:
        """Return the canvas of a prompt under the template that the model was finetuned with, if it has one.

        Raises:
            ValueError: see `from_prompt`.
        """
        canvas, template = self.from_prompt(prompt, n_tokens), self.config.template
        if template is None:
            return canvas
        token_id = self.tokenizer.convert_tokens_to_ids
        return self.from_prompt(
            template.ids(prompt, encode=self.codec.encode, token_id=token_id), n_tokens, start=False
        )

    def with_template(self, template: str | None) -> TextGenerator:
        """Return a generator of the same model that formats prompts by another template, or by none if it is None.

        Raises:
            ValueError: if there is no template of this name, or the model lacks its tokens.
        """
        config, stored = self.config, self.config.template
        if template is None:
            config = replace(config, template=None)
        elif stored is None or stored.name != template:
            # Templates are LLaMA-Factory's; nothing else in this folder needs it.
            parsed, stop_words = import_module("..integration.data.stored_template", __package__).load_template(
                template, self.tokenizer
            )
            if stored is not None and stored.parts != parsed.parts:
                logger.warning(
                    "template: %s differs from the template that this model was finetuned with: %s",
                    template,
                    stored.name,
                )
            vocabulary = self.tokenizer.get_vocab()
            eos_tokens = self.tokenizer.convert_ids_to_tokens(list(self.eos_ids))
            words = (*(config.end_tokens or eos_tokens), *(word for word in stop_words if word in vocabulary))
            names = tuple(dict.fromkeys(words))
            ids = tuple(int(vocabulary[name]) for name in names)
            config = replace(config, template=parsed, end_tokens=names, end_token_ids=ids)
        return TextGenerator(self.model, self.tokenizer, config, probe=False, lengths=self.sizer.lengths)

    def with_runner(self, runner: Runner, step_function: StepFunction) -> TextGenerator:
        """Return a generator of the same model whose forward passes and denoising steps others run."""
        other = copy(self)
        other.sizer = self.sizer.with_runner(runner)
        other.writer = Writer(other.sizer, step_function)
        return other

    def settings(self, settings: SamplingSettings | None = None, **keywords: Any) -> SamplingSettings:
        """Return `settings`, by default `SamplingSettings()`, with the values of keywords in place of its own.

        Raises:
            TypeError: for an unknown keyword.
            ValueError: if a value is out of range, or a token to suppress does not exist.
        """
        if settings is None:
            settings = SamplingSettings()
        for key in {"suppress", "suppress_tokens"} & keywords.keys():
            keywords[key] = resolve_tokens(self.tokenizer, key, keywords[key])
        return with_keywords(settings, keywords)

    def __repr__(self) -> str:
        """Return the model, its size and noise, and the tokens that end a text, in one line."""
        config, model = self.config, self.model
        size = sum(parameter.numel() for parameter in model.parameters())
        noise = f"mixed noise ({config.uniform_ratio:g} random tokens)" if config.uniform_ratio else "masked noise"
        eos = ", ".join(self.tokenizer.convert_ids_to_tokens(list(self.eos_ids)))
        blocks = "" if config.train_block_length is None else f", blocks of {config.train_block_length} tokens"
        template = "" if config.template is None else f", template {config.template.name or 'without a name'}"
        return (
            f"<{type(self).__name__}: {type(model).__name__} of {size / 1e6:.1f} million parameters, "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device}; {noise}, mask {config.mask_token}, "
            f"{'with' if config.shift else 'no'} shift{blocks}, EOS {eos}{template}>"
        )

    def from_parts(self, parts: Sequence[str | Sequence[int] | int]) -> Canvas:
        """Return the canvas of texts (or their ids) and of gaps to fill, given by their number of tokens, in order.

        Raises:
            ValueError: see `from_prompt`.
        """
        encoded = [
            part if not isinstance(part, str) else self.codec.encode_after(part) if number else self.codec.encode(part)
            for number, part in enumerate(parts)
        ]
        return self._checked(canvas_of(encoded, start_id=self.start_id))

    def from_marked(self, text: str, *, label: str | None = None) -> Canvas:
        """Return the canvas of a text with markers such as <|infill:8|>; `label` gives the length of <|infill|>.

        Raises:
            ValueError: if there is no marker or an invalid one, or the text holds the mask token or is too long.
        """
        self.note_text(text)
        return self._checked(
            infilling_canvas(
                text, self.codec.encode, encode_after=self.codec.encode_after, label=label, start_id=self.start_id
            )
        )

    def note_text(self, text: str) -> None:
        """Count a text that spells a control token; `check` logs the number."""
        self._n_with_control += self.codec.holds_control(text)

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Check canvases and settings before the first forward pass, and warn of control tokens in texts.

        Raises:
            ValueError: if a canvas has more blocks than there are steps, guidance lacks a prompt, a length predictor
                is not fitted, no token is left to generate, or a block model does not take the settings.
        """
        if self._n_with_control:
            spellings = " or ".join(map(repr, self.codec.controls))
            logger.warning(
                f"{self._n_with_control} of the texts hold {spellings}, which is read as ordinary characters, as in "
                "training, not as the mask token or padding. Mark gaps with <|infill:8|>."
            )
            self._n_with_control = 0
        settings.strategy()
        never_text = {*settings.logits.suppress, *self.eos_ids, self.config.mask_token_id}
        if settings.logits.suppress and self._token_ids <= never_text:
            raise ValueError(
                f"suppress_tokens: {len(set(settings.logits.suppress))} suppressed tokens leave only EOS to generate; "
                "suppress fewer"
            )
        self.edits(settings)
        block_length = self.config.train_block_length
        if block_length is not None:
            block_models.check_settings(block_length, settings)
        self.sizer.check(canvases, settings)
        for number, canvas in enumerate(canvases):
            with error_prefix(f"text {number}"):
                if block_length is not None:
                    block_models.check_canvas(canvas)
                else:
                    block = split_into_blocks(torch.tensor([canvas.editable]), settings.block_length)
                    steps_of_blocks(block, settings.diffusion_steps)
                if settings.logits.guidance_scale != 1.0 and all(canvas.editable[canvas.n_start :]):
                    raise ValueError(
                        f"guidance_scale: {settings.logits.guidance_scale} needs a prompt; give one, or set "
                        "guidance_scale: 1"
                    )

    def _checked(self, canvas: Canvas) -> Canvas:
        fixed = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
        if self.config.mask_token_id in fixed:
            raise ValueError(
                f"the text holds the mask token {self.config.mask_token!r} (id {self.config.mask_token_id}), which "
                "marks positions to generate; remove it, or mark gaps with <|infill:8|>"
            )
        limit = max_positions(self.model.config)
        if limit is not None and len(canvas) > limit:
            raise ValueError(
                f"{len(fixed)} fixed tokens and {canvas.n_editable} to generate exceed the model's {limit} positions; "
                "shorten the prompt, or generate fewer tokens"
            )
        return canvas

    def edits(self, settings: SamplingSettings) -> Edits:
        """Return which decoded tokens the settings edit with this model; see `Writer.edits`."""
        return self.writer.edits(settings)

    def max_steps(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> int:
        """Return the largest number of denoising steps of a canvas, without edit steps."""
        return self.writer.max_steps(canvases, settings)

    def sized(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[SizedCanvas]:
        """Cut the canvases of one batch to the length that `early_stop` requires; see `CanvasSizer.sized`."""
        return self.sizer.sized(canvases, settings)

    def sample_batch(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        *,
        sample_indices: Sequence[int],
        traced: bool = False,
        callback: StepCallback | None = None,
    ) -> list[Generated]:
        """Fill the canvases, all in one batch.

        Args:
            canvases: from `from_noise`, `from_prompt`, `from_templated` or `from_marked`.
            settings: how to sample.
            sample_indices: index of each sample, which with the seed determines its random numbers.
            traced: whether to return the texts step by step.
            callback: called after each step.
        Raises:
            ValueError: if settings and canvases are incompatible, or logits are NaN or infinite.
        """

        def watch(step: int, canvases: Sequence[Canvas], ids: list[list[int]]) -> None:
            if callback is not None:
                callback(
                    step,
                    lambda: [
                        self.codec.pieces(row[canvas.n_start :]) for row, canvas in zip(ids, canvases, strict=True)
                    ],
                )

        filled = self.writer.write(
            canvases, settings, sample_indices=sample_indices, traced=traced, watch=None if callback is None else watch
        )
        return [self.generated(canvas) for canvas in filled]

    def generated(self, filled: FilledCanvas) -> Generated:
        """Return the text of a filled canvas."""
        canvas, ids = filled.canvas, filled.ids
        spans = [
            [token for token, _ in run]
            for editable, run in itertools.groupby(zip(ids, canvas.editable, strict=True), key=itemgetter(1))
            if editable
        ]
        text = ids[canvas.n_start :]
        if len(spans) == 1 and canvas.editable[-1]:
            n_cut = len(spans[0]) - len(self.before_eos(spans[0]))  # EOS and what follows it
            if n_cut:
                spans[0], text = spans[0][:-n_cut], text[:-n_cut]
        first_is_fixed = not canvas.editable[canvas.n_start]
        return Generated(
            predict="\n".join(
                self.codec.decode(span, follows=number > 0 or first_is_fixed) for number, span in enumerate(spans)
            ),
            text=self.codec.decode(text, follows=False),
            n_tokens=sum(map(len, spans)),
            num_forward_passes=filled.nfe,
            computed=filled.computed,
            edits=filled.edits,
            trace=None if filled.events is None else replay(self.codec, canvas, ids, filled.events),
        )

    def before_eos(self, ids: Sequence[int]) -> list[int]:
        """Return the ids before the first EOS or padding token."""
        return list(itertools.takewhile(lambda token: token not in self.eos_ids, ids))

    def generate(self, prompt: str | Sequence[str] | None = None, **options: Any) -> list[str]:
        """Return texts: answers to prompts or their continuations, texts with their gaps filled, or texts from noise.

        A model that was finetuned on prompts gets each prompt in its template; any other continues the text.

        Args:
            prompt: one or several texts to answer or continue; only the generated text is returned.
            options: those of `stream`, by keyword:
                infill: one or several texts with markers such as <|infill:8|>; the whole texts are returned.
                max_new_tokens: tokens to generate after a prompt or from noise (default: 64).
                num_samples: how many texts to generate from noise, or for each prompt (default: 1).
                batch_size: texts in a batch, which does not change them (default: 8).
                settings: a `SamplingSettings`.
                callback: called after each step of each batch.
                template: name of another template for the prompts.
                raw: continue prompts without a template.
                Any other keyword sets one key, as in `temperature=0`: a YAML key, or an attribute of
                `SamplingSettings` or `LogitsConfig`.
        Raises:
            TypeError: for an unknown keyword.
            ValueError: if both prompt and infill are given, or a text is invalid, naming its number.
        """
        is_infilled = options.get("infill") is not None
        return [result.text if is_infilled else result.predict for result in self.stream(prompt, **options)]

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        infill: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        num_samples: int = 1,
        batch_size: int = 8,
        settings: SamplingSettings | None = None,
        callback: StepCallback | None = None,
        template: str | None = None,
        raw: bool = False,
        **keywords: Any,
    ) -> Iterator[Generated]:
        """Return an iterator over the texts that `generate` returns, each as soon as its batch is finished.

        The arguments are those of `generate`. Texts are not stored, so there may be any number.

        Raises:
            TypeError: on the call, see `generate`.
            ValueError: on the call, see `generate`.
        """
        if raw and template is not None:
            raise ValueError("template and raw exclude each other; give one of them")
        if prompt is not None and infill is not None:
            raise ValueError("prompt and infill exclude each other; give one of them")
        if num_samples < 1 or max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"num_samples, max_new_tokens and batch_size must be at least 1, got {num_samples}, "
                f"{max_new_tokens}, {batch_size}"
            )
        generator = self.with_template(template) if raw or template is not None else self
        settings = generator.settings(settings, **keywords)
        canvases = generator.canvases(prompt, infill, max_new_tokens)
        if len(canvases) * num_samples > MAX_SAMPLES:
            raise ValueError(
                f"num_samples: {num_samples} for each of {len(canvases)} texts exceeds {MAX_SAMPLES} in all; lower it"
            )
        generator.check(canvases, settings)
        return generator._in_batches(canvases, settings, num_samples, batch_size, callback)

    def canvases(
        self, prompt: str | Sequence[str] | None, infill: str | Sequence[str] | None, max_new_tokens: int
    ) -> list[Canvas]:
        """Return the canvases of the texts that `stream` generates; the arguments are those of `generate`.

        Raises:
            ValueError: if a text is invalid, naming its number.
        """
        texts = prompt if prompt is not None else infill
        if texts is None:
            return [self.from_noise(max_new_tokens + (self.start_id is not None))]
        texts = [texts] if isinstance(texts, str) else texts
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("prompt and infill must be texts; for ids use from_prompt and sample_batch")
        canvases = []
        for number, text in enumerate(texts):
            with error_prefix(f"text {number}"):
                canvases.append(
                    self.from_marked(text) if prompt is None else self.from_templated(text, max_new_tokens)
                )
        return canvases

    def _in_batches(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        num_samples: int,
        batch_size: int,
        callback: StepCallback | None,
    ) -> Iterator[Generated]:
        """Yield `num_samples` texts for each canvas, one canvas after another."""
        parts = [canvases[low : low + batch_size] for low in range(0, len(canvases), batch_size)]
        canvases = [sized.canvas for part in parts for sized in self.sized(part, settings)]
        count = len(canvases) * num_samples
        for low in range(0, count, batch_size):
            indices = range(low, min(low + batch_size, count))
            batch = [canvases[index // num_samples] for index in indices]
            yield from self.sample_batch(batch, settings, sample_indices=indices, callback=callback)


@contextmanager
def error_prefix(subject: str) -> Iterator[None]:
    """Put what an error is about, such as 'text 3', in front of the message of a ValueError.

    Raises:
        ValueError: the one that left the block, with a longer message.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from error
