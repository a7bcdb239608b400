"""OpenAI's API for a diffusion model, on LLaMA-Factory's app: chats, completions and infilling, and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ...data.canvas import MARKER
from ...serving.request import Answer, Progress, Request
from ...serving.server import ServerBusy
from ..logs import get_logger
from .engine import DiffusionEngine, Running
from .http import ApiError, EventStream, Guard, disconnection, is_loopback, parse_json
from .messages import read_chat
from .metrics import Metrics
from .protocol import Body, read_body, refused, schema
from .replies import Reply

logger = get_logger(__name__)
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_CLIENT_LEFT = 499
_DRAIN_SECONDS = 300


@dataclass(frozen=True)
class Job:
    """A checked request, and how it is answered."""

    body: Body
    request: Request
    reply: Reply


def extend(app: Any, engine: DiffusionEngine) -> Any:
    """Add the routes of a diffusion model to LLaMA-Factory's app, in place of its own chat, and return the app."""
    api = Api(engine)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != _CHAT]
    app.add_api_route(_CHAT, api.chat, methods=["POST"], openapi_extra=schema("chat"), response_model=None)
    app.add_api_route(_TEXT, api.text, methods=["POST"], openapi_extra=schema("text"), response_model=None)
    app.add_api_route("/metrics", api.show_metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Guard, api_key=os.getenv("API_KEY"), host=os.getenv("API_HOST"))
    return app


async def _http_error(_: Any, error: Any) -> Response:
    return ApiError(error.status_code, str(error.detail)).response


class Api:
    """The routes."""

    def __init__(self, engine: DiffusionEngine) -> None:
        """Serve an engine."""
        self.engine = engine
        self.metrics = Metrics(engine.server)
        self._name = os.getenv("API_MODEL_NAME", "gpt-3.5-turbo")  # as LLaMA-Factory lists it

    async def show_metrics(self) -> Response:
        """Return the metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a chat."""
        return await self._respond("chat", self._chat_job, request)

    async def text(self, request: HttpRequest) -> Response:
        """Continue a text, or fill its gaps."""
        return await self._respond("text", self._text_job, request)

    # ---- requests ----

    def _chat_job(self, body: Body) -> Job:
        messages, system, tools = read_chat(body.values)
        request = self.engine.prepare(messages, system, tools, **body.keywords)
        extract = self.engine.template.extract_tool if tools else None
        return Job(body, request, Reply(True, body.model or self._name, request.settings.seed, extract))

    def _text_job(self, body: Body) -> Job:
        prompt, suffix = body.values.get("prompt"), body.values.get("suffix")
        if isinstance(prompt, list) and len(prompt) == 1:
            [prompt] = prompt
        if not isinstance(prompt, str):
            raise ApiError(400, "prompt must be one text; send a request for each text", param="prompt")
        if not isinstance(suffix, str | None):
            raise ApiError(400, f"suffix must be a text, got {type(suffix).__name__}", param="suffix")
        request = self.engine.prepare_text(prompt, suffix, **body.keywords)
        fills = bool(suffix or MARKER.search(prompt))
        return Job(body, request, Reply(False, body.model or self._name, request.settings.seed, shows_whole=fills))

    async def _respond(self, route: str, job_of: Callable[[Body], Job], http: HttpRequest) -> Response:
        """Check a request, and answer it or say why not; nothing is sent before it is checked and has a place."""
        start = time.perf_counter()
        status = 500
        try:
            with _as_api_errors():
                body = read_body(route, parse_json(await http.body()))
                job = await asyncio.to_thread(job_of, body)
                running = self.engine.submit(job.request)
            status = 200
            if body.streams:
                return EventStream(self._stream(job, running, start), when_closed=running.close)
            answers = await _unless_gone(http, self._all(running, start))
            running.close()
            if answers is None:
                status = _CLIENT_LEFT
                return Response(status_code=_CLIENT_LEFT)
            return JSONResponse(job.reply.whole(answers))
        except ApiError as error:
            status = error.status
            return error.response
        finally:
            self.metrics.responses.labels(route, str(status)).inc()

    # ---- answers ----

    async def _all(self, running: Running, start: float) -> list[Answer]:
        """Return all answers of a request, in order."""
        answers: list[Answer] = []
        with _as_api_errors():
            async for event in self._timed(running, start):
                if isinstance(event, Answer):
                    answers.append(event)
        return sorted(answers, key=lambda answer: answer.sample)

    async def _stream(self, job: Job, running: Running, start: float) -> AsyncGenerator[str, None]:
        """Yield the data of the server-sent events that answer a request."""
        answers: list[Answer] = []
        try:
            with _as_api_errors():
                for chunk in job.reply.first_chunks(job.request.n):
                    yield chunk
                async with contextlib.aclosing(self._timed(running, start)) as events:
                    async for event in events:
                        if isinstance(event, Progress):
                            piece = job.reply.progress_chunk(event)
                            if piece is not None:
                                yield piece
                        else:
                            answers.append(event)
                            for chunk in job.reply.last_chunks(event):
                                yield chunk
        except ApiError as error:
            yield json.dumps(error.body)
            return
        if job.body.includes_usage:
            yield job.reply.usage_chunk(answers)
        yield "[DONE]"

    async def _timed(self, running: Running, start: float) -> AsyncGenerator[Progress | Answer, None]:
        """Yield the events of a request, and note when its first text came and when it was answered."""
        has_text = False
        async with contextlib.aclosing(running.events()) as events:
            async for event in events:
                if not has_text and event.text:
                    has_text = True
                    self.metrics.first_token_seconds.observe(time.perf_counter() - start)
                yield event
        self.metrics.seconds.observe(time.perf_counter() - start)


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    """Turn what the engine raises into errors of the API."""
    try:
        yield
    except ApiError:
        raise
    except ServerBusy as error:
        raise ApiError(503, f"the server is busy: {error}; try again later", code="server_busy") from error
    except TimeoutError as error:
        raise ApiError(504, str(error) or "the request took too long", code="timeout") from error
    except ValueError as error:
        raise refused(error) from error
    except Exception as error:
        logger.exception("a request failed")
        raise ApiError(500, f"the model failed: {type(error).__name__}", code="model_failed") from error


