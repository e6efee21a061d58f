"""Whole datasets and requests on a local Ray: every image once, whoever dies in between."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import radio_fast
from radio_fast.images import ImageError, read_image, to_tensor
from tests.conftest import GOLDEN, golden_source
from tests.numerics import assert_relative

pytest.importorskip("ray", reason="pip install radio_fast[ray]")

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from radio_fast.serve import shards
from radio_fast.serve.ray import EmbedImages, _EmbedFiles, deployment, embed_dataset

ROOT = Path(__file__).resolve().parents[2]
VERSION = str(golden_source("vit_h16"))
SIDE = 32
OPTIONS = {"embedder": {"resolution": SIDE}}
PATIENCE = 60.0  # seconds until something that has to happen counts as not happening


@pytest.fixture(scope="module")
def cluster():
    """A Ray of our own with two CPUs, whatever else runs on this machine."""
    folder = tempfile.mkdtemp(prefix="rf-")  # sockets' paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the home folder
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=folder,
            log_to_driver=False,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model():
    return radio_fast.load(VERSION)


def picture(seed: int, side: int = SIDE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + seed % 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(folder: Path, count: int) -> None:
    for i in range(count):
        path = folder / ("ab"[i % 2]) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def expected(model, image: bytes | Path):
    return model(to_tensor(read_image(image), SIDE, SIDE)[None])


def rows_of(output: Path) -> dict[str, dict]:
    """By path; no path may be there twice."""
    rows = [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def check_rows(rows: dict[str, dict], folder: Path, model) -> None:
    for path, row in rows.items():
        assert row["error"] is None and (row["height"], row["width"]) == (SIDE, SIDE)
        assert_relative(torch.tensor(row["summary"]), expected(model, folder / path).summary[0])


def state_of(output: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("*.parquet")}


def until(condition, what: str):
    """The first true value of condition()."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


def leftovers(output: Path) -> list[Path]:
    return list(output.rglob(".*.part"))


# -- whole datasets ---------------------------------------------------------------------------------------------------


def test_a_folder_and_then_what_is_missing(cluster, model, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    fill(images, 60)
    (images / "b" / "broken.png").write_bytes(picture(0)[:100])
    (images / "note.txt").write_text("no image")
    report = embed_dataset(images, output, VERSION, images_per_file=13, actors=2, **OPTIONS)
    assert (report.files, report.skipped, report.images, report.failed) == (5, 0, 61, 1)
    rows = rows_of(output)
    assert list(rows) == sorted(str(p.relative_to(images)) for p in images.rglob("*.png"))
    broken = rows.pop("b/broken.png")
    assert "broken.png" in broken.pop("error") and broken.pop("path")
    assert broken == {"summary": None, "height": None, "width": None}
    check_rows(rows, images, model)
    schema = pq.read_schema(output / "000000.parquet")
    assert schema.field("summary").type == pa.list_(pa.float32(), model.summary_dim)

    # One file lost, one cut short, one left by a worker that was killed; and more images.
    (output / "000001.parquet").unlink()
    cut = (output / "000003.parquet").read_bytes()
    (output / "000003.parquet").write_bytes(cut[: len(cut) // 2])
    (output / ".000001.parquet.0.part").write_bytes(cut)
    before = state_of(output)
    (images / "a" / "000 new.png").write_bytes(picture(77))
    report = embed_dataset(str(images), str(output), Path(VERSION), images_per_file=13, device="cpu", **OPTIONS)
    assert (report.files, report.skipped, report.images, report.failed) == (3, 3, 27, 0)
    rows = rows_of(output)
    assert rows.pop("b/broken.png")["error"]
    assert len(rows) == 61 and "a/000 new.png" in rows
    check_rows(rows, images, model)
    after = state_of(output)
    assert {name for name in before if before[name] == after[name]} == {f"{i:06}.parquet" for i in (0, 2, 4)}
    assert not leftovers(output)

    report = embed_dataset(images, output, VERSION, **OPTIONS)
    assert (report.files, report.skipped, report.images) == (0, 6, 0)
    assert state_of(output) == after


@contextlib.contextmanager
def stuck(image: Path, lists: Path):
    """Whoever reads `image` once it is listed hangs; gives a function that waits for that and tells the process's id."""
    content, pipe = image.read_bytes(), image.with_suffix(".pipe")
    os.mkfifo(pipe)
    writer: list[int] = []

    def swap() -> None:
        until(lambda: any(image.name in file.read_text() for file in lists.glob("*.json")), "the list of images")
        os.replace(pipe, image)

    def opened() -> bool:
        with contextlib.suppress(OSError):  # no reader yet, or no pipe
            if image.is_fifo():
                writer.append(os.open(image, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writer)

    def reader() -> int:
        until(opened, "a worker that reads the pipe")

        def holders() -> list[int]:
            found = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(OSError, psutil.Error):
                    if any(os.path.samefile(fd, image) for fd in Path(f"/proc/{process.pid}/fd").iterdir()):
                        found.append(process.pid)
            return found

        (pid,) = until(holders, "the process that reads the pipe")
        return pid

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield reader
    finally:
        thread.join()
        whole = image.with_suffix(".whole")
        whole.write_bytes(content)
        os.replace(whole, image)
        for fd in writer:
            os.close(fd)


def test_a_worker_killed_in_the_middle_of_a_file(cluster, model, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    fill(images, 40)
    killed: list[int] = []

    def kill() -> None:
        with stuck(images / "a" / "018.png", output / "_images") as reader:
            pid = reader()
            until(lambda: len(state_of(output)) == 3, "the other worker's files")
            killed.extend(pid for part in leftovers(output) if part.name.startswith(".000000.parquet."))
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    report = embed_dataset(images, output, VERSION, images_per_file=10, actors=2, **OPTIONS)
    thread.join()
    assert len(killed) == 1
    assert (report.files, report.images, report.failed) == (4, 40, 0)
    rows = rows_of(output)
    assert len(rows) == 40
    check_rows(rows, images, model)
    assert not leftovers(output)
