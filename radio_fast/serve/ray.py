"""Embedding on Ray: `embed_dataset` for whole datasets (Ray Data), `deployment` for requests (Ray Serve).

Needs `pip install 'radio_fast[ray]'`. Ray is started by its own rules when it is first used; `ray.init` before
that says where, and with what.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

try:
    import pyarrow as pa
    import ray
    import ray.data
    from PIL import Image  # noqa: F401 (checked here so that a missing one is told at once)

    from radio_fast.serve import shards
except ImportError as error:
    raise ImportError(f"radio_fast.serve.ray needs Ray and PyArrow: pip install 'radio_fast[ray]' ({error})") from error

from radio_fast.api import load as load_model
from radio_fast.images import ImageError
from radio_fast.models.registry import find_version
from radio_fast.runtime import resolve_dtype
from radio_fast.serve.embedder import Embedder
from radio_fast.serve.types import Embedding

if TYPE_CHECKING:
    from ray import serve


@dataclass(frozen=True)
class DatasetReport:
    """What a call of `embed_dataset` has done: files written, files that were finished before, images in those written,
    and how many of these could not be read and have an `error` in place of an embedding.
    """

    files: int
    skipped: int
    images: int
    failed: int


def embed_dataset(
    source: str | os.PathLike,
    output: str | os.PathLike,
    version: str | os.PathLike = "",
    *,
    column: str = "image",
    keep: Sequence[str] | None = None,
    features: bool = False,
    images_per_file: int = 1000,
    actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    embedder: Mapping[str, Any] | None = None,
    **load: Any,
) -> DatasetReport:
    """Embed a folder of images, or Parquet files of them, into Parquet files with a row for each image.

    Called again after any kind of end, it goes on: finished files stay as they are, all others are made from the start,
    and each appears when it is complete. So every image is embedded once, whatever is killed; a worker that dies is
    replaced by Ray. Images and Parquet files that have come since are embedded too.

    The rows are in the source's order, with the columns of `EmbedImages` and `path`, below a folder of images, or
    `keep`. Output files are named as the Parquet files, or 000000.parquet and so on.

    Args:
        source: a Parquet file, a folder with some at any depth, or else a folder of images (at any depth; files that
            are links are followed, folders are not).
        output: a folder, new or of an earlier call. All machines of the cluster must see both under these names.
        version, load: what `radio_fast.load` takes.
        column, keep, features: as in `EmbedImages`.
        images_per_file: for a folder of images.
        actors: how many workers; each loads the model.
        num_cpus: of each actor, for Ray's planning, and the threads it decodes and computes with.
        num_gpus: of each actor, also a fraction; the model is on the GPU then.
        embedder: arguments of `Embedder`, such as `resolution`.

    Raises:
        ValueError: source or output are not as they must be, or the output was begun with other arguments.
        RuntimeError: some files could not be read or written; all others are finished.
        ray.exceptions.RayError: the model can't be loaded or fails.
    """
    for name, path in (("source", source), ("output", output)):
        if "://" in str(path):
            raise ValueError(f"{name} must be a path on a file system that all machines share, got {str(path)!r}")
    for name, number in (("images_per_file", images_per_file), ("actors", actors)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    # Actors may have other working directories.
    source, output, version = Path(source).absolute(), Path(output).absolute(), _absolute(version)
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output {output} is inside of the source: name a folder elsewhere")
    if load.get("checkpoint") is not None:
        load["checkpoint"] = str(Path(load["checkpoint"]).absolute())
    resolve_dtype(load.get("dtype"))
    ours = _columns(["backbone", *_names(load.get("adaptor_names"))], features)
    options = {"column": column, "keep": keep, "features": features, "embedder": dict(embedder or {})}
    settings = {"source": str(source), "version": version, **options, **load, **(embedder or {})}
    settings = {name: value for name, value in settings.items() if name not in _NO_RESULT}
    with shards.job(output, settings):
        found = shards.find_shards(source, output, column, keep, images_per_file, ours)
        todo = [shard for shard in found if not shards.finished(shard)]
        done: list[dict[str, Any]] = []
        if todo:
            dataset = ray.data.from_items([shard._asdict() for shard in todo], override_num_blocks=len(todo))
            # One file at a time each, or the last ones would queue behind a busy actor while others have nothing.
            pool = ray.data.ActorPoolStrategy(size=min(actors, len(todo)), max_tasks_in_flight_per_actor=1)
            dataset = dataset.map_batches(
                _EmbedFiles,
                fn_constructor_kwargs={"version": version, **options, **load},
                batch_size=1,
                batch_format="pyarrow",
                compute=pool,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            done = list(dataset.iter_rows())
    errors = [f"{row['source']}: {row['error']}" for row in done if row["error"] is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(found)} files are not done: {'; '.join(errors[:5])}")
    images, failed = (sum(row[name] for row in done) for name in ("images", "failed"))
    return DatasetReport(len(done), len(found) - len(done), images, failed)


def _names(adaptors: str | Iterable[str] | None) -> list[str]:
    return [adaptors] if isinstance(adaptors, str) else list(adaptors or ())


def _columns(outputs: Iterable[str], features: bool) -> set[str]:
    """That come to those kept."""
    parts = ("summary", "features") if features else ("summary",)
    found = {part if name == "backbone" else f"{name}_{part}" for name in outputs for part in parts}
    return found | {"height", "width", "error"} | ({"grid_height", "grid_width"} if features else set())


# What changes where and how fast an embedding is made, not which: a job may go on with other ones.
_NO_RESULT = frozenset(
    {"embedder", "max_tokens", "max_queue", "max_wait_ms", "workers", "device", "backend", "cuda_graphs", "cache_dir"}
    | {"progress", "timeout", "token", "local_files_only"}
)


def _absolute(version: str | os.PathLike) -> str:
    known = isinstance(version, str) and (not version or find_version(version) is not None)
    return str(version) if known or not Path(version).exists() else str(Path(version).absolute())


class EmbedImages:
    """For `Dataset.map_batches(EmbedImages, fn_constructor_kwargs={…}, batch_format="pyarrow", compute=…)`.

    Each actor loads the model once. To the columns kept come

    - `summary` (S·D,) float32, `NAME_summary` of each adaptor;
    - with `features`, `features` (T, D) float32, row by row, and `NAME_features`; `grid_height` and `grid_width`, h and
      w of T = h·w;
    - `height` and `width`, the pixels that the model saw;
    - `error`: why an image has null in all of these, being damaged or too large; else null.

    Args:
        version, load: what `radio_fast.load` takes; the device is the GPU that Ray gave the actor, if it did.
        column: images as bytes (JPEG, PNG, …), structs with a field `bytes`, paths of files, or arrays (H, W, 3) uint8.
        keep: which other columns to keep; all of them if None. A struct's field `path` is kept in any case.
        embedder: arguments of `Embedder`, such as `resolution`. It has as many decoding threads as the actor has CPUs.

    Raises:
        ValueError: a column is missing, or has the name of one that comes.
    """

    def __init__(
        self,
        version: str | os.PathLike = "",
        *,
        column: str = "image",
        keep: Sequence[str] | None = None,
        features: bool = False,
        embedder: Mapping[str, Any] | None = None,
        **load: Any,
    ):
        self.column, self.keep, self.features = column, keep, features
        self._embedder = _load_embedder(version, embedder or {}, load)
        outputs = self._embedder.submit(np.zeros((32, 32, 3), np.uint8), features=True).result().outputs
        # Known before any image is, so that files have the same columns even where all images are damaged.
        self._widths = {name: (output.summary.shape[-1], output.features.shape[-1]) for name, output in outputs.items()}

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not isinstance(batch, pa.Table):
            raise ValueError('EmbedImages takes Arrow tables: map_batches(…, batch_format="pyarrow")')
        return next(self._embed([shards.split(batch, self.column, self.keep)]))

    def _embed(self, parts: Iterable[tuple[pa.Table, Sequence[Any]]]) -> Iterator[pa.Table]:
        """A table for each part; images of the next ones are being decoded meanwhile."""
        waiting: deque[tuple[pa.Table, int]] = deque()

        def images() -> Iterator[Any]:
            for kept, values in parts:
                waiting.append((kept, len(values)))
                yield from values

        results = self._embedder.embed_many(images(), features=self.features, return_exceptions=True)
        while True:
            first = list(islice(results, 1))
            while waiting and not waiting[0][1]:
                yield self._table(waiting.popleft()[0], [])
            if not first:
                return
            kept, count = waiting.popleft()
            yield self._table(kept, first + list(islice(results, count - 1)))

    def _table(self, kept: pa.Table, results: list[Embedding | Exception]) -> pa.Table:
        for result in results:
            # Anything else, such as a GPU out of memory, is not the image's fault and must not be taken for done.
            if isinstance(result, Exception) and not isinstance(result, ImageError):
                raise result
        good = [result if isinstance(result, Embedding) else None for result in results]
        columns = {}
        for name, (summary_width, width) in self._widths.items():
            prefix = "" if name == "backbone" else f"{name}_"
            outputs = [each and each.outputs[name] for each in good]
            columns[f"{prefix}summary"] = _vectors([output and output.summary for output in outputs], summary_width)
            if self.features:
                columns[f"{prefix}features"] = _maps([output and output.features for output in outputs], width)
        sizes = {"height": [each and each.height for each in good], "width": [each and each.width for each in good]}
        if self.features:
            sizes |= {f"grid_{side}": [each and each.grid[i] for each in good] for i, side in enumerate(sizes)}
        columns |= {name: pa.array(values, pa.int32()) for name, values in sizes.items()}
        errors = [shards.text(str(result)) if isinstance(result, Exception) else None for result in results]
        columns["error"] = pa.array(errors, pa.string())
        twice = [name for name in columns if name in kept.column_names]
        if twice:
            raise ValueError(
                f"the images have a column {twice[0]!r} already: choose what to keep of them with keep=[…]"
            )
        for name, values in columns.items():
            kept = kept.append_column(name, values)
        return kept


def _vectors(rows: list[Tensor | None], width: int) -> pa.Array:
    values = torch.zeros(len(rows), width)
    for value, row in zip(values, rows, strict=True):
        if row is not None:
            value.copy_(row)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), width, mask=missing)


def _maps(rows: list[Tensor | None], width: int) -> pa.Array:
    values = torch.cat([torch.zeros(0, width), *(row.float() for row in rows if row is not None)])
    offsets = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), width)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), vectors, mask=missing)


class _EmbedFiles(EmbedImages):
    """Takes shards and writes their files; gives a row for each: how many images it has, and how many failed."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = shards.Shard(**batch.to_pylist()[0])
        images, failed, why = 0, 0, None

        def tables() -> Iterator[pa.Table]:
            nonlocal images, failed
            for table in self._embed(shards.read(shard, self.column, self.keep)):
                images += table.num_rows
                failed += table.num_rows - table.column("error").null_count
                yield table

        try:
            shards.write(shard, tables())
        except (OSError, pa.ArrowException) as error:  # one bad file must not keep the others from being done
            why = str(error) or type(error).__name__
        row = {"source": shard.source, "images": images, "failed": failed, "error": why}
        return pa.Table.from_pylist([row], pa.schema([("source", pa.string()), ("images", pa.int64()),
                                                      ("failed", pa.int64()), ("error", pa.string())]))  # fmt: skip


