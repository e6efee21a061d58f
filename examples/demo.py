"""Embed the photographs in examples/images/ with radio_v2.5-b; show what comes out.

Writes to out/demo/: embeddings.npz, a picture per photograph with a PCA of its patch features beside it, and all of
them on one sheet, overview.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import radio_fast
from radio_fast.images import find_images, read_image, to_tensor

HERE = Path(__file__).resolve().parent
VERSION = "radio_v2.5-b"
LONG_SIDE = 768  # the version's preferred resolution
console = Console()


def load_model(timeout: float) -> tuple[radio_fast.RADIOModel, bool]:
    """The model, and whether its weights are the official ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return radio_fast.load(VERSION, device=device, timeout=timeout), True
    except radio_fast.DownloadError as error:
        console.print(f"[yellow]no official weights:[/] {error}", highlight=False, soft_wrap=True)
    console.print(
        f"[bold yellow]RANDOM WEIGHTS (seed 0) of {VERSION}'s architecture: the features below carry no meaning.[/]",
        soft_wrap=True,
    )
    return radio_fast.load(VERSION, device=device, random_init=True, seed=0), False


def size_for(model: radio_fast.RADIOModel, image: Image.Image) -> tuple[int, int]:
    """The legal size nearest to the picture's own, its long side at most LONG_SIDE."""
    scale = min(1.0, LONG_SIDE / max(image.size))
    return model.get_nearest_supported_resolution(round(image.height * scale), round(image.width * scale))


def pca_picture(features: np.ndarray, width: int, height: int) -> Image.Image:
    """The first three principal components of (h, w, D) features as red, green and blue, from the 1st to the 99th
    percentile of each."""
    h, w, D = features.shape
    x = features.reshape(-1, D) - features.reshape(-1, D).mean(axis=0)
    components = np.linalg.svd(x, full_matrices=False)[2][:3]
    # An axis has no direction of its own: make the largest entry positive, so that every run gives the same colours.
    components *= np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1))
    y = x @ components.T
    low, high = np.percentile(y, [1, 99], axis=0)
    rgb = (((y - low) / np.maximum(high - low, 1e-12)).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(rgb.reshape(h, w, 3)).resize((width, height), Image.Resampling.NEAREST)


def side_by_side(pictures: list[Image.Image], vertical: bool = False, gap: int = 8) -> Image.Image:
    """Pictures on a white sheet, in a row or a column."""
    widths, heights = zip(*(p.size for p in pictures), strict=True)
    if vertical:
        size = (max(widths), sum(heights) + gap * (len(pictures) - 1))
    else:
        size = (sum(widths) + gap * (len(pictures) - 1), max(heights))
    sheet = Image.new("RGB", size, "white")
    at = 0
    for picture in pictures:
        sheet.paste(picture, (0, at) if vertical else (at, 0))
        at += (picture.height if vertical else picture.width) + gap
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo", help="where to write")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for the weights' server")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    model, official = load_model(options.timeout)
    device = model.summary_idxs.device
    paths = find_images([HERE / "images"])
    table = Table(title=f"{VERSION}, {'official' if official else 'random'} weights, {device}, float32")
    for column in ("file", "size used", "summary", "features", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left", no_wrap=True)

    arrays: dict[str, np.ndarray] = {}
    rows: list[Image.Image] = []
    summaries: list[torch.Tensor] = []
    for path in paths:
        image = read_image(path)
        height, width = size_for(model, image)
        x = to_tensor(image, height, width).unsqueeze(0).to(device)
        with torch.inference_mode():
            model(x)  # once to warm up
            start = time.perf_counter()
            summary, features = model(x, feature_fmt="NCHW")
            features = features.float().cpu()  # waits for the device
        milliseconds = (time.perf_counter() - start) * 1e3
        tokens = features[0].permute(1, 2, 0).numpy()
        table.add_row(
            path.name,
            f"{height} × {width}",
            str(tuple(summary.shape)),
            str(tuple(features.shape)),
            f"{milliseconds:.0f}",
        )
        picture = side_by_side([image.resize((width, height)), pca_picture(tokens, width, height)])
        picture.save(options.out / f"{path.stem}.png")
        scale = 480 / picture.width
        rows.append(picture.resize((480, round(picture.height * scale))))
        arrays[f"{path.stem}.summary"], arrays[f"{path.stem}.features"] = summary[0].float().cpu().numpy(), tokens
        summaries.append(summary[0].float().cpu())
    console.print(table)

    unit = torch.nn.functional.normalize(torch.stack(summaries), dim=1)
    similarity = unit @ unit.T
    nearest = Table(title="cosine similarity of the summaries")
    for column in ("", *(p.stem for p in paths), "nearest"):
        nearest.add_column(column, no_wrap=True)
    for i, path in enumerate(paths):
        others = similarity[i].clone()
        others[i] = -2
        cells = [f"{value:.3f}" for value in similarity[i].tolist()]
        nearest.add_row(path.stem, *cells, paths[int(others.argmax())].stem)
    console.print(nearest)

    np.savez(options.out / "embeddings.npz", similarity=similarity.numpy(), **arrays)
    side_by_side(rows, vertical=True).save(options.out / "overview.png")
    names = ", ".join(sorted(p.name for p in options.out.iterdir()))
    console.print(f"written to {options.out}: {names}", highlight=False, soft_wrap=True)
    if not official:
        console.print("[bold yellow]These were random weights: the features carry no meaning.[/]")


if __name__ == "__main__":
    main()
