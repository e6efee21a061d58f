"""Attention by other packages: stand-ins take their places, none of them runs without a GPU."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from radio_fast import ops
from radio_fast.ops import _dispatch, _providers
from radio_fast.ops._dispatch import OPS
from radio_fast.ops.attention import ATTENTION, attention_ref
from tests.conftest import qkv_like
from tests.numerics import assert_relative

CUDA = torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    def pretend(sm: int) -> None:
        monkeypatch.setattr(_dispatch.native, "why_not_native", lambda: "the CUDA extension was not built")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(sm, 10))

    return pretend


@pytest.fixture
def packages(monkeypatch):
    """Every package installed: attention on (B, N, H, d), as each of them has it."""
    seen = {}

    def install(name: str, module: str, function: str) -> None:
        def attend(q, k, v):
            seen[name] = [t.data_ptr() for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
            return (out, None) if name == "flash-attn-4" else out

        parents = module.split(".")
        for i in range(1, len(parents) + 1):
            one = types.ModuleType(".".join(parents[:i]))
            one.__path__ = []
            one.__spec__ = types.SimpleNamespace(submodule_search_locations=[], name=one.__name__)
            monkeypatch.setitem(sys.modules, one.__name__, sys.modules.get(one.__name__, one))
        monkeypatch.setattr(sys.modules[module], function, attend, raising=False)

    for name, (module, function, _) in _providers.PACKAGES.items():
        install(name, module, function)
    _providers.why_not_import.cache_clear()
    _providers._function.cache_clear()
    yield seen
    _providers.why_not_import.cache_clear()
    _providers._function.cache_clear()


@pytest.mark.parametrize("name", _providers.PACKAGES)
def test_packages_read_qkv_in_place(packages, name):
    """Right, on views of the packed tensor, whatever its strides; a pair's first entry is the result."""
    for qkv in (qkv_like(2, 24, 96, dtype=torch.float32, device="cpu"), torch.randn(2, 24, 200)[..., 100:196]):
        result = ATTENTION.implementations[name].run(qkv, 2, None, None, None)
        assert_relative(result, attention_ref(qkv, 2))
        assert packages[name] == [qkv.data_ptr() + 4 * 32 * i for i in range(3)]


@pytest.mark.parametrize("name", _providers.SDPA)
def test_sdpa_asks_for_its_backend(monkeypatch, name):
    asked = []
    operator, arguments = _providers.SDPA[name]
    schema = getattr(torch.ops.aten, operator).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:3] == ["query", "key", "value"]
    assert names[3 : 3 + len(arguments)] == ["attn_bias", "compute_log_sumexp"][: len(arguments)]
    assert all(argument.has_default_value() for argument in schema.arguments[3 + len(arguments) :])

    def attend(q, k, v, *rest):
        asked.append(rest)
        return F.scaled_dot_product_attention(q, k, v), None

    monkeypatch.setattr(torch.ops.aten, operator, attend)
    qkv = qkv_like(2, 24, 96, dtype=torch.float32, device="cpu")
    assert_relative(ATTENTION.implementations[name].run(qkv, 2, None, None, None), attention_ref(qkv, 2))
    assert asked == [arguments]


def test_sdpa_leaves_the_users_choice_alone():
    """`sdpa_kernel` sets flags of the whole process: two threads inside it leave them wrong for good."""
    assert "sdpa_kernel(" not in Path(_providers.__file__).read_text()


@pytest.mark.parametrize(
    ("sm", "names"),
    [
        (70, set()),
        (75, {"xformers"}),
        (80, {"flash-attn", "xformers"}),
        (89, {"flash-attn", "xformers"}),
        (90, {"flash-attn", "flash-attn-3", "flash-attn-4", "xformers"}),
        (100, {"flash-attn", "flash-attn-4", "xformers"}),
        (120, {"flash-attn", "xformers"}),
    ],
)
def test_where_packages_run(gpu, packages, sm, names):
    gpu(sm)
    for dtype in HALF:
        reasons = ATTENTION.usable(CUDA, dtype)
        assert {name for name in _providers.PACKAGES if reasons[name] is None} == names
        assert all(reasons[name] is None for name in _providers.SDPA)
    reasons = ATTENTION.usable(CUDA, torch.float32)
    assert [name for name in (*_providers.SDPA, *_providers.PACKAGES) if reasons[name] is None] == ["sdpa-efficient"]


def test_missing_and_broken_packages_say_so(gpu, packages, monkeypatch):
    gpu(90)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    broken = types.ModuleType("xformers.ops")
    broken.__spec__ = types.SimpleNamespace(submodule_search_locations=None, name="xformers.ops")

    def fails(name):
        raise OSError("libcudart.so.11.0:\n cannot open shared object file")

    broken.__getattr__ = fails
    monkeypatch.setitem(sys.modules, "xformers.ops", broken)
    reasons = ATTENTION.usable(CUDA, torch.float16)
    assert reasons["flash-attn-3"] == "not installed"
    assert reasons["xformers"] == "does not import: OSError: libcudart.so.11.0: cannot open shared object file"


def test_by_name(packages):
    """An error where it can't run, never another implementation in its place."""
    qkv = torch.zeros(1, 4, 96)
    with pytest.raises(ValueError, match="the flash-attn backend of attention can't run here: it is for NVIDIA GPUs"):
        ops.attention(qkv, 2, backend="flash-attn")
    with pytest.raises(ValueError, match="the sdpa-cudnn backend of attention can't run here: packed images and"):
        ops.attention(qkv, 2, window=(2, 2, 2), backend="sdpa-cudnn")
    with pytest.raises(
        ValueError, match="the xformers backend of attention can't run here: qkv's last axis must be adj"
    ):
        ops.attention(torch.zeros(1, 96, 4).mT, 2, backend="xformers")
    with pytest.raises(ValueError, match=r"must be one of .*'sdpa-flash', .*'xformers', got 'flashinfer'"):
        ops.attention(qkv, 2, backend="flashinfer")


def test_never_unmeasured():
    """What was not compared with ours on this GPU does not take its place."""
    foreign = (*_providers.SDPA, *_providers.PACKAGES)
    assert not any(OPS["attention"].implementations[name].shipped for name in foreign)
