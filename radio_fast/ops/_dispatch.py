"""Which implementation of an op runs: plain PyTorch, a kernel of ours, or one of another package.

Every op is an `Op`: its plain form ("reference", the truth), and what may take its place, by name. "triton", "cuda"
and "cpu" are the kernels of this package, `torch.ops.radio_fast.<op>`, `<op>_cuda` and `<op>_cpu`. `Op.choose` decides:
on a GPU the implementation that `_tuning` measured to be the fastest one there, or the first of a shipped order; on a
CPU the kernels wherever they run; one asked for by name that can't run is an error, never a silent replacement.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from radio_fast import native, native_cpu
from radio_fast.arch import arch_of
from radio_fast.ops._state import overrides, torch_is_plain

BACKENDS = ("auto", "reference", "triton", "cpu")  # of a whole model; "cuda" and others are some ops'
CPU_OR_REFERENCE = "cpu or reference"  # of the ops in a whole model on "cpu", which has no kernel for some
LIBRARY = torch.library.Library("radio_fast", "FRAGMENT")
HALF = (torch.float16, torch.bfloat16)
CPU_DTYPES = tuple(native_cpu.DTYPES)
KERNEL_DTYPES = (*HALF, torch.float32)


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


def why_not_native_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the CPU kernels run on `device`, else the reason why they don't."""
    if device.type != "cpu":
        return f"the kernels are for CPUs with AMX, not for {device.type}"
    return native_cpu.why_not_native_cpu()


def _why_not_now(args: tuple) -> str | None:
    if forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivative: use the reference backend"
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return "the kernels have no backward: use torch.no_grad() or the reference backend"
    if torch.is_autocast_enabled(args[0].device.type):
        return "autocast is on: cast the model with .to(dtype) instead, or use the reference backend"
    return None


def backend_of_ops(backend: str) -> str:
    """What the ops are asked for where a whole model, or the environment, asks for `backend`."""
    return CPU_OR_REFERENCE if backend == "cpu" else backend


def accelerated(device: torch.device) -> bool:
    """Whether "auto" ranks implementations on `device`, shipped or measured."""
    return device.type == "cuda"


def has_kernels(device: torch.device) -> bool:
    """Whether "auto" looks for anything but plain PyTorch on `device`."""
    return accelerated(device) or (device.type == "cpu" and native_cpu.why_not_native_cpu() is None)


class Implementation(NamedTuple):
    """run: takes what the op's plain form takes. why_not: None where it runs on a device in a dtype, else the reason.

    shipped: the dtypes in which "auto" takes it unmeasured; in others only a measurement, or its name, makes it run.
    """

    run: Callable[..., Any]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    shipped: tuple[torch.dtype, ...]


def _runs(device: torch.device, dtype: torch.dtype) -> None:
    """Why plain PyTorch does not: no reason."""


