"""Jobs on Ray without a Ray: what is read, what is written, what is refused."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import radio_fast
from radio_fast.images import read_image, to_tensor
from radio_fast.serve.types import DeadlineExceeded, QueueFull
from tests.conftest import golden_source
from tests.numerics import assert_relative
from tests.serve.jobs import OPTIONS, SIDE, VERSION, expected, fill, leftovers, picture, table_of

pytest.importorskip("ray", reason="pip install radio_fast[ray]")

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.extensions import ArrowTensorArray

from radio_fast.serve import ray as ray_module
from radio_fast.serve import shards
from radio_fast.serve.ray import DatasetReport, EmbedImages, _EmbedFiles, _Replica, _replica_app, embed_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own settings
    pytest.mark.filterwarnings("ignore:Using .httpx. with:"),  # Starlette would rather have httpx2
]
ROOT = Path(__file__).resolve().parents[2]


def test_images_of_every_kind_and_adaptors_features(tmp_path):
    source = golden_source("hf_vit_h16_adaptors")
    model = radio_fast.load(source)
    stage = EmbedImages(source, column="x", keep=["id"], features=True, embedder={"resolution": (32, 48)})
    (tmp_path / "0.png").write_bytes(picture(0))
    pixels = np.asarray(read_image(picture(2)))
    tensors = ArrowTensorArray.from_numpy(pixels[None])
    for images, sources in (
        (pa.array([picture(0), picture(2), None]), [picture(0), picture(2), None]),
        (pa.array([b"damaged", picture(2)], pa.large_binary()), [None, picture(2)]),
        (pa.array([{"bytes": picture(0)}, None], pa.struct([("bytes", pa.binary())])), [picture(0), None]),
        (pa.array([str(tmp_path / "0.png"), None, str(tmp_path / "none.png")]), [picture(0), None, None]),
        (tensors, [picture(2)]),
    ):
        table = stage(pa.table({"id": range(len(images)), "other": range(len(images)), "x": images}))
        assert table.column_names == [
            "id", "summary", "features",
            *(f"{name}_{part}" for name in model.adaptors for part in ("summary", "features")),
            "height", "width", "grid_height", "grid_width", "error",
        ]  # fmt: skip
        for i, (row, image) in enumerate(zip(table.to_pylist(), sources, strict=True)):
            assert row["id"] == i
            if image is None:
                assert {key for key, value in row.items() if value is not None} == {"id", "error"}
                continue
            assert row["error"] is None
            assert (row["height"], row["width"], row["grid_height"], row["grid_width"]) == (32, 48, 2, 3)
            truth = model(to_tensor(read_image(image), 32, 48)[None])
            assert len(truth) == 3
            for name, output in truth.items():
                prefix = "" if name == "backbone" else f"{name}_"
                assert_relative(torch.tensor(row[f"{prefix}summary"]), output.summary[0])
                assert_relative(torch.tensor(row[f"{prefix}features"]), output.features[0])


@pytest.fixture(scope="module")
def stage():
    return _EmbedFiles(VERSION, **OPTIONS)


def test_a_stage_refuses_what_it_cannot_take(stage):
    with pytest.raises(ValueError, match=r"a column 'width' already: choose what to keep of them with keep=\[…\]"):
        EmbedImages.__call__(stage, pa.table({"image": [picture(0)], "width": [1]}))
    with pytest.raises(ValueError, match='batch_format="pyarrow"'):
        EmbedImages.__call__(stage, {"image": np.array([picture(0)], object)})
    empty = EmbedImages.__call__(stage, pa.table({"image": pa.array([], pa.binary())}))
    assert empty.num_rows == 0 and empty.column_names == ["summary", "height", "width", "error"]


def test_an_actor_uses_what_ray_gave_it(monkeypatch):
    context = SimpleNamespace(get_actor_id=lambda: "1", get_assigned_resources=lambda: {"CPU": 2.0})
    gpus: list[int] = []
    fake = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context, get_gpu_ids=lambda: gpus)
    loaded: list[dict] = []

    def load(version, **options):
        loaded.append(options)
        return radio_fast.load(version, **(options | {"device": "cpu"}))

    monkeypatch.setattr(ray_module, "ray", fake)
    monkeypatch.setattr(ray_module, "load_model", load)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        EmbedImages(VERSION, **OPTIONS)
        assert torch.get_num_threads() == 2
        assert loaded == [{"progress": False}]
        gpus.append(3)
        EmbedImages(VERSION, **OPTIONS)
        EmbedImages(VERSION, device="cuda:1", embedder={"resolution": SIDE, "workers": 3})
        assert [options["device"] for options in loaded[1:]] == ["cuda", "cuda:1"]
        names = [thread.name for thread in threading.enumerate()]
        assert "radio_fast-decode-2" in names and "radio_fast-decode-3" not in names
    finally:
        torch.set_num_threads(before)


def test_a_job_asks_ray_for_what_it_was_told(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}

    class Dataset:
        def __init__(self, items, override_num_blocks):
            assert override_num_blocks == len(items)
            self.items = items

        def map_batches(self, stage, *, fn_constructor_kwargs, **options):
            asked.update(options, stage=fn_constructor_kwargs)
            self.run = stage(**fn_constructor_kwargs)
            return self

        def iter_rows(self):
            for item in self.items:
                yield from self.run(pa.Table.from_pylist([item])).to_pylist()

    monkeypatch.setattr(ray_module.ray.data, "from_items", Dataset)
    (tmp_path / "one").mkdir()
    table = table_of([picture(0), picture(1)]).append_column("other", [["a", "b"]])
    for name in ("one/a", "one/b", "c"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    options = {"features": True, "keep": ["other"], "dtype": "float16", **OPTIONS}
    for source, output, files in ((tmp_path / "one", "out", 2), (tmp_path / "c.parquet", "more/out", 1)):
        report = embed_dataset(
            source, tmp_path / output, VERSION, actors=7, num_cpus=3, num_gpus=0.5, backend="reference", **options
        )
        assert report == DatasetReport(files=files, skipped=0, images=2 * files, failed=0)
        compute, stage = asked.pop("compute"), asked.pop("stage")
        assert (compute.min_size, compute.max_size) == (files, files)
        assert asked == {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": 3, "num_gpus": 0.5}
        assert stage == {"version": VERSION, "column": "image", "backend": "reference", **options}
    written = pq.read_table(tmp_path / "more" / "out" / "c.parquet")
    assert written.column_names[:4] == ["other", "path", "summary", "features"]
    assert written["other"].to_pylist() == ["a", "b"]


def test_a_replica(monkeypatch):
    from fastapi.testclient import TestClient

    replica = _Replica(VERSION, {"resolution": SIDE}, {"dtype": "float32"}, {"api_key": "key"})
    answer = asyncio.run(replica.embed(picture(0), features=True, resolution=(48, 32), deadline=60))
    assert answer.features is not None and (answer.height, answer.width) == (48, 32)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(replica.embed(picture(0), deadline=1e-9))

    app, gate = _replica_app(), threading.Event()
    monkeypatch.setattr(replica.embedder, "warm_up", gate.wait)
    with TestClient(app) as client:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(replica.check_health(), 0.2))  # the model is being warmed up
        gate.set()
        asyncio.run(replica.check_health())
        assert client.get("/v1/models").status_code == 401
        models = client.get("/v1/models", headers={"Authorization": "Bearer key"}).json()
        assert [model["id"] for model in models["data"]] == [Path(VERSION).name]
        replica.embedder.close()
        with pytest.raises(RuntimeError, match="shutting down"):
            asyncio.run(replica.check_health())


def test_a_replica_whose_model_fails_is_not_healthy(monkeypatch):
    from fastapi.testclient import TestClient

    replica = _Replica(VERSION, {"resolution": SIDE}, {}, {})
    monkeypatch.setattr(replica.embedder, "warm_up", lambda: 1 / 0)
    with (
        TestClient(_replica_app()),
        pytest.raises(RuntimeError, match="the model could not be loaded"),
    ):
        asyncio.run(replica.check_health())
    replica.embedder.close()


def test_what_is_no_fault_of_the_image_is_no_row(stage):
    with pytest.raises(RuntimeError, match="out of memory"):
        stage._table(pa.table({"id": [1]}), [RuntimeError("out of memory")])


def test_names_that_are_no_unicode(stage, tmp_path):
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
    assert_relative(torch.tensor(good["summary"]), expected(radio_fast.load(VERSION), picture(1)).summary[0])


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
    shard = shard._replace(rows=3)
    shards.write(shard, tables(3))
    assert pq.read_table(shard.output)["x"].to_pylist() == [1, 1, 1]
    assert pq.read_metadata(shard.output).num_row_groups == 2
    assert shards.finished(shard) and not shards.finished(shard._replace(rows=2))
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
    (output / "part").mkdir()
    (output / "part" / "0.parquet").touch()
    with (
        pytest.raises(ValueError, match=r"\(dtype: 'torch.float16' there, None here; version: None there, 'b' here\)"),
        shards.job(output, {"version": "b", "keep": ["a"]}),
    ):
        pass
    (output / "_job.json").write_text("")  # as a power cut may leave it
    with pytest.raises(ValueError, match=r"_job\.json is damaged"), shards.job(output, {}):
        pass
    (output / "_job.json").unlink()
    (output / "other.txt").touch()
    with pytest.raises(ValueError, match="holds files of something else"), shards.job(output, {}):
        pass


def test_a_job_that_died_before_it_began(tmp_path):
    (tmp_path / "._job.json.0.part").touch()
    with shards.job(tmp_path, {}):
        assert not leftovers(tmp_path)


def test_names_of_parquet_files(tmp_path):
    """An output ends in .parquet, by which other settings are refused; folders may too."""
    table = table_of([picture(0)])
    (tmp_path / "folder" / "spark.parquet").mkdir(parents=True)
    for name in ("one.pq", "folder/spark.parquet/part-0.parquet"):
        pq.write_table(table, tmp_path / name)

    def outputs(source):
        found = shards.find_shards(tmp_path / source, tmp_path / "out", "image", None, 1)
        return [Path(shard.output).relative_to(tmp_path / "out").as_posix() for shard in found]

    assert outputs("one.pq") == ["one.parquet"]
    assert outputs("folder") == ["spark.parquet/part-0.parquet"]
    assert outputs("folder/spark.parquet") == ["part-0.parquet"]


@pytest.mark.parametrize(
    "kind", [pa.binary_view(), pa.binary(len(picture(0))), pa.dictionary(pa.int32(), pa.binary())], ids=str
)
def test_kinds_of_binary_columns(stage, tmp_path, kind):
    values = pa.array([picture(0)], pa.binary())
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    pq.write_table(pa.table({"image": values}), tmp_path / "in.parquet")
    [shard] = shards.find_shards(tmp_path / "in.parquet", tmp_path / "out", "image", None, 1)
    row = stage(pa.Table.from_pylist([shard._asdict()])).to_pylist()[0]
    assert (row["images"], row["failed"], row["error"]) == (1, 0, None)


def test_no_columns_kept(stage):
    """But the path that is in the image's own column."""
    table = table_of([picture(0)])
    kept, _ = shards.split(table, "image", [])
    assert kept.column_names == ["path"]
    kept, _ = shards.split(table.set_column(1, "image", [[picture(0)]]), "image", [])
    assert kept.column_names == []


