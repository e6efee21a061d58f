"""The command line: radio-fast versions | info | embed | serve | export | tune | doctor."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

MISSING = "radio-fast needs typer, rich and Pillow: pip install 'radio_fast[cli]'"

try:
    import numpy as np
    import torch
    import typer
    from PIL import Image  # noqa: F401 (checked here so that a missing one is told at once)
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f"{MISSING} ({error})")

import radio_fast
from radio_fast.checkpoint import read_checkpoint, state_of_checkpoint
from radio_fast.cli_common import err, out, parse_resolution
from radio_fast.cli_export import export
from radio_fast.cli_ops import doctor_ops, tune_command
from radio_fast.cli_serve import leave_cores_to_others, serve
from radio_fast.doctor import examine
from radio_fast.download import fetch_repo, is_repo_id
from radio_fast.folder import read_folder
from radio_fast.images import ImageError, find_images, read_image, to_tensor
from radio_fast.model import RADIOModel
from radio_fast.models.eradio_spec import ERADIOSpec, released_spec
from radio_fast.models.registry import ARCHS, DEFAULT_VERSION, VERSIONS, find_version, unknown_version
from radio_fast.models.spec import ViTSpec
from radio_fast.paths import default_cache_dir

app = typer.Typer(
    name="radio-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run NVIDIA's RADIO vision foundation models.",
)


def main() -> None:
    """Entry point: what a user can put right is one line on stderr and exit code 1, not a traceback."""
    if sys.argv[1:2] == ["serve"]:
        leave_cores_to_others()
    try:
        app()
    except (ValueError, FileNotFoundError, radio_fast.DownloadError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def versions() -> None:
    """List the released versions and their licences."""
    table = Table(box=None, pad_edge=False)
    for column in ("version", "arch", "preferred", "licence"):
        table.add_column(column, no_wrap=True)
    for row in VERSIONS.values():
        name = f"{row.name} *" if row.name == DEFAULT_VERSION else row.name
        table.add_row(name, row.arch, f"{row.preferred} px", row.license)
    out.print(table)
    out.print("\n* the default. `radio-fast info VERSION` tells more.", highlight=False)


def _file_facts(path: Path) -> dict[str, object]:
    state = read_folder(path)[0] if path.is_dir() else state_of_checkpoint(read_checkpoint(path))
    spec = state.spec()
    parameters = sum(t.numel() for name, t in state.backbone.items() if not name.endswith("relative_coords_table"))
    facts = {"arch": spec.arch, "parameters": f"{parameters / 1e6:.1f} M (backbone)", "embed_dim": spec.embed_dim}
    facts |= _eradio_facts(spec) if isinstance(spec, ERADIOSpec) else _vit_facts(spec)
    return facts | {
        "stored as": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.backbone.values()})),
        "runs as": str(state.args["dtype"]).removeprefix("torch."),
        "adaptors": ", ".join(state.heads) or "none",
    }


def _vit_facts(spec: ViTSpec) -> dict[str, object]:
    return {
        "depth": spec.depth,
        "heads": f"{spec.num_heads} × {spec.embed_dim // spec.num_heads}",
        "MLP": f"{'SwiGLU' if spec.swiglu else 'GELU'} {spec.mlp_hidden}",
        "patch size": spec.patch_size,
        "prefix tokens": f"{spec.num_cls_tokens} cls + {spec.num_registers} registers",
        "summary": f"{len(spec.summary_idxs)} × {spec.embed_dim} (tokens {', '.join(map(str, spec.summary_idxs))})",
        "position table": f"{spec.grid_side} × {spec.grid_side}",
    }


def _eradio_facts(spec: ERADIOSpec) -> dict[str, object]:
    facts: dict[str, object] = {"feature size": f"{spec.patch_size} pixels", "summary": "the mean of the features"}
    for i, level in enumerate(spec.levels):
        if level.chains:
            one = level.chains[0][0]
            windows = ", ".join(
                f"{block.window} × {block.window}{' at half resolution' * (block.sr_ratio == 2)}"
                for block in level.chains[0]
            )
            heads = f"{one.num_heads} heads of {one.dim // one.num_heads}"
            kind = f"{len(level.chains)} × attention, {heads}, windows {windows}"
        else:
            kind = f"{len(level.c2f)} × C2f" if level.c2f_width else f"{len(level.convs)} × convolutions"
        facts[f"level {i}"] = f"{level.dim} channels, {kind}"
    return facts


@app.command()
def info(
    version: Annotated[str, typer.Argument(metavar="VERSION|FILE", help="A version name, checkpoint file or folder.")],
) -> None:
    """Show what a version or a checkpoint file holds: widths, tokens, adaptors, licence."""
    row, path = find_version(version), Path(version).expanduser()
    facts: dict[str, object] = {}
    if row is not None:
        facts |= {"version": row.name, "licence": row.license, "file": f"nvidia/{row.repo}/{row.file}"}
        facts |= {"max resolution": row.max_resolution, "preferred": " × ".join(map(str, row.preferred_resolution))}
        if row.vitdet is None:
            facts["ViTDet mode"] = "no"
        else:
            windowed = row.vitdet.num_windowed
            facts["ViTDet mode"] = f"{windowed} windowed per global" if windowed else f"{row.vitdet.num_global} global"
        path = default_cache_dir() / row.file
        facts["cached"] = str(path) if path.is_file() else "no (downloaded on first load)"
    elif not path.exists():
        if not is_repo_id(version):
            raise unknown_version(version)
        path = fetch_repo(version)
    if path.exists():
        facts |= _file_facts(path)
    elif row is not None:
        facts |= {"arch": row.arch, "adaptors": ", ".join(row.adaptors) or "none"}
        if arch := ARCHS.get(row.arch):
            facts |= {"embed_dim": arch.embed_dim, "depth": arch.depth, "patch size": arch.patch_size}
            facts |= {"heads": f"{arch.num_heads} × {arch.embed_dim // arch.num_heads}"}
        elif row.is_eradio:
            facts |= _eradio_facts(released_spec(row.arch))
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    out.print(table)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ops: Annotated[
        bool, typer.Option("--ops", help="Show each op's implementations instead: who won here, and by how much.")
    ] = False,
) -> None:
    """Show what this machine has, which backends can run, and why the others can't."""
    if ops:
        doctor_ops(as_json)
        return
    findings = examine()
    if as_json:
        typer.echo(json.dumps([f._asdict() for f in findings], indent=1, ensure_ascii=False))
    else:
        for name, ok, detail in findings:
            mark = {True: "[green]ok[/]", None: "[yellow]--[/]", False: "[red]no[/]"}[ok]
            out.print(f"{mark}  [bold]{name:<18}[/] {detail}", highlight=False, soft_wrap=True)
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)


