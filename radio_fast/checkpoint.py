"""Read checkpoint files without trusting them, and bring their tensors into this package's names."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pathlib
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from radio_fast.errors import CheckpointError
from radio_fast.models.weights import ModelState, canonical_backbone, fold_spectral

# A pickle beside the tensors holds names, shapes and arguments: under 1 MB in every released file.
MAX_PICKLE_BYTES = 64 << 20


# -- reading --------------------------------------------------------------------------------------------------


class Inert:
    """Stands in for an object of a class that isn't known to be harmless: it keeps nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, not loaded>"


class _NumpyDtype:
    """What a pickled numpy dtype says, without numpy's own unpickling; `code` is None for all but numbers."""

    def __init__(self, code: str, *_: object):
        self.code = code if isinstance(code, str) and re.fullmatch(r"[<>=|]?[biufc]\d{1,2}", code) else None

    def __setstate__(self, state: tuple) -> None:
        if self.code is not None and state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>=|")


def _numpy_scalar(dtype: _NumpyDtype, data: object) -> int | float | bool | complex | Inert:
    """A plain Python number; dates, text and pickled objects stay unread."""
    if not isinstance(dtype, _NumpyDtype) or dtype.code is None or not isinstance(data, bytes):
        return Inert()
    return np.frombuffer(data, dtype=dtype.code, count=1)[0].item()


# Real files hold these; paths become pure paths, which touch no file system and exist on every one.
_KNOWN_GLOBALS: dict[str, object] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": lambda *_: {},
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
} | {
    f"{module}.{kind}": getattr(pathlib, "PureWindowsPath" if "Windows" in kind else "PurePosixPath")
    for module in ("pathlib", "pathlib._local")
    for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
}
_SAFE_GLOBALS_LOCK = threading.Lock()  # torch keeps the list of safe globals per process


def _check_zip(path: Path) -> None:
    """Refuse what torch's memory-mapped reader would misread: no zip, compressed or overlapping records."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    with path.open("rb") as file:
        head = file.read(4)
    if head != b"PK\x03\x04":
        if head[:1] == b"\x80":
            raise CheckpointError(
                f"{path} is a pickle from before torch 1.6 (no zip file); write it anew with a current torch: "
                f"torch.save(torch.load(path, weights_only=True), path)"
            )
        raise CheckpointError(f"{path} is not a torch checkpoint: it starts with {head!r} instead of a zip header")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            orders = [archive.read(r) for r in records if r.filename.endswith("/byteorder") and r.file_size < 16]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RecursionError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({size} bytes): {error}") from error
    if not any(record.filename.endswith("/data.pkl") for record in records):
        raise CheckpointError(f"{path} is a zip file but not a torch checkpoint: it has no data.pkl")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint: this reads what torch.save wrote")
    if any(order != sys.byteorder.encode() for order in orders):
        # torch would swap the mapped bytes in place, and giving pages back (MappedRange) would undo that.
        raise CheckpointError(
            f"{path} was not written on a {sys.byteorder}-endian machine like this: save it anew here"
        )
    total = 0
    for record in records:
        total += record.file_size
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise CheckpointError(
                f"{path}: record {record.filename!r} is compressed; torch stores tensors uncompressed"
            )
        if record.filename.endswith("/data.pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: data.pkl has {record.file_size} bytes, more than {MAX_PICKLE_BYTES}")
    if total > size:
        raise CheckpointError(f"{path} is damaged: its records claim {total} bytes, the file has {size}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict in a torch checkpoint file, its tensors mapped from the file (read when first used).

    Only tensors, plain containers, numbers, `argparse.Namespace`, torch dtypes, numpy scalars and paths are made.
    Objects of any other class become an `Inert` placeholder; nothing the file names is ever called.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty, truncated, no torch file, of the format before torch 1.6, or refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    _check_zip(path)
    try:
        with _SAFE_GLOBALS_LOCK:
            unknown = get_unsafe_globals_in_checkpoint(str(path))
            allow = [
                (_KNOWN_GLOBALS.get(name) or type(name.rpartition(".")[2], (Inert,), {}), name) for name in unknown
            ]
            with safe_globals(allow):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the reader's failures on a hostile file have no common class
        raise CheckpointError(f"{path} can't be read as a torch checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the dict of a RADIO checkpoint")
    return content


def _reason(error: Exception) -> str:
    """What was wrong, in one line: torch wraps it into advice to read the file unsafely."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


MAX_EXPANDED = 1 << 24  # values of a tensor that repeats itself; torch saves such ones small, here they take memory