def _load_embedder(version: str | os.PathLike, options: Mapping[str, Any], load: Mapping[str, Any]) -> Embedder:
    """In an actor with the CPUs that Ray gave it, and on its GPU."""
    load, options = {"progress": False, **load}, dict(options)
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        cpus = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        torch.set_num_threads(cpus)
        options = {"workers": cpus, **options}
        if ray.get_gpu_ids():
            load = {"device": "cuda", **load}
    return Embedder(load_model(version, **load), **options)


class _Replica:
    """One of a deployment's: requests over HTTP go to the app of `_replica_app`, those of handles to `embed`."""

    current: ClassVar[_Replica]  # Serve has the app made by a function without arguments, in the replica's process

    def __init__(
        self, version: str, options: Mapping[str, Any], load: Mapping[str, Any], app_options: Mapping[str, Any]
    ):
        self.embedder = _load_embedder(version, options, load)
        row = self.embedder.model.version
        self.app_options = {"model_name": Path(version).name if row is None else row.name, **app_options}
        self.service: Any = None  # of the app
        _Replica.current = self

    async def embed(
        self,
        image: Any,
        *,
        deadline: float | None = None,
        features: bool = False,
        resolution: tuple[int, int] | int | str | None = None,
    ) -> Embedding:
        """`Embedder.embed`."""
        return await self.embedder.embed(image, deadline=deadline, features=features, resolution=resolution)

    async def check_health(self) -> None:
        """Asked by Serve: at first before any request comes, so it waits until the model is warm. Where this raises,
        Serve replaces the replica.
        """
        service = self.service
        while (reason := service.why_not_ready) is not None:
            if service.draining or service.loaded is not None or service.failure is not None:
                raise RuntimeError(reason) from service.failure
            await asyncio.sleep(0.05)


