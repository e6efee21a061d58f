"""What `radio_fast.serve.ray` embeds, cut into shards of one output file each, and which of them are done.

A file gets its name when it is complete and on disk: it is whole or absent, whoever writes it and however often. Beside
the finished files an output folder holds `_job.json`, what it was made with; `_images/`, of a folder of images the list
of each file; and `.NAME.….part`, what is being written.
"""

from __future__ import annotations

import glob
import json
import os
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from radio_fast.images import find_images

ROWS = 16  # read and written at a time: features of 1024 tokens are 100 MB then
ROW_GROUP = 64 << 20  # bytes
MAX_ATTEMPTS = 5


class Shard(NamedTuple):
    """`rows` images of `source`, a Parquet file or a list of paths below `root`, that go into the file `output`."""

    source: str
    output: str
    root: str | None
    rows: int


@contextmanager
def job(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Make `output` this job's alone: no other may run there, nor may one with other settings have finished a file.

    Raises:
        ValueError: one does or did, or the folder holds other things; the message says which.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(f"another job is writing into {output}") from error
    with lock:
        file, ours = output / "_job.json", json.loads(json.dumps(settings, default=str))
        if not file.exists():
            if any(path.name != ".lock" and not path.match("._job.json.*.part") for path in output.iterdir()):
                raise ValueError(f"{output} holds files of something else: name a new folder, or an earlier job's")
            _write_json(file, ours)
        theirs = _read_json(file)
        other = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
        if other and not any(
            path.is_file() for path in output.rglob("*.parquet")
        ):  # a first call with a slip in it binds nobody
            for names in (output / "_images").glob("*.json"):
                names.unlink()
            _write_json(file, ours)
        elif other:
            differences = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in other)
            raise ValueError(f"{output} was begun with other settings ({differences}): name a new folder")
        try:
            _clean(output)  # what a job left that was killed
            yield
        finally:
            _clean(output)


def _clean(output: Path) -> None:
    for part in output.rglob(".*.part"):
        part.unlink(missing_ok=True)


