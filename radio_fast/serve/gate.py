"""In front of the routes: keys, limits on bodies, draining, and what is counted. Plain ASGI, so that a request can be
refused before its body is read.
"""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radio_fast.serve.errors import ApiError, client_gone, shutting_down
from radio_fast.serve.prometheus import Prometheus
from radio_fast.serve.service import Service

# Whoever can connect may see these; every other path, one that there is not too, wants the key.
OPEN = frozenset({"/", "/page.js", "/page.css", "/docs", "/docs.js", "/openapi.json", "/health/live", "/health/ready"})
METRICS = "/metrics"
EMBEDS = frozenset({"/embed", "/v1/embeddings"})
BODY_SECONDS = 60.0  # in which a body has to arrive
# An answer has to leave in this time, and more by its size: memory is held until it has.
ANSWER_SECONDS = 60.0
ANSWER_RATE = 2**18  # bytes a second
CHUNK = 2**16  # bytes of an answer; the next ones wait until these are nearly gone
BODIES = 8  # of the largest size that may be in memory together
COMMAS = 4096  # in JSON: 60 MB of small items would hold the interpreter for 10 seconds, those of 256 images no time


class Gate:
    """Refuses (401, 408, 413, 429, 503), counts, and times."""

    def __init__(
        self, app: ASGIApp, *, service: Service, prometheus: Prometheus, api_key: str | None, max_body_bytes: int
    ):
        self.app = app
        self.service = service
        self.prometheus = prometheus
        self.key = None if api_key is None else api_key.strip().encode()
        self.max_body_bytes = max_body_bytes
        self.held = 0  # bytes of bodies of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        status, start = 500, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if status == 499:  # for the metrics: it was too slow; the server closes what has no end
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if self.service.draining:
                    headers["Connection"] = "close"
            body = message.get("body", b"")
            try:
                async with self.service.within(ANSWER_SECONDS + len(body) / ANSWER_RATE):
                    if len(body) > CHUNK:
                        for part in range(0, len(body), CHUNK):
                            await send({**message, "body": body[part : part + CHUNK], "more_body": True})
                        message = {**message, "body": b""}
                    await send(message)
            except TimeoutError:
                status = 499

        body = _Body(self, receive, "json" in Headers(scope=scope).get("content-type", "").lower())
        try:
            self._admit(scope["method"], path, Headers(scope=scope))
            if path in OPEN or path == METRICS:
                await self.app(scope, body.receive, watch)
            else:
                with self.service.request(scope):
                    await self.app(scope, body.receive, watch)
        except ApiError as error:
            await error.response()(scope, receive, watch)
        finally:
            body.release()
            self.prometheus.observe(path, status, time.perf_counter() - start)

    def _admit(self, method: str, path: str, headers: Headers) -> None:
        if path in OPEN:
            return
        if self.key is not None:
            # As bytes: compare_digest takes no other strings than ASCII.
            scheme, _, key = headers.get("authorization", "").encode("latin-1").partition(b" ")
            if not (hmac.compare_digest(key.strip(), self.key) and scheme.lower() == b"bearer"):
                raise ApiError(401, "invalid_api_key", "this server wants its key: Authorization: Bearer KEY")
        if self.service.draining and path != METRICS:
            raise shutting_down()
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            raise self.too_large()
        # At overload most requests end here: reading one costs more than its answer.
        if method == "POST" and path in EMBEDS:
            self.service.check_room()

    def too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the request is larger than {self.max_body_bytes} bytes")


class _Body:
    """A request's body as it arrives, held to the limits."""

    def __init__(self, gate: Gate, receive: Receive, is_json: bool):
        self._gate = gate
        self._receive = receive
        self._is_json = is_json
        self._commas = 0
        self._size = 0
        self._whole = False
        self._until = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the client's leaving
            return await self._receive()
        try:
            async with self._gate.service.within(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            if self._gate.service.draining and time.monotonic() < self._until:
                raise shutting_down() from None
            raise ApiError(408, "body_timeout", f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
        if message["type"] == "http.disconnect":
            raise client_gone()
        part = message.get("body", b"")
        self._size += len(part)
        self._gate.held += len(part)
        self._whole = not message.get("more_body", False)
        if self._size > self._gate.max_body_bytes:
            raise self._gate.too_large()
        if self._gate.held > BODIES * self._gate.max_body_bytes:
            raise ApiError(429, "queue_full", "the server holds too many requests", retry_after=1)
        self._commas += part.count(b",") if self._is_json else 0
        if self._commas > COMMAS:
            raise ApiError(400, "invalid_value", "the JSON has too many items")
        return message

    def release(self) -> None:
        self._gate.held -= self._size
