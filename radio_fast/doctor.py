"""What this machine has, what of it can be used, and why the rest can't."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import NamedTuple

import torch

from radio_fast import native, native_cpu
from radio_fast.ops._dispatch import OPS, why_not_triton
from radio_fast.ops._providers import PACKAGES, why_not_import
from radio_fast.paths import default_cache_dir
from radio_fast.version import __version__


class Finding(NamedTuple):
    """One line of the report; `ok` is None where a lack costs speed only."""

    name: str
    ok: bool | None
    detail: str


def _package(name: str, distribution: str, why: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, None, f"not installed: {why}")


def _provider(name: str) -> Finding:
    reason = why_not_import(name)
    detail = "imports" if reason is None else f"{reason}: optional attention provider"
    return Finding(name, None if reason else True, detail)


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    if path is None:
        return Finding("nvcc", None, "not found: only needed to build CUDA sources")
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", None, f"{path} does not run: {error}")
    release = next((line.strip() for line in text.splitlines() if "release" in line), text.strip()[:80])
    return Finding("nvcc", True, release)


def _gpus() -> list[Finding]:
    if torch.version.cuda is None and torch.version.hip is None:
        return [Finding("GPU", None, f"torch {torch.__version__} is a CPU build: models run on the CPU")]
    if not torch.cuda.is_available():
        return [Finding("GPU", None, "torch finds no usable GPU (driver missing, too old, or no device)")]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        found.append(Finding(f"GPU {index}", True, detail))
    return found


def _cuda_extension() -> Finding:
    reason = native.why_not_native()
    if reason is not None:
        return Finding("CUDA extension", None, reason)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        reason = native.library().why_not_on(10 * major + minor) or native.library().why_not_run(
            torch.device("cuda", index)
        )
        if reason is not None:
            return Finding("CUDA extension", None, reason)
    return Finding("CUDA extension", True, f"kernels for {native.library().architectures.replace(' ', ', ')}")


def _cpu_kernels() -> Finding:
    reason = native_cpu.why_not_native_cpu()
    return Finding("CPU kernels", None if reason else True, reason or "AMX, for models in float32, bfloat16 and int8")


def _triton_backend() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dots, rows = (why_not_triton(device, needs_dot=needs_dot) for needs_dot in (True, False))
    if dots is None:
        return Finding("backend triton", True, f"all kernels, on {device}")
    if rows is None:
        return Finding("backend triton", True, f"row-wise kernels only: {dots}")
    return Finding("backend triton", None, f"can't run: {dots}")


def examine_ops() -> tuple[torch.device, dict[str, dict[str, str | None]]]:
    """Of the device that models would run on: each op's implementations, and why they don't run there, if so.

    In bfloat16 where the GPU has it, else in float16.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if old else torch.bfloat16
    return device, {name: op.usable(device, dtype) for name, op in sorted(OPS.items())}


def examine() -> list[Finding]:
    """Look at everything; no finding is ever an exception."""
    torch_ok = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    torch_detail = f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    if not torch_ok:
        torch_detail += "; radio_fast needs torch ≥ 2.10 (its safe checkpoint reader)"
    cpu = torch.backends.cpu.get_cpu_capability()
    return [
        Finding("radio_fast", True, __version__),
        Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("torch", torch_ok, torch_detail),
        Finding("CPU", True, f"{platform.processor() or platform.machine()}, {cpu}"),
        *_gpus(),
        _package("triton", "triton", "the kernels need it; it comes with torch's CUDA builds"),
        _nvcc(),
        *map(_provider, PACKAGES),
        _package("fastapi", "fastapi", "only radio-fast serve needs it: pip install 'radio_fast[serve]'"),
        _package("ray", "ray", "only radio_fast.serve.ray needs it: pip install 'radio_fast[ray]'"),
        _package("transformers", "transformers", "only needed to compare against its RadioModel"),
        Finding("backend reference", torch_ok, "plain PyTorch, on any device that torch has"),
        _triton_backend(),
        _cuda_extension(),
        _cpu_kernels(),
        Finding("cache", True, str(default_cache_dir())),
    ]
