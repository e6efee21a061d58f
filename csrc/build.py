"""Build csrc into one shared library, radio_fast/libradio_fast_cuda.so. Needs no torch, no GPU and no CUDA driver.

`python csrc/build.py` builds in place, what an editable install does too, and the CPU kernels (build_cpu.py);
setup.py builds them into wheels. Every .cu is
compiled to a cubin for each architecture, by nvcc, or by NVRTC (which pip can install) where nvcc is missing or has
forgotten the architecture, as CUDA 13's has sm_70. The host code is plain C++; the cubins are embedded in it.
Everything lands in build/csrc, and only what has changed is compiled again.

RADIO_FAST_CUDA_ARCHS  "80;90": for these architectures alone; "none": not at all
RADIO_FAST_NVRTC       a site-packages folder in which NVRTC is, if not the interpreter's own
CUDA_HOME              whose nvcc to take, before the one in PATH
CXX                    the C++ compiler (c++)
MAX_JOBS               compilers at a time (one a core)
RADIO_FAST_WERROR      1: a warning is an error, as ./dev has it; another compiler's new ones stop nobody's installation
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
BUILD = ROOT / "build" / "csrc"
LIBRARY = "libradio_fast_cuda.so"
REASON = "libradio_fast_cuda.txt"  # in the library's place where there is none: why, in one line

ARCHS = sorted(runpy.run_path(str(ROOT / "radio_fast" / "arch.py"))["ARCHS"])
# A cubin runs on later minors of its major too, so these take that of the one before. NVIDIA promises it between
# desktop GPUs only, not from or to a Jetson (72, 87, 88): on aarch64, where those are, all architectures are compiled.
COVERED = (72, 87, 88, 121)
STRICT = bool(os.environ.get("RADIO_FAST_WERROR"))
INCLUDES = ("include", "common", "attention")
CXX_FLAGS = (
    *("-std=c++17", "-O2", "-Wall", "-Wextra", *(("-Werror",) if STRICT else ()), "-fPIC", "-shared", "-pthread"),
    *("-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--as-needed"),
)
HOW = (
    "to build it, install CUDA's nvcc (`pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12` does too) and a "
    "C++ compiler, then install radio_fast again from its source"
)


class BuildError(Exception):
    """The build failed; the message has the compiler's output."""


def default_archs() -> list[int]:
    return [sm for sm in ARCHS if sm not in COVERED or platform.machine() == "aarch64"]


def wanted_archs() -> list[int] | None:
    """What RADIO_FAST_CUDA_ARCHS names, [] for nothing at all; None if it is not set."""
    text = os.environ.get("RADIO_FAST_CUDA_ARCHS", "").strip()
    if not text:
        return None
    if text.lower() in ("none", "0"):
        return []
    words = re.split(r"[;,\s]+", text.strip(";,"))
    for word in words:
        if not word.isdecimal() or int(word) not in ARCHS:
            raise BuildError(f'RADIO_FAST_CUDA_ARCHS must be "none" or of {ARCHS}, as in "80;90"; got {text!r}')
    return sorted({int(word) for word in words})


def minimum_of(source: Path) -> int:
    """sm80.cu is for sm_80 and newer; a name without a number for all.

    Newer GPUs get the older paths too, so that RADIO_FAST_ARCH can force one on them.
    """
    number = re.search(r"sm(\d+)", source.stem)
    return int(number[1]) if number else 0


# -- compilers -------------------------------------------------------------------------------------------------