app.command(name="tune")(tune_command)


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders to search for images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.")],
    version: Annotated[str, typer.Option(help="Version name, checkpoint file or folder.")] = DEFAULT_VERSION,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint file to use for --version.")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels (432, 384x512), or 'native': each image's nearest legal size.")
    ] = None,
    adaptors: Annotated[str | None, typer.Option(help="Adaptors to run too, separated by commas.")] = None,
    window_size: Annotated[
        str | None,
        typer.Option(help="E-RADIO: attention windows of so many positions, or 'optimal' for each image's size."),
    ] = None,
    features: Annotated[bool, typer.Option(help="Store patch features too, not the summaries alone.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size per forward pass.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … (a GPU where there is one).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, int8 (as the file says).")] = None,
    random_init: Annotated[
        bool, typer.Option(help="Random weights: for trying out; the result has no meaning.")
    ] = False,
) -> None:
    """Embed images into an .npz file.

    It holds `paths`, `sizes` (pixels used) and `summary` (N, S·D), one row an image; with adaptors `NAME.summary` too;
    with --features `features/000000`, … (T, D) per image. Files that are no images are left out, listed at the end, and
    make the exit code 1. Ctrl-C writes what is done so far.
    """
    files = find_images(paths)
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    names = [name for name in (adaptors or "").split(",") if name]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    window = int(window_size) if window_size and re.fullmatch(r"-?\d{1,9}", window_size) else window_size
    model = radio_fast.load(
        version,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        adaptor_names=names or None,
        window_size=window,
        random_init=random_init,
    )
    size = parse_resolution(resolution, model)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    arrays = _Arrays(features)
    interrupted = False
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("embedding", total=len(files))
        batch: list[tuple[Path, torch.Tensor]] = []
        try:
            for path in files:
                try:
                    image = read_image(path)
                except ImageError as error:
                    failed.append(str(error))
                    progress.advance(task)
                    continue
                height, width = size or model.get_nearest_supported_resolution(image.height, image.width)
                tensor = to_tensor(image, height, width)
                if batch and (len(batch) == batch_size or batch[0][1].shape != tensor.shape):
                    progress.advance(task, arrays.run(model, batch, device))
                    batch = []
                batch.append((path, tensor))
            if batch:
                arrays.run(model, batch, device)
                progress.update(task, completed=len(files))
        except KeyboardInterrupt:
            interrupted = True
    arrays.write(output)
    done = len(arrays.paths)
    out.print(f"{done} of {len(files)} images embedded into {output}", highlight=False, soft_wrap=True)
    for line in failed:
        err.print(f"[bold red]left out:[/] {line}", highlight=False, soft_wrap=True)
    if interrupted:
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


app.command()(export)
app.command()(serve)


class _Arrays:
    """The results so far, as they will stand in the file."""

    def __init__(self, with_features: bool):
        self.with_features = with_features
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.summaries: dict[str, list[np.ndarray]] = {}
        self.features: dict[str, np.ndarray] = {}

    def run(self, model: RADIOModel, batch: list[tuple[Path, torch.Tensor]], device: str) -> int:
        """Embed one batch; return its number of images."""
        with torch.inference_mode():
            result = model(torch.stack([tensor for _, tensor in batch]).to(device))
        outputs = result if isinstance(result, dict) else {"backbone": result}
        first = len(self.paths)
        for name, (summary, features) in outputs.items():
            prefix = "" if name == "backbone" else f"{name}."
            self.summaries.setdefault(f"{prefix}summary", []).append(summary.float().cpu().numpy())
            if self.with_features:
                for i, one in enumerate(features.float().cpu().numpy()):
                    self.features[f"{prefix}features/{first + i:06d}"] = one
        self.paths += [str(path) for path, _ in batch]
        self.sizes += [tuple(tensor.shape[1:]) for _, tensor in batch]
        return len(batch)

    def write(self, path: Path) -> None:
        """Write the file under another name first, so that a crash leaves no half of one."""
        arrays = {name: np.concatenate(parts) for name, parts in self.summaries.items()} | self.features
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez(file, paths=np.array(self.paths, dtype=str), sizes=np.array(self.sizes, dtype=int), **arrays)
        part.replace(path)


if __name__ == "__main__":
    main()
