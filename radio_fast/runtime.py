"""Where and in which precision a model runs."""

from __future__ import annotations

import torch

from radio_fast.ops._dispatch import BACKENDS, why_not_native_cpu, why_not_triton

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name; torch.int8 too.

    Raises:
        ValueError: not float32, float16, bfloat16 or int8.
    """
    if dtype in (torch.int8, "int8", "torch.int8"):
        return torch.int8
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise ValueError(f"dtype must be float32, float16, bfloat16 or int8, got {dtype!r}")


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """A usable device; None means the CPU, where the official loader puts its models too.

    Raises:
        ValueError: no such device, or none that torch can use here.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from error
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r} asked for, but torch {torch.__version__} finds no usable CUDA GPU")
        if resolved.index is not None and resolved.index >= torch.cuda.device_count():
            raise ValueError(f"device {device!r} asked for, but there are {torch.cuda.device_count()} CUDA GPUs")
    return resolved


def resolve_backend(backend: str, device: torch.device) -> str:
    """`backend`, once it is known that it can run on `device`.

    Raises:
        ValueError: a name that is no backend, or "triton" or "cpu" where those kernels can't run; the message
            says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    reason = None
    if backend == "triton":
        reason = why_not_triton(device, needs_dot=True)
    elif backend == "cpu":
        reason = why_not_native_cpu(device, torch.bfloat16)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run on {device}: {reason}")
    return backend
