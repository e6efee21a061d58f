"""Whole datasets and requests on a local Ray: every image once, whoever dies in between."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import radio_fast
from radio_fast.images import ImageError, read_image, to_tensor
from tests.conftest import golden_source
from tests.numerics import assert_relative

pytest.importorskip("ray", reason="pip install radio_fast[ray]")

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from radio_fast.serve.ray import deployment, embed_dataset

ROOT = Path(__file__).resolve().parents[2]
VERSION = str(golden_source("vit_h16"))
SIDE = 32
OPTIONS = {"embedder": {"resolution": SIDE}}
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
    """Whoever reads `image` once it is listed hangs; gives a function that waits for that and tells whose id it is."""
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


def test_an_interrupted_job_keeps_what_is_finished(cluster, model, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    fill(images, 20)
    main = threading.main_thread().ident

    def interrupt() -> None:
        with stuck(images / "b" / "001.png", output / "_images") as reader:
            reader()
            until(lambda: state_of(output), "a finished file")
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(PATIENCE)

    interrupted = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(images, output, VERSION, images_per_file=10, actors=2, **OPTIONS)
    before = state_of(output)
    interrupted.set()
    thread.join()
    assert before.keys() == {"000000.parquet"}
    report = embed_dataset(images, output, VERSION, images_per_file=10, **OPTIONS)
    assert (report.files, report.skipped, report.images) == (1, 1, 10)
    assert state_of(output)["000000.parquet"] == before["000000.parquet"]
    check_rows(rows_of(output), images, model)


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


def table_of(images: list[bytes | None]) -> pa.Table:
    """As Hugging Face's datasets have them."""
    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"id": pa.array(range(len(images)), pa.int64()), "image": pa.array(structs, kind)})


def test_a_model_that_cannot_be_loaded_ends_the_job(cluster, tmp_path):
    fill(tmp_path / "images", 1)
    with pytest.raises(ray.exceptions.RayError, match="nowhere"):
        embed_dataset(tmp_path / "images", tmp_path / "output", VERSION, adaptor_names=["nowhere"])


# -- requests ---------------------------------------------------------------------------------------------------------


def replicas() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_requests_and_a_replica_killed(cluster, model):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        handle = serve.run(deployment(VERSION, app={"model_name": "tiny"}, **OPTIONS), name="radio")
        truth = expected(model, picture(3))

        def ask():
            return handle.embed.remote(picture(3), features=True).result(timeout_s=PATIENCE)

        answer = ask()
        assert_relative(answer.summary, truth.summary[0])
        assert_relative(answer.features, truth.features[0])
        with pytest.raises(ImageError):
            handle.embed.remote(b"no image").result(timeout_s=PATIENCE)

        def post() -> httpx.Response:
            body = {"model": "tiny", "input": base64.b64encode(picture(3)).decode()}
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


# -- the parts, without a cluster -------------------------------------------------------------------------------------


def test_images_of_every_kind_and_adaptors_features(tmp_path):
    source = golden_source("hf_vit_h16_adaptors")
    model = radio_fast.load(source)
    stage = EmbedImages(source, column="x", keep=["id"], features=True, embedder={"resolution": (32, 48)})
    (tmp_path / "0.png").write_bytes(picture(0))
    pixels = np.asarray(read_image(picture(2)))
    tensors = ray.data.extensions.ArrowTensorArray.from_numpy(pixels[None])
    for images in (
        pa.array([picture(0), picture(2), None]),
        pa.array([picture(0), picture(2), b"damaged"], pa.large_binary()),
        pa.array([{"bytes": picture(0)}, {"bytes": picture(2)}, None], pa.struct([("bytes", pa.binary())])),
        pa.array([str(tmp_path / "0.png"), None, str(tmp_path / "missing.png")]),
        tensors,
    ):
        table = stage(pa.table({"id": range(len(images)), "other": range(len(images)), "x": images}))
        assert table.column_names == [
            "id", "summary", "features", *(f"{name}_{part}" for name in model.adaptors for part in ("summary", "features")),
            "height", "width", "grid_height", "grid_width", "error",
        ]  # fmt: skip
        rows = table.to_pylist()
        assert [row["id"] for row in rows] == list(range(len(images)))
        for row, image in zip(rows, [picture(2)] if images is tensors else [picture(0), picture(2), None], strict=True):
            if row["error"] is not None:
                assert {key for key, value in row.items() if value is not None} == {"id", "error"}
                continue
            assert (row["height"], row["width"], row["grid_height"], row["grid_width"]) == (32, 48, 2, 3)
            truth = model(to_tensor(read_image(image), 32, 48)[None])
            for name, output in truth.items():
                prefix = "" if name == "backbone" else f"{name}_"
                assert_relative(torch.tensor(row[f"{prefix}summary"]), output.summary[0])
                assert_relative(torch.tensor(row[f"{prefix}features"]), output.features[0])
        assert sum(row["error"] is not None for row in rows) == (
            0 if images is tensors else 1 + (images[1].as_py() is None)
        )