class Op:
    """One operation and its implementations, in the order in which "auto" takes them unmeasured.

    Args:
        name: as in RADIO_FAST_<NAME> and the tuning file.
        reference: the plain form.
        key: of a call's arguments, their bucket of shapes: each is measured once. None: the shipped order, unmeasured.
        first: of a call's arguments, the implementation that then heads the shipped order ("": as it is).
        truth: the dtype that 16-bit implementations are checked in, on two images; float32's are in float64.
        batched: which of its arguments have the batch as their first axis (their results have it too): an
            implementation is checked on the first and the last image of a batch.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        key: Callable[..., str | None],
        batched: tuple[int, ...] = (0,),
        first: Callable[..., str] = lambda *args: "",
        truth: torch.dtype = torch.float64,
    ):
        self.name = name
        self.variable = f"RADIO_FAST_{name.upper()}"
        self.key = key
        self.first = first
        self.batched = batched
        self.truth = truth
        self.implementations = {"reference": Implementation(reference, _runs, KERNEL_DTYPES)}
        self._rankings: dict[tuple, tuple[str, ...]] = {}
        OPS[name] = self

    def add(
        self,
        name: str,
        run: Callable[..., Any],
        why_not: Callable[[torch.device, torch.dtype], str | None],
        shipped: tuple[torch.dtype, ...] = KERNEL_DTYPES,
    ) -> None:
        """One more implementation; plain PyTorch stays the last of those that are shipped."""
        self.implementations[name] = Implementation(run, why_not, shipped)
        if shipped:
            self.implementations["reference"] = self.implementations.pop("reference")

    def __call__(self, backend: str, args: tuple, limits: Mapping[str, str | None]) -> Any:
        """Run what `choose` says."""
        return self.implementations[self.choose(backend, args, limits)].run(*args)

    def choose(self, backend: str, args: tuple, limits: Mapping[str, str | None]) -> str:
        """The name of the implementation that this call runs.

        Args:
            backend: what the caller wants; the environment's RADIO_FAST_<OP>, else RADIO_FAST_BACKEND, replaces "auto".
                CPU_OR_REFERENCE is refused where the CPU kernels can't run at all, not for their `limits`.
            args: of the call; the first one is a tensor, and says on which device and in which dtype.
            limits: what the call breaks of an implementation's limits, by its name.

        Raises:
            ValueError: no such backend, or one was asked for that can't run; the message says why.
        """
        if backend == "auto":
            named = overrides()
            backend = named.get(self.variable) or backend_of_ops(named.get("RADIO_FAST_BACKEND", "auto"))
        if backend == "reference":
            return "reference"
        if backend == CPU_OR_REFERENCE:
            reason = why_not_native_cpu(args[0].device, args[0].dtype) or _why_not_now(args)
            if reason is not None:
                raise ValueError(f"backend 'cpu' can't run here: {reason}")
            return self._on_cpu(args[0].dtype, limits)
        if backend != "auto":
            self._require(backend, args, limits)
            return backend
        device = args[0].device
        if not has_kernels(device) or _why_not_now(args) is not None:
            return "reference"
        if not accelerated(device):
            return self._on_cpu(args[0].dtype, limits)
        for name in self._ranking(args, limits):
            if limits.get(name) is None:
                return name
        return "reference"

    def _on_cpu(self, dtype: torch.dtype, limits: Mapping[str, str | None]) -> str:
        """ "cpu" where it is shipped, by what was measured for all of its shapes; nothing is measured here.

        What traces, exports or transforms a model gets plain PyTorch, which it knows.
        """
        own = self.implementations.get("cpu")
        if own is None or dtype not in own.shipped or limits.get("cpu") is not None:
            return "reference"
        return "reference" if torch.compiler.is_compiling() or not torch_is_plain() else "cpu"

    def _require(self, backend: str, args: tuple, limits: Mapping[str, str | None]) -> None:
        known = dict.fromkeys((*BACKENDS, "cuda", "cpu", *self.implementations))
        if backend not in known:
            raise ValueError(f"backend of {self.name} must be one of {', '.join(map(repr, known))}, got {backend!r}")
        if backend not in self.implementations:
            reason = "it has no kernel there"
        else:
            implementation = self.implementations[backend]
            reason = limits.get(backend) or _why_not_now(args) or implementation.why_not(args[0].device, args[0].dtype)
        if reason is not None:
            raise ValueError(f"the {backend} backend of {self.name} can't run here: {reason}")

    def _ranking(self, args: tuple, limits: Mapping[str, str | None]) -> tuple[str, ...]:
        """What runs on the device of `args`, best first."""
        device, dtype, first = args[0].device, args[0].dtype, self.first(*args)
        if torch.compiler.is_compiling() or not torch_is_plain():  # nothing can be measured, nor remembered
            return shipped_order(self.name, device, dtype, first)
        key = self.key(*args)
        barred = tuple(limits.items()) if any(limits.values()) else None
        slot = (device, dtype, overrides().get("RADIO_FAST_ARCH"), key, first, barred)
        ranking = self._rankings.get(slot)
        if ranking is None:
            from radio_fast.ops import _tuning  # it imports this module

            ranking = shipped_order(self.name, device, dtype, first)
            if key is not None and _tuning.enabled():
                measured = _tuning.rank(self, key, args, limits, ranking)
                if measured is None:  # not now: asked again in the next call
                    return ranking
                ranking = measured
            self._rankings[slot] = ranking
        return ranking

    def usable(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        """Each implementation's reason not to run on `device` in `dtype`, None where it does."""
        return {name: one.why_not(device, dtype) for name, one in self.implementations.items()}

    def forget(self) -> None:
        """Decide anew from the next call on."""
        self._rankings.clear()


