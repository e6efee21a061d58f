"""What tests of jobs on Ray share: images, what a model makes of them, what is in an output folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from radio_fast.images import read_image, to_tensor
from tests.conftest import golden_source
from tests.numerics import assert_relative

if TYPE_CHECKING:
    import pyarrow

VERSION = str(golden_source("vit_h16"))
SIDE = 32
OPTIONS = {"embedder": {"resolution": SIDE}}


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


def expected(model, image: bytes | Path, side: int = SIDE):
    return model(to_tensor(read_image(image), side, side)[None])


def rows_of(output: Path) -> dict[str, dict]:
    """By path; no path may be there twice."""
    import pyarrow.parquet as pq

    rows = [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def check_rows(rows: dict[str, dict], folder: Path, model) -> None:
    for path, row in rows.items():
        assert row["error"] is None and (row["height"], row["width"]) == (SIDE, SIDE)
        assert_relative(torch.tensor(row["summary"]), expected(model, folder / path).summary[0])


def leftovers(output: Path) -> list[Path]:
    return list(output.rglob(".*.part"))


def table_of(images: list[bytes | None]) -> pyarrow.Table:
    """As Hugging Face's datasets have them."""
    import pyarrow as pa

    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"id": pa.array(range(len(images)), pa.int64()), "image": pa.array(structs, kind)})
