"""Small libraries for the tests of the CUDA extension's host side, compiled by g++."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
needs_cxx = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++ to compile a library"
)

FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")


def compiled(target: Path, *arguments: str | Path) -> Path:
    includes = [f"-I{CSRC / folder}" for folder in ("include", "common")]
    subprocess.run(["g++", *FLAGS, *includes, *map(str, arguments), "-o", str(target), "-ldl"], check=True, timeout=120)
    return target


def probe(target: Path) -> Path:
    """csrc's way to the driver behind probe.cc's entries and images."""
    return compiled(target, HERE / "probe.cc", CSRC / "common" / "driver.cc", CSRC / "common" / "status.cc")


def fake_driver(folder: Path, *flags: str) -> Path:
    """A folder for LD_LIBRARY_PATH with a libcuda.so.1 that says what it is asked."""
    folder.mkdir()
    compiled(folder / "libcuda.so.1", HERE / "fake_cuda.cc", "-fvisibility=default", *flags)
    return folder
