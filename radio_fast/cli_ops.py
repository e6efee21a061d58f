"""radio-fast tune, and doctor --ops."""

from __future__ import annotations

import json
import re
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import radio_fast
from radio_fast.cli_common import err, out, parse_resolution
from radio_fast.doctor import examine_ops
from radio_fast.models.registry import find_version
from radio_fast.ops import _dispatch
from radio_fast.ops._tuning import store
from radio_fast.runtime import DTYPES, resolve_device
from radio_fast.tune import Choice, check_tunable, choices, tune


def doctor_ops(as_json: bool) -> None:
    """Each op's implementations on the device that models would run on, and what was measured there."""
    device, implementations = examine_ops()
    found = choices(device)
    if as_json:
        rows = [choice._asdict() | {"winner": choice.winner, "gain": choice.gain} for choice in found]
        content = {"device": str(device), "implementations": implementations, "choices": rows}
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    for op, reasons in implementations.items():
        out.print(f"[bold]{op}[/]")
        for name, reason in reasons.items():
            mark = "[green]ok[/]" if reason is None else "[yellow]--[/]"
            out.print(f"  {mark}  {name:<15}{reason or ''}", highlight=False, soft_wrap=True)
    _print_choices(found, device)


def _print_choices(found: list[Choice], device: torch.device) -> None:
    if not found:
        why = (
            "a model's first call does, or radio-fast tune VERSION"
            if _dispatch.accelerated(device)
            else "plain PyTorch runs there"
        )
        out.print(f"\nNothing has been measured on {device}: {why}", highlight=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, title=f"measured on {device}", title_justify="left")
    for column in ("op", "bucket", "fastest", "µs", "next best", "gain", "dropped"):
        table.add_column(column, justify="right" if column in ("µs", "gain") else "left", overflow="fold")
    for choice in found:
        second = [f"{name} {us:.1f}" for name, us in choice.times.items()][1:2] or [""]
        gain = "" if choice.gain is None else f"{choice.gain:.2f}×"
        best = f"{choice.times[choice.winner]:.1f}" if choice.times else ""
        row = (choice.op, choice.bucket, choice.winner, best, second[0], gain, ", ".join(choice.dropped))
        table.add_row(*map(escape, row))
    out.print(table)


def tune_command(
    version: Annotated[str, typer.Argument(metavar="VERSION|FILE", help="A version name, checkpoint file or folder.")],
    resolution: Annotated[
        str | None, typer.Option(help="Pixels, separated by commas: 224,384x512 (224 and the preferred one).")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …")] = "cuda",
) -> None:
    """Measure every op's implementations ahead, so that no first call has to.

    The weights don't matter: a version's are random, nothing is downloaded. Results are kept in the cache folder;
    Ctrl-C keeps what is done. RADIO_FAST_TUNE=0 turns measuring off altogether.
    """
    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", batch) or not all(map(int, batch.split(","))):
        raise ValueError(f"--batch must be numbers of images from 1 on, separated by commas, got {batch!r}")
    if dtype not in DTYPES:  # int8 is for CPUs, where nothing is measured
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
    where = resolve_device(device)
    check_tunable(where)
    model = radio_fast.load(
        version, device=where, dtype=dtype, random_init=find_version(version) is not None, cuda_graphs=False
    )
    if resolution is None and model.model.only_size:
        sizes = {2 * (model.model.only_size,)}
    elif resolution is None:
        sizes = {parse_resolution(None, model), tuple(model.get_nearest_supported_resolution(224, 224))}
    else:
        sizes = {parse_resolution(text, model) for text in resolution.split(",")}
    if None in sizes:
        raise ValueError("--resolution must be numbers of pixels: 'native' is for embed")
    batches = [int(n) for n in batch.split(",")]
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("", total=len(sizes) * len(set(batches)))
        for step in tune(model, sizes, batches):
            progress.update(task, advance=1, description=f"{step.batch} × {step.height} × {step.width}")
            if step.failed:
                err.print(f"[bold red]left out:[/] {step.batch} × {step.height} × {step.width}: {step.failed}")
    _print_choices(choices(model.model.device), model.model.device)
    out.print(
        f"\nkept in {store(model.model.device).path or 'memory: there is no home'}", highlight=False, soft_wrap=True
    )
