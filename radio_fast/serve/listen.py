"""uvicorn with a drain: a signal lets the requests in flight finish, answers others 503 meanwhile, and exits with 0."""

from __future__ import annotations

import math
import socket
import time
from types import FrameType

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from radio_fast.serve.service import Service

HEAD_BYTES = 2**16  # of a request's line and headers, and what a read brings at once
GRACE_SECONDS = 5  # for the last bytes of answers
UNREAD_SECONDS = 60  # those that the client's machine has not taken by then are dropped


class Parser(httptools.HttpRequestParser):
    """httptools' own takes what follows a wish for another protocol (`Upgrade: h2c`, which Java's client sends with
    every request) for that protocol, be it the request's body. Here another parser is given the head without the wish.
    """

    def __init__(self, protocol: Protocol):
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    @property
    def wished(self) -> bool:
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:
        parser, left = super(), memoryview(data)
        while left:
            try:
                return parser.feed_data(left)
            except httptools.HttpParserUpgrade as wish:
                left, head = left[wish.args[0] :], self._protocol.plain_head()
                self._protocol.parser = Parser(self._protocol)
                parser = super(Parser, self._protocol.parser)
                parser.feed_data(head)


class Protocol(HttpToolsProtocol):
    """uvicorn's with the parser in C, and the bound on headers and trailers its other one has: that one, in Python,
    takes longer over a request that is refused than all the rest does.
    """

    _held = 0  # bytes since the request's beginning, or a part of its body

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parser = Parser(self)

    def plain_head(self) -> bytes:
        """The head just parsed, without what asks for another protocol."""
        head = self.parser.get_method() + b" " + self.url + b" HTTP/%s\r\n" % self.parser.get_http_version().encode()
        return head + b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade") + b"\r\n"

    def on_headers_complete(self) -> None:
        if not self.parser.wished:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.wished:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        super().data_received(data)
        if self._held > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's headers are too long.")

    def on_message_begin(self) -> None:
        self._held = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)


class Server(uvicorn.Server):
    """Serves `app` until SIGTERM or Ctrl-C and then up to `drain_seconds` more; at once on a second signal, or when the
    model can't be loaded.
    """

    def __init__(self, app: FastAPI, *, drain_seconds: float):
        # No forwarded headers: nothing here depends on a client's address.
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="on", log_config=None, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._service: Service = app.state.service
        self._drain_seconds = drain_seconds
        self._drained_by: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's, which raises the signal again at the end: the exit code would not be 0.
        again = self._drained_by is not None
        self.force_exit = self.should_exit
        self._service.draining = True
        self._drained_by = time.monotonic() + (0 if again else self._drain_seconds)

    async def on_tick(self, counter: int) -> bool:
        if self._drained_by is not None and time.monotonic() > self._drained_by:
            await self._service.stop()
            self.should_exit = True
        idle = self._drained_by is not None and not self._service.requests
        if idle:  # a slow reader has the rest of the time for the end of its answer
            left = max(0, math.ceil(self._drained_by - time.monotonic()))
            self.config.timeout_graceful_shutdown = max(GRACE_SECONDS, left)
        if idle or self._service.failure is not None:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        ValueError: the address is not this machine's, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"can't listen on {host} port {port}: {error.strerror or error}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it. uvicorn would keep the answer for ever
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_SECONDS))
    return bound
