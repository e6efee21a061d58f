"""Which implementation runs where, and what is said where it can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from radio_fast import native, ops
from radio_fast.arch import ARCHS, arch_of
from radio_fast.ops import _dispatch
from radio_fast.ops._dispatch import OPS, Op
from radio_fast.runtime import resolve_backend
from tests.numerics import assert_relative

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU of a compute capability; nothing runs on it."""

    def pretend(sm: int) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: "the CUDA extension was not built")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(sm, 10))

    return pretend


class Anywhere:
    """Stands for a tensor on a device that is not there."""

    shape = torch.Size([1])

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float16):
        self.device = device
        self.dtype = dtype


@pytest.fixture(autouse=True)
def decided_anew(monkeypatch):
    """Unmeasured, and nothing of one pretended GPU is remembered for the next."""
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})
        monkeypatch.setattr(op, "key", lambda *args: "")
        if op.name != "linear":
            monkeypatch.setattr(op, "first", lambda *args: "")


def chosen(name: str, backend: str, tensor: Any, **limits: str | None) -> str:
    return OPS[name].choose(backend, (tensor, *6 * [None]), limits)


@pytest.mark.parametrize("sm", ARCHS)
def test_triton_multiplies_matrices_only_with_tensor_cores(gpu, sm):
    """On sm_70 to 75 Triton's dot is done by FMAs: "auto" must never take a matmul or attention kernel there."""
    gpu(sm)
    tensor = Anywhere(CUDA)
    for op in ("ln_linear", "attention", "window_attention", "patch_embed"):
        assert chosen(op, "auto", tensor) == ("triton" if sm >= 80 else "reference")
    for op in ("layer_norm", "add_layer_norm", "norm_stats", "add_norm_stats", "pos_embed", "blend"):
        assert chosen(op, "auto", tensor) == "triton"
    arguments = (tensor, None, None, "gelu", None, None)
    assert OPS["linear"].choose("auto", arguments, {}) == ("triton" if sm >= 80 else "reference")
    plain = (tensor, *5 * [None])
    assert OPS["linear"].choose("auto", plain, {}) == "reference", "nothing to gain on cuBLAS"
    assert chosen("linear_add_norm", "auto", tensor) == "deferred"
    if sm < 80:
        with pytest.raises(ValueError, match=f"linear can't run here: Triton has no tensor cores on sm_{sm}"):
            chosen("linear", "triton", tensor)


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

    def answer(backend: str, dtype: torch.dtype = torch.float16, **limits) -> str:
        OPS[op].forget()
        return chosen(op, backend, Anywhere(CUDA, dtype), **limits)

    first = "triton" if sm >= 80 else "cuda"
    assert answer("auto") == first
    assert answer("auto", torch.float32) == ("triton" if sm >= 80 else "reference")
    assert answer("auto", triton="d") == "cuda", "what Triton can't take"
    assert answer("auto", triton="d", cuda="d") == "reference"
    assert answer("cuda") == answer("cuda", torch.float32) == "cuda"
    if sm < 80:
        assert answer("auto", torch.bfloat16) == "reference"
        with pytest.raises(ValueError, match=f"{op} can't run here: bfloat16 needs sm_80 or newer"):
            answer("cuda", torch.bfloat16)
    Built.architectures = "90" if sm < 80 else "70"
    assert answer("auto") == ("triton" if sm >= 80 else "reference"), "no code for this GPU in the library"
    with pytest.raises(ValueError, match=f"the CUDA extension was built for .., not for sm_{sm}"):
        answer("cuda")
    Built.architectures = " ".join(map(str, ARCHS))
    monkeypatch.setattr(Built, "refusal", "the driver is too old")
    assert answer("auto") == ("triton" if sm >= 80 else "reference")
    with pytest.raises(ValueError, match="the driver is too old"):
        answer("cuda")
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: "the CUDA extension was not built")
    assert answer("auto") == ("triton" if sm >= 80 else "reference")
    with pytest.raises(ValueError, match=f"the cuda backend of {op} can't run here: the CUDA extension was not built"):
        answer("cuda")


