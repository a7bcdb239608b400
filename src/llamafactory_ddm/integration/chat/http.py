"""The API at the level of HTTP: errors in OpenAI's format, event streams, the key, the size of bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response

MAX_BODY = 4 * 2**20  # bytes
_BODY_SECONDS, _PING_SECONDS = 60.0, 15.0
_OPEN_PATHS = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")  # what the API is, without the model

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, or None.
        code: a word for programs, or None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API reports it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The response that reports the error."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body, self.status, headers)


class Guard:
    """ASGI middleware that checks the API key, and reads a body of bounded size before the app sees the request.

    Without a key, pages of other sites are refused: a browser would let any of them use the model.
    """

    def __init__(self, app: Any, *, api_key: str | None, host: str | None = None) -> None:
        """Wrap an app.

        Args:
            app: an ASGI app.
            api_key: the key that a request must bring; None for no key.
            host: API_HOST, the address that the user chose to listen on; None for this computer's own.
        """
        self.app = app
        self._key = api_key
        self._is_open = host is not None and not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            self._check_origin(scope)
            body = await _body(scope, receive)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        await self.app(scope, _replayed(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if not self._key or scope["method"] == "OPTIONS" or scope["path"] in _OPEN_PATHS:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer", code="invalid_api_key"
            )

    def _check_origin(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1"))
        if self._key or not origin.netloc or is_loopback(origin.hostname or ""):
            return
        if not self._is_open or origin.netloc != headers.get(b"host", b"").decode("latin-1"):
            raise ApiError(
                403,
                f"pages of {origin.scheme}://{origin.netloc} may not use this server; set API_KEY to allow those that "
                "send the key",
                code="origin_not_allowed",
            )


def is_loopback(host: str) -> bool:
    """Tell whether an address is this computer's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """Return the body of a request; None if the client has gone.

    Raises:
        ApiError: if it is too large, or takes too long.
    """
    too_large = ApiError(413, f"the request exceeds {MAX_BODY} bytes; send a shorter text", code="request_too_large")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, "the request did not arrive in time", code="timeout") from error


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI receiver that gives the body first, and then what comes after it."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class EventStream(Response):
    """Server-sent events. Where the client leaves, the generator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], when_closed: Callable[[], None]) -> None:
        """Wrap a generator.

        Args:
            events: data of the events.
            when_closed: called at the end, whether it was begun or not.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._when_closed = events, when_closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(disconnection(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
            self._when_closed()

    async def _send(self, send: Send) -> None:
        """Send each event, and a comment where none comes for long, so that no proxy closes the connection."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while True:
            following = asyncio.ensure_future(anext(self._events, None))
            try:
                while not (await asyncio.wait({following}, timeout=_PING_SECONDS))[0]:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            finally:
                if not following.done():
                    following.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await following
            data = following.result()
            if data is None:
                break
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnection(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        ApiError: if it is none.
    """
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # an escape may spell half of a character
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8 ({str(error)[:200]}); correct it") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(parsed).__name__}")
    return parsed


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
