"""csrc/common/driver.cc on a fake CUDA driver, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver.probes import fake_driver, needs_cxx, probe

pytestmark = needs_cxx


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with probe.so, and a fake driver in driver/."""
    folder = tmp_path_factory.mktemp("native")
    probe(folder / "probe.so")
    fake_driver(folder / "driver")
    return folder


PRELUDE = """
import ctypes, sys, threading
library = ctypes.CDLL(sys.argv[1])
library.rf_last_error.restype = library.rf_architectures.restype = ctypes.c_char_p
def driver(): return ctypes.CDLL("libcuda.so.1")
def device(): a, s = ctypes.c_int(), ctypes.c_int(); return library.probe_device(ctypes.byref(a), ctypes.byref(s)), a.value, s.value
def launch(source, kernel, shared=0, parameter=42):
    return library.probe_launch(source.encode(), kernel.encode(), shared, parameter)
def show(*values):
    ctypes.CDLL(None).fflush(None)
    print(*values, library.rf_last_error().decode(), sep="|", flush=True)
"""  # noqa: E501


def drive(built: Path, code: str, driver: str = "driver", **environment: str) -> list[str]:
    """Run `code` in a new process on the fake driver; the lines that both print."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FAKE_")}
    env |= {"LD_LIBRARY_PATH": str(built / driver), "FAKE_ARCHS": "90", **environment}
    command = [sys.executable, "-c", PRELUDE + code, str(built / "probe.so")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("device", "source", "image"),
    [
        ("80", "sm80", "sm80-80"),
        ("86", "sm80", "sm80-86"),
        ("87", "sm80", "sm80-86"),
        ("89", "sm80", "sm80-89"),
        ("103", "sm80", "sm80-100"),
        ("75", "plain", "plain-70"),
        ("90", "plain", "plain-90"),
    ],
)
def test_the_newest_image_that_a_device_runs(built, device, source, image):
    lines = drive(built, f"launch('{source}', 'k')", FAKE_ARCHS=device)
    assert lines == [
        f"load {image}",
        f"kernel {image} k",
        f"launch {image} 7,1,1 128,1,1 0 stream 0x5 buffer 42 of 4 bytes",
    ]


@pytest.mark.parametrize(("device", "source"), [("90", "sm80"), ("100", "plain"), ("120", "sm80"), ("75", "none_such")])
def test_a_device_without_an_image(built, device, source):
    has = {"sm80": "80 86 89 100", "plain": "70 80 90", "none_such": "none"}[source]
    [line] = drive(built, f"show(launch('{source}', 'k'))", FAKE_ARCHS=device)
    assert line == f"2|this build has no {source} kernels for sm_{device} (it has them for: {has})"


def test_what_is_known_is_not_asked_again(built):
    lines = drive(
        built,
        """
for _ in range(3): launch("sm80", "a")
launch("sm80", "b")
driver().fake_device(1)
launch("sm80", "a"); launch("sm80", "a")
driver().fake_device(0)
launch("sm80", "a")
driver().fake_device(2)
launch("sm80", "a")
""",
        FAKE_ARCHS="86,86,80",
    )
    assert [line for line in lines if not line.startswith("launch")] == [
        "load sm80-86", "kernel sm80-86 a", "kernel sm80-86 b", "kernel sm80-86 a", "load sm80-80", "kernel sm80-80 a",
    ]  # fmt: skip
    assert [line.split()[1] for line in lines if line.startswith("launch")] == ["sm80-86"] * 7 + ["sm80-80"]


def test_shared_memory_is_allowed_once_and_only_raised(built):
    lines = drive(
        built,
        """
for shared in (0, 60000, 50000, 60000, 99000): launch("sm80", "a", shared)
launch("sm80", "b", 60000)
driver().fake_device(1)
launch("sm80", "a", 60000)
""",
        FAKE_ARCHS="86,89",
    )
    assert [line for line in lines if line.startswith("attribute")] == [
        "attribute 8 60000 sm80-86 0", "attribute 8 99000 sm80-86 0", "attribute 8 60000 sm80-86 0",
        "attribute 8 60000 sm80-89 1",
    ]  # fmt: skip
    assert [line.split()[4] for line in lines if line.startswith("launch")] == [
        "0",
        "60000",
        "50000",
        "60000",
        "99000",
        "60000",
        "60000",
    ]


def test_threads_share_what_is_known(built):
    """500 kernels in 8 threads at once: an image is loaded once, a kernel looked up once and allowed its most."""
    lines = drive(
        built,
        """
