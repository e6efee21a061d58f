from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: kernels then run on CPU tensors

GOLDEN = Path(__file__).parent / "golden"


def golden_source(case: str) -> Path:
    """What to give `load` for a golden case: its checkpoint file, or the Hugging Face folder it is."""
    file = GOLDEN / case / "checkpoint.pth.tar"
    return file if file.exists() else GOLDEN / case


def golden_calls() -> list:
    """(case, number of the call, the call) for every golden case, as pytest parameters."""
    params = []
    for path in sorted(GOLDEN.glob("*/case.json")):
        for number, call in enumerate(json.loads(path.read_text())["calls"]):
            params.append(pytest.param(path.parent.name, number, call, id=f"{path.parent.name}-{number}"))
    return params


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def device() -> str:
    """Where kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The entries of the CPU kernels' library that are called."""
    from radio_fast import native_cpu

    made, call = [], native_cpu._call
    monkeypatch.setattr(native_cpu, "_call", lambda entry, *args: (made.append(entry), call(entry, *args))[1])
    return made


@pytest.fixture(params=(1, 2, 3, 4))
def threads(request):
    """Of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def without_amx(monkeypatch):
    """A CPU on which none of our kernels run."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")


@pytest.fixture
def poison(monkeypatch):
    """Fill every torch.empty with NaN, so that an element a kernel does not write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def guarded(monkeypatch, poison):
    """Poisoned outputs with more poison behind them, which must still be there at the end."""
    behind = []
    new_empty = torch.Tensor.new_empty

    def with_room(self, size, **kwargs):
        if isinstance(size, int):  # the interpreter's copies of whole storages
            return new_empty(self, size, **kwargs)
        buffer = new_empty(self, (math.prod(size) + 4096,), **kwargs)
        behind.append(buffer[math.prod(size) :])
        return buffer[: math.prod(size)].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", with_room)
    yield
    assert behind and all(tail.isnan().all() for tail in behind), "a kernel wrote behind its output"


@pytest.fixture
def nearest_bfloat16(monkeypatch):
    """Triton's interpreter cuts float32 off to bfloat16, a GPU rounds to nearest: twice the error, and biased."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cut_off = interpreter._convert_float

    def convert(values, from_dtype, to_dtype, rounding):
        if (from_dtype.name, to_dtype.name) == ("fp32", "bf16"):
            return torch.tensor(values).view(torch.float32).bfloat16().view(torch.uint16).numpy()
        return cut_off(values, from_dtype, to_dtype, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def outlier_input(*shape: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """Normal values, every 61st channel of the last axis 30 times larger: what RADIO's residual stream looks like."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::61] *= 30
    return x.to(device, dtype)


def qkv_like(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Outliers in a few channels of q and k would make every softmax one-hot: they are cut to 4."""
    x = outlier_input(*shape, dtype=dtype, seed=seed, device=device)
    x[..., : 2 * shape[-1] // 3].clamp_(-4, 4)
    return x


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch, tmp_path):
    """Tests neither find nor leave anything in the user's cache."""
    monkeypatch.setenv("RADIO_FAST_CACHE", str(tmp_path / "cache"))
