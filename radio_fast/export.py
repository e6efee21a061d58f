"""`export_onnx`: a model as an ONNX file, for one image size, checked with onnxruntime."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.model import RADIOModel
from radio_fast.version import __version__

MISSING = "exporting to ONNX needs {}: pip install 'radio_fast[export]'"
OPSETS = range(18, 24)  # those that torch's exporter and onnxruntime both know
# One ONNX file is a protobuf message and ends at 2 GiB; a graph beside the weights needs some of it.
MAX_INLINE = (2 << 30) - (64 << 20)
# Of the largest value: float32 sums in another order; float16 rounds after every operation, and elsewhere.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


class ExportError(RuntimeError):
    """The file that was written does not compute what the model does, or can't be run; it is not kept."""


class Exported(NamedTuple):
    """What `export_onnx` wrote. error: largest relative error of any output against the model; None: not checked."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    bytes: int
    error: float | None


class Flat(nn.Module):
    """image → the outputs one by one, in the order of `names`: summary, features, NAME.summary, NAME.features, …

    Plain PyTorch inside, on the weights of the model given, which stays as it is.
    """

    def __init__(self, model: RADIOModel):
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self.model.backend = "reference"
        self.model.graphs = None
        self.eval()
        kinds = ("summary", "features")
        self.names = (*kinds, *(f"{name}.{kind}" for name in self.model.adaptors for kind in kinds))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(image)
        return tuple(t for one in (outputs.values() if isinstance(outputs, dict) else [outputs]) for t in one)


def require_onnx() -> None:
    """Refuse what would fail later.

    Raises:
        ImportError: a package of the extra is missing; the message says how to get it.
    """
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(MISSING.format(" and ".join(lacking)))


def legal_size(model: RADIOModel, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels; the model's preferred one for None.

    Raises:
        ValueError: no such size, or one the model does not take; the message names the nearest it takes.
    """
    if image_size is None:
        image_size = model.model.only_size or model.preferred_resolution or (512, 512)
        image_size = image_size if isinstance(image_size, int) else model.get_nearest_supported_resolution(*image_size)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"image_size must be a number of pixels or (height, width), got {image_size!r}")
    near = model.get_nearest_supported_resolution(*size)
    if tuple(near) != size:
        raise ValueError(
            f"image_size: sides must be multiples of {model.min_resolution_step} pixels, got {size[0]} × {size[1]}; "
            f"the nearest supported size is {near.height} × {near.width}"
        )
    return size