OPS: dict[str, Op] = {}


def shipped_order(op: str, device: torch.device, dtype: torch.dtype, first: str = "") -> tuple[str, ...]:
    """What "auto" takes unmeasured, best first."""
    implementations = OPS[op].implementations.items()
    order = [name for name, one in implementations if dtype in one.shipped and one.why_not(device, dtype) is None]
    return tuple(sorted(order, key=lambda name: name != first))


# torch.compile takes the answers as they are at tracing, and does not look inside, where a lock would end its graph.
# What torch.compiler.assume_constant_result does, without its import of the compiler.
why_not_native._dynamo_marked_constant = True
native_cpu.why_not_native_cpu._dynamo_marked_constant = True
shipped_order._dynamo_marked_constant = True


def triton_runs(needs_dot: bool) -> Callable[[torch.device, torch.dtype], str | None]:
    """`Implementation.why_not` of a Triton kernel."""
    return lambda device, dtype: why_not_triton(device, needs_dot)


def bucket(n: int) -> int:
    """n up to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: shapes of one bucket share a measurement."""
    power = 1 << max(n - 1, 0).bit_length()
    return 3 * power // 4 if n <= 3 * power // 4 else power


def register(name: str, schema: str, fake, kernel) -> None:
    """Define `radio_fast::<name>`: its kernel for CUDA (and interpreted CPU) tensors, and its fake form."""

    def on_its_device(first: Tensor, *args):
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever the tensors are on
            return kernel(first, *args)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, on_its_device, "CUDA")
    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"radio_fast::{name}", fake, lib=LIBRARY)


def register_cpu(name: str, schema: str, fake, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Define `radio_fast::<name>` for CPU tensors; calls it where something traces or profiles, else its kernel, 8 µs
    sooner.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"radio_fast::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.radio_fast, name)

    def run(*args):
        plain = not (torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled()) and torch_is_plain()
        return kernel(*args) if plain else operator(*args)

    return run


def cpu_limit(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None) -> str | None:
    """What breaks the CPU kernels' limits, which read memory by its address: plain tensors, in one of `dtypes`."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"a {type(tensor).__name__} is not for it"
        if tensor.layout is not torch.strided:
            return f"{tensor.layout} is not for it"
    if tensors[0].dtype not in dtypes:
        return f"dtype must be {' or '.join(map(str, dtypes))}, got {tensors[0].dtype}"
    return None


def kernels_run_all(ops: tuple[Op, ...], tensors: tuple[Tensor, ...]) -> bool:
    """Whether "auto" runs the CPU kernels of all `ops` on `tensors`, where shapes and dtypes allow, and nobody looks
    which ops there are.
    """
    named = overrides()
    return (
        not (named and ("RADIO_FAST_BACKEND" in named or any(op.variable in named for op in ops)))
        and all(t.is_cpu for t in tensors)
        and not accelerated(tensors[0].device)
        and native_cpu.why_not_native_cpu() is None
        and _why_not_now(tensors) is None
        and cpu_limit((tensors[0].dtype,), *tensors) is None
        and not (torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled())
        and torch_is_plain()
    )


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
