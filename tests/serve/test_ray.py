"""Whole datasets and requests on a local Ray: every image once, whoever dies in between."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

import radio_fast
from radio_fast.images import ImageError
from tests.numerics import assert_relative
from tests.serve.jobs import OPTIONS, VERSION, check_rows, expected, fill, leftovers, picture, rows_of, table_of

pytest.importorskip("ray", reason="pip install radio_fast[ray]")

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from radio_fast.serve.ray import embed_dataset

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray's own use of itself and pydantic
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


def state_of(output: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("*.parquet")}


def until(condition, what: str):
    """The first true value of condition()."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


def snippets(folder: Path) -> list[str]:
    """Of the documentation, as they stand, but for a small model and a folder of ours."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    text = re.search(r"^## On Ray$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]
    for ours, theirs in {
        repr(VERSION): '"radio_v2.5-b"',
        str(folder): "/data",
        '{"num_replicas": 1, "health_check_period_s": 0.2}': '{"num_replicas": 1}',  # a dead one is seen the sooner
    }.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# -- whole datasets ---------------------------------------------------------------------------------------------------


def test_a_folder(cluster, model, tmp_path):
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


@pytest.fixture
def held(monkeypatch):
    from tests.serve.held import Held

    monkeypatch.setattr(radio_fast.serve.ray, "_EmbedFiles", Held)


def pipe_beside(image: Path) -> Path:
    pipe = image.with_suffix(".pipe")
    os.mkfifo(pipe)
    return pipe


@contextlib.contextmanager
def stuck(pipe: Path):
    """A `Held` worker hangs at this pipe; gives a function that waits for that and tells whose id it is."""
    writer: list[int] = []

    def opened() -> bool:
        with contextlib.suppress(OSError):  # no reader yet
            writer.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writer)

    def reader() -> int:
        until(opened, "a worker that reads the pipe")

        def holders() -> list[int]:
            found = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(OSError, psutil.Error):
                    if any(os.path.samefile(fd, pipe) for fd in Path(f"/proc/{process.pid}/fd").iterdir()):
                        found.append(process.pid)
            return found

        (pid,) = until(holders, "the process that reads the pipe")
        return pid

    try:
        yield reader
    finally:
        pipe.unlink()  # before its end, so that nobody waits for a writer that is gone
        for fd in writer:
            os.close(fd)


def test_a_worker_killed_in_the_middle_of_a_file(cluster, model, held, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    fill(images, 40)
    pipe, killed = pipe_beside(images / "a" / "018.png"), []

    def kill() -> None:
        with stuck(pipe) as reader:
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


@pytest.fixture
def ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and so would the tests in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_job_goes_on_with_what_is_missing(cluster, model, held, ctrl_c, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    fill(images, 40)
    main = threading.main_thread().ident
    interrupted, pipe = threading.Event(), pipe_beside(images / "b" / "039.png")

    def interrupt() -> None:
        with stuck(pipe) as reader:
            reader()
            until(lambda: len(state_of(output)) == 3, "the finished files")
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(PATIENCE)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(images, output, VERSION, images_per_file=10, actors=2, **OPTIONS)
    before = state_of(output)
    interrupted.set()
    thread.join()
    assert before.keys() == {f"{i:06}.parquet" for i in range(3)} and not leftovers(output)

    # One file is lost, one cut short, one left by a worker that was killed; and there is one more image.
    (output / "000000.parquet").unlink()
    cut = (output / "000001.parquet").read_bytes()
    (output / "000001.parquet").write_bytes(cut[: len(cut) // 2])
    (output / ".000000.parquet.0.part").write_bytes(cut)
    (images / "a" / "000 new.png").write_bytes(picture(77))
    report = embed_dataset(str(images), str(output), Path(VERSION), images_per_file=7, device="cpu", **OPTIONS)
    assert (report.files, report.skipped, report.images, report.failed) == (4, 1, 31, 0)
    rows = rows_of(output)
    assert len(rows) == 41 and "a/000 new.png" in rows
    check_rows(rows, images, model)
    after = state_of(output)
    assert {name for name in before if before[name] == after[name]} == {"000002.parquet"}
    assert not leftovers(output)

    report = embed_dataset(images, output, VERSION, **OPTIONS)
    assert (report.files, report.skipped, report.images) == (0, 5, 0)
    assert state_of(output) == after


def test_a_damaged_file_keeps_no_other_from_being_done(cluster, model, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    for i, name in enumerate(("damaged", "part/good", "part/none")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        images = [] if name.endswith("none") else [picture(i), None, picture(i + 10)]
        pq.write_table(table_of(images), source / f"{name}.parquet", compression="none")
    content = bytearray((source / "damaged.parquet").read_bytes())
    content[4:40] = bytes(36)  # the first page's header; the footer, at the end, stays
    (source / "damaged.parquet").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"1 of 3 files are not done: .*damaged\.parquet: "):
        embed_dataset(source, output, VERSION, **OPTIONS)
    done = sorted(str(path.relative_to(output)) for path in output.rglob("*.parquet"))
    assert done == ["part/good.parquet", "part/none.parquet"]
    good = pq.read_table(output / "part" / "good.parquet")
    assert good.column_names == ["id", "path", "summary", "height", "width", "error"]
    assert good["id"].to_pylist() == [0, 1, 2] and good["path"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert [error is None for error in good["error"].to_pylist()] == [True, False, True]
    assert_relative(torch.tensor(good["summary"][2].as_py()), expected(model, picture(11)).summary[0])
    assert pq.read_table(output / "part" / "none.parquet").schema == good.schema


def test_a_model_that_cannot_be_loaded_ends_the_job(cluster, tmp_path):
    fill(tmp_path / "images", 1)
    with pytest.raises(ray.exceptions.RayError, match="nowhere"):
        embed_dataset(tmp_path / "images", tmp_path / "output", VERSION, adaptor_names=["nowhere"])


def test_snippets_of_datasets(cluster, model, tmp_path, capsys):
    fill(tmp_path / "photos", 3)
    dataset, stage, _ = snippets(tmp_path)
    exec(compile(dataset, "dataset", "exec"), {})
    assert capsys.readouterr().out.startswith("3 images in 1 files, 0 unreadable; 0 files were there")
    exec(compile(stage, "stage", "exec"), {})
    rows = rows_of(tmp_path / "out")
    others = {os.path.relpath(path, tmp_path / "photos"): row for path, row in rows_of(tmp_path / "embedded").items()}
    assert rows.keys() == others.keys()
    for path, row in rows.items():
        assert (row["height"], row["width"], row["error"]) == (224, 224, None)
        truth = expected(model, tmp_path / "photos" / path, 224).summary[0]
        assert_relative(torch.tensor(row["summary"]), truth)
        assert_relative(torch.tensor(others[path]["summary"]), truth)


# -- requests ---------------------------------------------------------------------------------------------------------


def replicas() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_requests_and_a_replica_killed(cluster, model, tmp_path):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "photo.png").write_bytes(picture(3))
        names: dict[str, Any] = {}
        exec(compile(snippets(tmp_path)[2], "requests", "exec"), names)
        handle, truth = names["handle"], expected(model, picture(3), 224)

        def ask():
            return handle.embed.remote(picture(3), features=True).result(timeout_s=PATIENCE)

        answer = ask()
        assert_relative(answer.summary, truth.summary[0])
        assert_relative(answer.features, truth.features[0])
        with pytest.raises(ImageError):
            handle.embed.remote(b"no image").result(timeout_s=PATIENCE)

        def post() -> httpx.Response:
            body = {"model": Path(VERSION).name, "input": base64.b64encode(picture(3)).decode()}
            url = f"http://127.0.0.1:{port}/v1/embeddings"
            return httpx.post(url, json=body, timeout=PATIENCE, trust_env=False)

        def check(response: httpx.Response) -> None:
            assert response.status_code == 200, response.text
            assert_relative(torch.tensor(response.json()["data"][0]["embedding"]), truth.summary[0])

        check(post())
        (pid,) = replicas()
        os.kill(pid, signal.SIGKILL)

        def retried():
            with contextlib.suppress(ray.exceptions.RayError, httpx.TransportError):
                return ask(), post()

        answer, response = until(retried, "the replica's successor")
        assert_relative(answer.summary, truth.summary[0])
        check(response)
        assert replicas() not in ([], [pid])
    finally:
        serve.shutdown()