def find_shards(
    source: Path,
    output: Path,
    column: str,
    keep: Sequence[str] | None,
    images: int,
    ours: Container[str] = (),
) -> list[Shard]:
    """Of a Parquet file or a folder with some, a shard each; else of a folder's images, at any depth, `images` a shard.

    Which image is in which file is settled when it is first seen: images that are new get new files. `ours`: the
    columns that come to those kept.

    Raises:
        ValueError: no such source, nothing in it or both kinds, an unreadable Parquet file, or one without a column of
            images or with other ones that can't be kept.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; it must be a folder on a file system that all machines share")
    if source.is_file():
        rows = _check_parquet(source, column, keep, ours)
        return [Shard(str(source), str((output / source.name).with_suffix(".parquet")), None, rows)]
    # Folders may be named like a file, as Spark's are.
    files = sorted(p for p in source.rglob("*.parquet") if p.name[0] not in "._" and p.is_file())
    if not files:
        return _folder_shards(source, output, images)
    if pictures := find_images([source]):
        raise ValueError(f"{source} holds Parquet files and images, such as {pictures[0]}: name a folder of one kind")
    rows = [_check_parquet(file, column, keep, ours) for file in files]
    return [Shard(str(f), str(output / f.relative_to(source)), None, n) for f, n in zip(files, rows, strict=True)]


def _check_parquet(file: Path, column: str, keep: Sequence[str] | None, ours: Container[str]) -> int:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} can't be read as Parquet: {error}") from error
    with parquet:
        schema = parquet.schema_arrow
        kept = [name for name in schema.names if name != column] if keep is None else list(keep)
        missing = [name for name in (column, *kept) if name not in schema.names]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]!r}, but {', '.join(map(repr, schema.names))}")
        twice = [name for name in (column, *kept) if schema.names.count(name) > 1 or kept.count(name) > 1]
        if twice:
            raise ValueError(f"{file}: column {twice[0]!r} is there more than once")
        taken = [name for name in kept if name in ours]
        if taken:
            raise ValueError(f"{file} has a column {taken[0]!r}, as the output has: choose with keep=[…]")
        kind = schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not _is_binary(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise ValueError(f"{file}: column {column!r} must be binary, or a struct with a field 'bytes', not {kind}")
        return parquet.metadata.num_rows


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        check(kind)
        for check in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    )


def _folder_shards(source: Path, output: Path, images: int) -> list[Shard]:
    lists = output / "_images"
    lists.mkdir(exist_ok=True)
    # Through JSON, names that are no Unicode come back as they were.
    known = {file: _read_json(file) for file in sorted(lists.glob("*.json"))}
    seen = {name for names in known.values() for name in names}
    found = [path.relative_to(source).as_posix() for path in find_images([source])]
    if not found and not known:
        raise ValueError(f"{source} holds neither images nor Parquet files")
    new = [name for name in found if name not in seen]
    for start in range(0, len(new), images):
        file = lists / f"{len(known):06}.json"
        known[file] = new[start : start + images]
        _write_json(file, known[file])
    return [Shard(str(f), str(output / f"{f.stem}.parquet"), str(source), len(names)) for f, names in known.items()]


def finished(shard: Shard) -> bool:
    """Whether the output is there, and has a row for each image."""
    try:
        return pq.read_metadata(shard.output).num_rows == shard.rows
    except (OSError, pa.ArrowException):
        return False


def read(shard: Shard, column: str, keep: Sequence[str] | None) -> Iterator[tuple[pa.Table, list[Any]]]:
    """A few rows at a time, and one time at least: columns that go into the output, and the images."""
    if shard.root is not None:
        names = _read_json(Path(shard.source))
        for start in range(0, len(names), ROWS):
            part = names[start : start + ROWS]
            paths = pa.array([text(name) for name in part], pa.string())
            yield pa.table({"path": paths}), [Path(shard.root, name) for name in part]
        return
    # With a buffer, pages are read one after the other; without, a whole row group's images at once.
    with pq.ParquetFile(shard.source, buffer_size=1 << 20) as parquet:
        columns = None if keep is None else [column, *keep]
        if not parquet.metadata.num_rows:
            yield split(parquet.schema_arrow.empty_table(), column, keep)
        for batch in parquet.iter_batches(ROWS, columns=columns):
            yield split(pa.Table.from_batches([batch]), column, keep)


def text(name: str) -> str:
    """`name` as Unicode, which names of files need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def split(table: pa.Table, column: str, keep: Sequence[str] | None) -> tuple[pa.Table, list[Any]]:
    """The columns kept, by default all others, and what is in the column of images: bytes, arrays, or paths of files.

    Of a struct of bytes and a path, as Hugging Face's datasets have it, the path is kept too. None becomes no bytes.
    """
    kept = table.select([name for name in table.column_names if name != column] if keep is None else list(keep))
    images = table.column(column)
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0 and "path" not in kept.column_names:
            kept = kept.append_column("path", pc.struct_field(images, "path"))
        images = pc.struct_field(images, "bytes")
    values = [each.as_py() if isinstance(each, pa.Scalar) else each for chunk in images.chunks for each in chunk]
    return kept, [b"" if value is None else value for value in values]


def write(shard: Shard, tables: Iterator[pa.Table]) -> None:
    """Write the output, all of it or nothing.

    Raises:
        OSError: as many workers as may have died on this file, which keep their parts; another number of rows than
            there were when the job began; or what the file system says.
    """
    target = Path(shard.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    attempts = len(list(target.parent.glob(f".{glob.escape(target.name)}.*.part")))
    if attempts >= MAX_ATTEMPTS:
        raise OSError(f"{attempts} workers have died on it")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            _write_tables(shard, tables, file)
            _to_disk(file)
        _rename(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write_tables(shard: Shard, tables: Iterator[pa.Table], file: Any) -> None:
    first = next(tables)
    waiting, written = [first], first.num_rows
    # Vectors hardly repeat: dictionaries of them cost time and save nothing.
    with pq.ParquetWriter(file, first.schema, use_dictionary=False) as writer:
        for table in tables:
            waiting.append(table)
            written += table.num_rows
            if sum(each.nbytes for each in waiting) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    if written != shard.rows:
        raise OSError(f"has {written} images, and had {shard.rows} when the job began")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or name a new folder") from error


def _write_json(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with part.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        _to_disk(file)
    _rename(part, path)


def _to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename(part: Path, target: Path) -> None:
    """For good: a power cut does not undo it."""
    os.replace(part, target)
    if os.name == "posix":  # elsewhere folders can't be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
