"""The Embedder and the HTTP server against the bare model, under load, on loopback.

`OMP_WAIT_POLICY=passive ./dev bench bench/bench_serve.py --benchmark-json=bench/results/cpu/serve.json`, then
`.venv/bin/python -m bench.serve_table bench/results/cpu/serve.json`. Server, callers and the bare model share the cores
of one machine, so a server's own work takes from what is computed; OpenMP's threads must sleep while they wait, as
docs/serving.md has it. RADIO_FAST_BENCH=full runs the soak for five minutes, else for half of one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import radio_fast
from radio_fast.images import read_image, to_tensor

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "golden" / "vit_h16" / "checkpoint.pth.tar"
PICTURES = 64
BATCH = 8  # images that the token budget holds
QUEUE = BATCH * 3 // 2  # images in the server, a bound on each one's wait: a batch in the model, half of one waiting
LOADS = (0.5, 1.0, 3.0)  # of the capacity measured before
ROUNDS, SECONDS = 3, 8.0
SOAK = 300.0 if os.environ.get("RADIO_FAST_BENCH") == "full" else 30.0
SOAK_LOAD = 0.8
SOAK_SIZES = ("224x224", "160x224", "224x128", "96x96")


@dataclass(frozen=True)
class Subject:
    source: str
    arguments: tuple[str, ...]  # of `radio-fast serve`
    load: dict
    side: int


SUBJECTS = {
    "tiny": Subject(str(TINY), (), {}, 64),
    "ViT-B": Subject("c-radio_v3-b", ("--random-init",), {"random_init": True}, 224),
}
DTYPE = "bfloat16"


def make_pictures(folder: Path, side: int) -> list[Path]:
    """JPEGs of one size, each of its own colours, so that every one has another embedding."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(PICTURES):
        small = random.integers(0, 256, (4, 4, 3), np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


@contextmanager
def serving(subject: Subject, max_tokens: int, resolution: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process. It must end with exit code 0."""
    command = [
        *(sys.executable, "-c", "from radio_fast.cli import main; main()", "serve", subject.source),
        *("--port", "0", "--dtype", DTYPE, "--resolution", resolution),
        *("--max-tokens", str(max_tokens), "--max-queue", str(QUEUE), "--log-level", "warning", *subject.arguments),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise RuntimeError("the server told no address")
            wait_until_ready(found[0], server)
            yield found[0], psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        assert code == 0, f"the server ended with exit code {code}"


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError("the server ended before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server was not ready after two minutes")


def put_load(**load) -> dict:
    command = [sys.executable, "-m", "bench.serve_client"]
    done = subprocess.run(command, input=json.dumps(load), capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def rate_of(images: int, run) -> float:
    """Images a second that `run`, which computes so many, does."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        run()
        count += images
    return count / (time.perf_counter() - begin)


def rate_of_embedder(embedder: radio_fast.Embedder, files: list[bytes]) -> float:
    with closing(embedder.embed_many(cycle(files))) as results:

        def batch() -> None:
            for _ in range(BATCH):
                next(results)

        batch()  # from here on it runs evenly
        return rate_of(BATCH, batch)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request, tmp_path_factory):
    """(a subject, its model, patches of an image, pictures, their summaries)."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        pytest.skip("needs OMP_WAIT_POLICY=passive, as an Embedder on a CPU does (docs/serving.md)")
    subject = SUBJECTS[request.param]
    model = radio_fast.load(subject.source, dtype=DTYPE, **subject.load)
    pictures = make_pictures(tmp_path_factory.mktemp("pictures"), subject.side)
    with torch.inference_mode():
        batch = torch.stack([to_tensor(read_image(path), subject.side, subject.side) for path in pictures])
        out = model(batch)
    return subject, model, out.features.shape[1], pictures, out.summary.float().tolist()


def test_load(benchmark, subject):
    subject, model, tokens, pictures, expected = subject
    batch = torch.stack([to_tensor(read_image(path), subject.side, subject.side) for path in pictures[:BATCH]])
    files = [path.read_bytes() for path in pictures]
    images = [str(path) for path in pictures]
    info: dict = {"batch": BATCH, "queue": QUEUE, "side": subject.side, "loads": {}}

    def bare() -> None:
        with torch.inference_mode():
            model(batch)

    def measure() -> None:
        rates: dict[str, list[float]] = {"model alone": [], "Embedder": [], "HTTP": []}
        embedder = radio_fast.Embedder(model, max_tokens=BATCH * tokens, resolution=subject.side)
        with embedder, serving(subject, BATCH * tokens, str(subject.side)) as (url, _):
            embedder.warm_up()
            closed = {"url": url, "images": images, "expected": expected, "seconds": SECONDS, "clients": QUEUE}
            for _ in range(ROUNDS):
                rates["model alone"].append(rate_of(BATCH, bare))
                rates["Embedder"].append(rate_of_embedder(embedder, files))
                rates["HTTP"].append(checked(put_load(**closed))["images_per_s"])
            medians = {name: statistics.median(values) for name, values in rates.items()}
            for share in LOADS:
                load = {"url": url, "images": images, "expected": expected, "seconds": 2 * SECONDS}
                info["loads"][str(share)] = checked(put_load(**load, rate=share * medians["HTTP"]))
        info["images_per_s"] = medians
        info["of_the_model"] = {name: rate / medians["model alone"] for name, rate in medians.items()}
        info["p99_at_3_over_at_half"] = info["loads"]["3.0"]["p99_ms"] / info["loads"]["0.5"]["p99_ms"]

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(info)


def checked(result: dict) -> dict:
    """A result of the load in which nobody was left without an answer or given another's."""
    assert not result["errors"] and not result["wrong"], result
    assert set(result["statuses"]) <= {"200", "429"}, result
    return result


def test_soak(benchmark, subject, tmp_path):
    """Resident memory under a steady load of mixed sizes: after a fifth of the time, and the most after that."""
    subject, _, tokens, pictures, _ = subject
    random = np.random.default_rng(1)
    mixed = []
    for path in pictures:
        height, width = map(int, SOAK_SIZES[random.integers(len(SOAK_SIZES))].split("x"))
        mixed.append(str(tmp_path / path.name))
        Image.open(path).resize((width, height)).save(mixed[-1])
    info: dict = {"seconds": SOAK}

    def measure() -> None:
        with serving(subject, BATCH * tokens, "native") as (url, process):
            closed = put_load(url=url, images=mixed, seconds=SECONDS, clients=QUEUE)
            load = {"url": url, "images": mixed, "seconds": SOAK, "rate": SOAK_LOAD * closed["images_per_s"]}
            command = [sys.executable, "-m", "bench.serve_client"]
            client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            client.stdin.write(json.dumps(load))
            client.stdin.close()
            resident = []
            while client.poll() is None:
                resident.append(process.memory_info().rss)
                time.sleep(0.5)
            result = checked(json.loads(client.stdout.read()))
        settled = len(resident) // 5
        tenth = max(len(resident) // 10, 1)
        info.update(
            result,
            rss_settled=resident[settled],
            rss_peak=max(resident[settled:]),
            growth=statistics.mean(resident[-tenth:]) / statistics.mean(resident[settled : settled + tenth]),
        )

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(info)
