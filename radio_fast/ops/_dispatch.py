"""Which implementation of an op runs: plain PyTorch or a kernel.

Every op has a plain form `*_ref` in its file, and an operator `torch.ops.radio_fast.<op>` that runs the Triton kernel;
some have a kernel in the CUDA extension too, `torch.ops.radio_fast.<op>_cuda`.
`choose` decides between them; an implementation asked for by name that can't run is an error, never a silent
replacement.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from radio_fast import native
from radio_fast.arch import arch_of

BACKENDS = ("auto", "reference", "triton")  # of a whole model; "cuda" is some ops'
LIBRARY = torch.library.Library("radio_fast", "FRAGMENT")


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors (TRITON_INTERPRET=1 at its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED_SM = 90  # whose configurations the interpreter runs, unless RADIO_FAST_ARCH says otherwise


def sm_of(device: torch.device) -> int:
    """The architecture whose configurations the kernels take on `device`."""
    if device.type != "cuda":
        return arch_of(99, 9).sm if os.environ.get("RADIO_FAST_ARCH") else INTERPRETED_SM
    return arch_of(*torch.cuda.get_device_capability(device)).sm


def why_not_triton(device: torch.device, needs_dot: bool) -> str | None:
    """None where the Triton kernels run on `device`, else the reason why they don't.

    `needs_dot`: the kernel multiplies matrices. Before sm_80 Triton has no tensor cores for that, and cuBLAS does it
    many times faster.
    """
    if not HAVE_TRITON:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "on the CPU Triton kernels run only under TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the kernels are for NVIDIA GPUs, not for {device.type}"
    if interpreting():
        return "TRITON_INTERPRET=1 is set: kernels would run on the CPU"
    try:
        arch = arch_of(*torch.cuda.get_device_capability(device))
    except ValueError as error:
        return str(error)
    if needs_dot and not arch.tensor_core_dot:
        return f"Triton has no tensor cores on sm_{arch.sm}"
    return None


def native_path(device: torch.device) -> int:
    """The path of the CUDA extension for `device`: 70, 75 or 80."""
    sm = sm_of(device)
    return 80 if sm >= 80 else 75 if sm >= 75 else 70


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the CUDA extension's kernels run on `device`, else the reason why they don't."""
    reason = native.why_not_native()
    if reason is not None:
        return reason
    if device.type == "cpu":
        if not native.library().emulated:
            return "the CUDA extension's kernels are for NVIDIA GPUs, not for the CPU"
    elif device.type != "cuda" or torch.version.cuda is None:
        return f"the kernels are for NVIDIA GPUs, not for {device.type}"
    try:
        path = native_path(device)
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    except ValueError as error:
        return str(error)
    if major:
        reason = native.library().why_not_on(10 * major + minor) or native.library().why_not_run(device)
        if reason is not None:
            return reason
    if dtype == torch.bfloat16 and path < 80:
        return f"bfloat16 needs sm_80 or newer, this is sm_{path}'s path: use float16"
    return None


# torch.compile takes the answer as it is at tracing, and does not look inside, where a lock would end its graph. What
# torch.compiler.assume_constant_result does, without its import of the compiler.
why_not_native._dynamo_marked_constant = True


def _why_not_now(tensors: list[Tensor]) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "the kernels have no backward: use torch.no_grad() or the reference backend"
    if torch.is_autocast_enabled(tensors[0].device.type):
        return "autocast is on: cast the model with .to(dtype) instead, or use the reference backend"
    return None


def choose(
    op: str,
    backend: str,
    *tensors: Tensor | None,
    needs_dot: bool,
    limit: str | None = None,
    native_limit: str | None = "it has no kernel there",
) -> str:
    """The implementation that this call runs: "reference", "triton" or "cuda" (the CUDA extension).

    `backend` is what the caller wants; the environment's RADIO_FAST_<OP>, else RADIO_FAST_BACKEND, replaces "auto".
    "auto" takes a kernel where one runs: on a GPU, outside autograd and autocast, within the kernel's limits (`limit`
    and `native_limit` are what this call breaks of Triton's and the CUDA extension's, if any); Triton's first, and the
    extension's in 16 bits only, where it has tensor cores. Else it takes plain PyTorch.

    Raises:
        ValueError: no such backend, or one was asked for that can't run; the message says why.
    """
    if backend == "auto":
        backend = os.environ.get(f"RADIO_FAST_{op.upper()}") or os.environ.get("RADIO_FAST_BACKEND") or "auto"
    if backend not in (*BACKENDS, "cuda"):
        known = ", ".join(map(repr, (*BACKENDS, "cuda")))
        raise ValueError(f"backend of {op} must be one of {known}, got {backend!r}")
    present = [t for t in tensors if t is not None]
    device = present[0].device
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    reason = None
    if backend != "cuda":
        reason = limit or why_not_triton(device, needs_dot) or _why_not_now(present)
        if reason is None:
            return "triton"
    if backend == "cuda" or (backend == "auto" and native_limit is None):
        reason = native_limit or _why_not_now(present) or why_not_native(device, present[0].dtype)
        if reason is None and (backend == "cuda" or present[0].dtype != torch.float32):
            return "cuda"
    if backend == "auto":
        return "reference"
    raise ValueError(f"the {backend} backend of {op} can't run here: {reason}")


def register(name: str, schema: str, fake, kernel) -> None:
    """Define `radio_fast::<name>`: its kernel for CUDA (and interpreted CPU) tensors, and its fake form."""

    def on_its_device(first: Tensor, *args):
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever the tensors are on
            return kernel(first, *args)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, on_its_device, "CUDA")
    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"radio_fast::{name}", fake, lib=LIBRARY)


KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def limit_of(first: Tensor, **others: Tensor | None) -> str | None:
    """What breaks the kernels' common limits: `first` is float16, bfloat16 or float32, the others are like it."""
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {first.dtype}"
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, expected {first.device} like the input"
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype}, expected {first.dtype} like the input"
    return None