class Nvcc:
    FLAGS = ("-cubin", "-std=c++17", "-Wno-deprecated-gpu-targets", "-Xptxas", "-v")
    FLAGS += ("-Werror", "all-warnings") if STRICT else ()

    def __init__(self, path: str):
        self.path = path
        self.version = self._ask("--version")
        self.name = f"nvcc {(re.findall(r'release ([0-9.]+)', self.version) or ['?'])[0]}"
        self.archs = {int(sm) for sm in re.findall(r"^sm_(\d+)$", self._ask("--list-gpu-code"), re.MULTILINE)}

    def _ask(self, option: str) -> str:
        try:
            return subprocess.run([self.path, option], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", None) or "").strip()
            raise BuildError(f"{self.path} does not run: {error} {output}".strip()) from None

    def compile(self, source: Path, sm: int, cubin: Path) -> str:
        includes = [f"-I{CSRC / folder}" for folder in INCLUDES]
        return run([self.path, *self.FLAGS, f"-arch=sm_{sm}", *includes, str(source), "-o", str(cubin)])


class Nvrtc:
    """NVRTC through ctypes, from pip's packages: `nvidia/cuda_nvrtc` for CUDA 12, `nvidia/cu13` for 13."""

    FLAGS = ("-std=c++17", "--ptxas-options=-v")

    def __init__(self, path: Path):
        import ctypes

        self.ctypes, self.path = ctypes, path
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so.[0-9]*"):
                ctypes.CDLL(str(builtins))  # 13's NVRTC does not look beside itself
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"NVRTC can't be loaded: {error}") from None
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = self.name = f"NVRTC {major.value}.{minor.value}"
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.archs = set(archs)

    def _call(self, function: str, *arguments) -> None:
        status = getattr(self.library, function)(*arguments)
        if status:
            self.library.nvrtcGetErrorString.restype = self.ctypes.c_char_p
            raise BuildError(f"{function}: {self.library.nvrtcGetErrorString(status).decode()}")

    def _text(self, program, what: str) -> bytes:
        size = self.ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, self.ctypes.byref(size))
        buffer = self.ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, source: Path, sm: int, cubin: Path) -> str:
        own = self.path.parents[1]  # CUDA 12's headers are in packages beside it, 13's in its own: both may be there
        beside = own.parent.glob("cuda_*/include") if own.name.startswith("cuda_") else [own / "include"]
        folders = [CSRC / folder for folder in INCLUDES] + sorted(beside)
        options = [*self.FLAGS, f"-arch=sm_{sm}", *(f"-I{folder}" for folder in folders)]
        texts = (self.ctypes.c_char_p * len(options))(*map(os.fsencode, options))
        program = self.ctypes.c_void_p()
        code, name = source.read_bytes(), os.fsencode(source)
        self._call("nvrtcCreateProgram", self.ctypes.byref(program), code, name, 0, None, None)
        try:
            status = self.library.nvrtcCompileProgram(program, len(options), texts)
            log = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            # It has no -Werror. Its own warnings ("nvrtc: …") are of old architectures.
            if status or (STRICT and re.search(r"^(?!nvrtc: ).*\bwarning\b", log, re.MULTILINE)):
                raise BuildError(f"{self.name} on {source} for sm_{sm}:\n{log}")
            cubin.write_bytes(self._text(program, "CUBIN"))
        finally:
            self._call("nvrtcDestroyProgram", self.ctypes.byref(program))
        return log


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run it; its output. A failure is a BuildError with all that it said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def find_nvrtc() -> list[Path]:
    """libnvrtc.so.* of the interpreter's site-packages, the newest first.

    pip's build isolation hides them from sys.path; sysconfig still names the environment that is installed into.
    """
    import sysconfig

    named = os.environ.get("RADIO_FAST_NVRTC")
    folders = [named] if named else [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    found = {path.resolve() for folder in folders for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.[0-9]*")}
    if named and not found:
        raise BuildError(f"RADIO_FAST_NVRTC={named} has no nvidia/*/lib/libnvrtc.so.*")
    return sorted(found, key=lambda path: path.name, reverse=True)


# -- what to build ---------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What can be built here; `reason` says why nothing is."""

    archs: list[int]
    compilers: dict[int, Nvcc | Nvrtc]
    cxx: str = ""
    reason: str | None = None


def plan() -> Plan:
    """Look which architectures are wanted and who can compile them.

    Raises:
        BuildError: RADIO_FAST_CUDA_ARCHS names what is no architecture or what no compiler here knows.
    """
    wanted = wanted_archs()
    if wanted == []:
        return Plan([], {}, reason="RADIO_FAST_CUDA_ARCHS=none was set when radio_fast was installed")
    if sys.platform != "linux":
        return Plan([], {}, reason="it is for Linux")
    nvcc = find_nvcc()
    compilers = [*([Nvcc(nvcc)] if nvcc else []), *map(Nvrtc, find_nvrtc())]
    lacking = "neither nvcc (in CUDA_HOME or PATH) nor NVRTC" if not compilers else None
    cxx = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if cxx is None and not lacking:
        lacking = "no C++ compiler"
    if lacking:
        if wanted:
            raise BuildError(f"RADIO_FAST_CUDA_ARCHS is set, but {lacking} was found; {HOW}")
        return Plan([], {}, reason=f"{lacking} was found when radio_fast was installed; {HOW}")
    chosen = {sm: next((c for c in compilers if sm in c.archs), None) for sm in wanted or default_archs()}
    unknown = [sm for sm, compiler in chosen.items() if compiler is None]
    if unknown and wanted:
        names = ", ".join(c.name for c in compilers)
        raise BuildError(f"RADIO_FAST_CUDA_ARCHS asks for {unknown}, which {names} can't compile for")
    known = {sm: compiler for sm, compiler in chosen.items() if compiler is not None}
    return Plan(sorted(known), known, cxx)


class Job(NamedTuple):
    source: Path
    sm: int

    @property
    def cubin(self) -> Path:
        return BUILD / str(self.sm) / f"{self.source.stem}.cubin"


def jobs(archs: list[int]) -> list[Job]:
    """Each device source for each architecture, in the order of the library's table."""
    sources = sorted(CSRC.glob("*/*.cu"), key=lambda path: path.stem)
    stems = [source.stem for source in sources]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise BuildError(f"two sources of the same name in csrc: {', '.join(sorted(twice))}")
    return [Job(source, sm) for source in sources for sm in archs if sm >= minimum_of(source)]


# -- building --------------------------------------------------------------------------------------------------


def fingerprint(*parts: object) -> str:
    """Of texts, and of files by their names and contents."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(f"{part}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def current(target: Path, stamp: str) -> bool:
    mark = target.with_suffix(".stamp")
    return target.exists() and mark.exists() and mark.read_text() == stamp


def compile_one(job: Job, compiler: Nvcc | Nvrtc) -> bool:
    """Whether it had to be compiled. The log beside the cubin is ptxas's report (registers, spills, shared memory)."""
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    stamp = fingerprint(job.sm, compiler.version, compiler.FLAGS, job.source, *headers)
    if current(job.cubin, stamp):
        return False
    mark = job.cubin.with_suffix(".stamp")
    job.cubin.parent.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    log = compiler.compile(job.source, job.sm, job.cubin)
    job.cubin.with_suffix(".log").write_text(log, encoding="utf-8")
    mark.write_text(stamp)
    return True


def write_images(table: list[Job]) -> None:
    """images.S holds the cubins, images.cc is the table that names them (common/images.h)."""
    assembly = ['    .section .rodata,"a"']
    rows = []
    for job in table:
        symbol = f"rf_image_{job.source.stem}_{job.sm}"
        assembly += [f"    .hidden {symbol}", f"    .globl {symbol}", "    .balign 64", f"{symbol}:"]
        assembly += [f'    .incbin "{job.cubin.relative_to(BUILD)}"', "    .byte 0"]
        rows.append((symbol, f'    {{"{job.source.stem}", {job.sm}, {symbol}}},'))
    assembly.append('    .section .note.GNU-stack,"",%progbits')
    code = ['#include "images.h"', "", 'extern "C" {']
    code += [f"extern const unsigned char {symbol}[];" for symbol, _ in rows]
    code += ["}", "", "const rf::Image rf::images[] = {", *(row for _, row in rows), "    {nullptr, 0, nullptr},", "};"]
    (BUILD / "images.S").write_text("\n".join(assembly) + "\n")
    (BUILD / "images.cc").write_text("\n".join(code) + "\n")


def build(what: Plan, target: Path, say=lambda text: None) -> None:
    """Bring `target` up to date.

    Raises:
        BuildError: a compiler failed.
    """
    import fcntl  # setup.py reads this file on every system

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs of one tree would write the same files
        table = jobs(what.archs)
        by = {name: [sm for sm in what.archs if what.compilers[sm].name == name]
              for name in dict.fromkeys(c.name for c in what.compilers.values())}  # fmt: skip
        say("CUDA extension: " + "; ".join(f"{name} for {' '.join(map(str, sms))}" for name, sms in by.items()))
        workers = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            futures = [pool.submit(compile_one, job, what.compilers[job.sm]) for job in table]
            try:
                compiled = sum(future.result() for future in futures)
            finally:
                pool.shutdown(cancel_futures=True)  # one that failed is enough
        library = BUILD / LIBRARY
        hosts = sorted(CSRC.glob("*/*.cc"))
        headers = sorted(CSRC.rglob("*.h"))
        version = run([what.cxx, "--version"])
        names = [(job.source.stem, job.sm) for job in table]
        stamp = fingerprint(version, CXX_FLAGS, names, Path(__file__), *hosts, *headers, *(job.cubin for job in table))
        if not current(library, stamp):
            library.with_suffix(".stamp").unlink(missing_ok=True)
            write_images(table)
            includes = [f"-I{CSRC / folder}" for folder in INCLUDES]
            sources = ["images.S", "images.cc", *map(str, hosts)]
            run([what.cxx, *CXX_FLAGS, *includes, *sources, "-o", LIBRARY, "-ldl"], cwd=BUILD)
            library.with_suffix(".stamp").write_text(stamp)
        say(f"CUDA extension: {compiled} of {len(table)} cubins compiled, {library.stat().st_size / 2**20:.1f} MiB")
        install(library, target)


def install(library: Path, target: Path) -> None:
    """A new file in one step: a process that has the old one open keeps it whole."""
    if target.exists() and target.read_bytes() == library.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")
    shutil.copy2(library, fresh)
    os.replace(fresh, target)


def build_into(folder: Path, what: Plan | None = None) -> bool:
    """Build the library into a package folder, or leave the reason there; whether there is a library.

    Raises:
        BuildError: it should have been built, and failed.
    """
    target, reason = folder / LIBRARY, folder / REASON
    try:
        what = what or plan()
        if what.reason is None:
            build(what, target, say=lambda text: print(text, file=sys.stderr))
            reason.unlink(missing_ok=True)
            return True
    except BuildError as error:
        hint = "RADIO_FAST_CUDA_ARCHS=none installs radio_fast without it"
        raise BuildError(f"the CUDA extension could not be built ({hint}):\n{error}") from None
    target.unlink(missing_ok=True)  # of an earlier build
    reason.write_text(what.reason + "\n", encoding="utf-8")
    print(f"radio_fast: the CUDA extension was not built: {what.reason}", file=sys.stderr)
    return False


if __name__ == "__main__":
    cpu = runpy.run_path(str(CSRC / "build_cpu.py"))
    try:
        cpu["build_into"](ROOT / "radio_fast")
        build_into(ROOT / "radio_fast")
    except (BuildError, cpu["BuildError"]) as failure:
        sys.exit(f"csrc/build.py: {failure}")
