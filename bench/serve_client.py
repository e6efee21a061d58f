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

import aiohttp
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
    wrong: int = 0
    first: float = float("inf")
    last: float = 0.0


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


async def one(session: aiohttp.ClientSession, load: Load, files: list[bytes], index: int, seen: Seen, begin: float):
    arrived = time.perf_counter()
    counted = arrived - begin >= WARM_UP
    try:
        form = aiohttp.FormData()
        form.add_field("images", files[index], filename=f"{index}.jpg", content_type="image/jpeg")
        async with session.post(f"{load.url}/embed?output=summary&format=npy", data=form) as answer:
            body = await answer.read()
            status = answer.status
    except (TimeoutError, aiohttp.ClientError) as error:
        seen.errors[type(error).__name__] += 1
        return
    done = time.perf_counter()
    if status == 200 and load.expected is not None:
        expected = np.asarray(load.expected[index], np.float32)
        difference = np.abs(np.load(io.BytesIO(body), allow_pickle=False).ravel() - expected).max()
        seen.wrong += bool(difference > load.max_relative_error * np.abs(expected).max())
    if counted:
        seen.statuses[status] += 1
        if status == 200:
            seen.latencies.append(done - arrived)
            seen.first, seen.last = min(seen.first, arrived), max(seen.last, done)


async def closed(session: aiohttp.ClientSession, load: Load, files: list[bytes], seen: Seen) -> None:
    begin = time.perf_counter()

    async def client(number: int) -> None:
        picture = random.Random(number)
        while time.perf_counter() - begin < load.seconds + WARM_UP:
            await one(session, load, files, picture.randrange(len(files)), seen, begin)

    await asyncio.gather(*(client(number) for number in range(load.clients)))


async def opened(session: aiohttp.ClientSession, load: Load, files: list[bytes], seen: Seen) -> None:
    begin, chance = time.perf_counter(), random.Random(0)
    arrival, sent = 0.0, set()
    while (arrival := arrival + chance.expovariate(load.rate)) < load.seconds + WARM_UP:
        await asyncio.sleep(max(begin + arrival - time.perf_counter(), 0))
        task = asyncio.create_task(one(session, load, files, chance.randrange(len(files)), seen, begin))
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.gather(*sent)


async def run(load: Load) -> dict:
    files, seen = [Path(path).read_bytes() for path in load.images], Seen()
    timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await (closed if load.clients else opened)(session, load, files, seen)
        seconds = time.perf_counter() - started - WARM_UP
    ok = len(seen.latencies)
    return {
        "statuses": dict(seen.statuses),
        "errors": dict(seen.errors),
        "wrong": seen.wrong,
        "seconds": seconds,
        "images_per_s": ok / (seen.last - seen.first) if ok > 1 else 0.0,
        "p50_ms": 1e3 * statistics.median(seen.latencies) if ok else None,
        "p99_ms": 1e3 * percentile(seen.latencies, 0.99) if ok > 1 else None,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(Load(**json.load(sys.stdin))))))
