"""Which implementation runs where, and what is said where it can't."""

from __future__ import annotations

import importlib

import pytest
import torch

from radio_fast import native, ops
from radio_fast.arch import ARCHS, arch_of
from radio_fast.ops import _dispatch
from radio_fast.runtime import resolve_backend

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU of a compute capability; nothing runs on it."""

    def pretend(sm: int) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(sm, 10))

    return pretend


class Anywhere:
    """Stands for a tensor on a device that is not there."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float16):
        self.device = device
        self.dtype = dtype
        self.requires_grad = False


@pytest.mark.parametrize("sm", ARCHS)
def test_triton_multiplies_matrices_only_with_tensor_cores(gpu, sm):
    """On sm_70 to 75 Triton's dot is done by FMAs: "auto" must never take a matmul or attention kernel there."""
    gpu(sm)
    tensor = Anywhere(CUDA)
    for op in ("linear", "ln_linear", "attention", "window_attention", "patch_embed"):
        expected = "triton" if sm >= 80 else "reference"
        assert _dispatch.choose(op, "auto", tensor, needs_dot=True) == expected
    for op in ("layer_norm", "pos_embed", "blend"):
        assert _dispatch.choose(op, "auto", tensor, needs_dot=False) == "triton"
    if sm < 80:
        with pytest.raises(ValueError, match=f"linear can't run here: Triton has no tensor cores on sm_{sm}"):
            _dispatch.choose("linear", "triton", tensor, needs_dot=True)


class Built:
    """A library with code for all GPUs."""

    emulated = False
    architectures = " ".join(map(str, ARCHS))

    @classmethod
    def why_not_on(cls, sm: int) -> str | None:
        return native.Library.why_not_on(cls, sm)

    refusal: str | None = None

    @classmethod
    def why_not_run(cls, device: torch.device) -> str | None:
        return cls.refusal


@pytest.mark.parametrize("op", ["attention", "window_attention"])
@pytest.mark.parametrize("sm", ARCHS)
def test_extension_where_triton_has_no_tensor_cores(gpu, monkeypatch, sm, op):
    """Before sm_80 in float16; float32 has no tensor-core form there, bfloat16 none at all."""
    gpu(sm)
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: None)
    monkeypatch.setattr(_dispatch.native, "library", lambda: Built)

    def chosen(backend: str, dtype: torch.dtype = torch.float16, **limits) -> str:
        return _dispatch.choose(op, backend, Anywhere(CUDA, dtype), needs_dot=True, **{"native_limit": None} | limits)

    first = "triton" if sm >= 80 else "cuda"
    assert chosen("auto") == first
    assert chosen("auto", torch.float32) == ("triton" if sm >= 80 else "reference")
    assert chosen("auto", limit="d") == "cuda", "what Triton can't take"
    assert chosen("auto", limit="d", native_limit="d") == "reference"
    assert chosen("cuda") == chosen("cuda", torch.float32) == "cuda"
    if sm < 80:
        assert chosen("auto", torch.bfloat16) == "reference"
        with pytest.raises(ValueError, match=f"{op} can't run here: bfloat16 needs sm_80 or newer"):
            chosen("cuda", torch.bfloat16)
    Built.architectures = "90" if sm < 80 else "70"
    assert chosen("auto") == ("triton" if sm >= 80 else "reference"), "no code for this GPU in the library"
    with pytest.raises(ValueError, match=f"the CUDA extension was built for .., not for sm_{sm}"):
        chosen("cuda")
    Built.architectures = " ".join(map(str, ARCHS))
    monkeypatch.setattr(Built, "refusal", "the driver is too old")
    assert chosen("auto") == ("triton" if sm >= 80 else "reference")
    with pytest.raises(ValueError, match="the driver is too old"):
        chosen("cuda")
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: "the CUDA extension was not built")
    assert chosen("auto") == ("triton" if sm >= 80 else "reference")
    with pytest.raises(ValueError, match=f"the cuda backend of {op} can't run here: the CUDA extension was not built"):
        chosen("cuda")


def test_extension_is_named_in_vain_for_other_ops(gpu, monkeypatch):
    gpu(90)
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: None)
    with pytest.raises(ValueError, match="the cuda backend of linear can't run here: it has no kernel there"):
        _dispatch.choose("linear", "cuda", Anywhere(CUDA), needs_dot=True)


def test_extension_leaves_the_cpu_alone(monkeypatch):
    """A built library does not run there; only the tests' emulation does."""
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: None)
    monkeypatch.setattr(_dispatch.native, "library", Built)
    with pytest.raises(ValueError, match="the CUDA extension's kernels are for NVIDIA GPUs, not for the CPU"):
        ops.attention(torch.zeros(1, 4, 48), 1, backend="cuda")
    assert _dispatch.choose("attention", "auto", torch.zeros(1), needs_dot=True, native_limit=None) == "reference"


