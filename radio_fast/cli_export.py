"""radio-fast export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import radio_fast
from radio_fast.export import ExportError, export_onnx, require_onnx


def export(
    version: Annotated[str, typer.Argument(metavar="VERSION|FILE", help="A version name, checkpoint file or folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    resolution: Annotated[str | None, typer.Option(help="Pixels: 432, 384x512 (the preferred one).")] = None,
    batch: Annotated[str, typer.Option(help="'dynamic', or a number of images.")] = "dynamic",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 (as the checkpoint says).")] = None,
    adaptors: Annotated[str | None, typer.Option(help="Adaptors to include, separated by commas.")] = None,
    vitdet_window: Annotated[int | None, typer.Option(help="ViTDet mode, windows of so many patches a side.")] = None,
    window_size: Annotated[str | None, typer.Option(help="E-RADIO: its windows, a number or 'optimal'.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    check: Annotated[bool, typer.Option(help="Run the file with onnxruntime and compare.")] = True,
    random_init: Annotated[bool, typer.Option(help="Random weights: for trying out.")] = False,
) -> None:
    """Write a model as an ONNX file for one image size, and check it with onnxruntime."""
    if resolution is not None and not re.fullmatch(r"\d{1,5}(x\d{1,5})?", resolution):
        raise ValueError(f"--resolution must be a number of pixels or HEIGHTxWIDTH, got {resolution!r}")
    if batch != "dynamic" and not re.fullmatch(r"[1-9]\d{0,4}", batch):
        raise ValueError(f"--batch must be 'dynamic' or a number of images from 1 on, got {batch!r}")
    sides = [int(side) for side in resolution.split("x")] if resolution else []
    try:
        require_onnx()  # before anything is downloaded
        model = radio_fast.load(
            version,
            dtype=dtype,
            adaptor_names=[name for name in (adaptors or "").split(",") if name] or None,
            vitdet_window_size=vitdet_window,
            window_size=int(window_size) if window_size and window_size.isdecimal() else window_size,
            random_init=random_init,
            backend="reference",
            cuda_graphs=False,
        )
        with Console(stderr=True).status("exporting and checking" if check else "exporting"):
            done = export_onnx(
                model,
                output,
                (sides[0], sides[-1]) if sides else None,
                dynamic_batch=batch == "dynamic",
                batch=1 if batch == "dynamic" else int(batch),
                opset=opset,
                check=check,
            )
    except (ImportError, ExportError) as error:
        raise ValueError(str(error)) from error
    shape = " × ".join(map(str, done.inputs["image"]))
    checked = "not checked" if done.error is None else f"max relative error {done.error:.1e} in onnxruntime"
    size = f"{done.bytes / 1e6:.1f} MB"
    typer.echo(f"{done.path}: image {shape} → {', '.join(done.outputs)}; opset {opset}, {size}, {checked}")
