"""Compile csrc with the host emulation in place of the GPU, into a library of the same C ABI."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CSRC, EMU = ROOT / "csrc", ROOT / "tests" / "emu"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]  # a GPU faults where this machine would not


def build_emulation(folder: Path, sanitize: bool = False, defines: tuple[str, ...] = (), csrc: Path = CSRC) -> Path:
    """The library's path. `csrc`: a changed copy of the sources, for tests of the tests."""
    library = folder / f"libradio_fast_emulated{'_asan' if sanitize else ''}.so"
    flags = [*FLAGS, *(["-fsanitize=address", "-g", "-O1"] if sanitize else [])]
    include = [f"-I{csrc / name}" for name in ("include", "common", "attention")] + [f"-I{EMU}"]
    sources = sorted((csrc / "attention").glob("*.cu"))
    host = [csrc / "attention" / "attention.cc", csrc / "common" / "status.cc", *sorted(EMU.glob("*.cc"))]
    jobs, objects = [], []
    for source in [*sources, *host]:
        objects.append(folder / f"{source.stem}{'_asan' if sanitize else ''}.o")
        command = ["g++", *flags, "-DRF_EMULATE", *(f"-D{d}" for d in defines), *include, "-x", "c++", "-c", source]
        jobs.append([*map(str, command), "-o", str(objects[-1])])
    for start in range(0, len(jobs), 2):  # two at a time
        running = [subprocess.Popen(job, stderr=subprocess.PIPE, text=True) for job in jobs[start : start + 2]]
        for process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(errors)
    link = ["g++", "-shared", *flags, *map(str, objects), "-o", str(library)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return library
