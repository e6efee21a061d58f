"""Build csrc/cpu into radio_fast/libradio_fast_cpu.so: plain C++ for the host's compiler, no torch, no OpenMP.

`python csrc/build.py` builds it in place and setup.py into wheels. It loads on every x86-64 and says itself what it can
do there. Where it can't be built the package installs without it; the reason is left beside, in one line.

CXX                     the C++ compiler (c++)
RADIO_FAST_CPU_KERNELS  "none": not at all
RADIO_FAST_WERROR       1: a warning, or no library, is an error
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = "libradio_fast_cpu.so"
REASON = "libradio_fast_cpu.txt"
STRICT = bool(os.environ.get("RADIO_FAST_WERROR"))
# GCC's own AVX-512 headers are what it calls uninitialised.
CXX_FLAGS = (
    *("-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", *(("-Werror",) if STRICT else ())),
    *("-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wl,-z,noexecstack"),
)


class BuildError(Exception):
    """The build failed; the message has the compiler's output."""


def why_not() -> str | None:
    """None if it can be built here, as far as that can be told without trying."""
    if os.environ.get("RADIO_FAST_CPU_KERNELS", "").strip().lower() in ("none", "0"):
        return "RADIO_FAST_CPU_KERNELS=none was set when radio_fast was installed"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU kernels are for Linux on x86-64, not for {sys.platform} on {platform.machine()}"
    if compiler() is None:
        return "no C++ compiler was found when radio_fast was installed"
    return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def build_into(folder: Path) -> bool:
    """Build the library into a package folder, or leave the reason there; whether there is a library.

    Raises:
        BuildError: it can't be compiled, and RADIO_FAST_WERROR is set.
    """
    target, note = folder / LIBRARY, folder / REASON
    reason = why_not()
    if reason is None:
        fresh = target.with_suffix(f".{os.getpid()}")  # a process that has the old one open keeps it whole
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted(map(str, (CSRC / "cpu").glob("*.cpp")))
        command = [compiler(), *CXX_FLAGS, f"-I{CSRC / 'include'}", *sources, "-o", str(fresh), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                os.replace(fresh, target)
                note.unlink(missing_ok=True)
                return True
            output = done.stderr
        except OSError as error:
            output = str(error)
        finally:
            fresh.unlink(missing_ok=True)
        if STRICT:
            raise BuildError(f"the CPU kernels could not be built:\n{output}")
        first = next((line for line in output.splitlines() if "error" in line), output.strip()[:200])
        reason = f"{command[0]} can't compile them (GCC 12 can): {first}"
    target.unlink(missing_ok=True)
    note.write_text(" ".join(reason.split()) + "\n", encoding="utf-8")
    print(f"radio_fast: the CPU kernels were not built: {reason}", file=sys.stderr)
    return False


if __name__ == "__main__":
    build_into(CSRC.parent / "radio_fast")
