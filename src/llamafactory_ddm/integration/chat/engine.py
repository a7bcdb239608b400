"""The engine that LLaMA-Factory's chat, API and web chat call for a diffusion model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from llamafactory.chat.base_engine import BaseEngine, Response
from llamafactory.extras.constants import EngineName

from ...data.canvas import MARKER, Canvas, split_at_markers
from ...serving.request import Answer, Event, Failure, Progress, Request
from ...serving.server import Limits, Server
from ..logs import get_logger
from .defaults import fitted_settings
from .model import load_served
from .options import Options, read_options
from .prompts import PromptEncoder

logger = get_logger(__name__)
_MAX_WAITING = 64  # events of a sample that wait for a slow client; its steps are merged beyond that


def _end(server: Server) -> None:
    with contextlib.suppress(RuntimeError):  # dropped in the server's thread, which cannot wait for itself
        server.close(drain=False)


def merged(events: Iterable[Event]) -> list[Event]:
    """Merge all steps of a sample into one, with their texts joined and the latest canvas; the other events follow."""
    steps: dict[int, Progress] = {}
    others: list[Event] = []
    for event in events:
        if not isinstance(event, Progress):
            others.append(event)
        elif (before := steps.get(event.sample)) is None:
            steps[event.sample] = event
        else:
            canvas = before.canvas if event.canvas is None else event.canvas
            steps[event.sample] = replace(event, text=before.text + event.text, canvas=canvas)
    return [*steps.values(), *others]


class Running:
    """A request that was submitted in an event loop."""

    def __init__(self, server: Server, request: Request) -> None:
        """Submit the request; see `Server.submit`."""
        self.request = request
        self._loop, self._has_event = asyncio.get_running_loop(), asyncio.Event()
        self._waiting: list[Event] = []  # a client may read more slowly than the model writes
        self._ticket = server.submit(request, self._put)

    def _put(self, event: Event) -> None:
        # Where the loop is closed and nobody waits, this raises, and the server cancels the request.
        self._loop.call_soon_threadsafe(self._keep, event)

    def _keep(self, event: Event) -> None:
        self._waiting.append(event)
        if len(self._waiting) > _MAX_WAITING * self.request.n:
            self._waiting = merged(self._waiting)
        self._has_event.set()

    def close(self) -> None:
        """Cancel the request unless it is over."""
        if not self._ticket.is_over:
            self._ticket.cancel()

    async def events(self) -> AsyncGenerator[Progress | Answer, None]:
        """Yield the events up to the last; raise the error of a request that failed."""
        n_left = self.request.n
        try:
            while n_left:
                while not self._waiting:
                    self._has_event.clear()
                    await self._has_event.wait()
                event = self._waiting.pop(0)
                if isinstance(event, Failure):
                    raise event.error
                n_left -= isinstance(event, Answer)
                yield event
        finally:
            self.close()


class DiffusionEngine(BaseEngine):
    """Answers chats with a `Server`, which denoises all requests in one batch."""

    def __init__(self, model_args: Any, data_args: Any, finetuning_args: Any, generating_args: Any) -> None:
        """Load the model and start its server.

        Raises:
            ValueError: for a mistake in the arguments, naming the key and the remedy.
        """
        self.name = EngineName.HF
        self.can_generate = True
        self.served = load_served(model_args, data_args, finetuning_args, generating_args)
        self.generator = self.served.generator
        self.model, self.tokenizer = self.generator.model, self.generator.tokenizer
        self.template = self.served.template
        self.defaults = self.served.defaults
        self.generating_args = generating_args.to_dict()
        self.prompts = PromptEncoder(self.template, self.tokenizer)
        self.generator.codec.controls = self.prompts.controls  # a user's text cannot spell any of them
        self.timeout: float | None = finetuning_args.serving_timeout
        limits = Limits(
            max_rows=finetuning_args.serving_rows,
            max_positions=finetuning_args.serving_positions,
            max_queue=finetuning_args.serving_queue,
        )
        self.server = Server(self.generator, limits)
        # Where the engine is dropped, and at the end of the process, which must not find the thread in the model.
        weakref.finalize(self, _end, self.server)
        if "MAX_CONCURRENT" in os.environ:
            logger.warning_rank0(
                "MAX_CONCURRENT has no effect on a diffusion model, whose requests share one batch; set serving_rows."
            )

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer whose request does not say how many, where its prompt leaves room for them."""
        return self.served.max_new_tokens or self.served.canvas or 0

    def close(self, *, drain: bool = False) -> None:
        """End the server; with `drain`, after its requests."""
        self.server.close(drain=drain)

    # ---- requests ----

    def prepare(
        self,
        messages: Sequence[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        **overrides: Any,
    ) -> Request:
        """Return the checked request for the next answer of a chat.

        Args:
            messages: `role` and `content`, as LLaMA-Factory's engines take them.
            system: the system prompt; None for the template's.
            tools: JSON of the tools.
            images: refused if there are any.
            videos: refused if there are any.
            audios: refused if there are any.
            overrides: keywords of `read_options`.
        Raises:
            ValueError: if the model cannot do this, naming the key, what was given and what is allowed.
        """
        for kind, items in (("images", images), ("videos", videos), ("audios", audios)):
            if items:
                raise ValueError(f"{kind}: this model reads text alone; remove them")
        options = self.options(overrides)
        ids = self.prompts.prompt(messages, system, tools)
        start = self.served.start
        canvas = self.generator.from_prompt(
            ids, self._room("messages", len(ids) + self._n_start(ids, start), options), start=start
        )
        return self._checked(canvas, options)

    def prepare_text(self, prompt: str, suffix: str | None = None, **overrides: Any) -> Request:
        """Return the checked request that continues a text, or fills the gap before `suffix` or those it marks.

        Args:
            prompt: a text; markers such as <|infill:8|> in it are gaps to fill.
            suffix: the text after a gap of `max_tokens` tokens that follows the prompt.
            overrides: keywords of `read_options`.
        Raises:
            ValueError: if the model cannot do this, naming the key.
        """
        options = self.options(overrides)
        generator, encode = self.generator, self.generator.codec.encode
        prompt, suffix = self.prompts.plain(prompt), self.prompts.plain(suffix or "")
        if MARKER.search(prompt):
            if suffix:
                raise ValueError("suffix: the prompt marks its gaps with <|infill:n|>; remove one of them")
            if options.max_tokens is not None:
                raise ValueError(
                    "max_tokens: the markers <|infill:n|> of the prompt set the number of tokens; remove it"
                )
            parts = [part for part in split_at_markers(prompt) if part is not None]
            if "<|infill|>" in prompt:
                raise ValueError("prompt: <|infill|> has no length; write <|infill:8|> for a gap of 8 tokens")
            self._check_size("prompt", sum(part for part in parts if isinstance(part, int)))
            canvas = generator.from_parts(parts)
        elif suffix:
            ids, after = encode(prompt), generator.codec.encode_after(suffix)
            room = self._room("prompt", len(ids) + len(after) + self._n_start(ids, True), options)
            canvas = generator.from_parts([ids, room, after])
        else:
            ids = encode(prompt)
            room = self._room("prompt", len(ids) + self._n_start(ids, True), options)
            canvas = generator.from_parts([ids, room])
        return self._checked(canvas, options)

    def options(self, overrides: dict[str, Any]) -> Options:
        """Return the options of a request over the server's defaults.

        Raises:
            ValueError: see `read_options`.
        """
        return read_options(self.generator, self.defaults, self.timeout, overrides)

    def _n_start(self, ids: Sequence[int], start: bool) -> int:
        start_id = self.generator.start_id
        return int(start and start_id is not None and list(ids[:1]) != [start_id])

    def _room(self, field: str, n_prompt: int, options: Options) -> int:
        """Return the number of tokens to generate after (and before) `n_prompt` fixed ones.

        Raises:
            ValueError: if they leave none.
        """
        canvas, wanted = self.served.canvas, options.max_tokens or self.served.max_new_tokens
        room = None if canvas is None else canvas - n_prompt
        if room is not None and room < 1:
            raise ValueError(
                f"{field}: a prompt of {n_prompt} tokens leaves no room for an answer within {canvas} tokens "
                f"({self.served.canvas_is}); shorten it"
            )
        n_tokens = min(n for n in (room, wanted) if n is not None)
        self._check_size("max_tokens", n_tokens)
        return n_tokens

    def _check_size(self, field: str, n_tokens: int) -> None:
        """Check the number of tokens to generate before a canvas of that size is made.

        Raises:
            ValueError: if the server takes no canvas so large.
        """
        limit = self.server.limits.max_positions
        if n_tokens > limit:
            raise ValueError(
                f"{field}: {n_tokens} tokens to generate exceed the {limit} positions that this server takes "
                "(serving_positions); generate fewer"
            )

    def _checked(self, canvas: Canvas, options: Options) -> Request:
        chosen = self.served.chosen | options.chosen
        request = Request(
            canvas,
            fitted_settings(options.settings, chosen, canvas.n_editable, self.generator.config),
            n=options.n,
            stop=options.stop,
            shows_canvas=options.shows_canvas,
            timeout=options.timeout,
        )
        try:
            self.server.check(request)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("text 0: ")) from error  # there is but one
        return request

    # ---- answers ----

    def submit(self, request: Request) -> Running:
        """Give a request its place, and return it running; called within an event loop.

        Raises:
            ServerBusy: if too many requests wait, or the server is closing.
            ValueError: if it is not allowed.
        """
        return Running(self.server, request)

    async def events(self, request: Request) -> AsyncGenerator[Progress | Answer, None]:
        """Yield what happens to a request: `Progress`, and an `Answer` for each of its samples.

        A caller that closes the generator early cancels the request.

        Raises:
            ServerBusy: see `submit`.
            TimeoutError: if the request took too long.
        """
        async with contextlib.aclosing(self.submit(request).events()) as events:
            async for event in events:
                yield event

    async def answers(self, request: Request) -> list[Answer]:
        """Return the answers of a request, one for each sample in their order.

        Raises:
            ServerBusy: see `events`.
            TimeoutError: see `events`.
        """
        found = [event async for event in self.events(request) if isinstance(event, Answer)]
        return sorted(found, key=lambda answer: answer.sample)

    async def chat(
        self,
        messages: list[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        **input_kwargs: Any,
    ) -> list[Response]:
        """Return the answers to a chat, as LLaMA-Factory's engines do."""
        request = self.prepare(messages, system, tools, images=images, videos=videos, audios=audios, **input_kwargs)
        return [
            Response(answer.text, answer.completion_tokens, answer.prompt_tokens, answer.finish_reason)
            for answer in await self.answers(request)
        ]

    async def stream_chat(
        self,
        messages: list[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        **input_kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        """Yield the pieces of the answer to a chat as they become final."""
        request = self.prepare(messages, system, tools, images=images, videos=videos, audios=audios, **input_kwargs)
        async with contextlib.aclosing(self.events(request)) as events:
            async for event in events:
                if isinstance(event, Progress) and event.sample == 0 and event.text:
                    yield event.text

    async def get_scores(self, batch_input: list[str], **input_kwargs: Any) -> list[float]:
        """Refuse: a diffusion model is no reward model.

        Raises:
            ValueError: always.
        """
        raise ValueError("a diffusion model gives no reward scores; load a reward model with stage: rm")