def test_extension_is_named_in_vain_for_other_ops(gpu, monkeypatch):
    gpu(90)
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: None)
    with pytest.raises(ValueError, match="the cuda backend of linear can't run here: it has no kernel there"):
        chosen("linear", "cuda", Anywhere(CUDA))


def test_extension_leaves_the_cpu_alone(monkeypatch, without_amx):
    """A built library does not run there; only the tests' emulation does."""
    monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: None)
    monkeypatch.setattr(_dispatch.native, "library", Built)
    with pytest.raises(ValueError, match="the CUDA extension's kernels are for NVIDIA GPUs, not for the CPU"):
        ops.attention(torch.zeros(1, 4, 48), 1, backend="cuda")
    assert chosen("attention", "auto", torch.zeros(1)) == "reference"


@pytest.mark.parametrize("forced", ["70", "75"])
def test_forced_older_architecture_counts(gpu, monkeypatch, forced):
    gpu(90)
    monkeypatch.setenv("RADIO_FAST_ARCH", forced)
    assert chosen("attention", "auto", Anywhere(CUDA)) == "reference"


def test_environment_replaces_auto_only(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RADIO_FAST_BACKEND", "triton")
    assert chosen("linear", "auto", x) == "triton"
    assert chosen("linear", "reference", x) == "reference"
    monkeypatch.setenv("RADIO_FAST_LINEAR", "reference")
    assert chosen("linear", "auto", x) == "reference"
    assert chosen("attention", "auto", x) == "triton"
    monkeypatch.setenv("RADIO_FAST_LINEAR", "cutlass")
    with pytest.raises(
        ValueError, match="backend of linear must be one of 'auto', 'reference', 'triton', 'cpu', 'cuda', got 'cutlass'"
    ):
        chosen("linear", "auto", x)


def test_environment_of_two_ops_in_one(monkeypatch):
    """RADIO_FAST_BACKEND is for the parts of linear_add_norm; the way they are put together has a name of its own."""
    x, w, one = torch.randn(3, 32), torch.randn(32, 32), torch.ones(32)
    plain = ops.linear_add_norm(x, w, None, x, one, one, 1e-6)
    ran = []
    choose = Op.choose

    def record(op, *args):
        ran.append((op.name, choose(op, *args)))
        return ran[-1][1]

    monkeypatch.setattr(Op, "choose", record)
    monkeypatch.setenv("RADIO_FAST_BACKEND", "triton")
    both = [("linear", "triton"), ("add_layer_norm", "triton")]
    for backend in ("auto", "triton"):
        ran.clear()
        for ours, theirs in zip(
            ops.linear_add_norm(x, w, None, x, one, one, 1e-6, backend=backend), plain, strict=True
        ):
            assert_relative(ours, theirs)
        assert ran == both
    monkeypatch.setenv("RADIO_FAST_BACKEND", "reference")
    ran.clear()
    ops.linear_add_norm(x, w, None, x, one, one, 1e-6)
    assert ran == [("linear_add_norm", "reference")]
    monkeypatch.setenv("RADIO_FAST_BACKEND", "triton")
    monkeypatch.setenv("RADIO_FAST_LINEAR_ADD_NORM", "epilogue")
    ran.clear()
    ops.linear_add_norm(x, w, None, x, one, one, 1e-6)
    assert ran == [("linear_add_norm", "epilogue"), ("linear", "triton"), ("layer_norm", "triton")]


def test_auto_is_plain_torch_on_a_cpu_without_amx(without_amx):
    assert chosen("linear", "auto", torch.zeros(1)) == "reference"
    assert chosen("linear", "auto", torch.zeros(1, dtype=torch.bfloat16)) == "reference"


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
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'triton', 'cpu', got 'cuda'"):
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