@pytest.fixture(scope="module")
def stage():
    return _EmbedFiles(VERSION, **OPTIONS)


def test_a_stage_refuses_what_it_cannot_take(stage):
    with pytest.raises(ValueError, match=r"a column 'width' already: choose what to keep of them with keep=\[…\]"):
        EmbedImages.__call__(stage, pa.table({"image": [picture(0)], "width": [1]}))
    with pytest.raises(ValueError, match='batch_format="pyarrow"'):
        EmbedImages.__call__(stage, {"image": np.array([picture(0)], object)})
    empty = EmbedImages.__call__(stage, pa.table({"image": pa.array([], pa.binary())}))
    assert empty.num_rows == 0 and "summary" in empty.column_names


def test_what_is_no_fault_of_the_image_is_no_row(stage):
    with pytest.raises(RuntimeError, match="out of memory"):
        stage._table(pa.table({"id": [1]}), [RuntimeError("out of memory")])


def test_names_that_are_no_unicode(stage, model, tmp_path):
    images, output = tmp_path / "images", tmp_path / "output"
    images.mkdir()
    with open(os.fsencode(images) + b"/\xff.png", "wb") as file:
        file.write(picture(1))
    with open(os.fsencode(images) + b"/\xfe.png", "wb") as file:
        file.write(b"damaged")
    with shards.job(output, {}):
        found = [shards.find_shards(images, output, "image", None, 10) for _ in range(2)]
        assert found[0] == found[1] and [shard.rows for shard in found[0]] == [2]
        done = stage(pa.Table.from_pylist([found[0][0]._asdict()]))
        assert shards.finished(found[0][0])
    assert done.to_pylist() == [{"source": found[0][0].source, "images": 2, "failed": 1, "error": None}]
    bad, good = pq.read_table(output / "000000.parquet").to_pylist()
    assert bad["path"] == "\\udcfe.png" and "\\udcfe.png" in bad["error"]
    assert_relative(torch.tensor(good["summary"]), expected(model, picture(1)).summary[0])