async def _unless_gone(http: HttpRequest, answers: Coroutine[Any, Any, list[Answer]]) -> list[Answer] | None:
    """Return the answers; None, and cancel them, if the client goes first."""
    working, leaving = asyncio.ensure_future(answers), asyncio.ensure_future(disconnection(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


# ---- the command ----


def run(upstream: Any) -> None:
    """Serve a diffusion model until SIGTERM or SIGINT, after which running requests are finished.

    Args:
        upstream: the module llamafactory.api.app.
    """
    host, port = bound_host(), int(os.getenv("API_PORT", "8000"))
    check_port(host, port)
    chat_model = upstream.ChatModel()
    app = upstream.create_app(chat_model)
    logger.info_rank0(f"Serving on http://{host}:{port}; http://{host}:{port}/docs describes the API.")
    # uvicorn raises the signal again once it is done, which would end the process with the signal's status.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        upstream.uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=_drain_seconds(chat_model.engine))
    finally:
        signal.signal(signal.SIGTERM, previous)
        chat_model.engine.close(drain=True)


def check_port(host: str, port: int) -> None:
    """Check that a port is free, before a model is loaded for nothing.

    Raises:
        OSError: if another program listens on it, or it is no port.
    """
    if not 0 <= port < 2**16:
        raise OSError(f"API_PORT: {port} is not a port; set a number from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # uvicorn reports other errors
            raise OSError(
                f"API_PORT: another program uses port {port} of {host}; stop it, or set API_PORT to another port"
            ) from error


def _drain_seconds(engine: DiffusionEngine) -> int:
    """Return how long running requests are waited for at the end; a client that does not read would hold one open."""
    return _DRAIN_SECONDS if engine.timeout is None else max(1, math.ceil(engine.timeout))


def bound_host() -> str:
    """Return the address to listen on: API_HOST; without it all, but without API_KEY this computer's own only."""
    host, has_key = os.getenv("API_HOST"), bool(os.getenv("API_KEY"))
    if host is None and has_key:
        return "0.0.0.0"
    if host is None:
        logger.info_rank0(
            "API_KEY is not set, so that the API listens on 127.0.0.1 only; to reach it from other computers set "
            "API_KEY, or API_HOST=0.0.0.0 to serve everyone."
        )
        return "127.0.0.1"
    if not has_key and not is_loopback(host):
        logger.warning_rank0(f"API_HOST is {host} and API_KEY is not set: everyone who reaches it can use this model.")
    return host