def test_columns_that_come_are_known_before(stage):
    kept, images = shards.split(pa.table({"image": [picture(0)]}), "image", [])
    table = next(stage._embed([(kept, images)]))
    assert set(table.column_names) == ray_module._columns(["backbone"], False)
    names = ray_module._columns(["backbone", *ray_module._names("clip")], True)
    assert {"features", "clip_summary", "clip_features", "grid_width"} <= names


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
        ({"source": "tables/b.parquet", "column": "id"}, "must be binary, or a struct with a field 'bytes', not int64"),
        ({"source": "taken"}, r"t\.parquet has a column 'error', as the output has: choose with keep="),
        ({"source": "twice"}, r"t\.parquet: column 'id' is there more than once"),
        ({"keep": ["id", "id"]}, "column 'id' is there more than once"),
        ({"source": "mixed"}, r"holds Parquet files and images, such as .*a\.png"),
        ({"dtype": "floaty"}, "floaty"),
        ({"images_per_file": 0}, "images_per_file must be at least 1, got 0"),
        ({"actors": 0}, "actors must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "tables", "text", "taken", "twice", "mixed"):
        Path(name).mkdir()
    one = table_of([picture(0)])
    pq.write_table(one.append_column("error", [[1]]), "taken/t.parquet")
    pq.write_table(one.append_column("id", [[1]]), "twice/t.parquet")
    pq.write_table(one, "mixed/t.parquet")
    Path("mixed/a.png").touch()
    Path("text/a.parquet").write_text("no Parquet")
    pq.write_table(table_of([picture(0)]), "tables/b.parquet")
    with pytest.raises(ValueError, match=message):
        embed_dataset(**{"source": "tables", "output": "out", "version": VERSION} | arguments)
    assert not list(tmp_path.rglob("out/*.parquet")) and not Path("tables/out").exists()
    fill(Path("right"), 1)
    monkeypatch.setattr(shards, "finished", lambda shard: True)  # nothing to do: no cluster is asked
    assert embed_dataset("right", "out", VERSION).skipped == 1


def test_other_settings_are_refused_and_other_machines_are_not(monkeypatch, tmp_path):
    fill(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "finished", lambda shard: True)  # nothing to do: no cluster is asked

    def again(**arguments):
        return embed_dataset(**{"source": "images", "output": "out", "version": VERSION, **OPTIONS} | arguments)

    assert again(images_per_file=1, dtype="float32").skipped == 2
    assert again().skipped == 1  # nothing had been finished
    Path("out/000000.parquet").touch()
    assert again(device="cuda", token="secret", actors=7, embedder={"resolution": SIDE, "workers": 3}).skipped == 1
    assert again(source=tmp_path / "images", output=tmp_path / "out").skipped == 1
    assert "secret" not in Path("out/_job.json").read_text()
    (tmp_path / "others").mkdir()
    with pytest.raises(ValueError, match=r"begun with other settings \(source: '.*/images' there, '.*/others' here\)"):
        again(source="others")
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