def shard_of(tmp_path: Path, rows: int = 2) -> shards.Shard:
    return shards.Shard(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), None, rows)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    shard, table = shard_of(tmp_path), pa.table({"x": [1]})

    def tables(count):
        for _ in range(count):
            assert not Path(shard.output).exists() and len(leftovers(tmp_path)) == 1
            yield table
        if count == 0:
            yield table
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(shard, tables(0))
    with pytest.raises(OSError, match="has 3 images, and had 2 when the job began"):
        shards.write(shard, tables(3))
    assert list(tmp_path.iterdir()) == [] and not shards.finished(shard)
    monkeypatch.setattr(shards, "ROW_GROUP", 1)
    shards.write(shard, tables(2))
    assert pq.read_table(shard.output)["x"].to_pylist() == [1, 1]
    assert shards.finished(shard) and not shards.finished(shard._replace(rows=3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_file_that_kills_its_workers_is_given_up(tmp_path):
    for i in range(shards.MAX_ATTEMPTS):
        (tmp_path / f".out.parquet.{i}.part").touch()
    with pytest.raises(OSError, match=f"{shards.MAX_ATTEMPTS} workers have died on it"):
        shards.write(shard_of(tmp_path), iter([]))


def test_a_folder_is_one_jobs_alone(tmp_path):
    output = tmp_path / "output"
    with shards.job(output, {"dtype": torch.float16, "keep": ("a",)}):
        (output / ".old.parquet.0.part").touch()
        with pytest.raises(ValueError, match="another job is writing into"), shards.job(output, {}):
            pass
    assert not leftovers(output)
    (output / ".old.parquet.0.part").touch()
    with shards.job(output, {"dtype": torch.float16, "keep": ["a"]}):
        assert not leftovers(output)
    with (
        pytest.raises(ValueError, match=r"\(dtype: 'torch.float16' there, None here; version: None there, 'b' here\)"),
        shards.job(output, {"version": "b", "keep": ["a"]}),
    ):
        pass
    (output / "_job.json").unlink()
    (output / "other.txt").touch()
    with pytest.raises(ValueError, match="holds files of something else"), shards.job(output, {}):
        pass


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "s3://bucket/images"}, "source must be a path on a file system that all machines share"),
        ({"output": "gs://bucket/out"}, "output must be a path on a file system that all machines share"),
        ({"source": "missing"}, "missing does not exist"),
        ({"source": "empty"}, "holds neither images nor Parquet files"),
        ({"source": "tables", "output": "tables/out"}, "is inside of the source"),
        ({"source": "text"}, r"a\.parquet can't be read as Parquet"),
        ({"source": "tables", "column": "picture"}, r"b\.parquet has no column 'picture', but 'id', 'image'"),
        ({"source": "tables", "keep": ["name"]}, "has no column 'name'"),
        ({"source": "tables/b.parquet", "column": "id"}, "column 'id' must be binary, or a struct with a field 'bytes', not int64"),
        ({"images_per_file": 0}, "images_per_file must be at least 1, got 0"),
        ({"actors": 0}, "actors must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "tables", "text"):
        Path(name).mkdir()
    Path("text/a.parquet").write_text("no Parquet")
    pq.write_table(table_of([picture(0)]), "tables/b.parquet")
    with pytest.raises(ValueError, match=message):
        embed_dataset(**{"source": "tables", "output": "out", "version": VERSION} | arguments)
    assert not list(tmp_path.rglob("out/*.parquet"))


def test_other_settings_are_refused_and_other_machines_are_not(monkeypatch, tmp_path):
    fill(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "finished", lambda shard: True)  # nothing to do: no cluster is asked

    def again(**arguments):
        return embed_dataset(**{"source": "images", "output": "out", "version": VERSION, **OPTIONS} | arguments)

    assert again().skipped == 1
    assert again(device="cuda", token="secret", actors=7, embedder={"resolution": SIDE, "workers": 3}).skipped == 1
    assert "secret" not in Path("out/_job.json").read_text()
    with pytest.raises(ValueError, match=r"begun with other settings \(resolution: 32 there, 64 here\)"):
        again(embedder={"resolution": 64})
    with pytest.raises(ValueError, match=r"\(dtype: None there, 'float16' here; features: False there, True here\)"):
        again(dtype="float16", features=True)


def test_ray_is_needed_for_this_alone_and_not_started():
    code = """
import sys
import radio_fast
assert "ray" not in sys.modules and "pyarrow" not in sys.modules
sys.modules["ray"] = None
try:
    import radio_fast.serve.ray
except ImportError as error:
    assert "pip install 'radio_fast[ray]'" in str(error), error
else:
    raise AssertionError
del sys.modules["ray"]
import radio_fast.serve.ray
assert not radio_fast.serve.ray.ray.is_initialized() and "ray.serve" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_refusals_travel_between_machines():
    full = pickle.loads(pickle.dumps(QueueFull("full", 2.5)))
    assert (str(full), full.retry_after) == ("full", 2.5)
