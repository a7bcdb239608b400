"""Text from a diffusion model, for every caller: the YAML, the command line and notebooks.

from llamafactory_ddm import load
model = load("saves/tiny_gpt2/full/ddm")
print(model.generate("Tom saw a small")[0])
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch

from ..data.canvas import Canvas, canvas_of, check_unmarked, infilling_canvas
from ..data.collators import start_token_id
from ..data.text_codec import TextCodec
from ..modeling.bidirectional import probe_bidirectional
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.length_heads import LengthPredictors
from ..modeling.model_info import max_positions
from ..modeling.special_tokens import resolve_token
from ..sampling import SamplingSettings
from ..sampling.budget import split_into_blocks, steps_of_blocks
from ..sampling.keywords import with_keywords
from ..sampling.state import MOST_ROWS
from .canvas_size import Sized
from .trace import Trace, replay
from .writer import Writer, Written

logger = logging.getLogger(__name__)
# Called after each step with the step and a function that gives the pieces of each text of the batch; None is [MASK].
StepCallback = Callable[[int, Callable[[], list[list[str | None]]]], None]


@dataclass(frozen=True)
class Generated:
    """One text.

    Attributes:
        predict: what was written, up to the first end-of-text or pad token, special tokens left out; spans that are
            apart are joined by a line break.
        text: the whole text, with what was given.
        n_tokens: tokens written that are part of `predict`; what stood behind an end-of-text token does not count.
        forwards: forwards that they took.
        computed: tokens that went through the model for them, padding up to the longest of the batch included.
        edits: how often a token was rewritten.
        trace: how the text came about, if asked for.
    """

    predict: str
    text: str
    n_tokens: int
    forwards: int
    computed: int = field(compare=False)
    edits: int = 0
    trace: Trace | None = None


class TextGenerator:
    """A bidirectional model with its tokenizer and the facts of its diffusion process."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: DiffusionConfig,
        *,
        probe: bool = True,
        lengths: LengthPredictors | None = None,
    ) -> None:
        """Wrap a model whose attention has been switched, and prove that it was unless `probe` is off.

        `lengths` are fitted length predictors, if there are any.

        Raises:
            NotBidirectionalError: if the model attends causally.
            ValueError: if the model was trained with shift and the tokenizer has no token to start with.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.start_id = None
        if config.shift:
            self.start_id = start_token_id(tokenizer) if config.start_token_id is None else config.start_token_id
        pads = () if config.variable_length is None else config.variable_length.pad_token_ids
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        ends = eos if config.end_token_ids is None else config.end_token_ids
        self._ends = {*ends, *pads}  # none of them, and nothing behind them, is text
        self.codec = TextCodec(
            tokenizer, config.mask_token_id, sorted(self._ends), [pad for pad in pads if pad not in ends]
        )
        self._with_control = 0
        n_ids = max(tokenizer.get_vocab().values()) + 1  # rows of the model beyond are no tokens
        self.writer = Writer(model, config, end_ids=sorted(self._ends), n_ids=n_ids, lengths=lengths)
        if probe:
            probe_bidirectional(model)

    def from_noise(self, length: int) -> Canvas:
        """Return the canvas of a text of `length` tokens in all, the start token included.

        Raises:
            ValueError: if that leaves nothing to write, or is more than the model has positions.
        """
        return self._checked(canvas_of([length - (self.start_id is not None)], start_id=self.start_id))

    def from_prompt(self, prompt: str | Sequence[int], n_tokens: int, *, start: bool = True) -> Canvas:
        """Return the canvas of a prompt and `n_tokens` tokens that continue it.

        Args:
            prompt: text, or ids that are taken as they are.
            n_tokens: to be written.
            start: whether to put the start token in front where the model needs one.
        Raises:
            ValueError: if the prompt is empty, holds the mask token or a marker, or leaves no room.
        """
        if isinstance(prompt, str):
            check_unmarked(prompt)
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give one, or generate from noise")
        if isinstance(prompt, str):
            self.note_text(prompt)
        return self._checked(canvas_of([ids, n_tokens], start_id=self.start_id if start else None))

    def asked(self, prompt: str, n_tokens: int) -> Canvas:
        """Return the canvas of a prompt as the model was finetuned on it, or of one to be continued.

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
        """Return a generator of the same model that writes prompts by another template, or None for as they stand.

        Raises:
            ValueError: if there is no template of this name, or the model lacks tokens for it.
        """
        config, stored = self.config, self.config.template
        if template is None:
            config = replace(config, template=None)
        elif stored is None or stored.name != template:
            # LLaMA-Factory has them, which nothing else here needs.
            found, ends = import_module("..integration.data.stored_template", __package__).named_template(
                template, self.tokenizer
            )
            if stored is not None and stored.parts != found.parts:
                logger.warning(
                    "template: %s is not the one that this model was finetuned with, which is %s",
                    template,
                    stored.name,
                )
            known = self.tokenizer.get_vocab()
            own = self.tokenizer.convert_ids_to_tokens(sorted(self._ends))
            names = tuple(dict.fromkeys((*(config.end_tokens or own), *(end for end in ends if end in known))))
            ids = tuple(int(known[name]) for name in names)
            config = replace(config, template=found, end_tokens=names, end_token_ids=ids)
        return TextGenerator(self.model, self.tokenizer, config, probe=False, lengths=self.writer.lengths)

    def settings(self, settings: SamplingSettings | None = None, **keywords: Any) -> SamplingSettings:
        """Return sampling settings: those given, else the defaults for this model, with what the keywords change.

        Raises:
            TypeError: for a keyword that is no setting.
            ValueError: if a value is out of range, or a token to suppress does not exist.
        """
        if settings is None:
            settings = SamplingSettings()
            settings = replace(
                settings, grow_length=self.writer.block if self.writer.block > 1 else settings.grow_length
            )
        for key in {"suppress", "suppress_tokens"} & keywords.keys():
            words = keywords[key]
            words = [word.strip() for word in words.split(",")] if isinstance(words, str) else words
            keywords[key] = tuple(resolve_token(self.tokenizer, key, word)[1] for word in words)
        return with_keywords(settings, keywords)

    def __repr__(self) -> str:
        """Say which model it is, and how it was trained."""
        config, model = self.config, self.model
        size = sum(parameter.numel() for parameter in model.parameters())
        noise = f"mixed noise ({config.uniform_ratio:g} random tokens)" if config.uniform_ratio else "masked noise"
        ends = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self._ends)))
        named = "" if config.template is None else f", template {config.template.name or 'of its own'}"
        return (
            f"<{type(self).__name__}: {type(model).__name__} of {size / 1e6:.1f} million parameters, "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device}; {noise}, mask {config.mask_token}, "
            f"{'with' if config.shift else 'no'} shift, ends {ends}{named}>"
        )

    def from_marked(self, text: str, *, label: str | None = None) -> Canvas:
        """Return the canvas of a text with markers such as <|infill:8|>; `label` gives the length of <|infill|>.

        Raises:
            ValueError: if there is no marker or a wrong one, if the text holds the mask token, or leaves no room.
        """
        self.note_text(text)
        return self._checked(
            infilling_canvas(
                text, self.codec.encode, encode_after=self.codec.encode_after, label=label, start_id=self.start_id
            )
        )

    def note_text(self, text: str) -> None:
        """Count a given text that spells a control token; `check` says how many there were."""
        self._with_control += self.codec.holds_control(text)

    def check(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> None:
        """Find before the first forward what would fail in the middle of a run, and say what may surprise.

        Raises:
            ValueError: if a canvas has more blocks than there are steps, guidance lacks a prompt, a length predictor
                is not fitted, or no token is left to write.
        """
        if self._with_control:
            said = " or ".join(map(repr, self.codec.controls))
            logger.warning(
                f"{self._with_control} of the given texts hold {said}: there it is read as plain characters, as in "
                "training, not as the mask token or a pad. Mark places to be written with <|infill:8|>."
            )
            self._with_control = 0
        settings.strategy()
        silent = {*settings.logits.suppress, *self._ends, self.config.mask_token_id}
        if settings.logits.suppress and silent.issuperset(self.tokenizer.get_vocab().values()):
            raise ValueError(
                f"suppress_tokens: {len(set(settings.logits.suppress))} of the vocabulary's tokens are never written, "
                "which leaves no text but its end; suppress fewer"
            )
        self.writer.check(canvases, settings)
        for number, canvas in enumerate(canvases):
            with saying(f"text {number}"):
                steps_of_blocks(
                    split_into_blocks(torch.tensor([canvas.editable]), settings.block_length), settings.diffusion_steps
                )
                if settings.logits.guidance_scale != 1.0 and all(canvas.editable[canvas.n_start :]):
                    raise ValueError(
                        f"guidance_scale: {settings.logits.guidance_scale} needs a prompt to guide by, and there is "
                        "none; give one, or leave guidance_scale at 1"
                    )

    def _checked(self, canvas: Canvas) -> Canvas:
        given = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
        if self.config.mask_token_id in given:
            raise ValueError(
                f"the text holds the mask token {self.config.mask_token!r} (id {self.config.mask_token_id}), which "
                "the model cannot tell from a place to be written; remove it, or mark places with <|infill:8|>"
            )
        limit = max_positions(self.model.config)
        if limit is not None and len(canvas) > limit:
            raise ValueError(
                f"{len(given)} given tokens and {canvas.n_editable} to be written are more than the model's {limit} "
                "positions; shorten the prompt or write fewer"
            )
        return canvas

    def sized(self, canvases: Sequence[Canvas], settings: SamplingSettings) -> list[Sized]:
        """Cut canvases of one batch to the size that `early_stop` asks for; see `sizing.Sizer.sized`."""
        return self.writer.sized(canvases, settings)

    def sample_batch(
        self,
        canvases: Sequence[Canvas],
        settings: SamplingSettings,
        *,
        ordinals: Sequence[int],
        traced: bool = False,
        callback: StepCallback | None = None,
    ) -> list[Generated]:
        """Write on the canvases, all in one batch.

        Args:
            canvases: made by the methods above.
            settings: see there.
            ordinals: a number for each canvas, which with the seed fixes its random numbers.
            traced: whether to return how the texts came about.
            callback: called after each step.
        Raises:
            ValueError: if the settings do not fit the canvases, or the model's logits are unusable.
        """

        def watch(step: int, shown: Sequence[Canvas], ids: list[list[int]]) -> None:
            if callback is not None:
                callback(
                    step,
                    lambda: [self.codec.pieces(row[canvas.n_start :]) for row, canvas in zip(ids, shown, strict=True)],
                )

        written = self.writer.write(
            canvases, settings, ordinals=ordinals, traced=traced, watch=None if callback is None else watch
        )
        return [self._generated(one) for one in written]

    def _generated(self, written: Written) -> Generated:
        canvas, ids = written.canvas, written.ids
        spans: list[list[int]] = []
        for place, editable in enumerate(canvas.editable):
            if editable and (place == 0 or not canvas.editable[place - 1]):
                spans.append([])
            if editable:
                spans[-1].append(ids[place])
        text = ids[canvas.n_start :]
        if len(spans) == 1 and canvas.editable[-1]:
            behind = len(spans[0]) - len(self.before_end(spans[0]))
            if behind:
                spans[0], text = spans[0][:-behind], text[:-behind]
        first_is_given = not canvas.editable[canvas.n_start]
        return Generated(
            predict="\n".join(
                self.codec.decode(span, follows=number > 0 or first_is_given) for number, span in enumerate(spans)
            ),
            text=self.codec.decode(text, follows=False),
            n_tokens=sum(map(len, spans)),
            forwards=written.forwards,
            computed=written.computed,
            edits=written.edits,
            trace=None if written.events is None else replay(self.codec, canvas, ids, written.events),
        )

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """Return the ids up to the first token that ends a text."""
        return list(itertools.takewhile(lambda token: token not in self._ends, ids))

    def generate(
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
    ) -> list[str]:
        """Return texts: answers to prompts or continuations of them, texts with their gaps filled, or from noise.

        A model that was finetuned on prompts gets each prompt as it was trained to, under its template; any other
        continues the text.

        Args:
            prompt: one or several texts to answer or continue; what comes back is what follows them.
            infill: one or several texts with markers such as <|infill:8|>; what comes back are the whole texts.
            max_new_tokens: tokens to write after a prompt or from noise.
            num_samples: how many texts to write from noise, or for each prompt.
            batch_size: texts that are denoised together; it does not change them.
            settings: how to sample.
            callback: called after each step of each batch.
            template: name of another template to write prompts by.
            raw: continue prompts as they stand, without the model's template.
            keywords: single settings, as `temperature=0`: of `SamplingSettings`, `LogitsConfig` and the YAML keys.
        Raises:
            TypeError: for a keyword that is no setting.
            ValueError: if both prompt and infill are given, or a text cannot be used; it says which and why.
        """
        results = self.stream(
            prompt,
            infill=infill,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            batch_size=batch_size,
            settings=settings,
            callback=callback,
            template=template,
            raw=raw,
            **keywords,
        )
        return [result.predict if infill is None else result.text for result in results]

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

        The arguments are those of `generate`. Nothing is kept of texts that are out, so there may be any number.

        Raises:
            TypeError: at once, see `generate`.
            ValueError: at once, see `generate`.
        """
        if raw or template is not None:
            if raw and template is not None:
                raise ValueError("give either template or raw, not both")
            return self.with_template(template).stream(
                prompt,
                infill=infill,
                max_new_tokens=max_new_tokens,
                num_samples=num_samples,
                batch_size=batch_size,
                settings=settings,
                callback=callback,
                **keywords,
            )
        settings = self.settings(settings, **keywords)
        if prompt is not None and infill is not None:
            raise ValueError("give either prompt or infill, not both")
        if num_samples < 1 or max_new_tokens < 1 or batch_size < 1:
            raise ValueError("num_samples, max_new_tokens and batch_size must be at least 1")
        given = prompt if prompt is not None else infill
        if given is not None and not isinstance(given, str) and not all(isinstance(text, str) for text in given):
            raise ValueError("prompt and infill are texts; for ids use from_prompt and sample_batch")
        canvases: list[Canvas] = []
        if given is None:
            canvases = [self.from_noise(max_new_tokens + (self.start_id is not None))]
        for number, text in enumerate([given] if isinstance(given, str) else given or ()):
            with saying(f"text {number}"):
                canvases.append(self.asked(text, max_new_tokens) if prompt is not None else self.from_marked(text))
        if len(canvases) * num_samples > MOST_ROWS:
            raise ValueError(f"num_samples: {num_samples} is too many; a call numbers up to {MOST_ROWS} texts")
        self.check(canvases, settings)
        return self._in_batches(canvases, settings, num_samples, batch_size, callback)

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
            ordinals = range(low, min(low + batch_size, count))
            batch = [canvases[number // num_samples] for number in ordinals]
            yield from self.sample_batch(batch, settings, ordinals=ordinals, callback=callback)


class saying:
    """A context that puts what it is about before the message of a ValueError."""

    def __init__(self, what: str) -> None:
        """Remember `what`, such as 'sample 3'."""
        self.what = what

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raise the error anew with `what` in front.

        Raises:
            ValueError: the one that left the block, with a longer message.
        """
        if isinstance(error, ValueError):
            raise ValueError(f"{self.what}: {error}") from error