@pytest.mark.parametrize("forced", ["70", "75"])
def test_forced_older_architecture_counts(gpu, monkeypatch, forced):
    gpu(90)
    monkeypatch.setenv("RADIO_FAST_ARCH", forced)
    assert _dispatch.choose("attention", "auto", Anywhere(CUDA), needs_dot=True) == "reference"


def test_every_matmul_op_says_so(gpu, monkeypatch):
    """The public ops pass needs_dot themselves; seen from outside, on a pretended V100."""
    asked = {}

    def record(op, backend, *tensors, needs_dot, limit=None, native_limit="none"):
        asked[op] = needs_dot
        return "reference"

    for module in ("attention", "blend", "linear", "norm", "patch_embed", "pos_embed", "window_attention"):
        monkeypatch.setattr(importlib.import_module(f"radio_fast.ops.{module}"), "choose", record)
    x, w = torch.zeros(2, 48), torch.zeros(48, 48)
    one, zero = torch.ones(48), torch.zeros(2)
    ops.linear(x, w, None)
    ops.ln_linear(x, zero, zero, one, one, 1.0, w, None)
    ops.attention(torch.zeros(1, 4, 48), 1)
    ops.layer_norm(x, one, one, 1e-6)
    ops.add_layer_norm(x, x, None, one, one, 1e-6)
    ops.norm_stats(x, 1e-6)
    ops.add_norm_stats(x, x, None, 1e-6)
    ops.pos_embed(torch.zeros(16, 8), 2, 3)
    ops.patch_embed(torch.zeros(1, 3, 4, 4), torch.zeros(48, 12), None, torch.zeros(4, 48), torch.zeros(1, 48), 2)
    ops.window_attention(torch.zeros(1, 2, 2, 48), 1, 2)
    ops.blend(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    dots = {"linear", "ln_linear", "attention", "window_attention", "patch_embed"}
    assert {op for op, needs_dot in asked.items() if needs_dot} == dots
    assert set(asked) == dots | {"layer_norm", "add_layer_norm", "norm_stats", "add_norm_stats", "pos_embed", "blend"}


def test_environment_replaces_auto_only(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RADIO_FAST_BACKEND", "triton")
    assert _dispatch.choose("linear", "auto", x, needs_dot=True) == "triton"
    assert _dispatch.choose("linear", "reference", x, needs_dot=True) == "reference"
    monkeypatch.setenv("RADIO_FAST_LINEAR", "reference")
    assert _dispatch.choose("linear", "auto", x, needs_dot=True) == "reference"
    assert _dispatch.choose("attention", "auto", x, needs_dot=True) == "triton"
    monkeypatch.setenv("RADIO_FAST_LINEAR", "cutlass")
    with pytest.raises(
        ValueError, match="backend of linear must be one of 'auto', 'reference', 'triton', 'cuda', got 'cutlass'"
    ):
        _dispatch.choose("linear", "auto", x, needs_dot=True)


def test_auto_is_plain_torch_on_the_cpu():
    assert _dispatch.choose("linear", "auto", torch.zeros(1), needs_dot=True) == "reference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: m.delenv("TRITON_INTERPRET", raising=False),
            "on the CPU Triton kernels run only under TRITON_INTER",
        ),
        (lambda m: m.setattr(_dispatch, "HAVE_TRITON", False), "triton is not installed"),
    ],
)
def test_triton_by_name_says_why_not(monkeypatch, change, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    change(monkeypatch)
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=f"the triton backend of linear can't run here: {reason}"):
        ops.linear(x, torch.zeros(16, 16), None, backend="triton")
    with pytest.raises(ValueError, match=f"backend 'triton' can't run on cpu: {reason}"):
        resolve_backend("triton", CPU)


def test_kernels_refuse_what_they_can_not_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="no backward"):
        ops.linear(x.clone().requires_grad_(), torch.zeros(16, 16), None, backend="triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast is on"):
        ops.linear(x, torch.zeros(16, 16), None, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'triton', got 'cuda'"):
        resolve_backend("cuda", CPU)


def test_architecture_table(monkeypatch):
    assert arch_of(9, 0).dot == "wgmma"
    assert arch_of(7, 5).tensor_core_dot is False
    assert arch_of(12, 5).sm == 121, "newer than the table: the row before it"
    with pytest.raises(ValueError, match="sm_61 is older than all supported GPUs"):
        arch_of(6, 1)
    monkeypatch.setenv("RADIO_FAST_ARCH", "80")
    assert arch_of(9, 0).sm == 80
    with pytest.raises(ValueError, match="asks for a newer GPU than this sm_75"):
        arch_of(7, 5)
    monkeypatch.setenv("RADIO_FAST_ARCH", "ampere")
    with pytest.raises(ValueError, match=r"RADIO_FAST_ARCH must be one of 70, .*, got 'ampere'"):
        arch_of(9, 0)