def _replica_app() -> Any:
    from radio_fast.serve.server import create_app

    replica = _Replica.current
    app = create_app(replica.embedder, **replica.app_options)
    replica.service = app.state.service
    return app


def deployment(
    version: str | os.PathLike = "",
    *,
    options: Mapping[str, Any] | None = None,
    embedder: Mapping[str, Any] | None = None,
    app: Mapping[str, Any] | None = None,
    **load: Any,
) -> serve.Application:
    """For `ray.serve.run(deployment(…))`: replicas of a model that batch what comes to each of them.

    Over HTTP they answer as `radio_fast.serve.server` does. In Ray, `handle = serve.run(…)` or `serve.get_app_handle`,
    then `await handle.embed.remote(image, features=…, deadline=…, resolution=…)` is an `Embedding`; images are whatever
    `Embedder.submit` takes, and its errors are raised (`QueueFull`, `ImageError`, …).

    Args:
        version, load: what `radio_fast.load` takes; the device is the GPU that Ray gave the replica, if it did.
        options: of `serve.deployment`: `num_replicas`, `autoscaling_config`, `ray_actor_options={"num_gpus": 1}`,
            `max_ongoing_requests` (256 here: a batch is made of requests that are there at the same time),
            `max_queued_requests`, …
        embedder: arguments of `Embedder`, such as `resolution`.
        app: arguments of `radio_fast.serve.server.create_app`, such as `api_key`.
    """
    from ray import serve

    ours = {"name": "radio_fast", "max_ongoing_requests": 256}
    return (
        serve.deployment(serve.ingress(_replica_app)(_Replica))
        .options(**{**ours, **(options or {})})
        .bind(_absolute(version), dict(embedder or {}), load, dict(app or {}))
    )
