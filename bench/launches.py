"""Where the time of one forward pass goes: its kernels from torch's profiler, grouped by op, held against floors."""

from __future__ import annotations

import collections
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.workload import Floor


class Kernel(NamedTuple):
    """One launch: its name, when it began and how long it took, both in µs."""

    name: str
    start: float
    us: float


# The first pattern that a kernel's name has. "gemm" is resolved further by its place in the block; the aten names are
# what takes the kernels' place on the CPU.
PATTERNS = {
    "window attention": r"window_attention",
    "attention": r"attention|flash|fmha|sdpa|mha_fwd|\brf_(sm\d+|plain)_",
    "norm": r"layer_?norm|norm_stats|aten::native_layer_norm",
    "patch embed": r"patch_embed",
    "position": r"pos_embed|upsample_bilinear|interpolate",
    "blend": r"blend",
    "convolution": r"conv(?!ert)|fprop|winograd|nchwToNhwc|nhwcToNchw",
    "gemm": r"linear|gemm|nvjet|cublas|cutlass|splitK|aten::(addmm|mm|matmul|bmm)$",
    "copy": r"memcpy|memset|copy|aten::(to|contiguous|clone)$",
}
AFTER_ATTENTION = ("proj", "fc1", "fc2", "qkv")  # the matrix products from one block's attention to the next one's


def op_of(name: str) -> str:
    return next((op for op, pattern in PATTERNS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def capture(call: Callable[[], object]) -> list[Kernel]:
    """The kernels, copies and fills of one call, in order; on the CPU its outermost aten operators."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    found = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: (float(e["ts"]), -float(e["dur"])))
    kernels, end = [], float("-inf")
    for event in found:
        start, us = float(event["ts"]), float(event["dur"])
        if cuda or start >= end:  # on the CPU operators lie inside each other
            kernels.append(Kernel(event["name"], start, us))
            end = start + us
    return kernels


def attentions_of(ops: list[str]) -> list[int]:
    """Where an attention begins; one that takes several kernels in a row is one."""
    return [i for i, op in enumerate(ops) if op == "attention" and (i == 0 or ops[i - 1] != "attention")]


def vit_ops(kernels: list[Kernel]) -> list[str]:
    """The op of each kernel of a ViT, its matrix products by their order: qkv, attention, proj, fc1, fc2, qkv, …

    A stretch between two attentions that has another number of matrix products keeps the name "gemm".
    """
    ops = [op_of(kernel.name) for kernel in kernels]
    attentions = attentions_of(ops)
    if not attentions:
        return ops
    # A product that is split along K is followed by the kernel that adds the parts up: one product.
    whole = [i for i, op in enumerate(ops) if op == "gemm" and not re.search("splitKreduce", kernels[i].name)]
    before = [i for i in whole if i < attentions[0]]
    for i in before:
        ops[i] = "qkv" if i == before[-1] else "patch embed"
    for first, last in zip(attentions, [*attentions[1:], len(ops)], strict=True):
        inside = [i for i in whole if first < i < last]
        names = AFTER_ATTENTION if last < len(ops) else AFTER_ATTENTION[:3]
        if len(inside) == len(names):
            for i, name in zip(inside, names, strict=True):
                ops[i] = name
    for i, op in enumerate(ops):
        if op == "gemm" and i and re.search("splitKreduce", kernels[i].name):
            ops[i] = ops[i - 1]
    return ops


def op_table(kernels: list[Kernel], depth: int | None, floors: dict[str, Floor]) -> dict:
    """Totals by op, and for a ViT of `depth` blocks the launches from one block's attention to the next one's.

    `us` is the sum of an op's kernels in the whole pass, `span_us` runs from the first kernel's start to the last
    one's end: what is missing between the two, nothing ran.
    """
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: another profiler may hold the device")
    ops = [op_of(kernel.name) for kernel in kernels] if depth is None else vit_ops(kernels)
    rows: dict[str, dict] = collections.defaultdict(lambda: {"launches": 0, "us": 0.0})
    for op, kernel in zip(ops, kernels, strict=True):
        rows[op]["launches"] += 1
        rows[op]["us"] += kernel.us
    for op, floor in floors.items():
        if op in rows:
            rows[op] |= {"flop": floor.flop * (depth or 1), "bytes": floor.moved * (depth or 1)}
    out = {
        "ops": dict(sorted(rows.items(), key=lambda row: -row[1]["us"])),
        "launches": len(kernels),
        "kernel_us": sum(kernel.us for kernel in kernels),
        "span_us": max(k.start + k.us for k in kernels) - kernels[0].start,
        "depth": depth,
    }
    attentions = attentions_of(ops)
    if depth is not None and depth > 1 and len(attentions) == depth:
        out["launches_per_block"] = (attentions[-1] - attentions[0]) / (depth - 1)
    return out