def work(n):
    for i in range(500):
        assert launch("sm80", f"kernel_{(i * 7 + n) % 500}", 1000 * n) == 0
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
""",
        FAKE_ARCHS="86",
        FAKE_QUIET="1",
    )
    assert lines.count("load sm80-86") == 1
    looked_up = [line for line in lines if line.startswith("kernel")]
    assert len(looked_up) == len(set(looked_up)) == 500


def test_threads_only_raise_the_shared_memory(built):
    lines = drive(
        built,
        """
def work(n):
    for i in range(20): assert launch("sm80", "k", 1000 * (i + 1) + n % 2) == 0
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
""",
        FAKE_ARCHS="86",
        FAKE_QUIET="1",
    )
    allowed = [int(line.split()[2]) for line in lines if line.startswith("attribute")]
    assert allowed == sorted(set(allowed)) and allowed[-1] == 20001


def test_a_name_in_two_sources(built):
    lines = drive(built, "for source in ('sm80', 'plain', 'sm80'): launch(source, 'k')", FAKE_ARCHS="80")
    assert [line.split()[1] for line in lines if line.startswith("launch")] == ["sm80-80", "plain-80", "sm80-80"]


@pytest.mark.parametrize(
    ("call", "of"),
    [
        ("cuCtxGetDevice", ""),
        ("cuDeviceGetAttribute", ""),
        ("cuLibraryLoadData", " of sm80 for sm_80"),
        ("cuLibraryGetKernel", " of k"),
        ("cuKernelSetAttribute", " of k to 5 bytes of shared memory"),
        ("cuLaunchKernel", " of k (7 blocks of 128 threads, 5 bytes of shared memory)"),
    ],
)
def test_errors_of_the_driver_have_its_text(built, call, of):
    code = "for _ in range(2): show(launch('sm80', 'k', 5))"  # a failure is not taken for known
    lines = drive(built, code, FAKE_ARCHS="80", FAKE_FAIL=f"{call} 719")
    text = f"3|{call}{of}: CUDA_ERROR_LAUNCH_FAILED (719, unspecified launch failure)"
    assert [line for line in lines if "|" in line] == [text, text]


def test_an_error_without_a_name(built):
    [line] = drive(built, "show(device()[0])", FAKE_FAIL="cuCtxGetDevice 4242")
    assert line == "3|cuCtxGetDevice: CUDA error (4242)"


def test_the_last_error_is_a_threads_own(built):
    lines = drive(
        built,
        """
launch("none_such", "k")
thread = threading.Thread(target=lambda: show("other"))
thread.start(); thread.join()
show("own")
device()
show("after a success")
""",
    )
    assert lines[0] == "other|"
    assert lines[1].startswith("own|this build has no none_such")
    assert lines[2] == "after a success|"


def test_the_device_and_the_architectures(built):
    assert drive(built, "show(*device())", FAKE_ARCHS="103") == ["0|103|101376|"]
    assert drive(built, "show(library.rf_architectures().decode())") == ["70 80 86 89 90 100|"]


def test_a_thread_without_a_context_takes_the_one_of_device_0(built):
    """As the CUDA runtime would: torch holds that context, but has made no call in this thread yet."""
    lines = drive(built, "show(*device()); show(*device())", FAKE_NO_CONTEXT="1")
    assert lines == ["retain 0", "0|90|101376|", "0|90|101376|"]
    [line] = drive(built, "show(device()[0])", FAKE_NO_CONTEXT="1", FAKE_NO_PRIMARY="1")
    assert line == "3|cuCtxGetDevice: CUDA_ERROR_INVALID_CONTEXT (201)"


def test_no_driver_and_one_that_is_too_old(built):
    fake_driver(built / "old", "-DWITHOUT_SET_ATTRIBUTE")
    [line] = drive(built, "show(launch('sm80', 'k'))", driver="old")
    assert line == "3|the CUDA driver has no cuKernelSetAttribute: it is older than CUDA 12.0, update it"
    (built / "broken").mkdir()
    (built / "broken" / "libcuda.so.1").write_text("no library")
    [line] = drive(built, "show(launch('sm80', 'k'))", driver="broken")
    assert line.startswith("3|no CUDA driver: ") and "libcuda.so.1" in line
