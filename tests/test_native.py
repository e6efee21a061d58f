"""Python's view of the CUDA extension: finding it, what it is given, what comes back."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from radio_fast import doctor, native
from tests.driver.probes import CSRC, HERE, compiled, needs_cxx, probe


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("emulated") / "emulated.so"
    return compiled(target, "-DEMULATION", HERE / "probe.cc", CSRC / "common" / "status.cc")


def test_the_header_and_python_agree():
    header = (CSRC / "include" / "radio_fast.h").read_text(encoding="utf-8")
    assert int(re.search(r"RF_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION
    kinds = {"const char": "c_char_p", "int": "c_int", "rf_status": "c_int"}
    declared = re.findall(r"^RF_API ([\w ]+?) ?\*?(rf_\w+)\(([^)]*)\);", header, re.MULTILINE)
    assert {name for _, name, _ in declared} == {"rf_abi_version", *native.ENTRIES}
    for result, name, parameters in declared:
        if name == "rf_abi_version":
            continue
        restype, argtypes = native.ENTRIES[name]
        assert restype.__name__ == kinds[result]
        wanted = []
        for parameter in parameters.split(",") if parameters != "void" else []:
            is_int = re.match(r"\s*(int|rf_dtype) ", parameter)
            wanted.append(native._P if "*" in parameter else native._I if is_int else native._L)
        assert argtypes == wanted, name
    enums = dict(re.findall(r"RF_(\w+) = (\d)", header))
    assert {
        str(dtype).removeprefix("torch.").upper(): str(value) for dtype, value in native.DTYPES.items()
    }.items() <= enums.items()
    assert [enums[name] for name in ("BAD_ARGUMENT", "UNSUPPORTED", "DRIVER")] == [
        str(value) for value in native.ERRORS
    ]


def reason_for(monkeypatch, path: Path) -> str:
    monkeypatch.setenv("RADIO_FAST_LIBRARY", str(path))
    reason = native.why_not_native()
    assert reason and "\n" not in reason
    assert native.why_not_native() == reason  # every time, not only the first
    with pytest.raises(native.LibraryError):
        native.library()
    [line] = [finding for finding in doctor.examine() if finding.name == "CUDA extension"]
    assert line.ok is None and line.detail == reason
    return reason


def test_no_library(monkeypatch, tmp_path):
    assert reason_for(monkeypatch, tmp_path / "none.so").startswith("RADIO_FAST_LIBRARY names no file: ")
    assert "names no file" in reason_for(monkeypatch, tmp_path)
    monkeypatch.delenv("RADIO_FAST_LIBRARY")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_found", {})
    assert re.search("was not built: there is no .*; install radio_fast again", native.why_not_native())
    monkeypatch.setattr(native, "_found", {})
    (tmp_path / native.REASON).write_text("no compiler was found\n")
    assert native.why_not_native() == "the CUDA extension was not built: no compiler was found"


def test_a_file_that_is_no_library(monkeypatch, tmp_path):
    for name, content in (("text.so", b"not a library"), ("empty.so", b""), ("head.so", b"\x7fELF\x02\x01\x01")):
        (tmp_path / name).write_bytes(content)
        assert reason_for(monkeypatch, tmp_path / name).startswith("the CUDA extension is damaged: ")


@needs_cxx
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_library_that_is_cut_off(monkeypatch, tmp_path, emulated, share):
    content = emulated.read_bytes()
    (tmp_path / "cut.so").write_bytes(content[: int(len(content) * share)])
    assert "is damaged: " in reason_for(monkeypatch, tmp_path / "cut.so")


@needs_cxx
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("int rf_abi_version() { return 999; }", "is stale: .* has interface 999, this radio_fast needs 1; install"),
        ("int rf_abi_version() { return 1; }", "is stale or another library: .*rf_last_error"),
        ("int something_else() { return 1; }", "is stale or another library: .*rf_abi_version"),
    ],
)
def test_another_library(monkeypatch, tmp_path, code, says):
    (tmp_path / "other.cc").write_text(f'extern "C" __attribute__((visibility("default"))) {code}\n')
    assert re.search(says, reason_for(monkeypatch, compiled(tmp_path / "other.so", tmp_path / "other.cc")))


def seen(library: native.Library, count: int) -> list[int]:
    return list((ctypes.c_int64 * 20).in_dll(ctypes.CDLL(str(library.path)), "probe_seen"))[:count]


@needs_cxx
@pytest.mark.parametrize(("dtype", "number"), list(native.DTYPES.items()))
def test_window_attention_hands_over_what_it_was_given(emulated, dtype, number):
    library = native.Library(emulated)
    assert library.architectures == "emulation" and library.emulated
    room = torch.zeros(2, 9, 12, 100, dtype=dtype)
    qkv = room[:, 1:8, :10, :96]  # (2, 7, 10, 3·2·16)
    bias = torch.zeros(2, 9, 64, dtype=dtype)[..., :9]
    out = library.window_attention(qkv, 2, 3, bias, arch=75)
    assert out.shape == (2, 7, 10, 32) and out.dtype == dtype and out.is_contiguous()
    pointers = [qkv.data_ptr(), bias.data_ptr(), out.data_ptr()]
    strides = [9 * 12 * 100, 12 * 100, 100, 9 * 64, 64]
    assert seen(library, 17) == [*pointers, number, 2, 7, 10, 2, 16, 3, *strides, 75, 0]
    library.window_attention(qkv, 2, 3)
    assert seen(library, 17)[1] == 0 and seen(library, 17)[13:] == [0, 0, 0, 0]


@needs_cxx
def test_attention_hands_over_what_it_was_given(emulated):
    library = native.Library(emulated)
    qkv = torch.zeros(3, 20, 5, 100, dtype=torch.float16)[:, :, 2, :96]
    out = library.attention(qkv, 1)
    assert out.shape == (3, 20, 32) and out.is_contiguous()
    assert seen(library, 13) == [qkv.data_ptr(), 0, out.data_ptr(), 0, 3, 20, 60, 1, 32, 20 * 500, 500, 0, 0]
    starts = torch.tensor([0, 4, 4, 20], dtype=torch.int32)
    out = library.attention(qkv[0], 2, starts, 16, arch=80)
    assert out.shape == (20, 32)
    assert seen(library, 13) == [qkv.data_ptr(), starts.data_ptr(), out.data_ptr(), 0, 3, 16, 20, 2, 16, 0, 500, 80, 0]


@needs_cxx
def test_nothing_to_do_is_no_call(emulated):
    library = native.Library(emulated)
    before = seen(library, 20)
    assert library.attention(torch.zeros(0, 5, 48), 1).shape == (0, 5, 16)
    assert library.window_attention(torch.zeros(2, 0, 5, 48), 1, 1).shape == (2, 0, 5, 16)
    assert seen(library, 20) == before


@needs_cxx
@pytest.mark.parametrize(("status", "error"), [(1, ValueError), (2, NotImplementedError), (3, RuntimeError)])
def test_a_status_is_an_exception_with_the_librarys_text(emulated, status, error):
    library = native.Library(emulated)
    flag = ctypes.c_int.in_dll(ctypes.CDLL(str(emulated)), "probe_status")
    flag.value = status
    try:
        with pytest.raises(error, match=f"^status {status} on purpose$") as caught:
            library.attention(torch.zeros(1, 2, 48), 1)
        assert caught.type is error
    finally:
        flag.value = 0
    library.attention(torch.zeros(1, 2, 48), 1)


@needs_cxx
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lib: lib.attention(torch.zeros(2, 48), 1), "qkv must have shape"),
        (lambda lib: lib.attention(torch.zeros(1, 2, 47), 1), "qkv must have shape"),
        (lambda lib: lib.attention(torch.zeros(1, 2, 48), 0), "qkv must have shape"),
        (lambda lib: lib.attention(torch.zeros(1, 2, 48).double(), 1), "float16, bfloat16 or float32"),
        (lambda lib: lib.attention(torch.zeros(1, 2, 96)[..., ::2], 1), "last axis must be adjacent"),
        (lambda lib: lib.attention(torch.zeros(1, 2, 48, device="meta"), 1), "qkv is on meta"),
        (lambda lib: lib.attention(torch.zeros(2, 48), 1, torch.tensor([0, 2])), "cu_seqlens must be int32"),
        (lambda lib: lib.window_attention(torch.zeros(2, 2, 48), 1, 2), "qkv must have shape"),
        (
            lambda lib: lib.window_attention(torch.zeros(1, 2, 2, 48), 1, 2, torch.zeros(1, 3, 4)),
            "bias must have shape",
        ),
        (
            lambda lib: lib.window_attention(torch.zeros(1, 2, 2, 48), 1, 2, torch.zeros(1, 4, 4).half()),
            "bias is torch",
        ),
        (
            lambda lib: lib.window_attention(torch.zeros(1, 2, 2, 48), 1, 2, torch.zeros(1, 4, 4, device="meta")),
            "bias is on meta",
        ),
    ],
)
def test_wrong_tensors_never_reach_the_library(emulated, call, says):
    library = native.Library(emulated)
    before = seen(library, 20)
    with pytest.raises(ValueError, match=says):
        call(library)
    assert seen(library, 20) == before


@needs_cxx
def test_a_cuda_library_never_gets_cpu_tensors(tmp_path):
    library = native.Library(probe(tmp_path / "probe.so"))
    assert library.architectures == "70 80 86 89 90 100"
    for call in (lambda: library.attention(torch.zeros(1, 2, 48), 1),
                 lambda: library.window_attention(torch.zeros(1, 2, 2, 48), 1, 2)):  # fmt: skip
        with pytest.raises(ValueError, match="qkv is on cpu, must be on a CUDA device"):
            call()


@needs_cxx
def test_the_library_is_loaded_once(monkeypatch, emulated):
    monkeypatch.setenv("RADIO_FAST_LIBRARY", str(emulated))
    monkeypatch.setattr(native, "_found", {})
    loads, found = [], []
    init = native.Library.__init__

    def slow(self, path):
        loads.append(path)
        time.sleep(0.05)  # for the other threads to get here too
        init(self, path)

    monkeypatch.setattr(native.Library, "__init__", slow)
    threads = [threading.Thread(target=lambda: found.append(native.library())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(found) == 8 and len(set(map(id, found))) == 1
    assert native.why_not_native() is None
    [line] = [finding for finding in doctor.examine() if finding.name == "CUDA extension"]
    assert line.ok and line.detail == "kernels for emulation"


def test_a_gpu_is_tried_once(monkeypatch):
    """What the driver says of the code is a reason, not an error; while a graph is captured nothing is tried."""
    tried = []

    class Refusing(native.Library):
        def __init__(self):
            self._tried = {}

        def attention(self, qkv, num_heads):
            tried.append(qkv.shape)
            raise RuntimeError("cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    library, device = Refusing(), torch.device("cuda", 1)
    assert library.why_not_run(device) is None and not tried
    capturing[0] = False
    for _ in range(2):
        assert "does not run on cuda:1: cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE" in library.why_not_run(device)
    assert tried == [(1, 1, 48)]


@pytest.mark.parametrize(
    ("built", "runs", "not_on"),
    [("80", (80, 86, 89), (70, 75, 90, 120)), ("70 75 90", (70, 72, 75, 90), (80, 100)), ("86", (86, 87, 89), (80,))],
)
def test_architectures(built, runs, not_on):
    """Code runs on its own major, from its minor on."""
    library = native.Library.__new__(native.Library)
    library.architectures = built
    assert all(library.why_not_on(sm) is None for sm in runs)
    for sm in not_on:
        assert f"was built for {built.replace(' ', ', ')}, not for sm_{sm}" in library.why_not_on(sm)


@needs_cxx
def test_doctor_looks_at_the_gpus(monkeypatch, tmp_path):
    """A library without this GPU's code is no "ok"."""
    monkeypatch.setenv("RADIO_FAST_LIBRARY", str(probe(tmp_path / "probe.so")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(native.Library, "why_not_on", lambda self, sm: f"not for sm_{sm}")
    finding = doctor._cuda_extension()
    assert (finding.ok, finding.detail) == (None, "not for sm_75")
    monkeypatch.setattr(native.Library, "why_not_on", lambda self, sm: None)
    monkeypatch.setattr(native.Library, "why_not_run", lambda self, device: "the driver is too old")
    assert doctor._cuda_extension().detail == "the driver is too old"
    monkeypatch.setattr(native.Library, "why_not_run", lambda self, device: None)
    assert doctor._cuda_extension().ok