class MappedRange:
    """The memory a checkpoint file is mapped to, so that pages already copied can be given back.

    Without this a load would count the file once as mapped pages and once as the model. Tensors may lie elsewhere, so
    the system is asked where the file is: pages of any other memory would be lost for good.
    """

    def __init__(self, path: str | Path, tensors: Iterable[Tensor]):
        self.ranges: list[tuple[int, int]] = []
        if sys.platform == "linux":
            self.madvise = ctypes.CDLL(None).madvise
            self.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            starts = [tensor.data_ptr() for tensor in tensors if tensor.layout == torch.strided]
            mapped = _mapped_ranges(path)
            self.ranges = [(low, high) for low, high in mapped if any(low <= start < high for start in starts)]

    def release(self, tensor: Tensor) -> None:
        """Drop the pages that lie wholly inside a mapped tensor; touched again, they are read from the file again."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if any(low <= start and end <= high for low, high in self.ranges):
            self._drop(start, end)

    def release_all(self) -> None:
        """Drop all pages of the file."""
        for low, high in self.ranges:
            self._drop(low, high)

    def _drop(self, low: int, high: int) -> None:
        page = mmap.PAGESIZE
        low, high = -(-low // page) * page, high // page * page
        if high > low:
            self.madvise(low, high - low, mmap.MADV_DONTNEED)


def _mapped_ranges(path: str | Path) -> list[tuple[int, int]]:
    """The address ranges that show a file in this process, as /proc/self/maps lists them."""
    real = os.path.realpath(path).replace("\n", "\\012")
    try:
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    spans = [entry[0].split("-") for entry in fields if len(entry) == 6 and entry[5] == real]
    return [(int(low, 16), int(high, 16)) for low, high in spans]


# -- arguments ------------------------------------------------------------------------------------------------


def plain_args(raw: object) -> dict[str, Any]:
    """A checkpoint's `args` as a dict with the fields this package uses checked; all others are dropped.

    Raises:
        CheckpointError: a field that is used has a value of the wrong kind.
    """
    if isinstance(raw, argparse.Namespace):
        raw = vars(raw)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"the checkpoint's args must be a Namespace or a dict, got {type(raw).__name__}")
    args: dict[str, Any] = {}
    for name, kind in _ARGS.items():
        value = raw.get(name)
        if value is not None and not isinstance(value, kind):
            legal = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise CheckpointError(f"the checkpoint's args.{name} must be of type {legal}, got {type(value).__name__}")
        args[name] = value
    for name in ("register_multiple", "cpe_num_registers"):
        if args[name] is not None and not 0 <= args[name] <= 4096:
            raise CheckpointError(f"the checkpoint's args.{name} must lie in 0…4096, got {args[name]}")
    for teacher in args["teachers"] or []:
        if not isinstance(teacher, Mapping) or not isinstance(teacher.get("name"), str):
            raise CheckpointError("each of the checkpoint's args.teachers must be a dict with a name")
    args["dtype"] = _dtype(args["dtype"])
    args["model_kwargs"] = dict(args["model_kwargs"] or {})
    for name in ("num_heads", "depth"):
        value = args["model_kwargs"].get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise CheckpointError(f"the checkpoint's model_kwargs.{name} must be a positive integer, got {value!r}")
    return args


_ARGS: dict[str, Any] = {
    "model": str,
    "model_kwargs": Mapping,
    "cls_token_per_teacher": bool,
    "teachers": (list, tuple),
    "register_multiple": int,
    "cpe_num_registers": int,
    "model_norm": bool,
    "spectral_reparam": (bool, Mapping),
    "dtype": (torch.dtype, str),
}


def _dtype(value: torch.dtype | str | None) -> torch.dtype:
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    value = value or torch.float32
    if value not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"the checkpoint's args.dtype must be float32, float16 or bfloat16, got {value}")
    return value


# -- from file to model state ---------------------------------------------------------------------------------


def check_tensors(tensors: Mapping[str, object]) -> None:
    """Plain dense tensors, no larger than what the file has of them.

    Raises:
        CheckpointError: the message names the first that is not.
    """
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the checkpoint's {key} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"the checkpoint's {key} must be a plain dense tensor with its data in the file")
        if value.numel() > MAX_EXPANDED and value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise CheckpointError(f"the checkpoint's {key} claims {value.numel()} values, the file has fewer")


def state_of_checkpoint(content: Mapping[str, Any]) -> ModelState:
    """The model state in a `*.pth.tar` checkpoint's dict: renamed, spectral weights folded, nothing else copied.

    Raises:
        CheckpointError: it has no state_dict or args, or they contradict each other.
    """
    ema = content.get("state_dict_ema")
    tensors = ema if ema is not None else content.get("state_dict")
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"the checkpoint has no state_dict; its entries are: {', '.join(map(repr, content))}")
    args = plain_args(content.get("args"))
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items()}
    check_tensors(tensors)

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    # EMA weights are plain weights: the parametrisation was folded when they were averaged.
    spectral = args["spectral_reparam"] if ema is None else False
    eps = spectral.get("eps", 1e-12) if isinstance(spectral, Mapping) else 1e-6
    heads = {}
    for index, teacher in enumerate(args["teachers"] or ()):
        name = teacher["name"]
        pair = tuple(
            under(f"{group}.{name}.") or under(f"{group}.{index}.") for group in ("_heads", "_feature_projections")
        )
        if all(pair) and name not in heads:
            heads[name] = tuple(fold_spectral(head, 1e-6) for head in pair)
    arch = args["model"] or str(content.get("arch") or "")
    backbone, plain = canonical_backbone(fold_spectral(under("base_model."), eps), arch)
    return ModelState(
        arch=arch,
        args=args,
        backbone=backbone,
        fixed_size=plain,
        conditioner=under("input_conditioner."),
        heads=heads,
        feature_normalizer=under("_feature_normalizer."),
        inter_feature_normalizer=under("_intermediate_feature_normalizer."),
    )