def export_onnx(
    model: RADIOModel,
    path: str | os.PathLike,
    image_size: int | tuple[int, int] | None = None,
    *,
    dynamic_batch: bool = True,
    batch: int = 1,
    opset: int = 20,
    check: bool = True,
) -> Exported:
    """Write a model as ONNX: input `image` (B, 3, H, W) in [0, 1], float32, normalised inside.

    Outputs: `summary` (B, S·D) and `features` (B, T, D), in the model's dtype; with adaptors `NAME.summary` and
    `NAME.features` too, float32. What the model was set to (ViTDet or E-RADIO windows, an external preprocessor) is
    what is written. Metadata: patch_size, image_size, radio_fast_version; of a released version its name and licence.

    The file appears under its name once it is complete and checked. Weights of more than 2 GB lie beside it, in
    `path` + ".data"; the two go together.

    Args:
        model: any of this package's, on any device; it stays as it is.
        path: where to; a file there is replaced.
        image_size: the one size the file takes, in pixels: a number, or (height, width); the preferred one if None.
        dynamic_batch: take batches of any size, else of `batch` images only.
        batch: how many images; not with `dynamic_batch`.
        opset: 18…23.
        check: run the file with onnxruntime on its CPU and hold the outputs against the model's.

    Raises:
        ImportError: the extra is not installed: pip install 'radio_fast[export]'.
        ValueError: an argument is off; the message names the legal values.
        ExportError: the check failed; nothing is left at `path` but what was there before.
    """
    if not isinstance(model, RADIOModel):
        raise ValueError(f"export_onnx takes a model of radio_fast.load, got {type(model).__name__}")
    if any(isinstance(module, LinearInt8) for module in model.modules()):
        raise ValueError("export_onnx takes no int8 model: load it in float32 or float16")
    if type(opset) is not int or opset not in OPSETS:
        raise ValueError(f"opset must lie in {OPSETS.start}…{OPSETS.stop - 1}, got {opset!r}")
    if type(batch) is not int or batch < 1 or (dynamic_batch and batch != 1):
        raise ValueError(f"batch must be a number of images from 1 on, and dynamic_batch False, got {batch!r}")
    dtype = next(model.model.parameters()).dtype
    if check and dtype not in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"onnxruntime's CPU can't run {name}: export float32 or float16, or without the check")
    size = legal_size(model, image_size)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"path must be a file to write, {path} is a folder")
    require_onnx()

    flat = Flat(model)
    count = 2 if dynamic_batch else batch  # a batch of one would be taken for a constant
    image = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)).to(model.model.device)
    shapes = {"image": {0: torch.export.Dim("batch", min=1)}} if dynamic_batch else None
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            flat, (image,), dynamo=True, dynamic_shapes=shapes, input_names=["image"], output_names=list(flat.names),
            opset_version=opset, verbose=False,
        )  # fmt: skip
    program.model.producer_name, program.model.producer_version = "radio_fast", __version__
    program.model.metadata_props.update(_metadata(model, size))
    size_of_weights = sum(tensor.numel() * tensor.element_size() for tensor in flat.state_dict().values())

    path.parent.mkdir(parents=True, exist_ok=True)
    # The graph names the file of its weights, so both get their own names at once, in a folder beside the target.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        program.save(str(part), external_data=size_of_weights > MAX_INLINE)
        error = (
            _check(part, flat, (image, image[:1]) if dynamic_batch else (image,), TOLERANCE[dtype]) if check else None
        )
        files = sorted(Path(folder).iterdir(), reverse=True)  # the weights before the graph that names them
        total = sum(file.stat().st_size for file in files)
        if len(files) == 1:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger model that was there
        for file in files:
            file.replace(path.parent / file.name)
    inputs, outputs = (
        {value.name: tuple(n if isinstance(n, int) else str(n.value) for n in value.shape) for value in values}
        for values in (program.model.graph.inputs, program.model.graph.outputs)
    )
    return Exported(path, inputs, outputs, total, error)


def _metadata(model: RADIOModel, size: tuple[int, int]) -> dict[str, str]:
    row = model.version
    facts = {
        "patch_size": str(model.patch_size),
        "image_size": f"{size[0]}x{size[1]}",
        "radio_fast_version": __version__,
    }
    return facts | ({} if row is None else {"version": row.name, "licence": row.license})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that no RADIO model needs, and on its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _check(path: Path, flat: Flat, batches: tuple[Tensor, ...], bound: float) -> float:
    """The largest |ONNX's − ours| / max|ours| of any output for any of the batches.

    Raises:
        ExportError: onnxruntime can't run the file, or the error is larger than `bound`.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise ExportError(f"onnxruntime can't load the file: {error}. check=False writes it all the same") from error
    worst = 0.0
    for x in batches:
        with torch.no_grad():
            truths = flat(x)
        results = session.run(list(flat.names), {"image": x.cpu().numpy()})
        for name, result, truth in zip(flat.names, results, truths, strict=True):
            actual, truth = torch.from_numpy(result).double(), truth.cpu().double()
            if actual.shape != truth.shape:
                raise ExportError(
                    f"{name} has shape {tuple(result.shape)} in onnxruntime, expected {tuple(truth.shape)}"
                )
            error = ((actual - truth).abs().max() / truth.abs().max()).item()
            if not error <= bound:  # so that NaN fails too
                raise ExportError(
                    f"onnxruntime's {name} differs by {error:.2g} of its largest value, more than {bound:g}"
                )
            worst = max(worst, error)
    return worst
