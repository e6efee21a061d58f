"""What a captured call depends on besides its arguments: torch's settings and modes, the environment, the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from radio_fast.layers.cache import TensorCache
from radio_fast.layers.mlp import Linear


def torch_settings(x: Tensor) -> tuple:
    """What chooses kernels and their rounding.

    Not by the public properties: they take ten times as long, and raise where two ways of setting TF32 were mixed.
    """
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    precision = torch._C._get_fp32_precision_getter
    sdpa = torch._C._get_sdp_priority_order()
    return autocast, precision("cuda", "matmul"), precision("cuda", "conv"), *sdpa, *[get() for get in _GETTERS]


_GETTERS = [
    getattr(torch._C, f"_get_{name}")
    for name in (
        "cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction",
        "cublas_allow_fp16_accumulation", "blas_preferred_backend", "cudnn_enabled", "cudnn_benchmark",
        "cudnn_deterministic", "deterministic_algorithms", "flash_sdp_enabled", "mem_efficient_sdp_enabled",
        "math_sdp_enabled", "cudnn_sdp_enabled",
    )
    if hasattr(torch._C, f"_get_{name}")
]  # fmt: skip


def pointer_check(tensors: list[Tensor], pointers: list[int]) -> Callable[[], bool]:
    """Whether the tensors are (still) at these addresses.

    Done by the loop in C++ that CUDA builds have for torch's own graphs, if it tells right from wrong.
    """
    compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    indices = [*range(len(tensors))]
    with suppress(Exception):
        if compare(tensors, pointers, indices) and not compare(tensors, [*pointers[:-1], pointers[-1] + 1], indices):
            return partial(compare, tensors, pointers, indices)
    return lambda: [*map(Tensor.data_ptr, tensors)] == pointers


class Baked:
    """What graphs take from a model: its modules, the addresses of its tensors, and which implementations run.

    A write into a weight is seen by a graph, which reads it where it is, but not by a tensor made from it and kept (the
    positions, the bias of windows, biases that cuBLAS has in 16 bits): below a module with a `TensorCache`, and of a
    `Linear`'s bias, the versions count too.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        _, *modules = model.modules()  # not the model, which holds this: it could only be freed by the collector
        self.root = model._modules
        tables = [(m._modules, m._parameters, m._buffers) for m in modules]
        tables.append((self.root, model._parameters, model._buffers))
        self.tables = [table for three in tables for table in three if table]
        self.copies = [dict(table) for table in self.tables]
        self.tensors = [value for table in self.copies for value in table.values() if isinstance(value, Tensor)]
        for tensor in self.tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device:
                raise TypeError(f"the model has a {type(tensor).__name__} on {tensor.device}")
        self.pointers = [*map(Tensor.data_ptr, self.tensors)]
        self.in_place = pointer_check(self.tensors, self.pointers)
        self.single = [
            (table, name, value)
            for table, copy in zip(self.tables, self.copies, strict=True)
            for name, value in copy.items()
            if isinstance(value, Tensor) and value.numel() == 1
        ]
        cachers = [m for m in modules if any(isinstance(value, TensorCache) for value in vars(m).values())]
        sources = [t for m in cachers for t in (*m.parameters(), *m.buffers())]
        sources += [m.bias for m in modules if isinstance(m, Linear) and m.bias is not None]
        self.sources = [t for t in sources if not t.is_inference()]  # which have no version, and are not cached
        self.versions = [t._version for t in self.sources]
        chosen = [(vars(m), name) for m in modules for name in ("backend", "fuse_norm") if hasattr(m, name)]
        self.chosen, self.names = [*zip(*chosen, strict=True)] or ((), ())
        self.choices = [*map(dict.get, self.chosen, self.names)]
        self.attributes = [vars(m) for m in modules]
        self.sizes = [*map(len, self.attributes)]
        self.patched = any("forward" in attributes for attributes in self.attributes)
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def holds(self, model: nn.Module) -> bool:
        """Whether all of it is still so; in C as far as it goes, since every call asks."""
        try:
            # Equal dictionaries hold the same objects: identity is tried first, and == of two tensors has no truth
            # value, unless they are of one element.
            same = self.tables == self.copies and all(table[name] is value for table, name, value in self.single)
        except RuntimeError:
            same = False
        return (
            same
            and self.root is model._modules
            and self.in_place()
            and [t._version for t in self.sources] == self.versions
            and [*map(dict.get, self.chosen, self.names)] == self.choices
            and [*map(len, self.attributes)] == self.sizes  # a method put into an instance
        )

    def runs_python(self) -> bool:
        """Whether a forward calls what a replay would leave out: hooks, methods put in place of forward."""
        return self.patched or any(self.hooks)

    def differentiable(self) -> bool:
        return torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), self.tensors))
