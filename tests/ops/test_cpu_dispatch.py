"""When the CPU kernels run, when plain PyTorch does, and what is said where they can't."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import radio_fast
from radio_fast import doctor, native_cpu, ops
from radio_fast.ops import _dispatch
from radio_fast.runtime import resolve_backend
from tests.conftest import golden_source
from tests.numerics import assert_tokens, assert_within

BF16 = torch.bfloat16
REASON = native_cpu.why_not_native_cpu()
needs_amx = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(0)).to(BF16)


def embed(image: torch.Tensor, p: int, dtype: torch.dtype, backend: str, rows=None, starts=None) -> torch.Tensor:
    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16).to(dtype)

    T = image.shape[2] * image.shape[3] // p**2 if rows is None else 5
    mean, std = torch.tensor([0.4, 0.5, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    args = image, random(40, 3 * p * p) / p, random(40), random(T, 40), random(3, 40), p, mean, std, rows, starts
    return ops.patch_embed(*args, backend=backend)


@needs_amx
@pytest.mark.parametrize("p", (16, 14, 3))
@pytest.mark.parametrize("kind", (torch.float32, BF16, torch.uint8, "packed"))
@pytest.mark.parametrize("at_once", (1, 1 << 20))
def test_patches(p, kind, at_once, calls, monkeypatch):
    """`at_once`: values of images that are normalised together, the second all of them."""
    monkeypatch.setattr(sys.modules["radio_fast.ops.patch_embed"], "CPU_VALUES", at_once)
    image = torch.rand(2, 3, 2 * p, 3 * p, generator=torch.Generator().manual_seed(0))
    packing = ()
    if kind == "packed":  # two images, of two and four patches, each after three rows of its prefix
        image = image.repeat(3, 1, 1, 1)[:, :, :p, :p]
        rows = [[0, 4, 1, 3, 2, 0], [3, 4, 8, 9, 10, 11]]
        packing = torch.tensor(rows, dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)
    else:
        image = (image * 255).to(kind) if kind == torch.uint8 else image.to(kind)
    wide = image.float() / 255 if kind == torch.uint8 else image.float()
    truth = embed(wide, p, torch.float32, "reference", *packing)
    exact = embed(wide.double(), p, torch.float64, "reference", *packing)
    plain = embed(image, p, BF16, "reference", *packing)
    assert not calls
    assert_within(embed(image, p, BF16, "auto", *packing), truth, plain)
    assert calls == ["rf_cpu_linear"]
    assert_within(embed(image, p, torch.float32, "auto", *packing), exact, truth)
    assert len(calls) == 2


def everything(x: torch.Tensor, backend: str = "auto") -> list[torch.Tensor]:
    D = x.shape[-1]
    weight, ones = torch.eye(D, dtype=x.dtype), torch.ones(D, dtype=x.dtype)
    return [
        ops.linear(x, weight, None, "gelu", backend=backend),
        ops.layer_norm(x, ones, ones, 1e-6, backend=backend),
        *ops.add_layer_norm(x, x, None, ones, ones, 1e-6, backend=backend),
        *ops.linear_add_norm(x, weight, ones.float(), x, ones, ones, 1e-6, backend=backend),
        ops.attention(x, 2, backend=backend),
    ]


@needs_amx
@pytest.mark.parametrize("dtype", (BF16, torch.float32))
def test_auto_takes_them(x, dtype, calls):
    with torch.no_grad():
        everything(x.to(dtype))
    norm, linear = "rf_cpu_layer_norm", "rf_cpu_linear"
    assert calls == [linear, norm, norm, linear, norm, "rf_cpu_attention"]


@needs_amx
def test_float16_is_not_for_them(x, calls):
    everything(x.half())
    assert not calls
    with pytest.raises(ValueError, match=r"can't run here: dtype must be torch.bfloat16 or torch.float32, got"):
        ops.linear(x.half(), torch.eye(96).half(), None, backend="cpu")


@needs_amx
def test_what_the_kernels_lack_is_plain_torch(x, calls):
    weight = torch.eye(96, dtype=BF16)
    ops.linear(x, weight, None, "swiglu", x[..., :48])
    ops.linear(x, weight, None, "silu")
    ops.linear(x, weight, None, None, x, x[0, 0])
    ops.add_layer_norm(x, x, x[0, 0], x[0, 0], x[0, 0], 1e-6)
    ops.attention(x, 2)
    assert calls == ["rf_cpu_attention"]
    for arguments, reason in (
        ((x, weight, None, "swiglu", x[..., :48]), "a residual after swiglu is not in it"),
        ((x, weight, None, None, None, x[0, 0]), "LayerScale is not in it"),
        ((x, weight, None, "silu"), "silu is not in it"),
    ):
        with pytest.raises(ValueError, match=f"cpu backend of linear can't run here: {reason}"):
            ops.linear(*arguments, backend="cpu")


@needs_amx
def test_never_under_autograd(x, calls):
    weight = nn.Parameter(torch.eye(96, dtype=BF16))
    ops.linear(x, weight, None).sum().backward()
    assert weight.grad is not None and not calls
    with pytest.raises(ValueError, match="have no backward"):
        ops.linear(x, weight, None, backend="cpu")
    with torch.inference_mode():
        ops.linear(x, weight, None, backend="cpu")
    assert calls


@needs_amx
def test_tensors_that_are_not_plain(x, calls):
    class Wrapped(torch.Tensor):
        pass

    ops.linear(x.as_subclass(Wrapped), torch.eye(96, dtype=BF16), None)
    ops.linear(x.to_sparse().to_dense(), torch.eye(96, dtype=BF16).as_subclass(Wrapped), None)
    torch.vmap(lambda one: ops.linear(one, torch.eye(96, dtype=BF16), None))(x)
    torch.func.jvp(lambda one: ops.linear(one, torch.eye(96, dtype=BF16), None), (x,), (x,))
    traced = torch.jit.trace(lambda one: ops.linear(one, torch.eye(96, dtype=BF16), None), (x,), check_trace=False)
    assert "aten::linear" in str(traced.graph)
    with torch._subclasses.FakeTensorMode() as mode:
        everything(mode.from_tensor(x))
    with torch.device("meta"):
        assert ops.linear(torch.empty(2, 96, dtype=BF16), torch.empty(8, 96, dtype=BF16), None).is_meta
    assert not calls


@needs_amx
def test_export_is_the_plain_model_s(x, calls):
    class Layer(nn.Module):
        def forward(self, x):
            return everything(x)

    exported = torch.export.export(Layer().eval(), (x,))
    assert not [node.target for node in exported.graph.nodes if "radio_fast" in str(node.target)] and not calls


@needs_amx
@pytest.mark.parametrize("name", ("linear_cpu", "layer_norm_cpu", "add_layer_norm_cpu", "attention_cpu"))
def test_operators_are_what_torch_expects(name, x):
    ones = torch.ones(96, dtype=BF16)
    arguments = {
        "linear_cpu": (x, torch.eye(96, dtype=BF16), ones.float(), "gelu", x),
        "layer_norm_cpu": (x, ones, ones, 1e-6, 1.0),
        "add_layer_norm_cpu": (x, x, ones, ones, 1e-6, 1.0),
        "attention_cpu": (x, 2, None, []),
    }[name]
    operator = getattr(torch.ops.radio_fast, name)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_amx
def test_environment_takes_them_away(x, calls, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    assert not _dispatch.has_kernels(torch.device("cpu"))
    everything(x)
    assert not calls
    with pytest.raises(ValueError, match="ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 takes AMX away"):
        everything(x, "cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_amx")
    everything(x)
    assert calls
    calls.clear()
    monkeypatch.setenv("RADIO_FAST_BACKEND", "reference")
    everything(x)
    assert not calls


def test_without_a_library_plain_torch_runs(x, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(native_cpu, "_found", {})
    monkeypatch.setattr(native_cpu, "_reasons", {})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    cut, other, empty = tmp_path / "cut.so", tmp_path / "other.so", tmp_path / "empty.so"
    cut.write_bytes(b"\x7fELF\x02" + bytes(100))
    other.write_text("no library")
    for path, reason in (
        (empty, "RADIO_FAST_CPU_LIBRARY names no file"),
        (cut, "the CPU kernels are damaged"),
        (other, "the CPU kernels are damaged"),
    ):
        monkeypatch.setenv("RADIO_FAST_CPU_LIBRARY", str(path))
        assert reason in native_cpu.why_not_native_cpu()
        everything(x)
        with pytest.raises(ValueError, match=reason):
            everything(x, "cpu")
    assert not calls


def test_a_note_of_the_build_is_the_reason(monkeypatch, tmp_path):
    (tmp_path / native_cpu.REASON).write_text("no C++ compiler was found\n", encoding="utf-8")
    reason = native_cpu._load(tmp_path / native_cpu.LIBRARY, named=False)
    assert reason == "the CPU kernels were not built: no C++ compiler was found"


def test_another_library_is_told_from_ours():
    import ctypes.util

    path = ctypes.util.find_library("m")
    maps = native_cpu.Path("/proc/self/maps").read_text().splitlines()
    loaded = next(line.split()[-1] for line in maps if path and path in line)
    assert "stale or another library" in native_cpu._load(native_cpu.Path(loaded), named=True)


@needs_amx
@pytest.mark.parametrize("autocast", (False, True))
def test_a_whole_model(autocast, calls):
    model = radio_fast.load(golden_source("vit_h16")).eval()
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    if not autocast:
        model = model.to(BF16)
    found = {}
    for backend in ("reference", "auto"):
        model.backend = backend
        with torch.inference_mode(), torch.autocast("cpu", BF16, enabled=autocast):
            found[backend] = model(image)
        assert bool(calls) == (backend == "auto")
    assert found["auto"].features.dtype == found["reference"].features.dtype
    assert_tokens(found["auto"].features, found["reference"].features.float(), 0.995)


@needs_amx
def test_a_whole_model_by_name(calls, monkeypatch):
    """Plain PyTorch where an op has no kernel, an error where none can run; the environment does not replace it."""
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model = radio_fast.load(golden_source("vit_h16"), backend="cpu").to(BF16)
    expected = model(x)
    assert "rf_cpu_blocks" in calls and model.backend == "cpu"
    calls.clear()
    monkeypatch.setenv("RADIO_FAST_BACKEND", "reference")
    assert "rf_cpu_linear" not in calls and torch.equal(model(x).features, expected.features) and calls
    monkeypatch.setenv("RADIO_FAST_BACKEND", "cpu")
    model.backend = "auto"
    calls.clear()
    assert_tokens(model(x).features, expected.features.float(), 0.999)
    assert "rf_cpu_linear" in calls
    model.float()(x)
    with pytest.raises(ValueError, match="backend 'cpu' can't run here: the kernels have no backward"):
        model.requires_grad_()(x)


def test_a_whole_model_by_name_says_why_not(without_amx):
    reason = "ONEDNN_MAX_CPU_ISA=AVX512_CORE takes AMX away"
    with pytest.raises(ValueError, match=f"backend 'cpu' can't run on cpu: {reason}"):
        radio_fast.load(golden_source("vit_h16"), backend="cpu")
    with pytest.raises(ValueError, match="backend 'cpu' can't run on cuda: the kernels are for CPUs with AMX, not for"):
        resolve_backend("cpu", torch.device("cuda"))
    model = radio_fast.load(golden_source("vit_h16"))
    model.backend = "cpu"
    for autocast in (False, True):
        refused = pytest.raises(ValueError, match=f"backend 'cpu' can't run here: {reason}")
        with refused, torch.autocast("cpu", BF16, enabled=autocast):
            model(torch.rand(1, 3, 64, 64))


def test_importing_asks_for_nothing():
    """The library is loaded, and AMX asked for, when the first tensor is there."""
    code = "import radio_fast; from radio_fast import native_cpu; assert not native_cpu._found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_amx
def test_a_profile_shows_them(x, calls):
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        everything(x)
    seen = {event.key for event in profiler.key_averages()}
    names = ("linear_cpu", "layer_norm_cpu", "add_layer_norm_cpu", "attention_cpu")
    assert seen >= {f"radio_fast::{name}" for name in names} and calls


def test_doctor_says_whether_they_run(without_amx):
    [line] = [finding for finding in doctor.examine() if finding.name == "CPU kernels"]
    assert line.ok is None and line.detail == "ONEDNN_MAX_CPU_ISA=AVX512_CORE takes AMX away"
