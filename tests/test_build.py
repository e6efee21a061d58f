"""The build of csrc and the packages made of it, on a small copy of the tree: no network, no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL = 'extern "C" __global__ void k(int *p) { *p = 1; }\n'
COPIED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "csrc", "radio_fast")
PAGE = {f"radio_fast/serve/page/{name}" for name in ("index.html", "page.js", "page.css", "docs.html", "docs.js")}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA extension is for Linux")
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++ to build the CUDA extension"
)


def build_of(tree: Path):
    spec = importlib.util.spec_from_file_location("radio_fast_build", tree / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path) -> Path:
    """What the packages are made of, with two tiny kernels in place of the device sources."""
    copy = tmp_path / "tree"
    copy.mkdir()
    ignored = shutil.ignore_patterns("libradio_fast_c*", "__pycache__")
    for name in (*COPIED, "kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    for source in copy.glob("csrc/*/*.cu"):
        source.unlink()
    for name in ("plain", "sm80"):
        (copy / "csrc" / "attention" / f"{name}.cu").write_text(f'#include "tiny.cuh"\n{KERNEL}')
    (copy / "csrc" / "common" / "tiny.cuh").write_text("// nothing\n")
    return copy


def run(tree: Path, *command: str, fails: bool = False, **environment: str) -> str:
    """Its stdout and stderr. Nothing of the caller's choice of architectures and compilers comes along."""
    own = ("RADIO_FAST_CUDA_ARCHS", "RADIO_FAST_NVRTC", "CUDA_HOME", "CXX", "MAX_JOBS")
    env = {name: value for name, value in os.environ.items() if name not in own} | environment
    done = subprocess.run(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def backend(tree: Path, hook: str, python: str = sys.executable, fails: bool = False, **environment: str) -> str:
    """Call what pip calls to make a package, into out/."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.{hook}('out')"
    return run(tree, python, "-c", code, fails=fails, **environment)


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An interpreter and a PATH without nvcc and NVRTC; `tools` has the C++ compiler alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True, timeout=60)
    (tmp_path / "site").mkdir()
    setuptools = Path(pytest.importorskip("setuptools", minversion="77").__file__).parent
    for part in (setuptools, setuptools.parent / "_distutils_hack", *setuptools.parent.glob("setuptools-*.dist-info")):
        (tmp_path / "site" / part.name).symlink_to(part)
    (tmp_path / "tools").mkdir()
    for tool in ("g++", "c++", "as", "ld"):
        if shutil.which(tool):
            (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    return {
        "python": str(tmp_path / "bare" / "bin" / "python"),
        "PATH": str(tmp_path / "tools"),
        "PYTHONPATH": str(tmp_path / "site"),
    }


def architectures(library: Path) -> str:
    """Asked in another process: this one would keep the file open."""
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).rf_architectures; f.restype = ctypes.c_char_p; print(f())"
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True)
    return done.stdout.strip()[2:-1]


# -- packages --------------------------------------------------------------------------------------------------


@needs_nvcc
def test_a_wheel_made_from_the_sdist_has_the_library(tree, tmp_path):
    backend(tree, "build_sdist")
    with tarfile.open(next((tree / "out").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "sdist", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [unpacked] = (tmp_path / "sdist").iterdir()
    packed = {
        str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.suffix != ".pyc" and path.is_file()
    }
    assert all((unpacked / name).is_file() for name in packed)

    said = backend(unpacked, "build_wheel", RADIO_FAST_CUDA_ARCHS="90;80")
    assert said.count("cubins compiled") == 1
    [wheel] = (unpacked / "out").glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "radio_fast/libradio_fast_cuda.so" in names and "radio_fast/kernels/attention.py" in names
        assert set(names) >= PAGE
        assert not any(name.startswith("csrc") or name.endswith("cuda.txt") for name in names)
        library = Path(archive.extract("radio_fast/libradio_fast_cuda.so", tmp_path))
    assert architectures(library) == "80 90"

    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert "rf_abi_version" in exported and all(name.startswith("rf_") for name in exported), exported
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not any(word in needed for word in ("cuda.so", "cudart", "torch", "python", "stdc++"))


@needs_nvcc
def test_an_editable_install_has_it_in_place_and_loses_it_when_asked_to(tree):
    backend(tree, "build_editable", RADIO_FAST_CUDA_ARCHS="80")
    library, reason = (tree / "radio_fast" / f"libradio_fast_cuda.{end}" for end in ("so", "txt"))
    assert architectures(library) == "80" and not reason.exists()
    said = backend(tree, "build_editable", RADIO_FAST_CUDA_ARCHS="none")
    assert said.count("the CUDA extension was not built") == 1
    assert not library.exists() and "RADIO_FAST_CUDA_ARCHS=none" in reason.read_text()
    assert "0 of 2 cubins" in backend(tree, "build_editable", RADIO_FAST_CUDA_ARCHS="80")  # they were kept
    assert library.exists() and not reason.exists()


def test_without_a_compiler_it_installs_and_says_so_once(tree, bare):
    python = bare.pop("python")
    bare["RADIO_FAST_CPU_KERNELS"] = "none"
    said = backend(tree, "build_wheel", python=python, **bare)
    assert "the CPU kernels were not built: RADIO_FAST_CPU_KERNELS=none was set" in said
    assert said.count("the CUDA extension was not built: neither nvcc (in CUDA_HOME or PATH) nor NVRTC was found") == 1
    assert "pip install nvidia-cuda-nvrtc-cu12" in said
    [wheel] = (tree / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        reason = archive.read("radio_fast/libradio_fast_cuda.txt").decode()
        assert "radio_fast/libradio_fast_cuda.so" not in archive.namelist()
        assert set(archive.namelist()) >= PAGE
    assert reason.startswith("neither nvcc") and reason.count("\n") == 1
    said = backend(tree, "build_wheel", python=python, fails=True, RADIO_FAST_CUDA_ARCHS="80", **bare)
    assert "RADIO_FAST_CUDA_ARCHS is set, but neither nvcc" in said


def test_without_a_cxx_compiler_it_installs_and_says_so(tree, bare, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_80\n")
    nvcc.chmod(0o755)
    environment = {**bare, "PATH": str(nvcc.parent), "CUDA_HOME": str(tmp_path)}
    said = run(tree, environment.pop("python"), "csrc/build.py", **environment)
    assert said.count("the CUDA extension was not built: no C++ compiler was found") == 1
    nvcc.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    said = run(tree, bare["python"], "csrc/build.py", fails=True, **environment)
    assert "nvcc does not run" in said and "broken" in said and "Traceback" not in said


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "says"),
    [("this is no code", "error"), ('extern "C" __global__ void k() { int unused; }', "declared but never referenced")],
)
def test_a_source_that_does_not_compile_is_an_error(tree, code, says):
    (tree / "csrc" / "attention" / "sm80.cu").write_text(code)
    said = backend(tree, "build_wheel", fails=True, RADIO_FAST_CUDA_ARCHS="80")
    assert "the CUDA extension could not be built (RADIO_FAST_CUDA_ARCHS=none installs" in said
    assert "sm80.cu" in said and says in said
    assert not list((tree / "out").glob("*.whl"))


@pytest.mark.parametrize("archs", ["85", "sm_80", "8.0", "80;all", "80 -1"])
def test_architectures_that_there_are_none_of(tree, archs):
    said = run(tree, sys.executable, "csrc/build.py", fails=True, RADIO_FAST_CUDA_ARCHS=archs)
    assert (
        'RADIO_FAST_CUDA_ARCHS must be "none" or of [70, ' in said and repr(archs) in said and "Traceback" not in said
    )


# -- compiling -------------------------------------------------------------------------------------------------


@needs_nvcc
def test_only_what_has_changed_is_compiled(tree):
    def build() -> str:
        return run(tree, sys.executable, "csrc/build.py", RADIO_FAST_CUDA_ARCHS="80,90")

    library = tree / "radio_fast" / "libradio_fast_cuda.so"
    assert "4 of 4 cubins" in build()
    first = library.stat()
    assert "0 of 4 cubins" in build()
    assert library.stat().st_mtime_ns == first.st_mtime_ns
    (tree / "csrc" / "attention" / "sm80.cu").write_text(KERNEL.replace("= 1", "= 2"))
    assert "2 of 4 cubins" in build()
    assert library.stat().st_ino != first.st_ino  # replaced, not written over: it may be open
    (tree / "csrc" / "common" / "tiny.cuh").write_text("// something\n")
    assert "4 of 4 cubins" in build()
    status = tree / "csrc" / "common" / "status.cc"
    before = library.stat().st_ino
    status.write_text(status.read_text() + '\nextern "C" RF_API int rf_more() { return 1; }\n')
    assert "0 of 4 cubins" in build()
    assert library.stat().st_ino != before
    (tree / "build" / "csrc" / "80" / "sm80.cubin").unlink()
    assert "1 of 4 cubins" in build()
    for name in ("80/sm80", "80/plain", "90/sm80", "90/plain"):
        assert "Used " in (tree / "build" / "csrc" / f"{name}.log").read_text()


def test_nvrtc_compiles_without_nvcc(tree, bare):
    found = build_of(ROOT).find_nvrtc()
    if not found or not shutil.which("g++"):
        pytest.skip("needs g++ and NVRTC: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12")
    environment = {**bare, "RADIO_FAST_NVRTC": str(found[-1].parents[3]), "RADIO_FAST_CUDA_ARCHS": "70;90"}
    python = environment.pop("python")
    source = tree / "csrc" / "attention" / "plain.cu"
    source.write_text(f"#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n{source.read_text()}")
    said = run(tree, python, "csrc/build.py", **environment)
    assert "NVRTC 12" in said and "nvcc" not in said and "3 of 3 cubins" in said  # sm80.cu is not for sm_70
    assert architectures(tree / "radio_fast" / "libradio_fast_cuda.so") == "70 90"
    assert "Used " in (tree / "build" / "csrc" / "70" / "plain.log").read_text()
    for code, says in (
        ('extern "C" __global__ void k() { int unused; }', "never referenced"),
        ("this is no code", "error"),
    ):
        source.write_text(code)
        said = run(tree, python, "csrc/build.py", fails=True, **environment)
        assert says in said and "plain.cu" in said and "Traceback" not in said


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_gpu_of_the_table_finds_a_cubin(monkeypatch, machine):
    build = build_of(ROOT)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    archs = build.default_archs()
    for sm in build.ARCHS:
        assert any(have // 10 == sm // 10 and have <= sm for have in archs), sm
        if machine == "aarch64":  # a Jetson's GPU runs its own only
            assert sm in archs


def test_each_architecture_has_the_sources_that_run_on_it(tree):
    build = build_of(tree)
    for name in ("sm70", "sm75"):
        (tree / "csrc" / "attention" / f"{name}.cu").write_text(KERNEL)
    table = [(job.source.stem, job.sm) for job in build.jobs([70, 75, 80, 90])]
    assert table == [
        *(("plain", sm) for sm in (70, 75, 80, 90)), *(("sm70", sm) for sm in (70, 75, 80, 90)),
        *(("sm75", sm) for sm in (75, 80, 90)), *(("sm80", sm) for sm in (80, 90)),
    ]  # fmt: skip
    (tree / "csrc" / "common" / "sm80.cu").write_text(KERNEL)
    with pytest.raises(build.BuildError, match=r"two sources of the same name in csrc: sm80"):
        build.jobs([80])
