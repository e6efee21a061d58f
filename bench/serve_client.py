"""A load on the HTTP server, from a process of its own: a `Load` as JSON on stdin, what came back on stdout.

Closed loop: so many clients, each sending its next image when it has the last one's result: the throughput there is.
Open loop: images arrive at random moments at a given rate, whether or not the earlier ones are done, as callers that
know nothing of each other do; latencies count from the moment of arrival. Every result is held against the image's own.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import numpy as np

ANSWER_WITHIN = 60.0  # seconds; what takes longer counts as unanswered
WARM_UP = 1.0  # seconds of the load that are not counted


@dataclass
class Load:
    url: str
    images: list[str]  # files, all of them different pictures
    seconds: float
    clients: int | None = None  # closed loop
    rate: float | None = None  # open loop, images a second
    expected: list[list[float]] | None = None  # each image's summary
    max_relative_error: float = 0.05  # between one batch's rounding and another's; two pictures differ by far more


@dataclass
class Seen:
    statuses: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    errors: Counter = field(default_factory=Counter)
    done: list[float] = field(default_factory=list)  # when results came, seconds from the beginning
    wrong: int = 0


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


class Connection(asyncio.Protocol):
    """One at a time: a request's bytes out, its status and body back. As little of Python as can be."""

    def __init__(self):
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None
        self._body: list[bytes] = []
        self._kept = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed before the answer was there"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        self._kept = self._parser.should_keep_alive()  # the parser knows only now
        if not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._body)))

    @property
    def usable(self) -> bool:
        return self._kept and self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._answer, self._body = asyncio.get_running_loop().create_future(), []
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return await self._answer


class Server:
    """Its address and the connections that wait for a request."""

    def __init__(self, url: str):
        address = urlsplit(url)
        self._host, self._port, self._free = address.hostname, address.port, []

    def upload(self, file: bytes) -> bytes:
        """The request for an image, made beforehand: what callers do is not what is measured, and takes cores."""
        part = b'--X\r\nContent-Disposition: form-data; name="images"; filename="i.jpg"\r\nContent-Type: image/jpeg'
        body = b"%s\r\n\r\n%s\r\n--X--\r\n" % (part, file)
        head = (
            f"POST /embed?output=summary&format=npy HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: multipart/form-data; boundary=X\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        async with asyncio.timeout(ANSWER_WITHIN):
            while self._free and not self._free[-1].usable:
                self._free.pop()
            if self._free:
                connection = self._free.pop()
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(Connection, self._host, self._port)
            answer = await connection.ask(request)
        self._free.append(connection)
        return answer


async def one(server: Server, load: Load, requests: list[bytes], index: int, seen: Seen, begin: float):
    arrived = time.perf_counter()
    counted = arrived - begin >= WARM_UP
    try:
        status, body = await server.ask(requests[index])
    except (OSError, httptools.HttpParserError) as error:  # a TimeoutError is an OSError
        seen.errors[type(error).__name__] += 1
        return
    done = time.perf_counter()
    if status == 200 and load.expected is not None:
        expected = np.asarray(load.expected[index], np.float32)
        difference = np.abs(np.load(io.BytesIO(body), allow_pickle=False).ravel() - expected).max()
        seen.wrong += bool(difference > load.max_relative_error * np.abs(expected).max())
    if status == 200:
        seen.done.append(done - begin)
    if counted:
        seen.statuses[status] += 1
        if status == 200:
            seen.latencies.append(done - arrived)


async def closed(server: Server, load: Load, requests: list[bytes], seen: Seen) -> None:
    begin = time.perf_counter()

    async def client(number: int) -> None:
        picture = random.Random(number)
        while time.perf_counter() - begin < load.seconds + WARM_UP:
            await one(server, load, requests, picture.randrange(len(requests)), seen, begin)

    await asyncio.gather(*(client(number) for number in range(load.clients)))


async def opened(server: Server, load: Load, requests: list[bytes], seen: Seen) -> None:
    begin, chance = time.perf_counter(), random.Random(0)
    arrival, sent = 0.0, set()
    while (arrival := arrival + chance.expovariate(load.rate)) < load.seconds + WARM_UP:
        await asyncio.sleep(max(begin + arrival - time.perf_counter(), 0))
        task = asyncio.create_task(one(server, load, requests, chance.randrange(len(requests)), seen, begin))
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.gather(*sent)


async def run(load: Load) -> dict:
    server, seen = Server(load.url), Seen()
    requests = [server.upload(Path(path).read_bytes()) for path in load.images]
    started = time.perf_counter()
    await (closed if load.clients else opened)(server, load, requests, seen)
    seconds = time.perf_counter() - started - WARM_UP
    ok = len(seen.latencies)
    return {
        "statuses": dict(seen.statuses),
        "errors": dict(seen.errors),
        "wrong": seen.wrong,
        "seconds": seconds,
        # Of a stretch that begins and ends in the midst of the load: what is under way at its ends evens out.
        "images_per_s": sum(0 <= when - WARM_UP < load.seconds for when in seen.done) / load.seconds,
        "p50_ms": 1e3 * statistics.median(seen.latencies) if ok else None,
        "p99_ms": 1e3 * percentile(seen.latencies, 0.99) if ok > 1 else None,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(Load(**json.load(sys.stdin))))))
